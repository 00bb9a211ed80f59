"""The objective of all diffusion stages: its loss in 64 bits, its densities, its weights.

Shapes: B rows, h and w latent pixels, c latent channels.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dreamlite_jax import system
from dreamlite_jax.data import transforms
from dreamlite_jax.diffusion import flow
from dreamlite_jax.models import autoencoder, unet_config
from dreamlite_jax.models.qwen3_vl import config as qwen3_vl
from dreamlite_jax.objectives import flow_matching
from dreamlite_jax.objectives.flow_matching import Settings
from dreamlite_jax.train import stages

B, H, W, C = 5, 4, 6, 2
RNG = np.random.default_rng(0)
X0, NOISE, MADE = RNG.standard_normal((3, B, H, W, C), np.float32)
SIGMA = np.array([0.02, 0.3, 0.5, 0.77, 0.99], np.float32)
CHANGED = np.zeros((B, H, W), bool)
CHANGED[0] = True  # text to image, or a new picture
CHANGED[1, 0, 0] = True
CHANGED[2, :2] = True
CHANGED[3, :, :3] = True  # and the last changes nothing


def by_hand(x0, noise, sigma, made, weight="unit", changed=None):
    """The loss of every row in 64 bits; `made` is a function of xt."""
    x0, noise, sigma = (np.asarray(x, np.float64) for x in (x0, noise, sigma))
    losses = []
    for b in range(len(x0)):
        xt = (1 - sigma[b]) * x0[b] + sigma[b] * noise[b]
        error = (made(b, xt) - (noise[b] - x0[b])) ** 2
        if changed is not None and changed[b].any():
            boost = np.log2(changed[b].size / changed[b].sum()) + 1
            error = error * np.where(changed[b], boost, 1.0)[:, :, None]
        scale = {"unit": 1.0, "cosmap": 2 / (np.pi * (1 - 2 * sigma[b] + 2 * sigma[b] ** 2))}
        losses.append(error.mean() * scale[weight])
    return np.array(losses)


# --- The loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["unit", "cosmap"])
@pytest.mark.parametrize("changed", [False, True])
def test_the_loss_is_that_of_the_formula(weight, changed):
    """A velocity that depends on the path's point: a sum of 48 squares of float32, so 1e-6."""
    settings = Settings(weight=weight, weight_changed=changed)
    found = flow_matching.losses(
        lambda xt, sigma: MADE + 0.5 * xt, X0, SIGMA, NOISE, settings, CHANGED
    )
    expected = by_hand(
        X0, NOISE, SIGMA, lambda b, xt: MADE[b] + 0.5 * xt, weight, CHANGED if changed else None
    )
    assert found.shape == (B,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_the_velocity_is_asked_on_the_path_and_its_own_has_no_loss():
    asked = []

    def velocity_fn(xt, sigma):
        asked.append((xt, sigma))
        return jnp.asarray(NOISE - X0)

    assert flow_matching.losses(velocity_fn, X0, SIGMA, NOISE, Settings()).tolist() == [0.0] * B
    ((xt, sigma),) = asked
    mix = SIGMA[:, None, None, None]
    np.testing.assert_allclose(xt, (1 - mix) * X0 + mix * NOISE, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(sigma, SIGMA)


def test_half_precision_is_compared_in_float32():
    """bfloat16 keeps 8 bits of a velocity, the loss of a right one is that rounding's square."""
    right = jnp.asarray(NOISE - X0, jnp.bfloat16)
    found = flow_matching.losses(lambda xt, sigma: right, X0, SIGMA, NOISE, Settings())
    rounding = np.square(np.asarray(right, np.float64) - (NOISE - X0)).mean((1, 2, 3))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, rounding, rtol=1e-5)


def test_what_an_edit_changes_weighs_more():
    """1 + log2 of how many times it fits: 24 pixels once, 2 in 4 rows twice, half the columns."""
    weights = flow_matching.change_weights(jnp.asarray(CHANGED))
    assert weights[0].tolist() == weights[4].tolist() == np.ones((H, W)).tolist()
    expected = np.ones((H, W))
    expected[0, 0] = np.log2(24) + 1
    np.testing.assert_allclose(weights[1], expected, rtol=1e-6)
    assert np.unique(weights[2]).tolist() == np.unique(weights[3]).tolist() == [1, 2]
    assert (np.asarray(weights[3]) == 2).sum() == 12


def test_loss_weights():
    sigma = np.linspace(0, 1, 100_001)
    for name, weight in flow_matching.WEIGHTS.items():
        values = np.asarray(weight(jnp.asarray(sigma, jnp.float32)), np.float64)
        assert values.mean() == pytest.approx(1, abs=1e-4), name
    cosmap = flow_matching.WEIGHTS["cosmap"](jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(cosmap, [2 / np.pi, 4 / np.pi, 2 / np.pi], rtol=1e-6)


# --- What is drawn --------------------------------------------------------------------------------

N = 20_000
KEYS = jax.random.split(jax.random.key(0), N)
NO_EDITS = np.zeros(N, bool)


def drawn(settings, mu, edits=NO_EDITS):
    x0 = jnp.zeros((N, 1, 2, 2))
    return jax.jit(lambda keys: flow_matching.draw(settings, keys, x0, mu, edits))(KEYS)


def unshifted(sigma, mu):
    """Where the shift comes from: 1/s0 - 1 = e^mu (1/s - 1)."""
    return 1 / (1 + np.exp(mu) * (1 / sigma - 1))


CDFS = {
    "uniform": lambda s, mean, std: s,
    "logit_normal": lambda s, mean, std: stats.norm.cdf((np.log(s) - np.log1p(-s) - mean) / std),
}


@pytest.mark.parametrize("density, mean, std", [("uniform", 0, 1), ("logit_normal", -0.4, 1.3)])
@pytest.mark.parametrize("shift, mu", [(False, 1.15), (True, 0.5), (True, 1.15)])
def test_densities(density, mean, std, shift, mu):
    """Kolmogorov and Smirnov at 1 %; without the shift, or with a wrong one, it is ten times as
    far."""
    sigma, _ = drawn(Settings(density, mean, std, shift=shift), mu)
    assert sigma.dtype == jnp.float32 and sigma.min() >= 0 and sigma.max() < 1
    sigma, far = np.asarray(sigma, np.float64), 1.63 / np.sqrt(N)

    def distance(mu):
        return stats.kstest(sigma, lambda s: CDFS[density](unshifted(s, mu), mean, std)).statistic

    assert distance(mu if shift else 0.0) < far
    assert distance((mu if shift else 0.0) + 0.5) > 5 * far


def test_edits_have_a_mean_of_their_own():
    """Rows of the other task draw what they drew without it, edits what they would have drawn from
    that mean."""
    edits = np.arange(N) % 2 == 1
    sigma, noise = drawn(Settings(mean=0.5, edit_offset=1.0), 0.5, edits)
    plain, same = drawn(Settings(mean=0.5), 0.5, edits)
    moved, _ = drawn(Settings(mean=1.5), 0.5, edits)
    np.testing.assert_array_equal(sigma[~edits], plain[~edits])
    np.testing.assert_array_equal(sigma[edits], moved[edits])
    assert (sigma[edits] > plain[edits]).all()
    np.testing.assert_array_equal(noise, same)


def test_noise_is_normal_and_independent():
    """Of sigma and among itself: correlations are below 4 of their standard deviations."""
    sigma, noise = drawn(Settings(), 0.0)
    assert noise.shape == (N, 1, 2, 2) and noise.dtype == jnp.float32
    columns = np.column_stack([np.log(sigma / (1 - sigma)), np.asarray(noise).reshape(N, 4)])
    for column in columns.T:
        assert stats.kstest(column, "norm").statistic < 1.63 / np.sqrt(N)
    correlation = np.corrcoef(columns.T) - np.eye(5)
    assert np.abs(correlation).max() < 4 / np.sqrt(N)


def test_a_row_draws_by_its_own_key():
    x0, edits = jnp.zeros((B, H, W, C)), jnp.zeros(B, bool)
    draw = jax.jit(lambda keys: flow_matching.draw(Settings(), keys, x0, 0.7, edits))
    (sigma, noise), others = draw(KEYS[:B]), draw(KEYS[np.array([9, 3, 8, 0, 7])])
    for row, place in ((3, 1), (0, 3)):
        np.testing.assert_array_equal(others[0][place], sigma[row])
        np.testing.assert_array_equal(others[1][place], noise[row])
    assert len({float(x) for x in (*sigma, *others[0])}) == 8


@pytest.mark.parametrize("side", [32, 64, 128])
def test_training_shifts_as_the_sampler_does(side, monkeypatch):
    """Were the density the sampler's even grid, training would see the sampler's sigmas."""
    mu = flow.resolution_mu(side, side, flow.ResolutionShift())
    steps = 28
    grid = np.linspace(1.0, 1 / steps, steps, dtype=np.float32)
    found = []
    for value in grid:
        monkeypatch.setattr(flow, "uniform", lambda key, shape, value=value: jnp.float32(value))
        found.append(flow_matching.draw_sigma(Settings("uniform"), KEYS[0], mu))
    np.testing.assert_array_equal(np.array(found), flow.sigma_list(steps, mu)[:-1])
    assert (np.array(found)[1:] > grid[1:]).all()


# --- The whole loss function ----------------------------------------------------------------------


class Linear:
    """In the U-Net's place: an answer that one can compute by hand, of both halves."""

    def __init__(self, *_):
        pass

    def apply(self, variables, x, timesteps, context, mask, time_ids):
        p, words = variables["params"], (context * mask[:, :, None]).sum((1, 2))
        rows = p["time"] * timesteps + p["words"] * words + p["size"] * time_ids @ jnp.array([1, 2])
        return p["answer"] + p["slope"] * x[:, :, ::-1] + rows[:, None, None, None]


PARAMS = {
    "answer": jnp.asarray(RNG.standard_normal((B, H, 2 * W, 4), np.float32)),
    "slope": jnp.float32(0.3),
    "time": jnp.float32(1e-3),
    "words": jnp.float32(0.1),
    "size": jnp.float32(1e-3),
}
BATCH = {
    "target_latents": RNG.standard_normal((B, H, W, 4), np.float32),
    "source_latents": RNG.standard_normal((B, H, W, 4), np.float32),
    "has_source": np.array([False, True, True, False, True]),
    "task": np.array([0, 1, 1, 1, 1], np.int32),  # of the fourth dropout took the source
    "changed": CHANGED,
    "context": RNG.standard_normal((B, 3, 2), np.float32),
    "context_mask": RNG.random((B, 3)) > 0.4,
    "time_ids": np.tile(np.float32([W * 8, H * 8]), (B, 1)),
}
CONFIG = system.Config(
    unet_config.NANO, autoencoder.TINY, qwen3_vl.TINY, shift=flow.ResolutionShift(0.3, 2.0, 4, 20)
)


@pytest.fixture
def loss_fn(monkeypatch):
    """With a linear U-Net: (batch, settings) -> loss, metrics, gradients of PARAMS."""
    monkeypatch.setattr(system, "UNet", Linear)

    @functools.partial(jax.jit, static_argnums=0)
    def differentiate(settings, *args):
        fn = stages.diffusion_loss(CONFIG, 3, settings)
        return jax.value_and_grad(fn, has_aux=True)(*args)

    def call(batch, **settings):
        args = {"unet": PARAMS}, {}, batch, KEYS[: len(batch["task"])]
        (loss, metrics), grads = differentiate(Settings(**settings), *args)
        return types.SimpleNamespace(loss=loss, metrics=metrics, grads=grads["unet"])

    return call


OFFSET = 0.8


def expected_losses(weight_changed):
    """Of BATCH in 64 bits. The shift is linear in the target's 6 patches: 0.3 at 4, 2.0 at 20."""
    mu = 0.3 + (2.0 - 0.3) * (6 - 4) / (20 - 4)
    settings = Settings(shift=False, edit_offset=OFFSET)
    edits = BATCH["task"] == 1
    sigma, noise = flow_matching.draw(settings, KEYS[:B], jnp.zeros((B, H, W, 4)), 0.0, edits)
    sigma = 1 / (1 + (1 / np.asarray(sigma, np.float64) - 1) / np.exp(mu))
    source = np.where(BATCH["has_source"][:, None, None, None], BATCH["source_latents"], 0)
    words = (BATCH["context"] * BATCH["context_mask"][:, :, None]).sum((1, 2), dtype=np.float64)
    rows = 1e-3 * 1000 * sigma + 0.1 * words + 1e-3 * (W * 8 + 2 * H * 8)

    def made(b, xt):
        seen = np.concatenate([xt, source[b]], axis=1)[:, ::-1]
        return (np.asarray(PARAMS["answer"], np.float64)[b] + 0.3 * seen + rows[b])[:, :W]

    changed = CHANGED if weight_changed else None
    return sigma, by_hand(BATCH["target_latents"], noise, sigma, made, changed=changed)


@pytest.mark.parametrize("weight_changed", [False, True])
def test_the_stage_s_loss_and_its_metrics(loss_fn, weight_changed):
    """A thousandth of a step of sigma would change a row's loss by more than 1e-5."""
    found = loss_fn(BATCH, weight_changed=weight_changed, edit_offset=OFFSET)
    sigma, losses = expected_losses(weight_changed)
    assert float(found.loss) == pytest.approx(losses.mean(), rel=1e-5)
    quarters = {f"loss/sigma_{k}": (sigma >= k / 4) & (sigma < (k + 1) / 4) for k in range(4)}
    tasks = {"loss/t2i": BATCH["task"] == 0, "loss/edit": BATCH["task"] == 1}
    assert found.metrics.keys() == {*quarters, *tasks}
    for name, rows in {**quarters, **tasks}.items():
        assert float(found.metrics[name].count) == rows.sum()
        assert float(found.metrics[name].total) == pytest.approx(losses[rows].sum(), rel=1e-5)


def test_the_half_of_the_condition_carries_no_loss(loss_fn):
    """Exactly: the gradient by the right half of the answer is zero, by the left one it is not."""
    grads = loss_fn(BATCH).grads["answer"]
    assert grads.shape == (B, H, 2 * W, 4)
    assert (np.asarray(grads[:, :, W:]) == 0).all()
    assert (np.asarray(grads[:, :, :W]) != 0).all()


def test_a_batch_without_edits(loss_fn):
    """It has neither sources nor a mean of edits; loss and gradients are those of other rows."""
    batch = {key: value for key, value in BATCH.items() if key != "source_latents"}
    batch |= {"task": np.zeros(B, np.int32), "has_source": np.zeros(B, bool)}
    found = loss_fn(batch)
    edits = found.metrics["loss/edit"]
    assert (float(edits.total), float(edits.count)) == (0, 0)
    assert float(found.metrics["loss/t2i"].count) == B
    leaves = jax.tree.leaves((found.loss, found.metrics, found.grads))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    zeros = {**batch, "source_latents": np.zeros_like(BATCH["source_latents"])}
    assert float(loss_fn(zeros).loss) == float(found.loss)
    ignored = {**batch, "source_latents": BATCH["source_latents"]}
    assert float(loss_fn(ignored).loss) == float(found.loss)


# --- Conditions left out --------------------------------------------------------------------------


def test_conditions_are_left_out_as_often_as_asked():
    """By the numbers of rows of many steps; within 4 standard deviations."""
    rates = transforms.Dropout(t2i_text=0.1, edit_text=0.05, edit_both=0.2, edit_source=0.1)
    numbers = [transforms.choices(3, step, row).dropout for step in range(100) for row in range(40)]
    n = len(numbers)
    assert stats.kstest(numbers, "uniform").statistic < 1.63 / np.sqrt(n)
    text, source = np.array([transforms.dropped(rates, True, u) for u in numbers]).T
    for found, rate in (
        ((text & ~source).mean(), 0.05),
        ((text & source).mean(), 0.2),
        ((~text & source).mean(), 0.1),
        (np.mean([transforms.dropped(rates, False, u)[0] for u in numbers]), 0.1),
    ):
        assert abs(found - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    assert not any(transforms.dropped(rates, False, u)[1] for u in numbers)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"density": "normal"}, "density is 'normal', known are logit_normal, uniform"),
        ({"weight": "snr"}, "weight is 'snr', known are unit, cosmap"),
        ({"std": 0.0}, "std is 0.0, should be positive"),
        ({"std": float("inf")}, "std is inf"),
        ({"mean": float("nan")}, "mean is nan, should be finite"),
        ({"edit_offset": float("inf")}, "edit_offset is inf, should be finite"),
    ],
)
def test_each_problem_is_named(settings, said):
    (problem,) = Settings(**settings).problems()
    assert said in problem and "\n" not in problem
    assert len(Settings("x", std=-1.0, weight="y").problems()) == 3
    assert Settings().problems() == []
