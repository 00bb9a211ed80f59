"""Reward servers of many clients: busy ones are waited for, who has left is not scored."""

import http.client
import threading
import time

import pytest
from test_remote_rewards import (
    IDENTITY,
    QUICK,
    Clock,
    Script,
    identity,
    proper,
    requests_of,
    started,
)

from dreamlite_jax.rewards import opening, protocol, remote, serving
from dreamlite_jax.rewards.base import RewardError, scored

IMPATIENT = QUICK._replace(patience=0.0, timeout=1.5)


def slow(name, scores):
    time.sleep(3.0)
    return proper(name, scores)


@pytest.fixture
def running():
    """A function that gives back a server, which is stopped in the end."""
    servers = []

    def run(server):
        servers.append(server)
        return server

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def script(running):
    def start(*answers):
        made = Script(*answers)
        running(made.server)
        return made

    return start


@pytest.fixture
def serve(running):
    return lambda reward: started(running(serving.server(reward)))


@pytest.fixture
def warned(monkeypatch):
    said = []
    monkeypatch.setattr(remote.logging, "warning", lambda form, *args: said.append(form % args))
    return said


def test_a_busy_server_is_waited_for_beyond_all_patience(script, warned):
    made = script(slow, slow)
    reward = remote.open_remote(made.url, IMPATIENT)
    assert scored(reward, requests_of([5, 2])).tolist() == [5, 2]
    assert made.seen == 3
    assert warned == [f"reward identity: {made.url} is busy (timed out): waiting"]


def test_waiting_for_a_busy_server_ends_when_the_run_is_asked_to_leave(script, warned):
    made = script(slow)
    settings = IMPATIENT._replace(pause=3.0)
    reward = remote.open_remote(made.url, settings, lambda: bool(warned))
    with pytest.raises(RewardError, match="asked to leave"):
        scored(reward, requests_of([1]))
    assert made.seen == 1


def held(gate, seen):
    """`identity`, which says of what it is asked and then waits."""

    def score(images, prompts, *rest):
        seen.extend(prompts)
        assert gate.wait(20)
        return identity(images, prompts, *rest)

    return IDENTITY._replace(score=score)


def test_a_server_whose_model_hangs_is_not_busy(serve, warned):
    """Its status page answers, but nobody gets scores."""
    gate, end = threading.Event(), time.monotonic() + 10
    reward = remote.open_remote(serve(held(gate, [])), IMPATIENT, lambda: time.monotonic() > end)
    with pytest.raises(RewardError, match="has been away for"):
        scored(reward, requests_of([1]))
    gate.set()
    assert len(warned) == 1


def test_what_nobody_waits_for_any_more_is_not_scored(serve, caplog):
    gate, seen = threading.Event(), []
    url = serve(held(gate, seen))
    host, port = url.removeprefix("http://").split(":")
    waits, leaves = (http.client.HTTPConnection(host, int(port), timeout=20) for _ in range(2))
    waits.request("POST", "/", protocol.request("a", requests_of([1])))
    while not seen:
        time.sleep(0.01)
    leaves.request("POST", "/", protocol.request("b", requests_of([2])))
    leaves.close()
    gate.set()
    assert protocol.read_reply(waits.getresponse().read(), "a", 1) == [1]
    waits.close()
    while "waits no longer" not in caplog.text and len(seen) == 1:
        time.sleep(0.01)
    assert seen == ["1"]
    (record,) = caplog.records
    assert record.getMessage() == "127.0.0.1 waits no longer: not scored (1 so far)"
    reward = remote.open_remote(url, QUICK)
    assert scored(reward, requests_of([3])).tolist() == [3]
    assert protocol.read_answered(remote._status(url, QUICK)) == 2


def test_that_a_server_is_busy_is_said_once_a_minute(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    due, said = remote._at_most_every(60), []
    for clock.now in range(0, 200, 10):
        said += [clock.now] if due() else []
    assert said == [0, 60, 120, 180]


@pytest.mark.parametrize("whole, processes, each", [(4, 1, 4), (8, 3, 2), (4, 64, 1)])
def test_processes_share_the_requests_at_a_time(whole, processes, each, monkeypatch):
    monkeypatch.setattr(
        remote,
        "open_remote",
        lambda url, settings, _: IDENTITY._replace(name=str(settings.concurrency)),
    )
    entry = {"reward": "http://x", "concurrency": whole}
    ((reward, *_),) = opening.open_rewards([entry], processes=processes)
    assert reward.name == str(each)
