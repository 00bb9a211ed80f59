"""The head of DMD2's discriminator, on the features of the fake score's middle block.

Shapes: B batch, h and w of the features (of a released model at 1024 px 32), C channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.layers import Dtype


class Discriminator(nn.Module):
    """Features [B, h, w, C] -> logits float32 [B], positive for real: convolutions of stride 2 with
    GroupNorm and SiLU, then one logit for each place, averaged. DMD2's has 4 x 4 kernels too, and
    goes down from 32 x 32 to a single place.

    depth: convolutions of stride 2.
    """

    depth: int
    features: int = 256
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        for _ in range(self.depth):
            x = nn.Conv(self.features, (4, 4), (2, 2), dtype=self.dtype)(x)
            x = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(x))
        x = nn.Conv(self.features, (3, 3), dtype=self.dtype)(x)
        x = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(x))
        return nn.Conv(1, (1, 1), dtype=jnp.float32)(x).mean((1, 2, 3))
