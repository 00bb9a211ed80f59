"""The objective of reinforcement learning: advantages by hand, ratios, clips, gradients.

The policy of most tests is a linear map of xt with a few parameters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import sde
from dreamlite_jax.objectives import grpo

ONE, DEFAULTS = jnp.ones(1), grpo.Settings()


def advantages(rewards, weights=(1.0,), asked=None, **settings):
    rewards = jnp.asarray(rewards, jnp.float32)
    rewards = rewards[..., None] if rewards.ndim == 2 else rewards
    asked = jnp.ones((len(rewards), rewards.shape[-1]), bool) if asked is None else asked
    return grpo.advantages(
        rewards, jnp.asarray(asked), jnp.asarray(weights), grpo.Settings(**settings)
    )


# --- Advantages -----------------------------------------------------------------------------------


def test_advantages_by_hand():
    """1 2 3 has mean 2 and deviation sqrt(2/3); 0 0 3 has mean 1 and sqrt(2)."""
    found, kept = advantages([[1, 2, 3], [0, 0, 3]])
    expected = [np.array([-1, 0, 1]) / (math.sqrt(2 / 3) + 1e-4)]
    expected += [np.array([-1, -1, 2]) / (math.sqrt(2) + 1e-4)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert kept.tolist() == [True, True]


def test_global_deviation_by_hand():
    """Of all six rewards: mean 2, squares 1 + 0 + 1 + 4 + 0 + 4 over 6; means stay the groups'."""
    found, _ = advantages([[1, 2, 3], [0, 2, 4]], scale="global")
    deviation = math.sqrt(10 / 6) + 1e-4
    np.testing.assert_allclose(found, np.array([[-1, 0, 1], [-2, 0, 2]]) / deviation, rtol=1e-6)


def test_each_reward_is_normalised_by_itself_and_then_summed():
    """The second reward's unit is a thousandth of the first's, its weight twice as much."""
    first, second = [1.0, 3.0], [0.002, 0.001]
    found, _ = advantages(np.stack([[first], [second]], -1), weights=(1.0, 2.0))
    deviations = 1 + 1e-4, 0.0005 + 1e-4
    expected = -1 / deviations[0] + 2 * 0.0005 / deviations[1]
    np.testing.assert_allclose(found, [[expected, -expected]], rtol=1e-5)


def test_rewards_that_are_not_asked_or_only_watched_do_not_count():
    rewards = np.stack([[[1.0, 3.0], [1.0, 3.0]], [[9.0, 0.0], [9.0, 0.0]]], -1)
    found, kept = advantages(rewards, (1.0, 1.0), [[True, False], [False, False]])
    np.testing.assert_allclose(found, [[-1 / (1 + 1e-4), 1 / (1 + 1e-4)], [0, 0]], rtol=1e-5)
    assert kept.tolist() == [True, False]
    watched, kept = advantages(rewards, (1.0, 0.0))
    np.testing.assert_allclose(watched[0], found[0])
    assert kept.all()


def test_groups_without_spread_are_dropped():
    """0.1 is no float32, and a mean of equal ones need not be equal to them."""
    found, kept = advantages([[0.1] * 7, [0.0, 0, 0, 0, 0, 0, 1]])
    assert kept.tolist() == [False, True]
    assert (found[0] == 0).all() and found[1, -1] > 2
    _, kept = advantages([[0.1, 0.14], [0.0, 1.0]], least_spread=0.05)
    assert kept.tolist() == [False, True]
    # Beside another reward a constant one adds nothing.
    both, kept = advantages(np.stack([[[0.1] * 3], [[1.0, 2.0, 3.0]]], -1), (1.0, 1.0))
    alone, _ = advantages([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(both, alone)
    assert kept.all()


@pytest.mark.parametrize("scale", grpo.SCALES)
def test_neither_an_offset_nor_the_order_of_pictures_and_prompts_matters(scale):
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((4, 6, 2))
    weights = (1.0, 0.5)
    found, _ = advantages(rewards, weights, scale=scale)
    prompts, pictures = rng.permutation(4), rng.permutation(6)
    other, _ = advantages(rewards[prompts][:, pictures] + 10, weights, scale=scale)
    np.testing.assert_allclose(other, found[prompts][:, pictures], atol=1e-4)


def test_advantages_are_clipped():
    found, _ = advantages([[0.0] * 99 + [1.0]], advantage_clip=5.0)
    assert found.max() == 5.0


def test_weights_make_a_mean_of_what_is_kept():
    kept = jnp.array([True, False, True, True])
    weights = grpo.row_weights(kept, 2)
    assert weights.mean() == pytest.approx(1)
    assert weights.tolist() == pytest.approx([4 / 3] * 2 + [0] * 2 + [4 / 3] * 4)
    assert not grpo.row_weights(jnp.zeros(3, bool), 2).any()


def test_diversity_is_the_mean_distance_of_pairs():
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (2, 4, 6, 5, 3)).astype(np.float32)
    pictures[1, :] = pictures[1, :1]
    found = grpo.diversity(jnp.asarray(pictures))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    first = pictures[0] / 2
    expected = np.mean([np.sqrt(np.square(first[i] - first[j]).mean()) for i, j in pairs])
    np.testing.assert_allclose(found, [expected, 0], rtol=1e-5)


# --- Windows --------------------------------------------------------------------------------------


def starts(process, count=200):
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    find = jax.vmap(functools.partial(grpo.window_start, process))
    return np.asarray(find(jnp.arange(count), keys))


def test_a_random_window_is_everywhere_it_may_be():
    found = starts(grpo.Process(steps=10, window=2, within=0.5))
    assert sorted(set(found.tolist())) == [0, 1, 2, 3]
    assert np.bincount(found).min() > 25


def test_a_sliding_window_moves_from_noise_to_data_and_begins_again():
    found = starts(grpo.Process(steps=6, window=3, within=1.0, order="sliding", every=4), 16)
    assert found.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4


@pytest.mark.parametrize(
    "process, size, places",
    [
        (grpo.Process(steps=10, window=0), 9, 1),
        (grpo.Process(steps=10, window=0, within=1.0), 9, 1),
        (grpo.Process(steps=10, window=2, within=1.0), 2, 8),
        (grpo.Process(steps=2, window=1), 1, 1),
    ],
)
def test_the_last_step_is_never_random(process, size, places):
    assert (process.size, process.places) == (size, places)
    assert process.places - 1 + process.size <= process.steps - 1
    assert not process.problems()


@pytest.mark.parametrize(
    "settings, message",
    [
        (grpo.Settings(clip=0.0), "clip is 0.0, should be positive"),
        (grpo.Settings(advantage_clip=math.nan), "advantage_clip is nan"),
        (grpo.Settings(kl=-1.0), "kl is -1.0, should be 0 or more"),
        (grpo.Settings(least_spread=math.inf), "least_spread is inf"),
        (grpo.Settings(scale="batch"), "scale is 'batch', known are group, global"),
        (grpo.Process(steps=1, window=0), "steps is 1, should be at least 2"),
        (grpo.Process(form="ddim"), "form is 'ddim', known are flow, cps"),
        (grpo.Process(level=0.0), "level is 0.0, should be above 0"),
        (grpo.Process(level=1.2), "level is 1.2, should be above 0, and with cps at most 1"),
        (grpo.Process(window=10), "window is 10, should be from 0 to the steps less one"),
        (grpo.Process(order="up"), "order is 'up', known are random, sliding"),
        (grpo.Process(within=0.0), "within is 0.0"),
        (grpo.Process(window=6), "window is 6, should be at most 5: it stays within 0.5 of 10"),
        (grpo.Process(every=0), "every is 0, should be at least 1"),
    ],
)
def test_settings_that_are_wrong(settings, message):
    (problem,) = settings.problems()
    assert problem.startswith(message)
    assert not grpo.Settings().problems() and not grpo.Process().problems()
    assert not grpo.Process(form="flow", level=1.2).problems()


# --- The loss -------------------------------------------------------------------------------------

LEVEL = 0.6
PARAMS = {"scale": jnp.float32(0.7), "shift": jnp.float32(-0.2), "turn": jnp.float32(0.1)}


def policy(params, dtype=jnp.float32):
    def velocity(xt, sigma):
        sigma = jnp.asarray(sigma, jnp.float32)
        sigma = sigma.reshape(sigma.shape + (1,) * (xt.ndim - sigma.ndim))
        values = params["scale"] * xt + params["shift"] + params["turn"] * sigma * xt[..., ::-1]
        return values.astype(dtype)

    return velocity


@functools.partial(jax.jit, static_argnames=("form", "dtype"))
def rolled_out(params, form="cps", dtype=jnp.float32, rows=12):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(12))
    noise = jax.vmap(lambda key: jax.random.normal(key, (4, 6, 4)))(keys)
    sigmas = jnp.array([1, 0.9, 0.7, 0.4, 0], jnp.float32)
    _, steps = sde.sample(policy(params, dtype), noise, sigmas, form, LEVEL, 0, 3, keys)

    def flat(x):
        return x.reshape(-1, *x.shape[2:])

    sigma, after = (jnp.tile(x, 12) for x in (steps.sigma, steps.after))
    mean = flat(steps.mean)
    return grpo.Old(flat(steps.xt), flat(steps.x_after), mean, mean, flat(steps.logp), sigma, after)


@functools.partial(jax.jit, static_argnames=("form", "settings", "dtype"))
def found_losses(params, old, advantage, form="cps", settings=DEFAULTS, dtype=jnp.float32):
    return grpo.losses(policy(params, dtype), old, advantage, form, LEVEL, settings)


ADVANTAGE = jnp.asarray(np.random.default_rng(0).standard_normal(36), jnp.float32)


@pytest.mark.parametrize("form", sde.FORMS)
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ratio_is_1_before_the_first_update(form, guard, dtype):
    """Densities are float32 whatever the network computes in. In bfloat16 two programs round the
    network's values (here below 4) by up to 2^-8 of them apart; a mean over 96 of them with
    random signs, over the deviation (0.2 and more) and times the step (up to 0.4), leaves 1e-3."""
    old = rolled_out(PARAMS, form, dtype)
    found = found_losses(PARAMS, old, ADVANTAGE, form, grpo.Settings(guard=guard), dtype)
    bound = 1e-5 if dtype == jnp.float32 else 1e-3
    assert np.abs(found.ratio - 1).max() <= bound
    assert np.abs(found.kl).max() <= bound


@pytest.mark.parametrize("form", sde.FORMS)
@pytest.mark.parametrize("guard", [False, True])
def test_the_gradient_at_ratio_1_is_the_plain_policy_gradient(form, guard):
    """-A d log p; with the guard times the deviation over the step's length."""
    old = rolled_out(PARAMS, form)
    settings = grpo.Settings(guard=guard, clip=1e-3)

    def plain(params):
        vt = policy(params)(old.xt, old.sigma)
        mean, std = sde.gaussian(form, old.xt, vt, old.sigma, old.after, LEVEL)
        scale = std / (old.sigma - old.after) if guard else 1
        return -(ADVANTAGE * scale * sde.log_prob(old.x_after, mean, std)).mean()

    def ours(params):
        return found_losses(params, old, ADVANTAGE, form, settings).total.mean()

    expected, found = jax.grad(plain)(PARAMS), jax.grad(ours)(PARAMS)
    for name in PARAMS:
        assert abs(expected[name]) > 1e-3
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-4), name


@pytest.mark.parametrize("sign", [1, -1])
def test_the_clip_stops_what_has_gone_far_enough(sign):
    """Of a step that became likelier and is rewarded, or less likely and punished, nothing more."""
    old = rolled_out(PARAMS)
    moved = {**PARAMS, "shift": PARAMS["shift"] + 0.02}
    advantage = jnp.full(36, float(sign))
    settings = grpo.Settings(clip=1e-4)
    found = found_losses(moved, old, advantage, settings=settings)
    far = np.asarray(sign * (found.ratio - 1) > 1e-4)
    assert 5 < far.sum() < 31
    np.testing.assert_array_equal(found.clipped, far)
    np.testing.assert_allclose(
        found.total, np.where(far, -sign * (1 + sign * 1e-4), -sign * found.ratio), rtol=1e-6
    )

    def one(params, k):
        return found_losses(params, old, advantage, settings=settings).total[k]

    grads = jax.jit(jax.vmap(jax.grad(one), (None, 0)))(moved, jnp.arange(36))
    stopped = np.asarray(grads["shift"]) == 0
    np.testing.assert_array_equal(stopped, far)


@pytest.mark.parametrize("form", sde.FORMS)
def test_the_divergence_is_that_of_the_gaussians(form):
    """By float64, and as the mean of log p - log q over draws."""
    old, other = rolled_out(PARAMS, form), {**PARAMS, "scale": jnp.float32(1.2)}
    vt = policy(other)(old.xt, old.sigma)
    reference = sde.gaussian(form, old.xt, vt, old.sigma, old.after, LEVEL)[0]
    settings = grpo.Settings(kl=0.3)
    found = found_losses(
        PARAMS, old._replace(mean_reference=reference), 0 * ADVANTAGE, form, settings
    )
    std = np.asarray(sde.coefficients(form, old.sigma, old.after, LEVEL)[1], np.float64)
    square = np.square(np.asarray(old.mean, np.float64) - np.asarray(reference, np.float64))
    expected = square.mean((1, 2, 3)) / (2 * std**2)
    np.testing.assert_allclose(found.kl, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.total, 0.3 * found.kl, rtol=1e-5)
    draws = np.asarray(old.mean)[None] + std[:, None, None, None] * np.random.default_rng(0).normal(
        size=(400, *old.mean.shape)
    )
    q = np.square((draws - np.asarray(reference)) / std[:, None, None, None])
    p = np.square((draws - np.asarray(old.mean)) / std[:, None, None, None])
    # (q - p) / 2 has the variance 2 KL: within five standard errors of 400 x 96 draws.
    error = np.abs((q - p).mean((0, 2, 3, 4)) / 2 - expected)
    assert (error < 5 * np.sqrt(2 * expected / (400 * 96)) + 1e-6).all()
    assert expected.max() > 0.01


def test_the_guard_centres_the_log_ratio():
    """After a move of the policy the plain log ratio lies below 0, most of all where a step's
    deviation is small; the guard's mean is 0."""
    old, moved = rolled_out(PARAMS), {**PARAMS, "shift": PARAMS["shift"] + 0.3}
    logs = {}
    for guard in (False, True):
        found = found_losses(moved, old, ADVANTAGE, settings=grpo.Settings(guard=guard))
        logs[guard] = np.log(np.asarray(found.ratio, np.float64)).reshape(12, 3)
    vt, moved_vt = (policy(p)(old.xt, old.sigma) for p in (PARAMS, moved))
    std = np.asarray(sde.coefficients("cps", old.sigma, old.after, LEVEL)[1]).reshape(12, 3)
    means = [sde.gaussian("cps", old.xt, v, old.sigma, old.after, LEVEL)[0] for v in (vt, moved_vt)]
    square = np.square(np.asarray(means[1] - means[0])).mean((1, 2, 3)).reshape(12, 3)
    np.testing.assert_allclose(logs[True], (logs[False] + square / (2 * std**2)) * std, atol=1e-5)
    assert logs[False][:, 2].mean() < -0.03
    assert (logs[False][:, 2] < 0).all()
    # Its mean over the old policy's draws is 0: within four standard errors.
    error = logs[True].std(0) / math.sqrt(12)
    assert (abs(logs[True].mean(0)) < 4 * error + 1e-6).all()


def test_more_reward_after_some_steps():
    """A toy: pictures whose mean is high are rewarded, and the policy learns to make them."""

    @jax.jit
    def update(params, k):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(jax.random.key(0), k), jnp.arange(64)
        )
        noise = jax.vmap(lambda key: jax.random.normal(key, (2, 2, 1)))(keys)
        sigmas = jnp.array([1, 0.8, 0.5, 0], jnp.float32)
        x0, steps = sde.sample(policy(params), noise, sigmas, "cps", 0.8, 0, 2, keys)
        rewards = x0.mean((1, 2, 3)).reshape(4, 16, 1)
        found, _ = grpo.advantages(rewards, jnp.ones((4, 1), bool), ONE, grpo.Settings())

        def flat(x):
            return x.reshape(-1, *x.shape[2:])

        old = grpo.Old(
            *map(flat, (steps.xt, steps.x_after, steps.mean, steps.mean, steps.logp)),
            *(jnp.tile(x, 64) for x in (steps.sigma, steps.after)),
        )
        advantage = jnp.repeat(found.reshape(-1), 2)

        def loss(params):
            made = grpo.losses(policy(params), old, advantage, "cps", 0.8, grpo.Settings(clip=0.2))
            return made.total.mean()

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), rewards.mean()

    params, seen = PARAMS, []
    for k in range(40):
        params, reward = update(params, k)
        seen.append(float(reward))
    assert np.mean(seen[-10:]) > np.mean(seen[:10]) + 0.2
