"""Every picture of a rollout is scored for its own prompt, and every score is told of its picture.

Networks are replaced by some that draw the number of the sample that their batch's row is of.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.data import pipeline, shapes, streams
from dreamlite_jax.data.mixture import TASKS
from dreamlite_jax.diffusion import flow
from dreamlite_jax.objectives import nft
from dreamlite_jax.rewards.base import Reward
from dreamlite_jax.rewards.opening import Weighted
from dreamlite_jax.train import reinforcement, rollouts, sharding, stages
from dreamlite_jax.train.rollouts import Rollouts

P, G, SIDE, COUNT = 8, 3, 32, 200
MESH = sharding.make_mesh(1, 1, jax.devices()[:1])
CONFIG = types.SimpleNamespace(
    shift=flow.ResolutionShift(), vae=types.SimpleNamespace(latent_channels=4)
)
STATE = types.SimpleNamespace(params={}, step=7)  # of updates: it says nothing of the batch


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(pipeline.Recipe, "context_length", 1)
    entries = [
        {"source": "shapes:quick:train", "count": COUNT, "task": task, "weight": 1.0}
        for task in TASKS
    ]
    return pipeline.Recipe(streams.open_streams(entries, SIDE), P, SIDE, seed=4)


def drawn(index):
    """uint8 [n, H, W, 3] of sample numbers [n]."""
    return jnp.broadcast_to(index[:, None, None, None], (*index.shape, SIDE, SIDE, 3)).astype(
        jnp.uint8
    )


def number(images, prompts, sources, metadata):
    """The samples' numbers, if pictures, prompts, sources and metadata agree on them."""
    for image, prompt, source, at in zip(images, prompts, sources, metadata, strict=True):
        assert (image == at["index"]).all()
        which = shapes.SETTINGS["quick"], "train", at["seed"], at["index"]
        if at["task"] == "t2i":
            assert prompt == shapes.sample_t2i(*which).caption and source is None
        else:
            edit = shapes.sample_edit(*which)
            assert prompt == edit.instruction
            np.testing.assert_array_equal(source, shapes.render(edit.source, SIDE, SIDE))
    return [float(at["index"]) for at in metadata]


REWARDS = (Weighted(Reward("number", number), 1.0, TASKS),)


def indices(recipe, step):
    batch = pipeline.batch(recipe, pipeline.check(recipe), range(P), step)
    return np.asarray(batch["index"]), np.asarray(batch["task"])


@pytest.mark.parametrize("step", [0, 3])
def test_every_picture_of_a_rollout_is_scored_for_its_own_prompt(recipe, step, monkeypatch):
    def rollout(params, frozen, batch, key, number):
        assert number == step
        index = jnp.repeat(batch["index"], G)
        return {"index": index}, drawn(index), jnp.full(P, 0.5)

    def learnt_from(table, settings, tasks, rows, scores, task, diversity):
        return {"index": rows["index"], "scores": scores, "task": task}

    monkeypatch.setattr(rollouts, "make_rollout", lambda *_: rollout)
    monkeypatch.setattr(rollouts, "learnt_from", learnt_from)
    made = reinforcement.make_batch_fn(
        CONFIG, Rollouts(group=G, updates=2), nft.Settings(), REWARDS, recipe, MESH
    )
    plan = pipeline.check(recipe)
    batch = sharding.spread(pipeline.batch(recipe, plan, range(P), step), MESH, P)
    found = made(STATE, {}, batch, None, step)
    expected, task = indices(recipe, step)
    assert len({*expected}) > P // 2 and {*task} == {0, 1}
    np.testing.assert_array_equal(found["scores"][:, 0], np.repeat(expected, G))
    np.testing.assert_array_equal(found["index"], np.repeat(expected, G))


def test_a_sheet_says_each_picture_s_score(recipe):
    asked = pipeline.asked(recipe, pipeline.check(recipe), range(P), 0)
    expected, _ = indices(recipe, 0)
    said = reinforcement.scores_shown(REWARDS, asked)(np.asarray(drawn(jnp.asarray(expected))))
    assert said == [f"number {k}" for k in expected]


def test_validation_is_what_the_rewards_say_of_the_averaged_network_s_pictures(recipe, monkeypatch):
    """Means by task over its two batches."""

    def sampled(config, params, batch, null, noise, sigmas, context_length, guidance):
        assert noise.shape[:1] == (P,) and len(sigmas) == 5 and null is None
        at = batch["index"][:, None, None, None] + params["shift"]
        return jnp.broadcast_to(at / 127.5 - 1, (P, SIDE, SIDE, 3)), None

    monkeypatch.setattr(stages, "sampled", sampled)
    predict = reinforcement.validation_fn(CONFIG, MESH, recipe, REWARDS, steps=4, guidance=1.0)
    state = types.SimpleNamespace(ema={"shift": jnp.float32(0)})
    found = predict(state, {"shift": jnp.float32(9)}, 5).metrics
    index, task = (
        np.concatenate(x) for x in zip(*(indices(recipe, k) for k in (0, 1)), strict=True)
    )
    assert found["val/reward"] == pytest.approx(index.mean())
    for k, name in enumerate(TASKS):
        assert found[f"val/reward/number/{name}/mean"] == pytest.approx(index[task == k].mean())
