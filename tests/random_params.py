"""Random parameters without compiling a network's initialisation."""

import numpy as np
from jax import tree

from dreamlite_jax import pretrained


def random_params(component: pretrained.Component, config, seed: int = 0) -> dict:
    """Normal numbers of about the size that keeps activations near 1; float32 NumPy."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = int(np.prod(leaf.shape[:-1])) or 1
        noise = rng.standard_normal(leaf.shape, np.float32)
        return noise * fan_in**-0.5 if len(leaf.shape) > 1 else 1 + 0.2 * noise

    return tree.map(draw, pretrained.param_shapes(component, config))
