"""The flow's algebra, the densities and the resolution shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import flow
from dreamlite_jax.diffusion.flow import ResolutionShift

RNG = np.random.default_rng(0)
X0, NOISE = RNG.standard_normal((2, 3, 4, 5, 2), np.float32)
SIGMA = np.array([0.1, 0.5, 0.9], np.float32)


def test_path_ends_at_data_and_noise():
    np.testing.assert_array_equal(flow.path(X0, NOISE, 0.0), X0)
    np.testing.assert_array_equal(flow.path(X0, NOISE, 1.0), NOISE)


def test_one_sigma_for_each_latent():
    xt = flow.path(X0, NOISE, SIGMA)
    for b, sigma in enumerate(SIGMA):
        np.testing.assert_allclose(xt[b], flow.path(X0[b], NOISE[b], sigma), rtol=1e-6)


def test_conversions_invert_each_other():
    xt, vt = flow.path(X0, NOISE, SIGMA), flow.velocity(X0, NOISE)
    close = {"atol": 2e-6}
    np.testing.assert_allclose(flow.x0_from_velocity(xt, vt, SIGMA), X0, **close)
    np.testing.assert_allclose(flow.noise_from_velocity(xt, vt, SIGMA), NOISE, **close)
    np.testing.assert_allclose(flow.velocity_from_x0(xt, X0, SIGMA), vt, atol=1e-5)
    np.testing.assert_allclose(flow.velocity_from_noise(xt, NOISE, SIGMA), vt, atol=1e-5)


def test_velocity_is_the_derivative_of_the_path():
    _, derivative = jax.jvp(lambda s: flow.path(X0, NOISE, s), (0.3,), (1.0,))
    np.testing.assert_allclose(derivative, flow.velocity(X0, NOISE), atol=1e-6)


def test_all_is_float32():
    half = jnp.asarray(SIGMA, jnp.bfloat16)
    assert flow.path(X0, NOISE, half).dtype == jnp.float32
    assert flow.timestep(half).dtype == flow.shift_sigma(half, 1.0).dtype == jnp.float32
    assert flow.sigma_list(4, 1.15).dtype == np.float32


def test_timestep_is_a_thousand_sigma():
    np.testing.assert_allclose(flow.timestep(SIGMA), [100, 500, 900])


def test_densities():
    """Quantiles: those of U(0, 1), and sigmoid(mean + std * those of the normal)."""
    key, quantiles = jax.random.key(0), np.array([0.1, 0.5, 0.9])
    got = np.quantile(flow.uniform(key, (40000,)), quantiles)
    np.testing.assert_allclose(got, quantiles, atol=0.01)
    got = np.quantile(flow.logit_normal(key, (40000,), 0.5, 2.0), quantiles)
    normal = np.array([-1.2816, 0, 1.2816])
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-(0.5 + 2 * normal))), atol=0.015)


def test_shift_at_its_two_ends():
    """0.5 for 256 patches (256 px), max_shift for 4096 (1024 px); patches are 2 x 2."""
    shift = ResolutionShift(max_shift=1.16)
    assert flow.resolution_mu(32, 32, shift) == pytest.approx(0.5)
    assert flow.resolution_mu(128, 128, shift) == pytest.approx(1.16)
    assert flow.resolution_mu(64, 256, shift) == pytest.approx(1.16)


def test_shift_keeps_the_ends_and_the_order():
    sigma = np.linspace(0, 1, 101)
    shifted = np.asarray(flow.shift_sigma(sigma, 1.15))
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (np.diff(shifted) > 0).all() and (shifted[1:-1] > sigma[1:-1]).all()
    np.testing.assert_allclose(flow.shift_sigma(sigma, 0.0), sigma, atol=1e-6)


def test_four_steps_at_1024_pixels():
    mu = flow.resolution_mu(128, 128, ResolutionShift())
    np.testing.assert_allclose(flow.sigma_list(4, mu), [1, 0.905, 0.760, 0.513, 0], atol=0.0006)


def test_steps_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        flow.sigma_list(0, 1.0)


def test_scheduler_config_round_trips():
    shift = ResolutionShift(0.4, 1.3, 200, 4000)
    assert ResolutionShift.from_scheduler(shift.to_scheduler()) == shift


def test_a_fixed_shift_is_a_constant_mu():
    """diffusers' shift * s / (1 + (shift - 1) s) is the same curve."""
    shift = ResolutionShift.from_scheduler({"shift": 3.0})
    mu = flow.resolution_mu(17, 40, shift)
    np.testing.assert_allclose(flow.shift_sigma(SIGMA, mu), 3 * SIGMA / (1 + 2 * SIGMA), rtol=1e-6)


def test_other_schedules_are_refused_in_one_line():
    settings = {"time_shift_type": "linear", "use_karras_sigmas": True, "shift_terminal": 0.1}
    with pytest.raises(ValueError) as refused:
        ResolutionShift.from_scheduler(settings)
    assert all(key in str(refused.value) for key in settings)
    assert "\n" not in str(refused.value)
