"""What training changes and checkpoints keep."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Params = Any  # a tree of float32 arrays


class TrainState(NamedTuple):
    """A network in training. A stage's state is one of these, or a dict of them."""

    step: Array  # int32, updates that were tried
    params: Params
    opt_state: Any
    ema: Params  # exponential moving average of params, float32
    skipped: Array  # int32, updates left out because something was not finite
    streak: Array  # int32, of these the latest in a row


def networks(state: TrainState | dict[str, TrainState]) -> dict[str, TrainState]:
    """The networks of a stage's state, by what the names of their metrics begin with."""
    if isinstance(state, TrainState):
        return {"": state}
    return {f"{name}/": one for name, one in state.items()}


def new_state(params: Params, tx: Any) -> TrainState:
    """The state at step 0; the average begins at the parameters."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, tx.init(params), ema, zero, zero)
