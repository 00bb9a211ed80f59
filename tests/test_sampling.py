"""The samplers on flows whose solution is known, and the algebra of guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import flow, sampling

NOISE = np.random.default_rng(0).standard_normal((3, 4, 5, 2)).astype(np.float32)
X0 = np.random.default_rng(1).standard_normal(NOISE.shape).astype(np.float32)


def straight(xt, sigma):
    """The velocity of a data set that holds X0 alone; at sigma 0 it is not defined."""
    return (xt - X0) / sigma


def curved(xt, sigma):
    """x(s) = x(1) exp((s^2 - 1) / 2)."""
    return sigma * xt


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("sigmas", [flow.sigma_list(4, 1.15), [1.0, 0.0], [1, 0.7, 0.69, 0.1, 0]])
def test_exact_on_straight_lines(method, sigmas):
    np.testing.assert_allclose(sampling.sample(straight, NOISE, sigmas, method), X0, atol=2e-6)


def test_any_part_of_the_way():
    got = sampling.sample(straight, flow.path(X0, NOISE, 0.8), [0.8, 0.5, 0.3])
    np.testing.assert_allclose(got, flow.path(X0, NOISE, 0.3), atol=1e-6)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    """Twice the steps: the error falls by 2 to the order."""

    def error(steps):
        sigmas = np.linspace(1, 0.2, steps + 1)
        exact = NOISE * np.exp((0.2**2 - 1) / 2)
        return np.abs(sampling.sample(curved, NOISE, sigmas, method) - exact).max()

    assert np.log2(error(8) / error(16)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("method", "expected"), [("euler", 5), ("heun", 9)])
def test_evaluations(method, expected):
    """N for Euler; 2 N - 1 for Heun, which never asks for the velocity at sigma 0."""
    seen = []

    def counted(xt, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma)
        return straight(xt, sigma)

    sampling.sample(counted, NOISE, flow.sigma_list(5, 0.5), method)
    jax.effects_barrier()
    assert len(seen) == expected and min(seen) > 0


def test_steps_are_reported():
    seen = []
    sampling.sample(straight, NOISE, flow.sigma_list(3, 0.5), on_step=lambda i: seen.append(int(i)))
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2]


def test_the_network_is_traced_once():
    """One scan: compile time does not grow with the number of steps."""
    traced = []

    def counted(xt, sigma):
        traced.append(1)
        return straight(xt, sigma)

    jax.jit(lambda x, s: sampling.sample(counted, x, s))(NOISE, flow.sigma_list(20, 0.5))
    assert len(traced) == 1


def test_half_precision_velocities_are_summed_in_float32():
    got = sampling.sample(lambda x, s: curved(x, s).astype(jnp.bfloat16), NOISE, [1.0, 0.5, 0.0])
    assert got.dtype == jnp.float32


def test_unknown_method():
    with pytest.raises(ValueError, match=r"'rk4'.*euler and heun"):
        sampling.sample(straight, NOISE, [1.0, 0.0], "rk4")


class Recorded:
    """A conditioned velocity function that knows its branches by their condition's value."""

    def __init__(self):
        self.batches = []

    def __call__(self, xt, sigma, condition):
        self.batches.append(xt.shape[0])
        return xt * condition["value"][:, None, None, None] + sigma


def condition(value):
    return {"value": jnp.full(len(NOISE), value, jnp.float32)}


def test_plain_and_single_guidance():
    network, sigma = Recorded(), jnp.float32(0.5)
    got = sampling.plain(network, condition(2.0))(NOISE, sigma)
    np.testing.assert_allclose(got, 2 * NOISE + 0.5, rtol=1e-6)
    got = sampling.single_guidance(network, condition(2.0), condition(3.0), 3.5)(NOISE, sigma)
    np.testing.assert_allclose(got, (2 + 3.5 * (3 - 2)) * NOISE + 0.5, rtol=1e-5)
    assert network.batches == [3, 6]


@pytest.mark.parametrize(("image_scale", "branches"), [(1.5, 3), (1.0, 2), (1, 2), (0.0, 3)])
def test_dual_guidance(image_scale, branches):
    """v0 + g (v_IT - v_I) + g_I (v_I - v0), with as few branches as that needs."""
    network = Recorded()
    velocity = sampling.dual_guidance(
        network, condition(1.0), condition(2.0), condition(5.0), 3.5, image_scale
    )
    got = velocity(NOISE, jnp.float32(0.5))
    factor = 1 + 3.5 * (5 - 2) + image_scale * (2 - 1)
    np.testing.assert_allclose(got, factor * NOISE + 0.5, rtol=1e-5, atol=1e-5)
    assert network.batches == [branches * len(NOISE)]


def test_an_image_scale_in_an_array_takes_three_branches():
    network = Recorded()
    conditions = [condition(v) for v in (1.0, 2.0, 5.0)]
    sampling.dual_guidance(network, *conditions, 3.5, jnp.float32(1))(NOISE, jnp.float32(0.5))
    assert network.batches == [9]


def test_branches_keep_every_rows_own_condition():
    rows = [{"value": jnp.arange(3.0) + 10 * k} for k in range(2)]
    got = sampling.branches(Recorded(), rows, NOISE, jnp.float32(0))
    for k in range(2):
        for b in range(3):
            np.testing.assert_allclose(got[k, b], NOISE[b] * (b + 10 * k), rtol=1e-6)
