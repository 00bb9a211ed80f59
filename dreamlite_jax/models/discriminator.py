"""The head of DMD2's discriminator, on the features of the fake score's middle block.

Shapes: B batch, h and w of the features (an eighth of a latent pixel's grid for a released model at
1024 px: 32), C channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.layers import Dtype

LEAST = 4  # side of the map that the last convolution sees


class Discriminator(nn.Module):
    """Features [B, h, w, C] -> logits float32 [B], positive for real: convolutions of stride 2 with
    GroupNorm and SiLU down to about 4 x 4, then one logit for each place, averaged (Yin et al.
    2024, appendix: 4 x 4 kernels)."""

    features: int = 256
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        while min(x.shape[1:3]) >= 2 * LEAST:
            x = nn.Conv(self.features, (4, 4), (2, 2), dtype=self.dtype)(x)
            x = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(x))
        x = nn.Conv(self.features, (3, 3), dtype=self.dtype)(x)
        x = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(x))
        return nn.Conv(1, (1, 1), dtype=jnp.float32)(x).mean((1, 2, 3))
