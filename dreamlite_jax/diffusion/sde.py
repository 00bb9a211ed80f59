"""The flow as a random process: steps that are Gaussian, so that a policy gradient can weigh them.

Every step is the ODE's, takes away a part of the noise that the network predicts, and puts fresh
noise z in its place:

    x_after = xt + (after - sigma) vt - taken * noise_hat + std * z,    noise_hat = xt + (1 - s) vt

- "flow": Euler and Maruyama's step of the SDE with the ODE's marginals (Flow-GRPO, Liu et al. 2025,
  arXiv 2505.05470; MixGRPO and DanceGRPO take the same). With d = sigma - after and
  g = level sqrt(sigma / (1 - sigma)): taken = g^2 d / (2 sigma), std = g sqrt(d). It keeps the
  marginals in the limit of many steps; with few it leaves noise over. At sigma = 1, g takes `after`
  in the denominator, as the authors' code does.
- "cps": coefficients preserved (Wang & Yu 2025, arXiv 2509.05952). With the angle level pi / 2:
  taken = after (1 - cos), std = after sin. Signal and noise have the weights that the flow has at
  `after`, whatever the number of steps, as far as noise_hat is the noise; level 1 replaces all of
  it. As noise_hat is its mean, random steps make the spread smaller: of a Gaussian's variance in 10
  steps at level 0.8, all random, a third is lost, with two random ones among the first five a
  twentieth at most.

Where the level is 0, `taken` and `std` are 0: the step is `sampling.sample`'s, to the bit. All of
it is float32.

Shapes: B rows of any shape [B, ...]; N steps, W of them in the window that is kept.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dreamlite_jax.diffusion import flow
from dreamlite_jax.diffusion.sampling import VelocityFn

FORMS = ("flow", "cps")


class Steps(NamedTuple):
    """Gaussian steps of a window, as a policy gradient needs them; float32."""

    xt: Array  # [B, W, ...]
    x_after: Array  # [B, W, ...], drawn
    mean: Array  # [B, W, ...], of x_after
    logp: Array  # [B, W], of x_after
    sigma: Array  # [W]
    after: Array  # [W], the sigma that a step leads to


def coefficients(
    form: str, sigma: Array, after: Array, level: float | Array
) -> tuple[Array, Array]:
    """`taken` and `std` of the step from sigma to after, float32, shaped as they are.

    Args:
      form: of FORMS.
      sigma, after: scalars or [B], 0 <= after < sigma <= 1.
      level: how much noise: 0 none; "flow": 0.7 in Flow-GRPO; "cps": up to 1.

    Raises:
      ValueError: an unknown form.
    """
    sigma, after, level = (jnp.asarray(x, jnp.float32) for x in (sigma, after, level))
    if form == "flow":
        g = level * jnp.sqrt(sigma / (1 - jnp.where(sigma == 1, after, sigma)))
        return jnp.square(g) * (sigma - after) / (2 * sigma), g * jnp.sqrt(sigma - after)
    if form == "cps":
        angle = level * (math.pi / 2)
        return after * (1 - jnp.cos(angle)), after * jnp.sin(angle)
    raise ValueError(f"form is {form!r}, supported are {' and '.join(FORMS)}")


def gaussian(
    form: str, xt: Array, vt: Array, sigma: Array, after: Array, level: float | Array
) -> tuple[Array, Array]:
    """Mean [B, ...] and standard deviation of the step from sigma to after, of xt and vt [B, ...];
    the rest as `coefficients`."""
    xt, vt = xt.astype(jnp.float32), vt.astype(jnp.float32)
    taken, std = coefficients(form, sigma, after, level)
    ode = xt + flow.over(jnp.asarray(after, jnp.float32) - sigma, xt) * vt
    return ode - flow.over(taken, xt) * flow.noise_from_velocity(xt, vt, sigma), std


def log_prob(x: Array, mean: Array, std: Array) -> Array:
    """log N(x; mean, std^2), float32 [B], the mean over the other axes of [B, ...].

    The mean, not the sum, as Flow-GRPO has it: ratios then stay near 1 whatever the resolution, and
    the ranges of clipping are small. std > 0, a scalar or [B].
    """
    x, mean, std = (jnp.asarray(a, jnp.float32) for a in (x, mean, std))
    square = jnp.square((x - mean) / flow.over(std, x)).mean(tuple(range(1, x.ndim)))
    return -0.5 * square - jnp.log(std) - 0.5 * math.log(2 * math.pi)


def levels(level: float, start: Array | int, window: int, steps: int) -> Array:
    """float32 [steps]: the level in the window's steps, 0 (the ODE) outside of it."""
    number = jnp.arange(steps)
    inside = (number >= start) & (number < start + window)
    return jnp.where(inside, jnp.float32(level), 0)


def sample(
    velocity_fn: VelocityFn,
    noise: Array,
    sigmas: Array,
    form: str,
    level: float,
    start: Array | int,
    window: int,
    keys: Array,
    on_step: Callable[[Array], None] | None = None,
) -> tuple[Array, Steps]:
    """x0 float32 [B, ...] from noise, by random steps within a window and the ODE's outside.

    Args:
      velocity_fn: (xt [B, ...], sigma) -> vt, as in `sampling`.
      noise: float32 [B, ...], x at sigmas[0].
      sigmas: float32 [N + 1], falling.
      start: the window's first step, which need not be known when this is compiled.
      window: W, its number of steps; start + W < N, as the last step's density may be a point.
      keys: [B], one for each row's noise: it depends neither on the rows beside it nor on where
        they are computed.
      on_step: see `sampling.sample`.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    steps = sigmas.shape[0] - 1

    def step(xt, at):
        number, sigma, after, level = at
        vt = velocity_fn(xt, sigma).astype(jnp.float32)
        mean, std = gaussian(form, xt, vt, sigma, after, level)

        def fresh(key):
            return jax.random.normal(jax.random.fold_in(key, number), xt.shape[1:], jnp.float32)

        x_after = mean + std * jax.vmap(fresh)(keys)
        if on_step is not None:
            jax.debug.callback(on_step, number)
        return x_after, (xt, x_after, mean)

    at = jnp.arange(steps), sigmas[:-1], sigmas[1:], levels(level, start, window, steps)
    x0, kept = lax.scan(step, noise.astype(jnp.float32), at)

    def windowed(x):
        return lax.dynamic_slice_in_dim(x, start, window)

    xt, x_after, mean = (windowed(x).swapaxes(0, 1) for x in kept)
    sigma, after = windowed(sigmas[:-1]), windowed(sigmas[1:])
    std = coefficients(form, sigma, after, level)[1]
    logp = jax.vmap(log_prob, (1, 1, 0), 1)(x_after, mean, std)
    return x0, Steps(xt, x_after, mean, logp, sigma, after)
