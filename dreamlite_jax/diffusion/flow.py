"""The flow between data and noise: path, conversions, timestep densities, resolution shift.

sigma (s) lies in [0, 1] and 1 is noise: x_s = (1 - s) x0 + s noise, v = dx/ds = noise - x0, and the
network is told the timestep 1000 s (Lipman et al. 2023; Liu et al. 2023; the convention of
diffusers' `FlowMatchEulerDiscreteScheduler`). All of it is float32.

Shapes: a latent is [B, H, W, C]; a sigma is a scalar, or [B] with one value for each latent.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

TIMESTEPS = 1000.0  # timestep = TIMESTEPS * sigma

# --- Path and conversions -------------------------------------------------------------------------


def over(sigma: Array, x: Array) -> Array:
    """sigma [] or [B], float32, shaped to multiply x [B, ...]."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if sigma.ndim else sigma


def path(x0: Array, noise: Array, sigma: Array) -> Array:
    """xt = (1 - sigma) x0 + sigma noise."""
    sigma = over(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0: Array, noise: Array) -> Array:
    """vt = noise - x0, the same everywhere on the path."""
    return noise - x0


def x0_from_velocity(xt: Array, vt: Array, sigma: Array) -> Array:
    """x0 = xt - sigma vt."""
    return xt - over(sigma, xt) * vt


def noise_from_velocity(xt: Array, vt: Array, sigma: Array) -> Array:
    """noise = xt + (1 - sigma) vt."""
    return xt + (1 - over(sigma, xt)) * vt


def velocity_from_x0(xt: Array, x0: Array, sigma: Array) -> Array:
    """vt = (xt - x0) / sigma; sigma > 0."""
    return (xt - x0) / over(sigma, xt)


def velocity_from_noise(xt: Array, noise: Array, sigma: Array) -> Array:
    """vt = (noise - xt) / (1 - sigma); sigma < 1."""
    return (noise - xt) / (1 - over(sigma, xt))


def timestep(sigma: Array) -> Array:
    """What the network is told for sigma: 1000 sigma, in [0, 1000]."""
    return TIMESTEPS * jnp.asarray(sigma, jnp.float32)


# --- Timestep densities (before the shift) --------------------------------------------------------


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """sigma ~ U[0, 1), float32 of `shape`."""
    return jax.random.uniform(key, shape, jnp.float32)


def logit_normal(
    key: Array, shape: tuple[int, ...], mean: Array | float = 0.0, std: float = 1.0
) -> Array:
    """sigma = sigmoid(mean + std n), n ~ N(0, 1), float32 of `shape` (Esser et al. 2024, eq. 19).

    A positive mean favours noise, a negative one data.
    """
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))


# --- The resolution shift, for training and sampling alike ----------------------------------------


class ResolutionShift(NamedTuple):
    """How far sigmas move towards noise as pictures grow; names as in a diffusers scheduler's
    config.

    mu is linear in the number of 2x2 patches of the target's latent: `base_shift` at
    `base_image_seq_len`, `max_shift` at `max_image_seq_len` (diffusers' `calculate_shift`).
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @classmethod
    def from_scheduler(cls, settings: Mapping[str, Any]) -> "ResolutionShift":
        """From the `scheduler_config.json` of a FlowMatchEulerDiscreteScheduler.

        Without dynamic shifting the same formula holds with a constant mu = log(shift).

        Raises:
          ValueError: settings that ask for another schedule, all of them in one line.
        """
        only = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "time_shift_type": "exponential",
            "invert_sigmas": False,
            "shift_terminal": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "stochastic_sampling": False,
        }
        problems = [
            f"{key}={settings[key]!r} is not supported, only {value!r}"
            for key, value in only.items()
            if (settings.get(key, value) or None) != (value or None)
        ]
        if problems:
            raise ValueError("scheduler config: " + "; ".join(problems))
        if not settings.get("use_dynamic_shifting", False):
            mu = math.log(settings.get("shift", 1.0))
            return cls(mu, mu)
        return cls(**{key: settings[key] for key in cls._fields if key in settings})

    def to_scheduler(self) -> dict[str, Any]:
        """The `scheduler_config.json` that `from_scheduler` and diffusers read."""
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": int(TIMESTEPS),
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            **self._asdict(),
        }


def resolution_mu(height: int, width: int, shift: ResolutionShift) -> float:
    """mu for a target whose latent is height x width (latent pixels, without the condition)."""
    slope = (shift.max_shift - shift.base_shift) / (
        shift.max_image_seq_len - shift.base_image_seq_len
    )
    patches = height * width // 4
    return shift.base_shift + slope * (patches - shift.base_image_seq_len)


def shift_sigma(sigma: Array, mu: float | Array) -> Array:
    """e^mu / (e^mu + 1/sigma - 1), float32: sigma in [0, 1] moved towards noise (Esser et al. 2024,
    eq. 23).

    0 and 1 stay where they are. Training draws sigma from a density and shifts it; sampling shifts
    a list.
    """
    strength = jnp.exp(jnp.asarray(mu, jnp.float32))
    return strength / (strength + (1 / jnp.asarray(sigma, jnp.float32) - 1))


def sigma_list(steps: int, mu: float) -> np.ndarray:
    """The sigmas of a sampler of `steps` steps, float32 [steps + 1]: from 1 down to 1/steps evenly,
    shifted, then 0.

    Raises:
      ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, should be at least 1")
    even = np.linspace(1.0, 1 / steps, steps, dtype=np.float32)
    with jax.ensure_compile_time_eval():  # numbers they are, within what is being compiled, too
        return np.append(np.asarray(shift_sigma(even, mu)), np.float32(0))
