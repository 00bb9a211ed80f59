"""Random steps along the flow: marginals, densities, and the ODE where there is no noise."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import flow, sampling, sde

KEY = jax.random.key(0)
MEAN, SPREAD = 1.5, 0.6  # of the toy's data, a Gaussian


def keys_of(rows, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def noise_of(rows, shape=(4, 4, 2), seed=1):
    return jax.random.normal(jax.random.key(seed), (rows, *shape), jnp.float32)


def marginal(sigma, spread=SPREAD):
    """Mean and variance of xt over data N(MEAN, spread^2)."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * spread**2 + sigma**2


def velocity_of(spread=SPREAD):
    """E[noise - x0 | xt] of that data: all is jointly Gaussian."""

    def velocity(xt, sigma):
        mean, variance = marginal(sigma, spread)
        slope = (sigma - (1 - sigma) * spread**2) / variance
        return -MEAN + slope * (xt - mean)

    return velocity


def curved(xt, sigma):
    return jnp.sin(3 * xt) * sigma + jnp.roll(xt, 1, axis=-1)


# Compiled: one by one, each operation would be.
drawn = jax.jit(sde.sample, static_argnames=("velocity_fn", "form", "window"))
ode = jax.jit(sampling.sample, static_argnames="velocity_fn")
velocity_of = functools.cache(velocity_of)


def sampled(form, sigmas, level, start, window, rows_keys, noise, spread=SPREAD):
    return drawn(velocity_of(spread), noise, sigmas, form, level, start, window, rows_keys)


# --- Marginals ------------------------------------------------------------------------------------


def assert_marginals(steps, sigmas, spread):
    """Mean and variance after every step, within five standard errors of so many draws."""
    x = np.asarray(steps.x_after, np.float64)
    count = x[:, 0].size
    for k, sigma in enumerate(np.asarray(sigmas, np.float64)[1 : x.shape[1] + 1]):
        mean, variance = marginal(sigma, spread)
        assert x[:, k].mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / count)), k
        assert x[:, k].var() == pytest.approx(variance, rel=5 * math.sqrt(2 / count)), k


# In the limit of many steps, where a step's noise shrinks with it: "flow" does so by itself; of
# "cps" the angle is what shrinks. The steps are so many that what is left of them is a third of
# the Monte-Carlo error.
@pytest.mark.parametrize("form, level, steps", [("flow", 0.7, 400), ("cps", 0.1, 400)])
def test_marginals_are_the_ode_s(form, level, steps):
    sigmas = np.linspace(0.98, 0.02, steps + 1, dtype=np.float32)
    mean, variance = marginal(0.98)
    noise = mean + math.sqrt(variance) * noise_of(128, (8, 8, 1))
    made = sampled(form, sigmas, level, 0, steps, keys_of(128), noise)[1]
    assert_marginals(made, sigmas, SPREAD)
    # The noise is not idle: at the end little of the start is left in the ODE's own place.
    still = sampled(form, sigmas, 0.0, 0, steps, keys_of(128), noise)[1]
    together = np.corrcoef(np.ravel(made.x_after[:, -1]), np.ravel(still.x_after[:, -1]))[0, 1]
    assert together < 0.7


@pytest.mark.parametrize("level", [0.3, 0.8, 1.0])
def test_cps_keeps_the_marginals_with_few_steps_where_the_prediction_is_exact(level):
    sigmas = flow.sigma_list(5, 0.5)
    made = sampled("cps", sigmas, level, 0, 4, keys_of(128), noise_of(128, (8, 8, 1)), spread=0.0)
    assert_marginals(made[1], sigmas, 0.0)


def variance_of_10_steps(level, random):
    """At the end, of data N(MEAN, SPREAD^2): every step is affine, so that it follows exactly."""
    sigmas, variance, velocity = flow.sigma_list(10, 0.5), 1.0, velocity_of()
    for k, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        (low, std), (high, _) = (
            sde.gaussian("cps", x, velocity(x, sigma), sigma, after, level if k in random else 0.0)
            for x in (jnp.zeros(1), jnp.ones(1))
        )
        variance = float((high - low)[0]) ** 2 * variance + float(jnp.ravel(std)[0]) ** 2
    return variance


def test_cps_makes_the_spread_smaller_the_more_steps_are_random():
    still = variance_of_10_steps(0.8, ())
    assert 0.3 < 1 - variance_of_10_steps(0.8, range(9)) / still < 0.36
    for start in range(4):
        assert 0 <= 1 - variance_of_10_steps(0.8, (start, start + 1)) / still < 0.05


def test_flow_leaves_noise_over_with_few_steps():
    """Why there is another form: with 5 steps the variance is above the path's."""
    sigmas = flow.sigma_list(5, 0.5)
    made = sampled("flow", sigmas, 0.7, 0, 4, keys_of(128), noise_of(128, (8, 8, 1)), spread=0.0)
    variance = np.asarray(made[1].x_after).var(axis=(0, 2, 3, 4))
    assert (variance > 1.1 * np.asarray(sigmas[1:5]) ** 2).all()


# --- The ODE --------------------------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.parametrize("form", sde.FORMS)
@pytest.mark.parametrize("steps", [1, 6])
def test_without_noise_it_is_the_sampler_to_the_bit(form, steps):
    sigmas, noise = flow.sigma_list(steps, 1.15), noise_of(3)
    window = max(steps - 1, 1) if steps > 1 else 0
    expected = ode(curved, noise, sigmas)
    found, _ = drawn(curved, noise, sigmas, form, 0.0, 0, window, keys_of(3))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", sde.FORMS)
def test_outside_of_the_window_it_is_the_ode(form):
    sigmas, noise = flow.sigma_list(6, 1.15), noise_of(3)
    x0, steps = drawn(curved, noise, sigmas, form, 0.7, 2, 2, keys_of(3))
    np.testing.assert_allclose(steps.xt[:, 0], ode(curved, noise, sigmas[:3]), atol=1e-6)
    np.testing.assert_array_equal(steps.x_after[:, 0], steps.xt[:, 1])
    np.testing.assert_allclose(x0, ode(curved, steps.x_after[:, 1], sigmas[4:]), atol=1e-6)
    assert np.abs(steps.x_after - steps.mean).mean((0, 2, 3, 4)).min() > 0.05
    np.testing.assert_array_equal(steps.sigma, sigmas[2:4])
    np.testing.assert_array_equal(steps.after, sigmas[3:5])


def test_the_window_may_move_without_compiling_again():
    traced = []

    def counted(xt, sigma):
        traced.append(1)
        return curved(xt, sigma)

    given = noise_of(2), flow.sigma_list(5, 1.0), "cps", 0.5
    first, second = (drawn(counted, *given, start, 2, keys_of(2))[1] for start in (0, 2))
    assert len(traced) == 1
    assert first.sigma[0] == 1 and second.sigma[0] == flow.sigma_list(5, 1.0)[2]


@pytest.mark.parametrize("form", sde.FORMS)
def test_a_row_s_noise_is_its_own(form):
    sigmas, noise, keys = flow.sigma_list(4, 1.0), noise_of(6), keys_of(6)
    whole = drawn(curved, noise, sigmas, form, 0.6, 0, 3, keys)[0]
    order = np.array([4, 1, 0])
    part = drawn(curved, noise[order], sigmas, form, 0.6, 0, 3, keys[order])[0]
    np.testing.assert_allclose(part, whole[order], atol=1e-6)
    assert (
        np.abs(whole[0] - drawn(curved, noise, sigmas, form, 0.6, 0, 3, keys[::-1])[0][0]).max()
        > 0.1
    )


# --- Densities ------------------------------------------------------------------------------------


def reference(form, xt, vt, sigma, after, level):
    """Mean and deviation in float64, from the papers' own form: x0 and noise predicted, weighed."""
    xt, vt = np.asarray(xt, np.float64), np.asarray(vt, np.float64)
    x0, noise = xt - sigma * vt, xt + (1 - sigma) * vt
    if form == "cps":
        angle = level * math.pi / 2
        return (1 - after) * x0 + after * math.cos(angle) * noise, after * math.sin(angle)
    g = level * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
    dt = after - sigma
    mean = xt * (1 + g**2 / (2 * sigma) * dt) + vt * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * math.sqrt(-dt)


@pytest.mark.parametrize("form", sde.FORMS)
@pytest.mark.parametrize("sigma, after", [(1.0, 0.9), (0.76, 0.51), (0.2, 0.05)])
@pytest.mark.parametrize("level", [0.2, 0.8])
def test_steps_and_densities_in_64_bits(form, sigma, after, level):
    """float32 against the formula: each is a few roundings of values of about 1. The square of z
    carries the error of (x - mean) / std, of size 1e-7 / std, twice."""
    sigma, after, level = (float(np.float32(x)) for x in (sigma, after, level))
    xt, vt, x = (noise_of(3, seed=k) for k in range(3))
    mean, std = sde.gaussian(form, xt, vt, sigma, after, level)
    expected, expected_std = reference(form, xt, vt, sigma, after, level)
    np.testing.assert_allclose(mean, expected, atol=2e-6)
    assert float(std) == pytest.approx(expected_std, rel=1e-6)
    x = expected + expected_std * np.asarray(x, np.float64)
    logp = -0.5 * ((x - expected) / expected_std) ** 2 - np.log(expected_std * np.sqrt(2 * np.pi))
    found = sde.log_prob(jnp.asarray(x, jnp.float32), mean, std)
    np.testing.assert_allclose(found, logp.mean((1, 2, 3)), atol=3e-6 / min(1, expected_std))


@pytest.mark.parametrize("form", sde.FORMS)
def test_a_trajectory_s_densities_are_those_of_its_steps(form):
    sigmas, level = flow.sigma_list(5, 1.0), 0.6
    _, steps = drawn(curved, noise_of(4), sigmas, form, level, 1, 3, keys_of(4))
    for w in range(3):
        sigma, after = float(steps.sigma[w]), float(steps.after[w])
        vt = curved(steps.xt[:, w], sigma)
        mean, std = reference(form, steps.xt[:, w], vt, sigma, after, level)
        x = np.asarray(steps.x_after[:, w], np.float64)
        logp = -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(steps.logp[:, w], logp.mean((1, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(steps.mean[:, w], mean, atol=2e-6)


def test_rows_may_have_sigmas_of_their_own():
    xt, vt = noise_of(3), noise_of(3, seed=2)
    sigma, after = jnp.array([1.0, 0.7, 0.3]), jnp.array([0.9, 0.5, 0.1])
    mean, std = sde.gaussian("flow", xt, vt, sigma, after, 0.7)
    logp = sde.log_prob(vt, mean, std)
    for b in range(3):
        one = sde.gaussian("flow", xt[b : b + 1], vt[b : b + 1], sigma[b], after[b], 0.7)
        np.testing.assert_allclose(mean[b], one[0][0], atol=1e-6)
        np.testing.assert_allclose(logp[b], sde.log_prob(vt[b : b + 1], *one)[0], rtol=1e-5)


def test_half_precision_velocities_are_weighed_in_float32():
    _, steps = drawn(
        lambda x, s: curved(x, s).astype(jnp.bfloat16), noise_of(2), flow.sigma_list(3, 1.0),
        "cps", 0.5, 0, 2, keys_of(2),
    )  # fmt: skip
    assert {x.dtype for x in steps} == {jnp.dtype("float32")}


def test_an_unknown_form():
    with pytest.raises(ValueError, match=r"'ddim'.*flow and cps"):
        sde.coefficients("ddim", 0.5, 0.4, 0.1)
