"""Schedules, AdamW, masks by regex, and what is wrong with settings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamlite_jax.train import optim
from dreamlite_jax.train.optim import Settings

RNG = np.random.default_rng(0)


def params_of(rng=RNG):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    return {
        "unet": {"conv": {"kernel": draw(3, 4), "bias": draw(4)}, "norm": {"scale": draw(4)}},
        "text_encoder": {"embed": {"embedding": draw(5, 3)}},
    }


def assert_close(tree, other, rtol):
    """Of the largest value of each leaf."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.abs(b).max()))


# --- Schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, {0: 1, 50: 1, 100: 1}),
        ({"warmup": 10}, {0: 0, 1: 0.1, 9: 0.9, 10: 1, 11: 1, 100: 1}),
        ({"warmup": 100}, {0: 0, 50: 0.5, 99: 0.99, 100: 1}),
        ({"schedule": "linear"}, {0: 1, 1: 0.99, 50: 0.5, 99: 0.01, 100: 0, 101: 0}),
        ({"schedule": "linear", "warmup": 20}, {19: 0.95, 20: 1, 60: 0.5, 100: 0}),
        ({"schedule": "linear", "decay_from": 0.5}, {0: 1, 50: 1, 51: 0.98, 75: 0.5, 100: 0}),
        # The fall begins where the later of warm-up and plateau ends.
        ({"schedule": "linear", "warmup": 60, "decay_from": 0.5}, {30: 0.5, 60: 1, 80: 0.5}),
        ({"schedule": "linear", "lr_end": 0.2}, {0: 1, 50: 0.6, 100: 0.2, 200: 0.2}),
        ({"schedule": "linear", "decay_from": 1.0}, {0: 1, 99: 1}),
        ({"schedule": "linear", "warmup": 100}, {50: 0.5, 99: 0.99}),
        ({"schedule": "cosine"}, {0: 1, 25: (1 + 0.5**0.5) / 2, 50: 0.5, 100: 0, 101: 0}),
        ({"schedule": "cosine", "lr_end": 0.2, "warmup": 20}, {10: 0.5, 20: 1, 60: 0.6, 100: 0.2}),
        ({"schedule": "cosine", "decay_from": 0.5}, {50: 1, 75: 0.5, 100: 0}),
    ],
)
def test_schedules(settings, expected):
    """Shares of the peak, at the numbers of updates out of 100."""
    rate = optim.learning_rate(Settings(lr=3e-4, **settings), 100)
    for update, share in expected.items():
        assert float(rate(jnp.int32(update))) == pytest.approx(3e-4 * share, rel=1e-5, abs=1e-10)


# --- AdamW ----------------------------------------------------------------------------------------


def run(tx, steps=5):
    """Parameters and state after some updates with the same random gradients."""
    params = params_of(np.random.default_rng(1))
    state, rng = tx.init(params), np.random.default_rng(2)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(params_of(rng), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("moments, rtol", [("float32", 1e-6), ("bfloat16", 1e-4)])
def test_adamw_is_optax_adamw(moments, rtol):
    """The same arithmetic in two programs: 1e-6 is eight units in the last place. A moment that
    rounds the other way in bfloat16 (2**-8) changes each of the 5 steps (lr 1e-2) by 4e-5, of
    parameters near 1 to 2."""
    settings = Settings(
        lr=1e-2, schedule="cosine", warmup=2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1,
        moments=moments,
    )  # fmt: skip
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
    mask = {
        "unet": {"conv": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        "text_encoder": {"embed": {"embedding": False}},
    }
    dtype = jnp.dtype(moments)
    theirs = optax.adamw(rate, 0.8, 0.95, 1e-6, mu_dtype=dtype, weight_decay=0.1, mask=mask)
    ours, state = run(optim.make_tx(settings, 10))
    assert_close(ours, run(theirs)[0], rtol)
    adam = state[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {dtype}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    assert int(adam.count) == 5


def test_one_step_by_hand():
    """From zero moments Adam's first step is lr g / (|g| + eps), and decay adds lr w kernel."""
    params = {"a": {"kernel": jnp.array([2.0, -4.0]), "bias": jnp.array([1.0])}}
    grads = {"a": {"kernel": jnp.array([0.5, -0.1]), "bias": jnp.array([3.0])}}
    tx = optim.make_tx(Settings(lr=0.1, weight_decay=0.5, eps=0.25), 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        updates["a"]["kernel"],
        [-0.1 * (0.5 / 0.75 + 0.5 * 2), -0.1 * (-0.1 / 0.35 - 0.5 * 4)],
        rtol=1e-5,
    )
    np.testing.assert_allclose(updates["a"]["bias"], [-0.1 * 3 / 3.25], rtol=1e-5)


def test_what_is_not_trained_has_no_moments_and_does_not_move():
    start = params_of(np.random.default_rng(1))
    tx = optim.make_tx(Settings(lr=0.1, weight_decay=0.5, trained=r"^unet/.*kernel$"), 10)
    params, state = run(tx)
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), params, start)
    assert moved == {
        "unet": {"conv": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        "text_encoder": {"embed": {"embedding": False}},
    }
    names = {optim.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert {name.rsplit("unet/")[-1] for name in names if "/mu/" in name} == {"conv/kernel"}


def test_matching_looks_anywhere_in_the_path():
    found = optim.matching(params_of(), r"conv|embed")
    assert found["unet"] == {"conv": {"kernel": True, "bias": True}, "norm": {"scale": False}}
    assert found["text_encoder"]["embed"]["embedding"]


# --- Settings -------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"schedule": "step"}, "schedule is 'step', known are constant, linear, cosine"),
        ({"lr": 0.0}, "lr is 0.0, should be positive"),
        ({"lr": NAN}, "lr is nan"),
        ({"lr": INF}, "lr is inf"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"warmup": 101}, "warmup is 101, should be from 0 to the 100 steps"),
        ({"warmup": -1}, "warmup is -1"),
        ({"decay_from": 1.5}, "decay_from is 1.5, should be in [0, 1]"),
        ({"lr_end": -0.1}, "lr_end is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0, should be in [0, 1)"),
        ({"beta2": NAN}, "beta2 is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, should be 0 or more"),
        ({"clip": NAN}, "clip is nan"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"moments": "float16"}, "moments is 'float16', known are float32, bfloat16"),
        ({"decayed": "("}, "decayed is no regex"),
        ({"trained": "["}, "trained is no regex"),
    ],
)
def test_each_problem_is_named(settings, said):
    (problem,) = Settings(**settings).problems(100)
    assert said in problem and "\n" not in problem


def test_all_problems_come_together():
    found = Settings(lr=-1.0, warmup=-1, beta1=2.0, trained="(").problems(10)
    assert [re.match(r"\w+", problem)[0] for problem in found] == [
        *("lr", "warmup", "beta1", "trained")
    ]
    assert Settings().problems(1) == []


@pytest.mark.parametrize("sizes", [(3, 70), (5000, 3, 4096, 4097), (9000,), ()])
def test_the_norm_of_small_and_large_arrays(sizes):
    rng = np.random.default_rng(0)
    tree = {str(n): jnp.asarray(rng.standard_normal((n, 2)), jnp.float32) for n in sizes}
    expected = np.sqrt(sum(np.square(np.float64(x)).sum() for x in tree.values()))
    np.testing.assert_allclose(jax.jit(optim.norm)(tree), expected, rtol=1e-6)


def test_a_cpu_sums_all_small_arrays_as_one():
    tree = [jnp.ones(size) for size in (*range(1, 40), 5000, 6000)]
    program = jax.jit(optim.norm).lower(tree).as_text()
    assert program.count("stablehlo.reduce(") == 3  # the large ones and the rest
