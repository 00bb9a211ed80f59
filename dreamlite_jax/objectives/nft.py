"""Rewards on the forward process: DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117).

Where `grpo` makes the random steps likelier by which a good picture came about, this takes the
picture x0 as it is, drawn by whatever sampler: it is noised anew, xt = (1 - s) x0 + s noise, and
the network learns to predict it the better, the further its reward lies above its group's mean, and
to predict away from it below. Of the old policy's velocity v_old and the new one's v are made

    v+ = (1 - b) v_old + b v,    v- = (1 + b) v_old - b v,    x0+- = xt - s v+-

and with r in [0, 1], a half plus a share of the advantage, the loss is

    r / b |x0+ - x0|^2 / w+  +  (1 - r) / b |x0- - x0|^2 / w-  +  kl |v - v_ref|^2,

w+- = mean |x0+- - x0| without a gradient, which evens noises and pictures out. A step's own noise
is no part of it, of which `grpo` has to average out nearly all.

The old policy is the one that drew the rollout, where the authors' is as a rule a slow average of
such. With one update of each rollout v is therefore v_old, and the gradient is that of regression
weighed by the advantage, whatever b.

Shapes: n noised pictures, of any rows together.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from dreamlite_jax.diffusion import flow
from dreamlite_jax.diffusion.sampling import VelocityFn
from dreamlite_jax.objectives import grpo

LEAST_WEIGHT = 1e-5  # of w+-, as the authors' code has it


class Settings(NamedTuple):
    """Of the loss. The authors' b is 1 with one reward and 0.1 with several, their kl 1e-4 where
    the rest is 5 times what it is here."""

    strength: float = 1.0  # b; it matters from the second update of a rollout on
    kl: float = 0.0  # weight of the squared distance of velocities from the reference's
    levels: int = 2  # noises at which every picture is learnt, one in each part of [0, 1], ...
    shift: bool = True  # ... which are then moved towards noise as the sampler's
    scale: str = "group"  # as of grpo.Settings, and the next two
    advantage_clip: float = 5.0
    least_spread: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with them, a line each."""
        found = grpo.advantage_problems(self)
        if not 0 < self.strength < math.inf:
            found.append(f"strength is {self.strength}, should be positive")
        if not 0 <= self.kl < math.inf:
            found.append(f"kl is {self.kl}, should be 0 or more")
        if self.levels < 1:
            found.append(f"levels is {self.levels}, should be at least 1")
        return found


class Old(NamedTuple):
    """Noised pictures, and what two policies see in them."""

    x0: Array  # float32 [n, ...]
    noise: Array  # [n, ...]
    sigma: Array  # [n]
    vt: Array  # [n, ...], the old policy's
    vt_reference: Array  # [n, ...]


class Losses(NamedTuple):
    """Each float32 [n]."""

    total: Array
    kl: Array  # |v - v_ref|^2, a mean over pixels


def losses(velocity_fn: VelocityFn, old: Old, advantage: Array, settings: Settings) -> Losses:
    """The loss of every noised picture, and what to watch.

    Args:
      velocity_fn: (xt [n, ...], sigma [n]) -> vt, the policy.
      advantage: float32 [n], within plus and minus settings.advantage_clip.
    """
    xt, b = flow.path(old.x0, old.noise, old.sigma), settings.strength
    vt = velocity_fn(xt, old.sigma).astype(jnp.float32)

    def error(mixed: Array) -> Array:
        apart = flow.x0_from_velocity(xt, mixed, old.sigma) - old.x0
        size = jnp.maximum(_mean(lax.stop_gradient(jnp.abs(apart))), LEAST_WEIGHT)
        return _mean(jnp.square(apart)) / size

    good = 0.5 + advantage / (2 * settings.advantage_clip)
    towards = error((1 - b) * old.vt + b * vt)
    away = error((1 + b) * old.vt - b * vt)
    kl = _mean(jnp.square(vt - old.vt_reference))
    return Losses((good * towards + (1 - good) * away) / b + settings.kl * kl, kl)


def _mean(x: Array) -> Array:
    """[n], over pixels."""
    return x.mean(tuple(range(1, x.ndim)))
