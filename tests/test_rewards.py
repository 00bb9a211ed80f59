"""Rewards: what they say of pictures, and how they are checked before anything depends on them."""

import math
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT

from dreamlite_jax.data import mixture, shapes
from dreamlite_jax.rewards import base, opening
from dreamlite_jax.rewards.base import Example, Requests, Reward, RewardError, scored, self_test
from dreamlite_jax.rewards.shapes import examples
from dreamlite_jax.rewards.statistics import saturation


def drawn(scene):
    return shapes.render(scene, 64, 64)


def metadata(task, index, split="held_out"):
    return {"settings": "demo", "split": split, "task": task, "seed": 0, "index": index}


def worlds(task, count=6):
    """Right pictures of held-out prompts, and what they were asked to be."""
    draw = {"t2i": shapes.sample_t2i, "edit": shapes.sample_edit}[task]
    samples = [draw(shapes.DEMO, "held_out", 0, k) for k in range(count)]
    edit = task == "edit"
    return Requests(
        [drawn(s.target if edit else s.scene) for s in samples],
        [s.instruction if edit else s.caption for s in samples],
        [drawn(s.source) if edit else None for s in samples],
        [metadata(task, k) for k in range(count)],
    )


@pytest.mark.parametrize("task", base.TASKS)
def test_the_judge_s_rewards_are_the_judge_s(task):
    requests = worlds(task)
    assert scored(opening.BUILT_IN["shapes"], requests).tolist() == [1.0] * 6
    turned = requests._replace(images=requests.images[1:] + requests.images[:1])
    found = scored(opening.BUILT_IN["shapes"], turned)
    exact = scored(opening.BUILT_IN["shapes_exact"], turned)
    draw = {"t2i": shapes.sample_t2i, "edit": shapes.sample_edit}[task]
    for k in range(6):
        judged = shapes.judge(turned.images[k], draw(shapes.DEMO, "held_out", 0, k).spec)
        assert found[k] == pytest.approx(judged.score) and exact[k] == judged.exact
    assert found.mean() < 0.9


def test_metadata_of_nothing_is_refused():
    requests = worlds("t2i", 1)
    for wrong in ({}, metadata("t2i", "x"), metadata("t2i", 0, "nowhere"), metadata("draw", 0)):
        with pytest.raises(RewardError, match="no sample of the shapes world"):
            scored(opening.BUILT_IN["shapes"], requests._replace(metadata=[wrong]))


def test_saturation_by_hand():
    image = np.array([[[255, 0, 0], [100, 50, 50]], [[7, 7, 7], [0, 0, 0]]], np.uint8)
    assert saturation(image) == pytest.approx((1 + 0.5 + 0 + 0) / 4)


# --- Checks ---------------------------------------------------------------------------------------


def constant(scores, **kw):
    return Reward("mine", lambda *given: scores, **kw)


@pytest.mark.parametrize(
    "scores, message",
    [
        ([0.5], "scores of shape [1] for 2 pictures"),
        ([[0.5, 0.5]], "scores of shape [1, 2] for 2 pictures"),
        (None, "reward mine: "),
        (["a", "b"], "could not convert string to float: 'a'"),
        ([0.5, math.nan], "1 of 2 scores are nan"),
        ([-math.inf, 0.1], "1 of 2 scores are -inf"),
        ([0.5, 1.5], "a score of 1.5 is outside of its range 0 to 1"),
    ],
)
def test_scores_that_are_none(scores, message):
    with pytest.raises(RewardError) as error:
        scored(constant(scores, least=0.0, most=1.0), worlds("t2i", 2))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("reward", opening.BUILT_IN.values(), ids=lambda reward: reward.name)
def test_every_built_in_reward_passes_its_own_test(reward):
    self_test(reward)


def test_the_self_test_finds_what_is_wrong():
    good, bad = (np.full((8, 8, 3), value, np.uint8) for value in (200, 10))
    shown = [Example(good, bad, f"prompt {k}", None, {}) for k in range(2)]

    def bright(images, *_):
        return [float(image.mean()) for image in images]

    def turned(images, *_):
        return [-score for score in bright(images)]

    def by_place(images, *_):
        return [float(k % 2 == 0) for k in range(len(images))]

    self_test(Reward("mine", bright, examples=lambda: shown))
    for score, message in (
        (turned, "for 'prompt 0' a good picture scores -200, a bad one -10"),
        (lambda images, *_: [0.5] * len(images), "a good picture scores 0.5, a bad one 0.5"),
        (by_place, "in another order the same pictures have other scores"),
    ):
        with pytest.raises(RewardError) as error:
            self_test(Reward("mine", score, examples=lambda: shown))
        assert message in str(error.value)
    with pytest.raises(RewardError, match="has no examples"):
        self_test(Reward("mine", bright))


# --- In a config ----------------------------------------------------------------------------------

SHAPES = {"reward": "shapes"}


@pytest.mark.parametrize(
    "entries, message",
    [
        ((), "none with a weight for the task t2i, edit"),
        (({**SHAPES, "weight": 0.0},), "none with a weight for the task t2i, edit"),
        (({**SHAPES, "task": "t2i"},), "none with a weight for the task edit"),
        ((SHAPES, SHAPES), "the name 'shapes' stands for several"),
        (("shapes",), "rl.rewards[0]: 'shapes' should be a dict"),
        (({"weight": 1.0},), "`reward` is missing: a server's address, or one of shapes"),
        (({"reward": "beauty"},), "unknown reward 'beauty'; known are shapes"),
        (({**SHAPES, "wieght": 1.0},), "unknown keys wieght; known are reward, weight, task, name"),
        (({**SHAPES, "timeout": 1.0},), "unknown keys timeout"),
        (({**SHAPES, "weight": "1"},), "weight is '1', should be float"),
        (({**SHAPES, "weight": -1.0},), "weight is -1.0, should be 0 or more"),
        (({**SHAPES, "task": "draw"},), "unknown task 'draw'; known are t2i, edit"),
        (({"reward": "http://x", "attempts": 0},), "attempts is 0, should be positive"),
        (({"reward": "http://x", "patience": "long"},), "patience is 'long', should be float"),
    ],
)
def test_entries_that_are_wrong(entries, message):
    assert any(message in problem for problem in opening.check(entries, ("t2i", "edit")))


def test_rewards_are_asked_about_their_tasks_alone():
    seen = {}

    def counting(name, value):
        def score(images, prompts, sources, metadata):
            seen[name] = list(prompts)
            return [value + float(image[0, 0, 0]) for image in images]

        return score

    entries = [SHAPES, {"reward": "sharpness", "task": "edit", "weight": 0}]
    assert not opening.check(entries, ("t2i", "edit"))
    opened = opening.open_rewards(entries)
    assert [one.tasks for one in opened] == [("t2i", "edit"), ("edit",)]
    assert [one.weight for one in opened] == [1.0, 0.0]
    rewards = [
        one._replace(reward=Reward(name, counting(name, value)))
        for one, name, value in zip(opened, "ab", (0.25, 0.5), strict=True)
    ]
    images = [np.full((2, 2, 3), k, np.uint8) for k in range(3)]
    requests = Requests(images, list("xyz"), [None] * 3, [{}] * 3)
    found = opening.score_all(rewards, requests, ["edit", "t2i", "edit"])
    np.testing.assert_array_equal(found, [[0.25, 0.5], [1.25, 0], [2.25, 2.5]])
    assert seen == {"a": ["x", "y", "z"], "b": ["x", "z"]}


def test_tasks_are_the_data_s():
    assert base.TASKS == mixture.TASKS
    assert {e.source is None for e in examples()} == {True, False}


def test_a_server_s_environment_need_not_have_much():
    """What HPSv3 and EditReward pin must not meet what this project does."""
    code = (
        "import sys, launch.serve_reward; "
        "found = {name.split('.')[0] for name in sys.modules}; "
        "print(sorted(found & {'jax', 'flax', 'grain', 'transformers', 'torch', 'ml_collections'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
