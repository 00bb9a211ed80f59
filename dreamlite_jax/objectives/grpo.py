"""Group-relative policy optimisation of a flow: what the rewards of pictures do to its steps.

For every prompt a group of pictures is drawn by random steps (`diffusion.sde`). A picture's
advantage is how far its reward lies from its group's mean (GRPO, Shao et al. 2024,
arXiv 2402.03300; on flows Liu et al. 2025, arXiv 2505.05470), and every step of its way is made
likelier or less likely by it, within a clipped range (PPO, Schulman et al. 2017, eq. 7):

    loss = max(-A r, -A clip(r, 1 - c, 1 + c)) + kl KL(policy || reference),
    r = p(x_after | xt) / p_old(x_after | xt)

Densities are averaged over pixels, not summed, so c is of the order of 1e-5 to 1e-3.

Shapes: P prompts, G pictures a group, R rewards, B = P G rows in the order of their prompts; n
steps of any rows together.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.diffusion import sde
from dreamlite_jax.diffusion.sampling import VelocityFn

SCALES = ("group", "global")
ORDERS = ("random", "sliding")


class Settings(NamedTuple):
    """Of the loss. Published clips: 1e-4 (Flow-GRPO, MixGRPO), 1e-5 with CPS, 2e-6 to 4e-6 with
    the guard."""

    clip: float = 1e-4
    kl: float = 0.0  # weight of the divergence from the reference; Flow-GRPO: 0.01 to 0.04
    scale: str = "group"  # rewards are divided by the spread within the group, or over all groups
    advantage_clip: float = 5.0
    least_spread: float = 0.0  # groups whose rewards lie no further apart teach nothing
    guard: bool = False  # GRPO-Guard's ratio, see `losses`

    def problems(self) -> list[str]:
        """What is wrong with them, a line each."""
        found = advantage_problems(self)
        if not 0 < self.clip < math.inf:
            found.append(f"clip is {self.clip}, should be positive")
        if not 0 <= self.kl < math.inf:
            found.append(f"kl is {self.kl}, should be 0 or more")
        return found


def advantage_problems(settings: Any) -> list[str]:
    """What is wrong with those of the settings that `advantages` reads, a line each."""
    found = []
    if not 0 < settings.advantage_clip < math.inf:
        found.append(f"advantage_clip is {settings.advantage_clip}, should be positive")
    if not 0 <= settings.least_spread < math.inf:
        found.append(f"least_spread is {settings.least_spread}, should be 0 or more")
    if settings.scale not in SCALES:
        found.append(f"scale is {settings.scale!r}, known are {', '.join(SCALES)}")
    return found


class Process(NamedTuple):
    """How the pictures are drawn: random steps in a window, the ODE's outside of it.

    The last step is never random: its density is too sharp ("cps": a point).
    """

    steps: int = 10
    form: str = "cps"  # of sde.FORMS
    level: float = 0.8  # of noise; "cps": 0.8 to 0.9, "flow": 0.7
    window: int = 2  # random steps; 0: all that there can be
    order: str = "random"  # where the window lies: anywhere, or "sliding" from noise to data
    within: float = 0.5  # share of the steps, from the noise on, that the window stays in
    every: int = 25  # rollouts at each place of a sliding window

    @property
    def size(self) -> int:
        """Steps of the window: W."""
        return self.window or self.steps - 1

    @property
    def places(self) -> int:
        """How many starts the window has."""
        return max(min(math.ceil(self.within * self.steps), self.steps - 1) - self.size, 0) + 1

    def problems(self) -> list[str]:
        """What is wrong with them, a line each."""
        found = []
        if self.steps < 2:
            found.append(f"steps is {self.steps}, should be at least 2: the last is not random")
        if self.form not in sde.FORMS:
            found.append(f"form is {self.form!r}, known are {', '.join(sde.FORMS)}")
        if not 0 < self.level < math.inf or (self.form == "cps" and self.level > 1):
            found.append(f"level is {self.level}, should be above 0, and with cps at most 1")
        if not 0 <= self.window < max(self.steps, 2):
            found.append(f"window is {self.window}, should be from 0 to the steps less one")
        elif 0 < self.within <= 1 and self.window > math.ceil(self.within * self.steps):
            most = math.ceil(self.within * self.steps)
            found.append(
                f"window is {self.window}, should be at most {most}: it stays within "
                f"{self.within:g} of {self.steps} steps"
            )
        if self.order not in ORDERS:
            found.append(f"order is {self.order!r}, known are {', '.join(ORDERS)}")
        if not 0 < self.within <= 1:
            found.append(f"within is {self.within}, should be above 0 and at most 1")
        if self.every < 1:
            found.append(f"every is {self.every}, should be at least 1")
        return found


def window_start(process: Process, rollout: Array, key: Array) -> Array:
    """The window's first step, int32: of the rollout with this number, counted from 0.

    Random (Flow-GRPO-Fast), or sliding by a step every so many rollouts and beginning again at the
    end (MixGRPO, Li et al. 2025, arXiv 2507.21802).
    """
    if process.order == "random":
        return jax.random.randint(key, (), 0, process.places)
    return (rollout // process.every) % process.places


# --- Advantages -----------------------------------------------------------------------------------


def advantages(
    rewards: Array, asked: Array, weights: Array, settings: Settings
) -> tuple[Array, Array]:
    """The advantage [P, G] of every picture, and bool [P], whether its group teaches anything.

    Every reward is normalised by itself, then they are summed (MixGRPO): no reward outweighs the
    others by its unit. One whose values in a group are all the same adds nothing there; a group
    with no other is dropped.

    Args:
      rewards: float32 [P, G, R].
      asked: bool [P, R], whether a reward concerns the prompt at all.
      weights: float32 [R]; rewards of weight 0 are watched, not learnt from.
    """
    spread = rewards.max(1) - rewards.min(1)
    counts = asked & (spread > settings.least_spread) & (weights != 0)
    centred = rewards - rewards.mean(1, keepdims=True)
    if settings.scale == "group":
        deviation = jnp.sqrt(jnp.square(centred).mean(1, keepdims=True))
    else:
        deviation = jnp.sqrt(_masked_variance(rewards, asked))
    parts = jnp.where(counts[:, None], weights * centred / (deviation + 1e-4), 0)
    total = jnp.clip(parts.sum(-1), -settings.advantage_clip, settings.advantage_clip)
    return total, counts.any(-1)


def _masked_variance(rewards: Array, asked: Array) -> Array:
    """[R] of every reward over all the pictures that it is asked of."""
    where = jnp.broadcast_to(asked[:, None], rewards.shape)
    count = jnp.maximum(where.sum((0, 1)), 1)
    mean = jnp.where(where, rewards, 0).sum((0, 1)) / count
    return jnp.where(where, jnp.square(rewards - mean), 0).sum((0, 1)) / count


def row_weights(kept: Array, group: int) -> Array:
    """float32 [B] from bool [P]: a mean over all rows with them is the mean over kept groups."""
    return jnp.repeat(kept / jnp.maximum(kept.mean(), 1 / kept.shape[0]), group)


def diversity(pictures: Array) -> Array:
    """How different pictures of a prompt are, float32 [P] of [P, G, ...] in [-1, 1]: the root mean
    square difference of two of them, in [0, 1], mean over all pairs."""
    flat = pictures.reshape(*pictures.shape[:2], -1).astype(jnp.float32)

    def to_others(k):
        one = jax.lax.dynamic_index_in_dim(flat, k, 1)
        return jnp.sqrt(jnp.square((flat - one) / 2).mean(-1)).sum(-1)

    group = flat.shape[1]
    sums = jax.lax.map(to_others, jnp.arange(group))  # one at a time: pairs would fill the memory
    return sums.sum(0) / (group * (group - 1))


# --- The loss -------------------------------------------------------------------------------------


class Old(NamedTuple):
    """Steps as the old policy took them, and where the reference would have gone."""

    xt: Array  # float32 [n, ...]
    x_after: Array  # [n, ...], drawn by the old policy
    mean: Array  # [n, ...], the old policy's
    mean_reference: Array  # [n, ...]
    logp: Array  # [n], the old policy's
    sigma: Array  # [n]
    after: Array  # [n]


class Losses(NamedTuple):
    """Each float32 [n]."""

    total: Array
    ratio: Array
    clipped: Array  # whether the clip stops the gradient: 0 or 1
    kl: Array  # the divergence from the reference, a mean over pixels


def losses(
    velocity_fn: VelocityFn,
    old: Old,
    advantage: Array,
    form: str,
    level: float,
    settings: Settings,
) -> Losses:
    """The loss of every step, and what to watch.

    The divergence is that of two Gaussians of equal deviation, |mean - mean_ref|^2 / (2 std^2).

    `settings.guard` (GRPO-Guard, Wang et al. 2025, arXiv 2510.22319): the log ratio's mean under
    the old policy is -|mean - mean_old|^2 / (2 std^2), always below 0, and its deviation falls as
    std rises, so that a clip hardly ever stops what is rewarded, least of all at some steps. The
    log ratio is therefore centred by the one and scaled by the other, and the loss divided by the
    step's length, which evens the gradients of the steps out.

    Args:
      velocity_fn: (xt [n, ...], sigma [n]) -> vt, the policy.
      advantage: float32 [n].
    """
    vt = velocity_fn(old.xt, old.sigma)
    mean, std = sde.gaussian(form, old.xt, vt, old.sigma, old.after, level)
    log_ratio = sde.log_prob(old.x_after, mean, std) - old.logp
    if settings.guard:
        log_ratio = (log_ratio + _distance(mean, old.mean, std)) * std
    ratio = jnp.exp(log_ratio)
    within = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip)
    free, held = -advantage * ratio, -advantage * within
    policy = jnp.maximum(free, held)
    if settings.guard:
        policy = policy / (old.sigma - old.after)
    kl = _distance(mean, old.mean_reference, std)
    clipped = ((held > free) & (ratio != within)).astype(jnp.float32)
    return Losses(policy + settings.kl * kl, ratio, clipped, kl)


def _distance(mean: Array, other: Array, std: Array) -> Array:
    """|mean - other|^2 / (2 std^2), [n], a mean over pixels."""
    square = jnp.square(mean - other).mean(tuple(range(1, mean.ndim)))
    return square / (2 * jnp.square(std))
