"""Rewards where a run has several processes: all of them learn of what one of them meets.

Threads stand for processes.
"""

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from jax.sharding import NamedSharding, PartitionSpec

from dreamlite_jax.diffusion import flow
from dreamlite_jax.errors import UserError
from dreamlite_jax.objectives import nft
from dreamlite_jax.rewards import opening, remote
from dreamlite_jax.rewards.base import Reward, RewardError
from dreamlite_jax.rewards.opening import Weighted
from dreamlite_jax.train import reinforcement, rollouts, sharding, signals, stages
from dreamlite_jax.train.peers import AloneError
from dreamlite_jax.train.rollouts import Rollouts

IMAGE = np.zeros((2, 2, 3), np.uint8)
ASKED = [types.SimpleNamespace(caption="", source=None, metadata={}, task="t2i")]


@pytest.fixture
def on_two(monkeypatch):
    """A function that gives what another one returns or raises on each of two processes."""
    here, barrier, flags = threading.local(), threading.Barrier(2, timeout=5), [False, False]

    def on_any_process(flag):
        flags[here.number] = flag
        barrier.wait()
        found = any(flags)
        barrier.wait()
        return found

    def one(do, number):
        here.number = number
        try:
            return do(number)
        except Exception as error:
            return error

    def run(do):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, [do, do], range(2)))

    monkeypatch.setattr(signals, "on_any_process", on_any_process)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(here, "number", 0))
    return run


# --- Scores ---------------------------------------------------------------------------------------

AWAY, FAULT = RewardError("away"), KeyError("a fault of ours")
ELSEWHERE = "another process got no scores from its rewards"
UNSAVED = "; nothing was saved for it"


@pytest.mark.parametrize(
    "raised, expected",
    [
        ((None, None), (["mine 1"], ["mine 1"])),
        ((None, AWAY), (UserError(ELSEWHERE), AWAY)),
        ((None, FAULT), (AloneError(ELSEWHERE + UNSAVED), FAULT)),
        ((AWAY, FAULT), (AloneError("away" + UNSAVED), FAULT)),
        ((FAULT, FAULT), (FAULT, FAULT)),
    ],
)
def test_all_leave_where_one_gets_no_scores(raised, expected, on_two):
    def asked(number):
        def score(*_):
            if raised[number]:
                raise raised[number]
            return [1.0]

        return reinforcement.scores_shown([Weighted(Reward("mine", score), 1.0, ("t2i",))], ASKED)(
            IMAGE[None]
        )

    found = on_two(asked)
    assert [(type(x), str(x)) for x in found] == [(type(x), str(x)) for x in expected]


def test_there_are_as_many_pictures_as_prompts():
    reward = Weighted(Reward("mine", lambda images, *_: [1.0] * len(images)), 1.0, ("t2i",))
    with pytest.raises(RuntimeError, match="2 pictures of this process for 1 prompts"):
        reinforcement.scores_shown([reward], ASKED)(np.stack([IMAGE, IMAGE]))


# --- The self-test --------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch, on_two):
    """A function: rewards by name, opened on two processes -> what is found, what was tested on
    which process, and the concurrency of servers."""

    def on_each(rewards):
        tested, concurrency = [], []

        def open_remote(url, settings, interrupted):
            concurrency.append(settings.concurrency)
            return rewards[url]

        def self_test(reward):
            tested.append((reward.name, jax.process_index()))
            if reward.least == 1:
                raise RewardError(f"{reward.name} fails")

        monkeypatch.setattr(opening, "BUILT_IN", rewards)
        monkeypatch.setattr(remote, "open_remote", open_remote)
        monkeypatch.setattr(reinforcement, "self_test", self_test)
        entries = tuple({"reward": name} for name in rewards)
        settings = reinforcement.Settings(Rollouts(), reinforcement.Limits(), entries)
        recipe = types.SimpleNamespace(streams=())
        found = on_two(lambda _: reinforcement.open_rewards(settings, recipe))
        return found, sorted(tested), concurrency

    return on_each


def test_one_process_tests_the_servers(opened):
    rewards = {"here": Reward("here", None), "http://there": Reward("there", None)}
    found, tested, concurrency = opened(rewards)
    assert [[one.reward.name for one in each] for each in found] == [["here", "there"]] * 2
    assert tested == [("here", 0), ("here", 1), ("there", 0)]
    assert concurrency == [2, 2]


def test_all_leave_where_one_finds_that_a_server_fails(opened):
    found, *_ = opened({"http://there": Reward("there", None, least=1)})
    assert [(type(x), str(x)) for x in found] == [
        (RewardError, "there fails"),
        (UserError, "another process cannot use its rewards"),
    ]


# --- Where pictures lie ---------------------------------------------------------------------------


def on_devices(count):
    """Rows of pictures are spread over the devices though these were made whole on each."""
    mesh, p, g, side = sharding.make_mesh(1, -1), 4, 2, 4
    config = types.SimpleNamespace(
        shift=flow.ResolutionShift(), vae=types.SimpleNamespace(latent_channels=4)
    )
    whole = NamedSharding(mesh, PartitionSpec())

    def made(rows):
        numbers = jnp.broadcast_to(jnp.arange(rows)[:, None, None, None], (rows, side, side, 3))
        return jax.lax.with_sharding_constraint(numbers.astype(jnp.uint8), whole)

    def conditions(config, networks, batch, context_length):
        return {"time_ids": jnp.zeros((p, 6))}, jnp.zeros((p, side, side, 4))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "conditions", conditions)
        patch.setattr(rollouts, "_draw", lambda *given: ({}, made(p * g)))
        rollout = rollouts.make_rollout(config, Rollouts(group=g), nft.Settings(), 1, mesh)
        pictures = rollout({}, {}, {}, jax.random.key(0), 0)[1]
    own = [int(shard.data[k, 0, 0, 0]) for shard in pictures.addressable_shards for k in range(2)]
    assert len(pictures.addressable_shards) == count == 4
    assert pictures.addressable_shards[0].data.shape[0] == 2, pictures.sharding
    assert sorted(own) == list(range(p * g))


def test_4_devices():
    training.on_devices("test_reward_processes", 4)
