"""DMD2's pieces against formulas, and as a whole where the right answer is known: in one dimension,
with a teacher whose velocity is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dreamlite_jax.diffusion import flow, sampling
from dreamlite_jax.objectives import dmd2, flow_matching

KEY, SHAPE = jax.random.key(5), (6, 4, 4, 3)


def normal(k, shape=SHAPE):
    return jax.random.normal(jax.random.fold_in(KEY, k), shape)


# --- The student's samples ------------------------------------------------------------------------


def velocity_fn(xt, sigma):
    return jnp.sin(3 * xt) + jnp.reshape(sigma, (-1, 1, 1, 1)) * xt


@pytest.mark.parametrize("stop", range(4))
def test_simulation_follows_the_deployed_sampler_step_by_step(stop):
    noise, sigmas = normal(0), flow.sigma_list(4, 0.7)
    found, _ = jax.jit(functools.partial(dmd2.simulated, velocity_fn))(noise, sigmas, stop)
    if stop == 0:
        np.testing.assert_array_equal(found, noise)
    else:
        wanted = sampling.sample(velocity_fn, noise, sigmas[: stop + 1])
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_last_step_of_simulation_gives_the_sample():
    noise, sigmas = normal(0), flow.sigma_list(4, 0.7)
    xt, found = dmd2.simulated(velocity_fn, noise, sigmas, 3)
    np.testing.assert_allclose(found, sampling.sample(velocity_fn, noise, sigmas), atol=1e-6)
    again = dmd2.sample_from(velocity_fn, xt, jnp.asarray(sigmas)[3])
    np.testing.assert_allclose(found, again, atol=1e-6)


def test_no_gradient_passes_through_simulated_steps():
    def reached(scale):
        found = dmd2.simulated(lambda x, s: scale * x, normal(0), flow.sigma_list(4, 0.7), 3)
        return sum(x.sum() for x in found)

    assert jax.grad(reached)(0.5) == 0


# --- The loss -------------------------------------------------------------------------------------


def test_the_surrogate_has_the_intended_gradient():
    x0, noise = normal(1), normal(2)
    sigma = jnp.linspace(0.1, 0.9, SHAPE[0])

    def fake_fn(xt, sigma):
        return 0.3 * xt + 0.1

    def teacher_fn(xt, sigma):
        return jnp.tanh(xt)

    def loss(x0):
        return dmd2.matching_losses(x0, sigma, noise, fake_fn, teacher_fn).sum()

    x, n, s = (np.asarray(a, np.float64) for a in (x0, noise, sigma))
    s = s[:, None, None, None]
    xt = (1 - s) * x + s * n
    fake, teacher = xt - s * (0.3 * xt + 0.1), xt - s * np.tanh(xt)
    g = (fake - teacher) / np.abs(x - teacher).mean((1, 2, 3), keepdims=True)
    size = x[0].size
    np.testing.assert_allclose(jax.grad(loss)(x0), g / size, atol=2e-6)
    np.testing.assert_allclose(loss(x0), 0.5 * np.square(g).mean((1, 2, 3)).sum(), rtol=1e-5)

    # Where the aim stands still, the loss is that quadratic: its finite differences are g, too.
    aim, at, h = x - g, (2, 1, 3, 0), 1e-4
    up, down = x.copy(), x.copy()
    up[at] += h
    down[at] -= h
    slope = (0.5 * np.square(up - aim).sum() - 0.5 * np.square(down - aim).sum()) / (2 * h) / size
    np.testing.assert_allclose(jax.grad(loss)(x0)[at], slope, rtol=1e-4)


def test_neither_score_has_a_gradient():
    def loss(scales):
        fake_fn, teacher_fn = (lambda x, s, k=k: scales[k] * x for k in ("fake", "teacher"))
        given = normal(1), jnp.full(SHAPE[0], 0.5), normal(2), fake_fn, teacher_fn
        return dmd2.matching_losses(*given).sum()

    found = jax.grad(loss)({"fake": 0.2, "teacher": 0.7})
    assert found == {"fake": 0, "teacher": 0}


def test_a_row_without_direction_stays_where_it_is():
    x0 = normal(1).at[0].set(0.0)
    teacher = normal(2).at[0].set(0.0)  # nothing to divide by
    g = dmd2.direction(x0, normal(3), teacher)
    assert not np.asarray(g[0]).any() and np.isfinite(g).all() and np.asarray(g[1]).all()


def test_draws_stay_in_their_range_and_follow_their_rows():
    settings = dmd2.Settings(least=0.2, most=0.6, shift=False, within=True)
    keys = jax.random.split(KEY, 500)
    given = keys, jnp.zeros((500, 2, 2, 1)), 1.0
    sigma, noise = dmd2.draw(settings, *given, jnp.ones(500), jnp.zeros(500))
    assert 0.2 <= sigma.min() < 0.22 and 0.58 < sigma.max() < 0.6
    shifted, same = dmd2.draw(settings._replace(shift=True), *given, jnp.ones(500), jnp.zeros(500))
    np.testing.assert_allclose(shifted, flow.shift_sigma(sigma, 1.0), atol=1e-6)
    np.testing.assert_array_equal(same, noise)
    ends = jnp.linspace(0.1, 1, 500), jnp.linspace(0, 0.6, 500)
    between, _ = dmd2.draw(settings, *given, *ends)
    np.testing.assert_allclose(between, ends[1] + (ends[0] - ends[1]) * sigma, atol=1e-6)
    as_dmd2, _ = dmd2.draw(settings._replace(within=False), *given, *ends)
    np.testing.assert_array_equal(as_dmd2, sigma)


def test_each_tasks_guidance_is_drawn_around_its_own():
    settings = dmd2.Settings(guidance=3.5, edit_guidance=1.5, jitter=0.5)
    keys, edits = jax.random.split(jax.random.key(0), 1000), jnp.arange(1000) % 2 == 1
    scale = dmd2.draw_guidance(settings, edits, keys)
    assert scale.shape == (1000, 1, 1, 1)
    for middle, part in ((3.5, scale[::2]), (1.5, scale[1::2])):
        assert middle - 0.5 <= part.min() < middle - 0.45
        assert middle + 0.45 < part.max() <= middle + 0.5
    plain = dmd2.draw_guidance(settings._replace(jitter=0.0), edits, keys)
    np.testing.assert_array_equal(plain, dmd2.guidance_of(settings, edits))
    np.testing.assert_array_equal(plain[:2].ravel(), [3.5, 1.5])


def test_the_trajectory_is_the_teachers():
    """A student that goes straight where the teacher ends has no loss; one that does not, has."""
    noise, sigmas = normal(1), jnp.asarray(flow.sigma_list(4, 0.7))

    def teacher_fn(xt, sigma):
        return jnp.tanh(xt)

    fine = jnp.linspace(sigmas[0], sigmas[1], 9)
    reached = sampling.sample(teacher_fn, noise, fine)
    chord = (noise - reached) / (sigmas[0] - sigmas[1])
    exact = dmd2.trajectory_losses(lambda x, s: chord, teacher_fn, noise, sigmas, 8)
    off = dmd2.trajectory_losses(lambda x, s: chord + 0.1, teacher_fn, noise, sigmas, 8)
    np.testing.assert_allclose(exact, 0, atol=1e-8)
    np.testing.assert_allclose(off, 0.01, rtol=1e-3)


def test_the_adversarial_losses_pull_apart():
    """Samples move where the discriminator says real; the discriminator learns which are."""
    x0, real, noise, sigma = normal(1), normal(2) + 3, normal(3), jnp.full(SHAPE[0], 0.3)

    def logit_fn(xt, sigma, slope=1.0):
        return slope * xt.mean((1, 2, 3))

    grad = jax.grad(lambda x: dmd2.fooling_losses(x, sigma, noise, logit_fn).sum())(x0)
    assert (grad < 0).all()

    def telling(slope):
        fn = functools.partial(logit_fn, slope=slope)
        return dmd2.telling_losses(x0, real, sigma, noise, fn).mean()

    assert jax.grad(telling)(0.0) < 0  # real ones lie higher: the slope rises
    np.testing.assert_allclose(telling(0.0), 2 * np.log(2), rtol=1e-6)


def test_settings_that_make_no_sense_are_told():
    bad = dmd2.Settings(least=0.9, most=0.1, gan=-1.0, guidance=float("nan"), trajectory_steps=0)
    found = "; ".join(bad.problems())
    assert all(word in found for word in ("least and most", "gan", "guidance", "trajectory_steps"))
    assert not dmd2.Settings().problems()


# --- One dimension, where the answer is known -----------------------------------------------------

MEANS, WEIGHTS, SPREAD = np.array([-1.2, 1.0]), np.array([0.35, 0.65]), 0.3
# A row is 16 numbers, each by itself from the mixture: g is divided by a mean over a row, which of
# one number would be the number itself.
WIDTH, ROW, ROWS = 48, (4, 4, 1), 64
SETTINGS = dmd2.Settings(within=True)


def every_number(velocity_fn):
    """Of [B, ...], from one of numbers and sigmas [n]."""

    def velocity(xt, sigma):
        s = jnp.broadcast_to(jnp.reshape(sigma, (-1, 1, 1, 1)), xt.shape)
        return velocity_fn(xt.reshape(-1), s.reshape(-1)).reshape(xt.shape)

    return velocity


def mixture_velocity(means, weights, xt, sigma):
    """E[noise - x0 | xt] of a mixture of Gaussians of deviation SPREAD: xt [n], sigma [n]."""
    xt, s = xt[:, None], sigma[:, None]
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    off = xt - (1 - s) * means
    x0_of = means + (1 - s) * SPREAD**2 / variance * off  # [n, K]
    odds = jax.nn.softmax(jnp.log(weights) - off**2 / (2 * variance), axis=-1)
    return ((xt - (odds * x0_of).sum(-1, keepdims=True)) / s)[:, 0]


def network(params):
    def velocity(xt, sigma):
        x = jnp.stack([xt, jnp.cos(3 * sigma), jnp.sin(3 * sigma), sigma], axis=-1)
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b) if w.shape[0] != w.shape[1] else x + jnp.tanh(x @ w + b)
        return (x @ params[-1][0] + params[-1][1])[:, 0]

    return every_number(velocity)


def fresh(key):
    sizes = [(4, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(k, s) / np.sqrt(s[0]), jnp.zeros(s[1]))
        for k, s in zip(keys, sizes, strict=True)
    ]


def fitted(velocity_fn, key, steps=1000):
    """A network with the teacher's velocity, as a student begins."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, key):
        a, b = jax.random.split(key)
        sigma = jax.random.uniform(a, (ROWS,), minval=0.02, maxval=1.0)
        xt = 1.5 * jax.random.normal(b, (ROWS, *ROW))
        return jnp.square(network(params)(xt, sigma) - velocity_fn(xt, sigma)).mean()

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    params = fresh(key)
    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def distilled(teacher_fn, number, key, updates, settings=SETTINGS, ratio=4, mu=0.5):
    """The averaged student of so many steps."""
    score = flow_matching.Settings()
    sigmas, start = jnp.asarray(flow.sigma_list(number, mu)), fitted(teacher_fn, key)
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, updates), b1=0.0, b2=0.99)
    tx_fake = optax.adam(2e-3, b1=0.0, b2=0.99)

    def sampled(student, key):
        a, b = jax.random.split(key)
        noise, stop = jax.random.normal(a, (ROWS, *ROW)), jax.random.randint(b, (), 0, number)
        student_fn, before = network(student), network(jax.lax.stop_gradient(student))
        xt, _ = dmd2.simulated(before, noise, sigmas, stop)
        x0 = dmd2.sample_from(student_fn, xt, jnp.full(ROWS, sigmas[stop]))
        return x0, (sigmas[stop], sigmas[stop + 1])

    def fake_loss(fake, student, key):
        a, b = jax.random.split(key)
        x0, ends = sampled(student, a)
        none = jnp.zeros(ROWS, bool)
        sigma, noise = flow_matching.draw(score, jax.random.split(b, ROWS), x0, mu, none)
        sigma = dmd2.within(settings, sigma, *ends)
        return flow_matching.losses(network(fake), x0, sigma, noise, score).mean()

    def student_loss(student, fake, key):
        a, b = jax.random.split(key)
        x0, ends = sampled(student, a)
        sigma, noise = dmd2.draw(settings, jax.random.split(b, ROWS), x0, mu, *ends)
        return dmd2.matching_losses(x0, sigma, noise, network(fake), teacher_fn).mean()

    def step(carry, key):
        student, fake, state, state_fake, ema = carry
        keys = jax.random.split(key, ratio + 1)

        def learn(carry, key):
            fake, state = carry
            updates, state = tx_fake.update(jax.grad(fake_loss)(fake, student, key), state)
            return (optax.apply_updates(fake, updates), state), None

        (fake, state_fake), _ = jax.lax.scan(learn, (fake, state_fake), keys[1:])
        updates, state = tx.update(jax.grad(student_loss)(student, fake, keys[0]), state)
        student = optax.apply_updates(student, updates)
        ema = jax.tree.map(lambda e, p: 0.99 * e + 0.01 * p, ema, student)
        return (student, fake, state, state_fake, ema), None

    carry = start, start, tx.init(start), tx_fake.init(start), start
    return jax.lax.scan(step, carry, jax.random.split(key, updates))[0][-1]


def samples(velocity_fn, number, key):
    """4000 numbers."""
    noise = jax.random.normal(key, (250, *ROW))
    return np.asarray(sampling.sample(velocity_fn, noise, flow.sigma_list(number, 0.5))).ravel()


@every_number
def one(xt, sigma):
    return mixture_velocity(MEANS, WEIGHTS, xt, sigma)


@every_number
def guided(xt, sigma, scale=2.0):
    """Of N(0.5, SPREAD^2) against N(-0.2, SPREAD^2). As both are equally wide, so is every guided
    density of the flow, whose mean is -0.2 + scale (0.5 + 0.2): nothing is approximate."""
    null = mixture_velocity(np.array([-0.2]), np.ones(1), xt, sigma)
    told = mixture_velocity(np.array([0.5]), np.ones(1), xt, sigma)
    return null + scale * (told - null)


# Two samples of 4000 from one density differ by 0.044 in one of 1000 cases (Kolmogorov-Smirnov);
# the rest of the bound is what so few updates leave. One step tears the mixture apart at once.
BOUND, UPDATES = 0.07, 1000


@pytest.mark.optimised
@pytest.mark.parametrize(
    "teacher_fn, number, updates",
    [(one, 1, 4 * UPDATES), (one, 4, UPDATES), (guided, 1, UPDATES), (guided, 4, UPDATES)],
    ids=["mixture-1", "mixture-4", "guided-1", "guided-4"],
)
def test_samples_match_the_teachers_distribution(teacher_fn, number, updates):
    student_fn = network(distilled(teacher_fn, number, KEY, updates))
    made = samples(student_fn, number, jax.random.fold_in(KEY, 1))
    rng = np.random.default_rng(0)
    if teacher_fn is one:
        centres = rng.choice(MEANS, made.size, p=WEIGHTS)
    else:
        centres = np.full(made.size, -0.2 + 2 * 0.7)
    wanted = centres + SPREAD * rng.standard_normal(made.size)
    assert stats.ks_2samp(made, wanted).statistic < BOUND
    # The teacher itself, in a single step, is far from it.
    if number == 1:
        before = samples(teacher_fn, 1, jax.random.fold_in(KEY, 1))
        assert stats.ks_2samp(before, wanted).statistic > 4 * BOUND


@pytest.mark.optimised
def test_compared_everywhere_the_last_step_loses_its_spread():
    """As DMD2 has it, one fake score for all steps: what `within` is for."""
    student_fn = network(distilled(one, 4, KEY, UPDATES, dmd2.Settings()))
    made = samples(student_fn, 4, jax.random.fold_in(KEY, 1))
    for mean in MEANS:
        assert made[np.abs(made - mean) < 0.8].std() < 0.5 * SPREAD
