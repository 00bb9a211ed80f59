"""Training the autoencoder from scratch: pictures there and back, through latents of unit size.

The flow ends in latents and starts from unit noise, so a penalty keeps every latent channel near
mean 0 and variance 1 (the Kullback-Leibler divergence of a Gaussian with the batch's moments from
the standard one). Noise on the latents while training makes the decoder forgive what a sampler gets
slightly wrong. Perceptual and adversarial terms are left out: they need networks of others.

Shapes: B rows, H and W pixels, h and w latent pixels, c latent channels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Settings(NamedTuple):
    moments: float = 1e-3  # weight of the penalty on the latents' moments
    noise: float = 0.05  # standard deviation of the noise on latents

    def problems(self) -> list[str]:
        """What is wrong with them, a line each."""
        return [
            f"{name} is {value}, should be 0 or more"
            for name, value in self._asdict().items()
            if not 0 <= value < math.inf
        ]


class Losses(NamedTuple):
    """Each float32 [B] but `moments`, a scalar of all rows together: accumulation takes each part's
    own, which for this term is not quite the full batch's."""

    absolute: Array  # mean |reconstruction - picture|, pictures in [-1, 1]
    square: Array  # mean squared, likewise
    moments: Array


def losses(
    encode: Callable[[Array], Array],
    decode: Callable[[Array], Array],
    pictures: Array,
    keys: Array,
    settings: Settings,
) -> Losses:
    """Of pictures float32 [B, H, W, 3] in [-1, 1]; keys [B], one for each row's noise."""
    latents = encode(pictures)
    mean = latents.mean((0, 1, 2))
    variance = jnp.square(latents - mean).mean((0, 1, 2)) + 1e-6
    moments = 0.5 * (jnp.square(mean) + variance - 1 - jnp.log(variance)).sum()
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:], jnp.float32))(keys)
    error = decode(latents + settings.noise * noise) - pictures
    axes = (1, 2, 3)
    return Losses(jnp.abs(error).mean(axes), jnp.square(error).mean(axes), moments)


def total(parts: Losses, settings: Settings) -> Array:
    """What is minimised: absolute and squared error, and the penalty; a scalar."""
    return (parts.absolute + parts.square).mean() + settings.moments * parts.moments


def psnr(square: Array) -> Array:
    """Peak signal to noise ratio in dB of a mean squared error over pictures in [-1, 1]."""
    return 10 * jnp.log10(4 / jnp.maximum(square, 1e-12))
