"""The update: accumulation, clipping, averages, what is not finite, what is not trained.

The network is a perceptron of two layers, so that everything can be computed by hand or by optax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamlite_jax.train import loop, optim
from dreamlite_jax.train.optim import Settings
from dreamlite_jax.train.state import new_state
from dreamlite_jax.train.update import Mean, gradients, make_update

KEY = jax.random.key(0)
ROWS = 16


def params_of(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    return {
        "first": {"kernel": draw(3, 8), "bias": draw(8)},
        "second": {"kernel": draw(8, 2), "bias": draw(2)},
    }


def batch_of(seed=0, rows=ROWS):
    rng = np.random.default_rng((1, seed))
    x = rng.standard_normal((rows, 3), np.float32)
    return {"x": jnp.asarray(x), "y": jnp.sin(x[:, :2]), "kind": jnp.arange(rows) % 3}


def loss_fn(params, frozen, batch, keys):
    """Squared error with a little noise of every row's own key, by rows of three kinds; there are
    none of a fourth."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    made = hidden @ params["second"]["kernel"] + params["second"]["bias"]
    losses = jnp.square(made - batch["y"] - frozen["noise"] * noise).sum(-1)
    kinds = {f"loss/{k}": Mean.of(losses, batch["kind"] == k) for k in range(4)}
    return losses.mean(), kinds


FROZEN = {"noise": jnp.float32(0.1)}


@functools.partial(jax.jit, static_argnums=(2, 3))
def gradients_of(params, batch, accumulation=1, trained="", key=KEY):
    return gradients(loss_fn, params, FROZEN, batch, key, accumulation, trained)


@functools.cache  # what is compiled for one test serves the next
def update_of(settings=None, steps=100, ema_decay=0.9, **kw):
    tx = optim.make_tx(settings or Settings(lr=1e-2), steps)
    return tx, jax.jit(make_update(loss_fn, tx, ema_decay, **kw))


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def largest(tree, other) -> float:
    """The largest difference of two trees, of the largest value of each leaf."""
    return max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


# --- Gradients ------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_mean_loss():
    """With each row's key the fold of the step's key by the row's number, in 64 bits."""
    params, batch = params_of(), batch_of()
    keys = jnp.stack([jax.random.fold_in(KEY, row) for row in range(ROWS)])
    noise = np.array([jax.random.normal(key, (2,)) for key in keys], np.float64)
    w1, b1, w2, b2 = (
        np.asarray(params[layer][leaf], np.float64)
        for layer in ("first", "second")
        for leaf in ("kernel", "bias")
    )
    x, y = (np.asarray(batch[name], np.float64) for name in "xy")
    hidden = np.tanh(x @ w1 + b1)
    error = hidden @ w2 + b2 - y - np.float64(np.float32(0.1)) * noise
    losses = (error**2).sum(-1)
    back = 2 * error / ROWS
    inner = back @ w2.T * (1 - hidden**2)
    expected = {
        "first": {"kernel": x.T @ inner, "bias": inner.sum(0)},
        "second": {"kernel": hidden.T @ back, "bias": back.sum(0)},
    }
    grads, metrics = gradients_of(params, batch)
    assert largest(grads, jax.tree.map(jnp.asarray, expected)) < 1e-5
    assert float(metrics["loss"]) == pytest.approx(losses.mean(), rel=1e-5)
    for kind in range(3):
        wanted = losses[np.arange(ROWS) % 3 == kind].mean()
        assert float(metrics[f"loss/{kind}"]) == pytest.approx(wanted, rel=1e-5)
    assert np.isnan(metrics["loss/3"])


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulation_equals_the_full_batch(accumulation):
    """Sums of 16 rows in another order: rounding of a few 2**-24 each, so 1e-6 of the largest."""
    full, metrics = gradients_of(params_of(), batch_of())
    parts, found = gradients_of(params_of(), batch_of(), accumulation)
    assert largest(parts, full) < 2e-6
    assert found.keys() == metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=2e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(parts)} == {jnp.dtype("float32")}


def test_the_mean_of_a_metric_counts_rows_not_micro_batches():
    """Rows of a kind lie unevenly: 5 of the first micro-batch's, 1 of the second's."""
    batch = batch_of(rows=12)
    batch["kind"] = jnp.array([0, 1] * 5 + [0, 0])  # row r is of micro-batch r % 2
    full = gradients_of(params_of(), batch)[1]
    parts = gradients_of(params_of(), batch, 2)[1]
    for kind in range(2):
        np.testing.assert_allclose(parts[f"loss/{kind}"], full[f"loss/{kind}"], rtol=2e-6)


def test_a_mean_of_nothing_is_none():
    mean = Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    assert (float(mean.total), float(mean.count)) == (1, 1)
    mean = Mean.of(jnp.ones(3), jnp.zeros(3, bool))
    assert (float(mean.total), float(mean.count)) == (0, 0)


# --- Steps ----------------------------------------------------------------------------------------


def test_steps_are_those_of_optax():
    """Three steps by plain optax, each with its own batch and key; tolerance of fused rounding."""
    tx, update = update_of(Settings(lr=1e-2, warmup=2, weight_decay=0.1), clip=0.5)
    state = new_state(params_of(), tx)
    params = params_of()
    mask = jax.tree.map(lambda x: x.ndim == 2, params)
    rate = optax.linear_schedule(0.0, 1e-2, 2)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=0.1, mask=mask)
    )
    opt_state, their_update = theirs.init(params), jax.jit(theirs.update)
    for step in range(4):
        key = jax.random.fold_in(KEY, step)
        batch = batch_of(step)
        state, metrics = update(state, FROZEN, batch, key)
        grads, _ = gradients_of(params, batch, key=key)
        assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), 1e-4)
        assert metrics["grad_norm"] > 0.5  # or nothing would be clipped
        updates, opt_state = their_update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(params), rtol=1e-5)
    assert largest(state.params, params) < 1e-5
    assert int(state.step) == 4 and int(state.skipped) == int(state.streak) == 0


@pytest.mark.parametrize("clip, share", [(0.0, 1), (1e6, 1), (1.0, None)])
def test_clipping(clip, share):
    """Plain gradient descent with rate 1: the change of the parameters is the clipped gradient."""
    tx = optax.sgd(1.0)
    update = jax.jit(make_update(loss_fn, tx, 0.9, clip=clip))
    state, metrics = update(new_state(params_of(), tx), FROZEN, batch_of(), KEY)
    norm = float(metrics["grad_norm"])
    assert norm > 2
    share = share or 1.0 / norm
    grads, _ = gradients_of(params_of(), batch_of())
    expected = jax.tree.map(lambda p, g: p - share * g, params_of(), grads)
    assert largest(state.params, expected) < 1e-6


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average(warmup):
    """e + (1 - d) (p - e), with d at most (1 + n) / (10 + n), against 64 bits; float32 throughout
    although moments are bfloat16."""
    tx, update = update_of(Settings(lr=0.1, moments="bfloat16"), ema_decay=0.3, ema_warmup=warmup)
    state = new_state(params_of(), tx)
    average = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    decays = []
    for n in range(6):
        state, _ = update(state, FROZEN, batch_of(n), KEY)
        decays.append(min(0.3, (1 + n) / (10 + n)) if warmup else 0.3)
        average = jax.tree.map(
            lambda e, p, d=decays[-1]: d * e + (1 - d) * np.asarray(p, np.float64),
            average,
            state.params,
        )
    assert decays[0] == (0.1 if warmup else 0.3) and decays[-1] == 0.3
    assert largest(state.ema, jax.tree.map(jnp.asarray, average)) < 1e-6
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}


def test_a_slow_average_moves_in_float32():
    """With decay 0.9999 a step moves the average by less than bfloat16 can hold of it."""
    tx, update = update_of(Settings(lr=1e-3), ema_decay=0.9999, ema_warmup=False)
    state = new_state(params_of(), tx)
    for n in range(3):
        state, _ = update(state, FROZEN, batch_of(n), KEY)
    moved = jax.tree.map(lambda e, p: jnp.abs(e - p), state.ema, params_of())
    assert 0 < max(float(leaf.max()) for leaf in jax.tree.leaves(moved)) < 1e-6


# --- Not finite -----------------------------------------------------------------------------------


def spoilt(batch, value):
    return {**batch, "y": batch["y"].at[5, 1].set(value)}


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e30])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_batch_that_is_not_finite_changes_nothing(value, accumulation):
    """1e30: a finite picture whose squared error is not."""
    tx, update = update_of(
        Settings(lr=1e-2, warmup=3, moments="bfloat16"), accumulation=accumulation, clip=1.0
    )
    state, _ = update(new_state(params_of(), tx), FROZEN, batch_of(), KEY)
    for bad in (1, 2):
        before = state
        state, metrics = update(state, FROZEN, spoilt(batch_of(), value), KEY)
        for part in ("params", "opt_state", "ema"):
            assert bits(getattr(state, part)) == bits(getattr(before, part)), part
        assert (int(state.step), int(state.skipped), int(state.streak)) == (1 + bad, bad, bad)
        assert (float(metrics["skipped"]), float(metrics["streak"])) == (bad, bad)
        assert not np.isfinite(metrics["loss"])
    state, metrics = update(state, FROZEN, batch_of(1), KEY)
    assert (int(state.step), int(state.skipped), int(state.streak)) == (4, 2, 0)
    assert np.isfinite(metrics["loss"]) and bits(state.params) != bits(before.params)


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_loss_and_gradient_both_must_be_finite(name):
    """A constant without an end has no gradient, a root at 0 has no finite one."""

    def loss_fn(params, frozen, batch, keys):
        x = params["x"][0]
        return (x + jnp.inf if name == "loss" else jnp.sqrt(x)), {}

    tx = optax.sgd(1.0)
    start = new_state({"x": jnp.zeros(3)}, tx)
    state, metrics = jax.jit(make_update(loss_fn, tx, 0.9))(start, {}, jnp.ones(2), KEY)
    assert np.isfinite(metrics["loss"]) == (name == "gradient")
    assert np.isfinite(metrics["grad_norm"]) == (name == "loss")
    assert int(state.skipped) == 1 and bits(state.params) == bits(start.params)


def test_what_was_skipped_leaves_no_trace():
    """Learning rate and average go by updates that were made: a run with bad batches between ends
    where one without them ends."""
    tx, update = update_of(Settings(lr=1e-2, warmup=3))
    clean = disturbed = new_state(params_of(), tx)
    for n in range(4):
        clean, _ = update(clean, FROZEN, batch_of(n), KEY)
        disturbed, _ = update(disturbed, FROZEN, spoilt(batch_of(n), jnp.nan), KEY)
        disturbed, _ = update(disturbed, FROZEN, batch_of(n), KEY)
    for part in ("params", "opt_state", "ema"):
        assert bits(getattr(disturbed, part)) == bits(getattr(clean, part)), part
    assert (int(disturbed.step), int(disturbed.skipped)) == (8, 4)


def stage_of(tx, update, spoil=()):
    """A stage of the loop, and its batches, of which some are spoilt."""

    def init_fn(key):
        return jax.jit(lambda: new_state(params_of(), tx))(), FROZEN

    def batches_from(step):
        while True:
            yield spoilt(batch_of(step), jnp.nan) if step in spoil else batch_of(step)
            step += 1

    return loop.Stage(init_fn, update), batches_from


def test_the_loop_ends_after_too_many_in_a_row(tmp_path):
    tx, update = update_of()
    schedule = loop.Schedule(steps=20, batch_size=ROWS, log_every=1, patience=3, sample_every=0)
    stage, batches = stage_of(tx, update, spoil=range(5, 20))
    with pytest.raises(loop.TrainingError) as error:
        loop.fit(stage, batches, schedule, tmp_path / "ends")
    said = str(error.value)
    assert "4 updates in a row up to step 9" in said and "not finite" in said
    assert "optim.lr" in said and "\n" not in said

    stage, batches = stage_of(tx, update, spoil=range(5, 9))  # and over before the next log
    with pytest.raises(loop.TrainingError, match="4 updates in a row up to step 10"):
        loop.fit(stage, batches, schedule._replace(log_every=10), tmp_path / "over")

    stage, batches = stage_of(tx, update, spoil=[5, 6, 7, 9, 10, 11])  # never four in a row
    state, done = loop.fit(stage, batches, schedule, tmp_path / "goes on")
    assert done and int(state.skipped) == 6 and int(state.step) == 20


# --- Not trained ----------------------------------------------------------------------------------


def test_what_is_not_trained_stays_bit_by_bit():
    settings = Settings(lr=0.1, weight_decay=0.5, trained="^second/")
    tx, update = update_of(settings, trained="^second/")
    start = new_state(params_of(), tx)
    state = start
    for n in range(3):
        state, _ = update(state, FROZEN, batch_of(n), KEY)
    for part in ("params", "ema"):
        after, before = getattr(state, part), getattr(start, part)
        assert bits(after["first"]) == bits(before["first"])
        assert all(a != b for a, b in zip(bits(after["second"]), bits(before["second"])))  # noqa: B905


def test_what_is_not_trained_does_not_count():
    """Neither in the norm that clips, nor when it is not finite; and it costs no gradient."""
    tx = optax.sgd(1.0)
    update = jax.jit(make_update(loss_fn, tx, 0.9, clip=0.5, trained="second/bias"))
    state, metrics = update(new_state(params_of(), tx), FROZEN, batch_of(), KEY)
    grads, _ = gradients_of(params_of(), batch_of())
    norm = float(jnp.linalg.norm(grads["second"]["bias"]))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    expected = params_of()["second"]["bias"] - 0.5 / norm * grads["second"]["bias"]
    np.testing.assert_allclose(state.params["second"]["bias"], expected, rtol=1e-5)

    def flops(trained):
        made = gradients_of.lower(params_of(), batch_of(), 1, trained)
        return made.compile().cost_analysis()["flops"]

    assert flops("second/bias") < 0.8 * flops("")


# --- Learning -------------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart():
    tx, update = update_of(Settings(lr=2e-2, schedule="cosine"), steps=600, clip=1.0)
    state, quiet = new_state(params_of(), tx), {"noise": jnp.float32(0)}
    state, metrics = update(state, quiet, batch_of(rows=6), KEY)
    first = float(metrics["loss"])
    for _ in range(600):
        state, metrics = update(state, quiet, batch_of(rows=6), KEY)
    assert first > 1 and float(metrics["loss"]) < 1e-4
