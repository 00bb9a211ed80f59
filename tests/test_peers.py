"""What says that another process is gone, and what does not."""

import ast
import os
import subprocess
import sys
import types

import commands
import jax
import pytest
import training
from absl import flags
from absl.testing import flagsaver

from dreamlite_jax import cli
from dreamlite_jax.errors import UserError
from dreamlite_jax.train import peers, signals
from dreamlite_jax.train.checkpoint import CheckpointError
from launch import processes

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


def test_what_the_loss_of_another_ends_is_not_exchanged_with_it(two, monkeypatch):
    monkeypatch.setattr(signals, "on_any_process", lambda _: pytest.fail("would wait"))

    def do():
        raise RuntimeError(LOST)

    with pytest.raises(RuntimeError, match="reset by peer"):
        peers.together(do)


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
    with peers.leaving_with_the_lost():
        raise peers.AloneError("process 0 of 2: shard 3 is damaged")
    assert codes[1:] == [2]
    assert capsys.readouterr().err == "error: process 0 of 2: shard 3 is damaged\n"


BEGUN = """
import sys
import jax
from dreamlite_jax.errors import UserError
from dreamlite_jax.train import checkpoint, folders, peers
folders.LISTED = 0.5
address, process, own, shared = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
one = jax.process_index() == 1
found = {"healthy": peers.elsewhere([]), "ill": peers.elsewhere(["no data"] * one)}
found["like"] = peers.unlike(config={"a": 1}, data=[1, 2])
found["unlike"] = peers.unlike(config={"a": 1}, data=[1, 2 + one])

def read():
    if one:
        raise UserError("no data")
    return 3

def opened(folder):
    with checkpoint.open_manager(folder):
        return "opened"

def tried(make):
    try:
        return make()
    except UserError as error:
        return f"{type(error).__name__}: {error}"

found["together"] = peers.together(lambda: 3), tried(lambda: peers.together(read))
found["folders"] = tried(lambda: opened(shared)), tried(lambda: opened(own))
print(found)
"""


def test_two_processes_begin_together_or_not_at_all(tmp_path):
    address = f"localhost:{training.free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BEGUN, address, str(k), tmp_path / f"{k}", tmp_path / "both"],
            cwd=training.ROOT,
            env=training.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    first, second = (ast.literal_eval(lines[-1]) for lines in said)
    lost = "process 1 of 2 cannot begin: its log says why"
    for found in (first, second):
        assert found["healthy"] == found["like"] == []
        (line,) = found["unlike"]
        assert line.startswith("data of process 1 is not that of process 0")
        assert found["together"][0] == 3 and found["folders"][0] == "opened"
        assert "CheckpointError" in found["folders"][1]
        assert "process 1 does not see what process 0 writes there" in found["folders"][1]
    assert (first["ill"], second["ill"]) == ([lost], [])  # which has its own problem to tell
    assert first["together"][1] == "UserError: another process cannot begin: its log says why"
    assert second["together"][1] == "UserError: no data"


@pytest.mark.parametrize("platforms", [None, "cpu", "tpu,cpu"])
def test_hosts_of_a_pod_join_without_being_told_of_each_other(platforms, monkeypatch):
    joined = []
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(jax_platforms=platforms),
        distributed=types.SimpleNamespace(initialize=lambda *given: joined.append(given)),
        process_count=lambda: 4,
    )
    monkeypatch.setattr(processes, "jax", fake)
    with commands.only_flags_of("launch.train") as command, flagsaver.flagsaver():
        flags.FLAGS(["train", "--workdir=run"])
        command.connect()
    assert joined == ([()] if platforms == "tpu,cpu" else [])

    def late():
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    fake.distributed.initialize = late
    with pytest.raises(cli.CommandError, match=r"4 hosts .* each other \(DEADLINE_EX.*say --coo"):
        processes.join_pod()
    fake.process_count = lambda: 1
    processes.join_pod()  # alone there is nobody to find
