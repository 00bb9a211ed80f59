"""DiffusionNFT's objective: its formula in float64, its gradient, and where it leads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamlite_jax.objectives import grpo, nft

N, SHAPE = 6, (6, 2, 2, 3)


def noised(seed=0):
    rng = np.random.default_rng(seed)
    x0, noise, vt, vt_reference = rng.standard_normal((4, *SHAPE)).astype(np.float32)
    sigma = rng.uniform(0.1, 1, N).astype(np.float32)
    return nft.Old(x0, noise, sigma, vt, vt_reference), rng.uniform(-5, 5, N).astype(np.float32)


def by_formula(vt, old, advantage, settings, sizes=None):
    """The module's formula, written down for one picture after another in float64; `sizes` holds
    w+ and w- where they should not follow vt."""
    found = []
    for k in range(N):
        x0, noise, s = (np.float64(x[k]) for x in (old.x0, old.noise, old.sigma))
        v_old, v_ref, v = np.float64(old.vt[k]), np.float64(old.vt_reference[k]), np.float64(vt[k])
        b, r = settings.strength, 0.5 + advantage[k] / (2 * settings.advantage_clip)
        xt, total = (1 - s) * x0 + s * noise, 0.0
        ways = (r, (1 - b) * v_old + b * v), (1 - r, (1 + b) * v_old - b * v)
        for i, (share, mixed) in enumerate(ways):
            apart = xt - s * mixed - x0
            size = np.abs(apart).mean() if sizes is None else sizes[k][i]
            total += share / b * np.square(apart).mean() / size
        found.append(total + settings.kl * np.square(v - v_ref).mean())
    return np.array(found)


def sizes_of(vt, old, b):
    xt = (1 - old.sigma[:, None, None, None]) * old.x0 + old.sigma[:, None, None, None] * old.noise
    ways = (1 - b) * old.vt + b * vt, (1 + b) * old.vt - b * vt
    apart = [xt - old.sigma[:, None, None, None] * mixed - old.x0 for mixed in ways]
    return np.stack([np.abs(one).mean((1, 2, 3)) for one in apart], 1)


@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_the_loss_and_its_gradient_are_the_formula_s(strength):
    settings = nft.Settings(strength=strength, kl=0.3)
    old, advantage = noised()
    vt = old.vt + 0.2 * np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)

    def total(vt):
        return nft.losses(lambda xt, sigma: vt, old, jnp.asarray(advantage), settings).total.sum()

    assert total(vt) == pytest.approx(by_formula(vt, old, advantage, settings).sum(), rel=1e-5)
    found, sizes = jax.grad(total)(vt), sizes_of(vt, old, strength)
    rng, step = np.random.default_rng(2), 1e-4
    for _ in range(5):  # w+- have no gradient
        way = rng.standard_normal(SHAPE)
        ends = [
            by_formula(vt + sign * step * way, old, advantage, settings, sizes).sum()
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert np.vdot(found, way) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_at_the_old_policy_it_is_regression_weighed_by_the_advantage():
    """Whatever b: towards x0 by as much as the advantage, away below 0, nowhere at 0."""
    old, advantage = noised()
    advantage[0], advantage[1], advantage[2] = 0.0, 2.0, -2.0

    def gradient(b):
        settings = nft.Settings(strength=b)
        return jax.grad(lambda vt: nft.losses(lambda *_: vt, old, advantage, settings).total.sum())

    first, second = (np.asarray(gradient(b)(old.vt)) for b in (1.0, 0.1))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first[0], 0, atol=1e-6)
    away = old.vt - (old.noise - old.x0)  # of the velocity that leads to x0
    assert np.vdot(first[1], away[1]) > 0 and np.vdot(first[2], away[2]) < 0


def test_the_divergence_is_of_velocities():
    old, advantage = noised()
    found = nft.losses(lambda *_: old.vt, old, advantage, nft.Settings())
    expected = np.square(old.vt - old.vt_reference).mean((1, 2, 3))
    np.testing.assert_allclose(found.kl, expected, rtol=1e-5)
    same = old._replace(vt_reference=old.vt)
    assert not nft.losses(lambda *_: old.vt, same, advantage, nft.Settings()).kl.any()


def test_a_policy_goes_where_the_rewards_are():
    """Pictures of one number, normal around m with deviation 1; the flow to them is known. The
    reward falls with the distance from 2, so m goes there."""
    settings = nft.Settings()
    tx = optax.adam(0.05)

    def velocity(m, xt, sigma):
        s = sigma[:, None]
        x0 = m + (1 - s) * (xt - (1 - s) * m) / ((1 - s) ** 2 + s**2)
        return (xt - x0) / s

    @jax.jit
    def update(m, state, key):
        for_x0, for_noise, for_sigma = jax.random.split(key, 3)
        x0 = m + jax.random.normal(for_x0, (64, 1))
        noise = jax.random.normal(for_noise, x0.shape)
        sigma = jax.random.uniform(for_sigma, (64,), minval=0.05)
        rewards = -jnp.abs(x0 - 2).reshape(4, 16, 1)
        asked, weights = jnp.ones((4, 1), bool), jnp.ones(1)
        advantage, _ = grpo.advantages(rewards, asked, weights, settings)
        xt = (1 - sigma[:, None]) * x0 + sigma[:, None] * noise
        vt = velocity(m, xt, sigma)
        old = nft.Old(x0, noise, sigma, vt, vt)

        def loss(m):
            policy = functools.partial(velocity, m)
            return nft.losses(policy, old, advantage.reshape(-1), settings).total.mean()

        change, state = tx.update(jax.grad(loss)(m), state)
        return optax.apply_updates(m, change), state

    m = jnp.zeros(())
    state = tx.init(m)
    for k in range(200):
        m, state = update(m, state, jax.random.key(k))
    assert m == pytest.approx(2, abs=0.3)  # around it Adam goes on by its rate


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strength": 0.0}, "strength is 0.0, should be positive"),
        ({"kl": -1.0}, "kl is -1.0, should be 0 or more"),
        ({"levels": 0}, "levels is 0, should be at least 1"),
        ({"scale": "batch"}, "scale is 'batch', known are group, global"),
        ({"advantage_clip": 0.0}, "advantage_clip is 0.0, should be positive"),
    ],
)
def test_what_is_wrong_with_settings(changes, message):
    assert nft.Settings(**changes).problems() == [message]
    assert not nft.Settings().problems()
