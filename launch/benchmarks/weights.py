"""Random weights for the suites."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax import pretrained


def random_params(component: pretrained.Component, config: Any, dtype: str) -> pretrained.Params:
    """Parameters drawn leaf by leaf, so that a large network never stands there twice."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype),
        pretrained.param_shapes(component, config),
    )
