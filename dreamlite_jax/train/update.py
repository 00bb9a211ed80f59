"""The one update: gradients, accumulation, clipping, optimizer, moving average, finite check.

A loss function is `(params, frozen, batch, keys) -> (loss, metrics)`: batch is a tree with leading
axis B, keys [B] has a PRNG key for every row, metrics are `Mean`s. It is differentiated by params
alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from dreamlite_jax.train.optim import matching, norm, once
from dreamlite_jax.train.state import Params, TrainState

LossFn = Callable[[Params, Any, Any, Array], tuple[Array, dict[str, "Mean"]]]
StepFn = Callable[[TrainState, Any, Any, Array], tuple[TrainState, dict[str, Array]]]


class Mean(NamedTuple):
    """A metric on its way: means over rows add up over micro-batches as totals and counts."""

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, where: Array | None = None) -> "Mean":
        """Of values [B], of those `where` [B] is true; of none there is no mean (0 of 0)."""
        where = jnp.ones(values.shape, bool) if where is None else where
        return cls(jnp.where(where, values, 0).sum(), where.sum().astype(jnp.float32))


def make_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    accumulation: int = 1,
    clip: float = 0.0,
    trained: str = "",
    ema_warmup: bool = True,
) -> StepFn:
    """`(state, frozen, batch, key, learns=True) -> (state, metrics)`.

    Args:
      tx: what becomes of gradients; its updates are added to the parameters.
      ema_decay: of the moving average, per step.
      accumulation: micro-batches of a batch, one after the other; B is a multiple of it.
      clip: the gradient's largest global norm, beyond which it is scaled down (Pascanu et al.
        2013); 0: none.
      trained: regex of the parameters that are, as in `optim.Settings`: the gradients of others
        count nowhere and are not computed.
      ema_warmup: decay is no more than (1 + n) / (10 + n) after n updates, so that the average
        forgets the first parameters.

    An update with a loss or gradient that is not finite changes nothing but `skipped` and `streak`;
    one that is not to be learnt from (`learns`, a bool []) not even these.
    Metrics are float32 scalars: `loss`, `grad_norm`, `param_norm`, `skipped`, `streak`, and those
    of loss_fn (NaN where a mean is of nothing). How far an update goes is measured by the loop, now
    and then: a CPU would take as long for it as for the update.
    """

    def update(state: TrainState, frozen: Any, batch: Any, key: Array, learns: Array | bool = True):
        grads, metrics = gradients(loss_fn, state.params, frozen, batch, key, accumulation, trained)
        grad_norm = once(norm(grads))
        fine = once(jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm))
        n = (state.step - state.skipped).astype(jnp.float32)
        decay = once(jnp.minimum(ema_decay, (1 + n) / (10 + n))) if ema_warmup else ema_decay

        def applied(held, grads):
            params, opt_state, ema = held
            if clip:
                scale = once(jnp.minimum(1.0, clip / grad_norm))
                grads = jax.tree.map(lambda g: g * scale, grads)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
            return params, opt_state, ema

        # Not selected number by number: XLA's CPU compiler would write every result twice.
        held = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = lax.cond(fine & learns, applied, lambda held, _: held, held, grads)

        bad = (~fine & learns).astype(jnp.int32)
        skipped = state.skipped + bad
        streak = jnp.where(learns, (state.streak + 1) * bad, state.streak)
        state = TrainState(state.step + 1, params, opt_state, ema, skipped, streak)
        metrics |= {
            "grad_norm": grad_norm,
            "param_norm": norm(params),
            "skipped": skipped.astype(jnp.float32),
            "streak": streak.astype(jnp.float32),
        }
        return state, metrics

    return update


def split_rows(tree: Any, parts: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]: row r goes to part r % parts, so that each is
    spread over all devices as the batch."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def joined_rows(tree: Any) -> Any:
    """`split_rows`' inverse."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def gradients(
    loss_fn: LossFn,
    params: Params,
    frozen: Any,
    batch: Any,
    key: Array,
    accumulation: int = 1,
    trained: str = "",
) -> tuple[Params, dict[str, Array]]:
    """The mean gradient over a batch, float32, and its metrics; zero where `trained` (a regex)
    matches nothing."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def part(batch, keys):
        (loss, metrics), grads = differentiate(params, frozen, batch, keys)
        chosen = matching(params, trained)
        grads = jax.tree.map(lambda g, yes: g if yes else jnp.zeros_like(g), grads, chosen)
        one = jnp.ones((), jnp.float32)
        return grads, {"loss": Mean(loss.astype(jnp.float32), one), **metrics}

    if accumulation == 1:
        grads, metrics = part(batch, keys)
    else:
        parts = split_rows((batch, keys), accumulation)
        start = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(part, *jax.tree.map(lambda x: x[0], parts)),
        )

        def add(total, one):
            return jax.tree.map(jnp.add, total, part(*one)), None

        (grads, metrics), _ = lax.scan(add, start, parts)
        grads = jax.tree.map(lambda g: g / accumulation, grads)
    return grads, {name: mean.total / mean.count for name, mean in metrics.items()}
