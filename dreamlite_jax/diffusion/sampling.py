"""From noise to data along the flow, and guidance, over any velocity function.

A velocity function takes xt [B, ...] and sigma (float32, a scalar or [B]) and gives vt [B, ...]. A
*conditioned* one takes a third argument: a tree of arrays with leading axis B. Guidance turns a
conditioned one into a plain one; it stacks its branches along B, so that the network is called
once a step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

VelocityFn = Callable[[Array, Array], Array]
ConditionedFn = Callable[[Array, Array, Any], Array]
METHODS = ("euler", "heun")


def sample(
    velocity_fn: VelocityFn,
    noise: Array,
    sigmas: Array,
    method: str = "euler",
    on_step: Callable[[Array], None] | None = None,
) -> Array:
    """Integrates dx/dsigma = v from sigmas[0] to sigmas[-1], in one `lax.scan`.

    Args:
      velocity_fn: as above.
      noise: float32 [B, ...], x at sigmas[0].
      sigmas: float32 [N + 1], falling; `flow.sigma_list` or any other.
      method: "euler", N evaluations, the deterministic sampler of diffusers; "heun", of second
        order, 2 N - 1 evaluations (Karras et al. 2022, algorithm 1: the step to 0 is Euler's).
      on_step: called on the host with the step's number, 0 to N - 1, e.g. for a progress bar.

    Returns:
      float32 [B, ...], x at sigmas[-1].

    Raises:
      ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, supported are {' and '.join(METHODS)}")

    def velocity(xt, sigma):
        return velocity_fn(xt, sigma).astype(jnp.float32)

    def heun(xt, vt, sigma, after):
        end = velocity(euler(xt, vt, sigma, after), after)
        return xt + (after - sigma) * (vt + end) / 2

    def step(xt, at):
        number, sigma, after = at
        vt = velocity(xt, sigma)
        reached = euler(xt, vt, sigma, after)
        if method == "heun":
            xt = lax.cond(after > 0, lambda: heun(xt, vt, sigma, after), lambda: reached)
        else:
            xt = reached
        if on_step is not None:
            jax.debug.callback(on_step, number)
        return xt, None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    numbers = jnp.arange(sigmas.shape[0] - 1)
    x0, _ = lax.scan(step, noise.astype(jnp.float32), (numbers, sigmas[:-1], sigmas[1:]))
    return x0


def euler(xt: Array, vt: Array, sigma: Array, after: Array) -> Array:
    """x at `after` from xt at sigma, along vt: a step of the deployed sampler."""
    return xt + (after - sigma) * vt.astype(jnp.float32)


def branches(velocity_fn: ConditionedFn, conditions: list[Any], xt: Array, sigma: Array) -> Array:
    """The velocities of xt [B, ...] under K conditions, from one call: [K, B, ...].

    Within the call, branch k holds places k B to (k + 1) B - 1 of the batch.
    """
    k = len(conditions)
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conditions)
    sigma = jnp.tile(sigma, k) if jnp.ndim(sigma) else sigma
    vt = velocity_fn(jnp.concatenate([xt] * k), sigma, stacked)
    return vt.reshape(k, *xt.shape)


def plain(velocity_fn: ConditionedFn, condition: Any) -> VelocityFn:
    """No guidance: one branch."""
    return lambda xt, sigma: velocity_fn(xt, sigma, condition)


def single_guidance(
    velocity_fn: ConditionedFn, null: Any, condition: Any, scale: float | Array
) -> VelocityFn:
    """Classifier-free guidance, v0 + scale (v - v0): two branches (Ho & Salimans 2022, eq. 6, with
    scale = 1 + w)."""

    def guided(xt, sigma):
        v0, v = branches(velocity_fn, [null, condition], xt, sigma)
        return v0 + scale * (v - v0)

    return guided


def dual_guidance(
    velocity_fn: ConditionedFn,
    null: Any,
    image: Any,
    text: Any,
    scale: float | Array,
    image_scale: float | Array,
) -> VelocityFn:
    """Guidance by instruction and source, v0 + scale (v_IT - v_I) + image_scale (v_I - v0): three
    branches (Brooks et al. 2023, eq. 3).

    Args:
      null: empty instruction, blank source (v0).
      image: empty instruction, source (v_I).
      text: instruction, source (v_IT).
      scale: an array of its own for every row is shaped to multiply xt.
      image_scale: a Python number 1 cancels v0, which leaves two branches. Inside `jit` it must be
        a Python number for that; an array always takes three.
    """
    if isinstance(image_scale, int | float) and image_scale == 1:
        return single_guidance(velocity_fn, image, text, scale)

    def guided(xt, sigma):
        v0, v_image, v_text = branches(velocity_fn, [null, image, text], xt, sigma)
        return v0 + scale * (v_text - v_image) + image_scale * (v_image - v0)

    return guided
