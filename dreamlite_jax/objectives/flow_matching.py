"""Flow matching: the objective of text to image, editing, joint training and fine-tuning alike.

    xt = (1 - sigma) x0 + sigma noise,    loss = | v(xt, sigma) - (noise - x0) |^2

(Lipman et al. 2023; Liu et al. 2023.) sigma is drawn from a density, then moved towards noise by
the same resolution shift that the sampler uses. The network sees `[xt | source]`; its velocity
function (`system.velocity`) gives the left half alone, so the right one carries no loss.

Shapes: B rows, h and w latent pixels, c latent channels.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.diffusion import flow
from dreamlite_jax.diffusion.sampling import VelocityFn

DENSITIES = ("logit_normal", "uniform")
# Of sigma, float32 -> float32, each with mean 1 over U[0, 1).
WEIGHTS = {
    "unit": jnp.ones_like,
    # 2 / (pi (1 - 2 s + 2 s^2)) (Esser et al. 2024, eq. 21): for the uniform density.
    "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * jnp.square(sigma))),
}


class Settings(NamedTuple):
    density: str = "logit_normal"
    mean: float = 0.0  # of the logit-normal density
    std: float = 1.0
    edit_offset: float = 0.0  # of the mean, for edits: what little noise hides, their source shows
    shift: bool = True  # draw sigma where the sampler of that resolution goes
    weight: str = "unit"
    weight_changed: bool = False  # see `change_weights`

    def problems(self) -> list[str]:
        """What is wrong with them, a line each."""
        found = []
        if self.density not in DENSITIES:
            found.append(f"density is {self.density!r}, known are {', '.join(DENSITIES)}")
        if self.weight not in WEIGHTS:
            found.append(f"weight is {self.weight!r}, known are {', '.join(WEIGHTS)}")
        if not 0 < self.std < math.inf:
            found.append(f"std is {self.std}, should be positive")
        for name in ("mean", "edit_offset"):
            if not math.isfinite(getattr(self, name)):
                found.append(f"{name} is {getattr(self, name)}, should be finite")
        return found


def draw_sigma(settings: Settings, key: Array, mu: float, offset: Array | float = 0.0) -> Array:
    """sigma, a float32 scalar in [0, 1), at the resolution that has shift mu; `offset` is added to
    the logit-normal density's mean."""
    if settings.density == "uniform":
        sigma = flow.uniform(key, ())
    else:
        sigma = flow.logit_normal(key, (), settings.mean + offset, settings.std)
    return flow.shift_sigma(sigma, mu) if settings.shift else sigma


def draw(
    settings: Settings, keys: Array, x0: Array, mu: float, edits: Array
) -> tuple[Array, Array]:
    """sigma float32 [B] and noise float32 like x0 [B, h, w, c]; `edits` is bool [B].

    Every row has a key of its own ([B]): what it draws depends neither on the rows beside it, nor
    on how they are split into micro-batches and over devices.
    """

    def row(key, edit):
        for_sigma, for_noise = jax.random.split(key)
        noise = jax.random.normal(for_noise, x0.shape[1:], jnp.float32)
        offset = jnp.where(edit, jnp.float32(settings.edit_offset), 0.0)
        return draw_sigma(settings, for_sigma, mu, offset), noise

    return jax.vmap(row)(keys, edits)


def losses(
    velocity_fn: VelocityFn,
    x0: Array,
    sigma: Array,
    noise: Array,
    settings: Settings,
    changed: Array | None = None,
) -> Array:
    """The loss of every row, float32 [B].

    Args:
      velocity_fn: (xt [B, h, w, c], sigma [B]) -> vt.
      x0: float32 [B, h, w, c], clean latents.
      sigma, noise: of `draw`.
      changed: bool [B, h, w], what an edit changes; only for `weight_changed`.
    """
    vt = velocity_fn(flow.path(x0, noise, sigma), sigma).astype(jnp.float32)
    error = jnp.square(vt - flow.velocity(x0, noise)).mean(-1)
    if settings.weight_changed and changed is not None:
        error = error * change_weights(changed)
    return error.mean((1, 2)) * WEIGHTS[settings.weight](sigma)


def change_weights(changed: Array) -> Array:
    """float32 [B, h, w] from bool: log2(area / changed area) + 1 where something changes, else 1.

    Small edits would drown in the copied rest of the picture (Lin et al. 2025, UniWorld-V1, whose
    weights DreamLite is reported to use). A row where nothing or everything changes has ones.
    """
    area = jnp.maximum(changed.sum((1, 2), keepdims=True), 1)
    ratio = changed.shape[1] * changed.shape[2] / area.astype(jnp.float32)
    return jnp.where(changed, jnp.log2(ratio) + 1, 1.0)
