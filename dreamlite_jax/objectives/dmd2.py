"""Step distillation by distribution matching: DMD2 (Yin et al. 2024, arXiv 2405.14867) for a flow.

A student that takes a few steps without guidance learns from a frozen, guided teacher. Where its
samples x0 lie, noised to xt, two scores are compared: the teacher's, and that of a *fake score*, a
network that learns the flow of the student's own samples meanwhile. The difference points from what
the student makes to what the teacher would:

    g = (x0_fake - x0_teacher) / mean |x0 - x0_teacher|,    loss = |x0 - stop(x0 - g)|^2 / 2

so that the gradient by x0 is g itself (DMD, Yin et al. 2024, arXiv 2311.18828, eq. 7 and 8). The
fake score's own loss is `flow_matching.losses` on the student's samples, as in pretraining.

The student meets in training what it meets on the phone: its inputs are drawn by the deployed,
deterministic sampler (backward simulation), and the gradient goes through one step of it. What a
step takes for x0 is compared at any noise, as by DMD2, or at the noise between the step's two ends
(`within`), as in trajectory distribution matching (TDM, Luo et al. 2025, arXiv 2503.06674). Then
the fake score sees one step's samples at each noise instead of the mixture of all steps', which a
blurred first step and a last one without spread can match together: in one dimension, where the
answer is known, the last step's samples lose most of their spread without it. But then nothing
holds the last step to what only much noise tells, the ground of a picture first of all: with
little a teacher takes any for right. Students of reinforced networks drifted away by that
(BENCHMARKS.md, *Where students are compared*).

Shapes: B rows, h and w latent pixels, c latent channels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dreamlite_jax.diffusion import flow, sampling
from dreamlite_jax.diffusion.sampling import VelocityFn

LogitFn = Callable[[Array, Array], Array]  # (xt [B, h, w, c], sigma [B]) -> logits [B]


class Settings(NamedTuple):
    """Of the student's loss, and of the teacher that it sees."""

    guidance: float = 3.5  # the teacher's, by the text, of text to image
    edit_guidance: float = 3.5  # and of edits, whose source says most already
    image_guidance: float = 1.0  # by the source of edits; 1 saves the teacher a branch
    jitter: float = 0.0  # the text's lies within this of its own, drawn for every row
    least: float = 0.02  # sigmas at which scores are compared are uniform in [least, most), ...
    most: float = 0.98
    shift: bool = True  # ... then moved towards noise as the sampler's
    within: bool = False  # compare a step only between its two ends, as TDM; DMD2: everywhere
    gan: float = 0.0  # weight of the adversarial term; DMD2: 5e-3
    gan_score: float = (
        0.01  # and of the discriminator's loss beside the fake score's; only with gan
    )
    trajectory: float = 0.0  # weight of the first step's regression to the teacher's
    trajectory_steps: int = 8  # that the teacher takes for it

    def problems(self) -> list[str]:
        """What is wrong with them, a line each."""
        found = [
            f"{name} is {getattr(self, name)}, should be 0 or more"
            for name in ("jitter", "gan", "gan_score", "trajectory")
            if not 0 <= getattr(self, name) < math.inf
        ]
        for name in ("guidance", "edit_guidance", "image_guidance"):
            if not math.isfinite(getattr(self, name)):
                found.append(f"{name} is {getattr(self, name)}, should be finite")
        if not 0 < self.least < self.most < 1:
            found.append(
                f"least and most are {self.least} and {self.most}, should be rising within 0 to 1"
            )
        if self.trajectory_steps < 1:
            found.append(f"trajectory_steps is {self.trajectory_steps}, should be at least 1")
        return found

    @property
    def guided(self) -> bool:
        """Whether the teacher needs null texts."""
        scales = self.guidance, self.edit_guidance, self.image_guidance
        return scales != (1, 1, 1) or self.jitter != 0


# --- The student's samples ------------------------------------------------------------------------


def simulated(
    velocity_fn: VelocityFn, noise: Array, sigmas: Array, stop: Array
) -> tuple[Array, Array]:
    """x at sigmas[stop] as `sampling.sample` passes it on its way from noise, and x0 as the student
    sees it from there: float32 [B, ...] each.

    Only the steps up to `stop` are taken, whose number need not be known to the compiler; there is
    no gradient through them.
    """
    sigmas, noise = jnp.asarray(sigmas, jnp.float32), noise.astype(jnp.float32)

    # The last step's x0 is taken within the loop, so that the program has the network once.
    def step(k: Array, passed: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, _, xt = passed
        velocity = velocity_fn(xt, sigmas[k]).astype(jnp.float32)
        x0 = flow.x0_from_velocity(xt, velocity, sigmas[k])
        return xt, x0, sampling.euler(xt, velocity, sigmas[k], sigmas[k + 1])

    xt, x0, _ = lax.stop_gradient(lax.fori_loop(0, stop + 1, step, (noise, noise, noise)))
    return xt, x0


def sample_from(velocity_fn: VelocityFn, xt: Array, sigma: Array) -> Array:
    """x0 as the student sees it from xt: its sample, where sigma is the last of its steps."""
    return flow.x0_from_velocity(xt, velocity_fn(xt, sigma).astype(jnp.float32), sigma)


# --- The student's loss ---------------------------------------------------------------------------


def draw(
    settings: Settings, keys: Array, x0: Array, mu: float, before: Array, after: Array
) -> tuple[Array, Array]:
    """Where scores are compared: sigma float32 [B] and noise like x0; a key [B] for every row.

    Args:
      before, after: float32 [B], the sigmas between which the student's step goes.
    """

    def row(key: Array) -> tuple[Array, Array]:
        for_sigma, for_noise = jax.random.split(key)
        sigma = jax.random.uniform(for_sigma, (), jnp.float32, settings.least, settings.most)
        sigma = flow.shift_sigma(sigma, mu) if settings.shift else sigma
        return sigma, jax.random.normal(for_noise, x0.shape[1:], jnp.float32)

    sigma, noise = jax.vmap(row)(keys)
    return within(settings, sigma, before, after), noise


def within(settings: Settings, sigma: Array, before: Array, after: Array) -> Array:
    """sigma in [0, 1) moved into [after, before), where that is asked for."""
    return after + (before - after) * sigma if settings.within else sigma


def guidance_of(settings: Settings, edits: Array) -> Array:
    """The teacher's text guidance of every row, edits bool [B], shaped to multiply latents: float32
    [B, 1, 1, 1]."""
    scale = jnp.where(edits, jnp.float32(settings.edit_guidance), settings.guidance)
    return scale[:, None, None, None]


def draw_guidance(settings: Settings, edits: Array, keys: Array) -> Array:
    """`guidance_of` moved by the jitter of every row's own key [B]."""
    offset = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, -1, 1))(keys)
    return guidance_of(settings, edits) + settings.jitter * offset[:, None, None, None]


def direction(x0: Array, x0_fake: Array, x0_teacher: Array) -> Array:
    """g [B, ...], where the student's samples should come from: see above. A row without a finite
    one (nothing to divide by) stays where it is."""
    axes = tuple(range(1, x0.ndim))
    distance = jnp.abs(x0 - x0_teacher).mean(axes, keepdims=True)
    return jnp.nan_to_num((x0_fake - x0_teacher) / distance, nan=0.0, posinf=0.0, neginf=0.0)


def matching_losses(
    x0: Array, sigma: Array, noise: Array, fake_fn: VelocityFn, teacher_fn: VelocityFn
) -> Array:
    """The loss of every row, float32 [B], whose gradient by x0 [B, ...] is g over its size.

    Args:
      sigma, noise: of `draw`.
      fake_fn, teacher_fn: (xt [B, ...], sigma [B]) -> vt, the scores; neither has a gradient.
    """
    xt = lax.stop_gradient(flow.path(x0, noise, sigma))
    x0_fake, x0_teacher = (sample_from(score_fn, xt, sigma) for score_fn in (fake_fn, teacher_fn))
    aim = lax.stop_gradient(x0 - direction(x0, x0_fake, x0_teacher))
    return 0.5 * jnp.square(x0 - aim).mean(tuple(range(1, x0.ndim)))


def trajectory_losses(
    velocity_fn: VelocityFn, teacher_fn: VelocityFn, noise: Array, sigmas: Array, steps: int
) -> Array:
    """How far the student's first step lies from the teacher's way, float32 [B]: a stabiliser that
    keeps what noise becomes which picture (DP-DMD, arXiv 2602.03139).

    Args:
      sigmas: float32 [N + 1], the student's.
      steps: that the teacher takes from the first of them to the second.
    """
    start, end = sigmas[0], sigmas[1]
    fine = jnp.linspace(start, end, steps + 1, dtype=jnp.float32)
    reached = lax.stop_gradient(sampling.sample(teacher_fn, noise, fine))
    wanted = (noise - reached) / (start - end)
    error = jnp.square(velocity_fn(noise, start).astype(jnp.float32) - wanted)
    return error.mean(tuple(range(1, noise.ndim)))


# --- The adversarial term -------------------------------------------------------------------------


def fooling_losses(x0: Array, sigma: Array, noise: Array, logit_fn: LogitFn) -> Array:
    """Of the student, float32 [B]: that its samples pass for real (DMD2, section 4.3). The gradient
    goes through the noised samples."""
    return jax.nn.softplus(-logit_fn(flow.path(x0, noise, sigma), sigma))


def telling_losses(
    fake: Array, real: Array, sigma: Array, noise: Array, logit_fn: LogitFn
) -> Array:
    """Of the discriminator, float32 [B]: that it tells the student's samples from real latents."""
    on_fake, on_real = (logit_fn(flow.path(x0, noise, sigma), sigma) for x0 in (fake, real))
    return jax.nn.softplus(on_fake) + jax.nn.softplus(-on_real)
