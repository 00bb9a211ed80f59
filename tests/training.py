"""Runs of `launch.train`, here or as processes that can be killed, and what they leave."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.train import checkpoint, metrics, origins
from dreamlite_jax.train import config as train_config

ROOT = commands.ROOT


def shared(cache: Path) -> tuple[str, ...]:
    """Flags of runs that need not make a model and compile what another has compiled."""
    return f"--compilation_cache={cache / 'programs'}", f"--config.model={cache / 'model'}"


def environment(devices: int = 1) -> dict[str, str]:
    """Of a command's process: so many devices, and no PyTorch, as where nothing is compared with
    it. (transformers imports it wherever it is, which takes seconds.)"""
    given = filter(None, [os.environ.get("PYTHONPATH")])
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "no_torch"), *given]),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}",
    }


def start(config: str, workdir: Path, cache: Path, *flags: str, devices: int = 1, **kw):
    """`python -m launch.train --config=configs/<config>.py:quick <flags>`, under way; what it says
    goes to <workdir>.<process>.log. `cache` is the fixture's folder."""
    log = Path(f"{workdir}.{kw.pop('process', 0)}.log")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch.train"),
            *(f"--config=configs/{config}.py:quick", f"--workdir={workdir}"),
            *shared(cache),
            *flags,
        ],
        cwd=ROOT,
        env=environment(devices),
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        **kw,
    )


def run_here(config: str, workdir: Path, cache: Path, *flags: str, code: int = 0) -> None:
    """The same to its end in this process, which spares a start; caplog has what it logs."""
    given = f"--config={ROOT / 'configs' / config}.py:quick", f"--workdir={workdir}"
    assert commands.run("train", *given, *shared(cache), *flags) == code


def run(config: str, workdir: Path, cache: Path, *flags: str, code: int = 0, **kw) -> str:
    """The same to its end; returns what it says."""
    process = start(config, workdir, cache, *flags, **kw)
    try:
        found = process.wait(900)
    finally:
        process.kill()
    said = Path(f"{workdir}.0.log").read_text()
    assert found == code, said
    return said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_together(
    config: str, workdir: Path, cache: Path, *flags: str, processes: int, **kw
) -> list[str]:
    """The same by several processes; returns what each says."""
    with together(config, workdir, cache, *flags, processes=processes, **kw) as started:
        codes = [process.wait(900) for process in started]
    said = sayings(workdir, processes)
    assert codes == [0] * processes, said
    return said


@contextlib.contextmanager
def together(
    config: str, workdir: Path, cache: Path, *flags: str, processes: int, **kw
) -> Iterator[list[subprocess.Popen]]:
    """The same, under way."""
    joined = (f"--coordinator=localhost:{free_port()}", f"--processes={processes}")
    with contextlib.ExitStack() as stack:
        started = []
        for k in range(processes):
            own = f"--process={k}"
            started.append(start(config, workdir, cache, *flags, *joined, own, process=k, **kw))
            stack.callback(started[-1].wait)
            stack.callback(started[-1].kill)
        yield started


def sayings(workdir: Path, processes: int) -> list[str]:
    """What each of several processes has said."""
    return [Path(f"{workdir}.{k}.log").read_text() for k in range(processes)]


def steps_said(log: Path) -> int:
    """How many steps a run has told of."""
    return log.read_text().count("\nstep ") if log.exists() else 0


def after_steps(process: subprocess.Popen, log: Path, count: int) -> None:
    """Returns once a run has told of so many steps, or has ended."""
    while process.poll() is None and steps_said(log) < count:
        time.sleep(0.01)


def after_saving(process: subprocess.Popen, workdir: Path, before: int = 0) -> None:
    """Returns once a run has a whole checkpoint of a step beyond `before`, or has ended."""
    while process.poll() is None and (checkpoint.latest_step(workdir) or 0) <= before:
        time.sleep(0.01)


def begun(config, workdir: Path, change=lambda meta: None):
    """A run, opened, and in its workdir a checkpoint with what it says of itself; `change` makes
    that another's."""
    run = train_config.opened(config, workdir)
    meta = train_config.meta_of(run)
    change(meta)
    with checkpoint.open_manager(workdir) as manager:
        checkpoint.save(manager, 1, {"x": jnp.ones(1)}, meta)
    return run


def result(workdir: Path) -> tuple[int, dict, list[dict]]:
    """The last checkpoint's step and its arrays' dtypes, shapes and checksums; the metrics of all
    steps."""
    step = checkpoint.latest_step(workdir)
    saved = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return step, saved["arrays"], metrics.read_metrics(workdir, times=False)


# Devices sum in another order. With its usual epsilon, Adam's steps are of the size of the learning
# rate however small a gradient is, so that one which is rounding alone would move its parameter by
# 1e-3 either way; with this one the steps follow the gradients.
SMOOTH = "--config.optim.eps=1e-3"
# Sums of float32 over some thousand values differ by 1e-6; another batch, key or mean changes
# losses by 1e-2 and more.
RTOL = 3e-5


def until(lines: list[dict], step: int) -> list[dict]:
    return [line for line in lines if line["step"] <= step]


def assert_close(found: list[dict], expected: list[dict]) -> None:
    """Metrics of the same steps on other devices, with `SMOOTH`: losses and norms agree within
    RTOL."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if name.startswith(("loss", "val/")) or name.endswith("_norm"):
                # NaN: the mean of no row.
                wanted = pytest.approx(float(theirs[name]), rel=RTOL, nan_ok=True)
                assert float(ours[name]) == wanted, name


def assert_parameters_close(found: Path, expected: Path, steps: int) -> None:
    """Parameters and average of two runs of so many steps with `SMOOTH`. Gradients of sums of some
    thousand values differ by 1e-6 of their size, which is below 1; that moves a parameter by
    1e-6 lr / eps a step, where lr is at most eps; twice that is the bound."""
    runs = {part: [origins.load_run(run, part=part).params for run in (found, expected)]
            for part in ("params", "ema")}  # fmt: skip
    for part in runs.values():
        for ours, theirs in zip(*map(jax.tree.leaves, part), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * steps)
    # That tells something: the average is this far behind already.
    behind = jax.tree.map(lambda a, b: np.abs(a - b).max(), runs["params"][1], runs["ema"][1])
    assert max(jax.tree.leaves(behind)) > 2e-4


def on_devices(module: str, count: int = 8) -> None:
    """Calls `on_devices(count)` of a module of the tests in a process that has so many."""
    code = f"import sys; sys.path[:0] = ['tests']; import {module}; {module}.on_devices({count})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(count),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
