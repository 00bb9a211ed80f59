"""What says that another process is gone, and what does not."""

import os

import jax
import pytest

from dreamlite_jax.errors import UserError
from dreamlite_jax.train import peers, signals
from dreamlite_jax.train.checkpoint import CheckpointError

LOST = "Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:1: Connection reset by peer"


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)


def raised(error, cause=None):
    try:
        raise error from cause
    except type(error) as found:
        return found


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError(LOST), True),
        (raised(CheckpointError("not written"), RuntimeError(LOST)), True),
        (RuntimeError("INTERNAL: Task 1 heartbeat timeout"), True),
        (RuntimeError("UNAVAILABLE: Failed to send RPC: Socket closed"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (RuntimeError("Gloo AllReduce failed: sizes 3 and 4"), False),
        (raised(CheckpointError("not written"), OSError("no space")), False),
        (raised(UserError("no rewards"), ConnectionRefusedError("Connection refused")), False),
    ],
)
def test_is_lost(error, lost, two, monkeypatch):
    assert peers.is_lost(error) == lost
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert not peers.is_lost(error)


def test_leaving(two, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with peers.leaving_with_the_lost():
        raise RuntimeError(LOST)
    assert codes == [signals.EXIT_TO_RESUME]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: process 0 of 2: another one has ended") and "reset by" in line
    with pytest.raises(KeyError), peers.leaving_with_the_lost():
        raise KeyError("ours")
    assert len(codes) == 1
