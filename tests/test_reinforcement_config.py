"""How a run of reinforcement learning is configured: what is refused, and what a run is made of."""

import functools
import math

import pytest
from ml_collections import ConfigDict

from configs.shapes import rl_grpo, rl_nft
from dreamlite_jax.data import transforms
from dreamlite_jax.objectives import nft
from dreamlite_jax.rewards import opening
from dreamlite_jax.rewards.base import RewardError
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train import reinforcement
from dreamlite_jax.train.config import ConfigError
from dreamlite_jax.train.loop import Limit


@pytest.fixture
def quick(cache):
    def make(**changes):
        config = rl_grpo.get_config("quick")
        config.model = str(cache / "model")
        for key, value in changes.items():
            *path, last = key.split("__")
            section = functools.reduce(lambda at, part: at[part], path, config)
            section[last] = value
        return config

    return make


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 6}, "batch_size 6 (pictures of a rollout) is no multiple of 1 devices x"),
        ({"rl__group": 3}, "no multiple of 1 devices x rl.group 3; nearest are 6 and 9"),
        ({"rl__updates": 3}, "rl.updates 3 x accumulation 1; nearest are 6 and 9"),
        ({"rl__updates": 2, "accumulation": 8}, "rl.updates 2 x accumulation 8; nearest are 16"),
        ({"rl__parts": 3}, "no multiple of 1 devices x rl.parts 3"),
        ({"rl__group": 1}, "rl.group is 1, should be at least 2"),
        ({"rl__updates": 0}, "rl.updates is 0, should be at least 1"),
        ({"rl__guidance": math.inf}, "rl.guidance is inf, should be finite"),
        ({"rl__process__level": 2.0}, "rl.process.level is 2.0, should be above 0"),
        ({"rl__process__window": 3}, "rl.process.window is 3, should be from 0 to the steps less"),
        ({"rl__limits__kl": math.nan}, "rl.limits.kl is nan, should be a number"),
        ({"rl": ConfigDict({"grop": 4})}, "rl.grop is unknown; known are group, updates, parts"),
        ({"rl": ConfigDict({"process": {"stpes": 4}})}, "rl.process.stpes is unknown"),
        ({"rl": ConfigDict({"limits": {"KL": 4.0}})}, "rl.limits.KL is unknown; known are kl"),
        ({"rl": ConfigDict({"group": "4"})}, "rl.group is '4', should be int"),
        ({"rl__rewards": ()}, "rl.rewards: none with a weight for the task t2i, edit"),
        ({"rl__rewards": ({"reward": "beauty"},)}, "rl.rewards[0]: unknown reward 'beauty'"),
        ({"loss__clip": 0.0}, "loss.clip is 0.0, should be positive"),
        ({"loss": {"clipp": 0.1}}, "loss.clipp is unknown; known are clip, kl, scale"),
        ({"train": ("unet", "text_encoder")}, "should name some of unet"),
    ],
)
def test_each_problem_is_named(changes, message, quick, tmp_path):
    with pytest.raises(ConfigError) as error:
        train_config.opened(quick(**changes), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rl__shared_noise": True}, "rl.shared_noise is True, but the stage nft draws without"),
        ({"loss__levels": 4}, "loss.levels is 4, should be at most rl.process.steps, 3"),
        ({"loss__strength": 0.0}, "loss.strength is 0.0, should be positive"),
        ({"loss__advantage_clip": 0.0}, "loss.advantage_clip is 0.0, should be positive"),
    ],
)
def test_each_problem_of_learning_from_pictures_is_named(changes, message, quick, tmp_path):
    config = quick(stage="nft", loss=rl_nft.get_config("quick").loss, **changes)
    with pytest.raises(ConfigError) as error:
        train_config.opened(config, tmp_path)
    assert message in str(error.value)


def test_a_reward_that_fails_its_test_ends_it_before_the_start(quick, monkeypatch, tmp_path):
    turned = opening.BUILT_IN["shapes"]._replace(score=lambda images, *_: [0.5] * len(images))
    monkeypatch.setitem(opening.BUILT_IN, "shapes", turned)
    with pytest.raises(RewardError, match=r"reward shapes: self-test: for '.*' a good picture"):
        train_config.opened(quick(), tmp_path)
    away = ({"reward": "http://127.0.0.1:9"},)
    with pytest.raises(RewardError, match=r"rl.rewards\[0\]: http://127.0.0.1:9: .*start the serv"):
        train_config.opened(quick(rl__rewards=away), tmp_path)


def test_what_a_run_is_made_of(quick, tmp_path):
    config = quick(rl__guidance=2.0, rl__limits__kl=0.5)
    run = train_config.opened(config, tmp_path)
    assert run.recipe.batch_size == 2 and run.recipe.with_null
    assert run.recipe.dropout == transforms.NEVER
    assert run.schedule.limits[0] == Limit("kl", most=0.5)
    assert run.schedule.batch_size == 8  # pictures
    assert run.reference.kind == "scratch"
    said = reinforcement.arithmetic(run.rl.rollouts, run.loss, 8, 1, 1)
    assert "8 pictures = 2 prompts x 4 a group = 1 devices x 8 at a time x 1 parts" in said
    assert "parts, 3 steps each, 1 of them random" in said
    assert "2 updates of 4 pictures = 1 devices x 4 x accumulation 1" in said
    assert "a device weighs 4 steps at a time" in said
    said = reinforcement.arithmetic(run.rl.rollouts, nft.Settings(levels=3), 8, 1, 1)
    assert "parts, 3 steps each\n" in said and "weighs 12 noised pictures at a time" in said
    meta = train_config.meta_of(run)
    train_config.check_resumed(run, meta)
    with pytest.raises(ConfigError, match="the run began with the run x at step 3, now init_from"):
        train_config.check_resumed(run, {**meta, "reference": "the run x at step 3"})
