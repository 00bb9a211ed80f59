"""Lets tests import what they share: commands and training here, reference in parity/."""

import contextlib
import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.demos import driver

# Of tests and of what they start: libtpu, which they compile for, is no device here and says so.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("GALLIVM_PERF", "nopt")  # of the Vulkan driver: few pictures, many shaders
# Of XLA: most programs run for few steps, and are compiled fast rather than well.
os.environ.setdefault("XLA_FLAGS", driver.COMPILED_FAST)
# Tracing makes millions of objects, few of them garbage: collecting it is an eighth of the time.
gc.set_threshold(50_000, 20, 20)
# A shell's background jobs ignore Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parity")]

# The slowest files, slowest first but for the third: it waits behind the first, which is one test.
# The last line's but test_dmd2 are the slowest of parity.
SLOWEST = (
    *("test_demo_e2e", "test_resume", "test_own_photographs", "test_reinforcement"),
    *("test_configs", "test_processes", "test_aot_compile", "test_bundle"),
    *("test_unet", "test_pipeline", "test_qwen3_vl", "test_dmd2"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Commands first: the slowest files must not be the last, with one process left to run them.
    What wants optimised code is told so."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        slow = item.path.stem in SLOWEST
        return "e2e" not in item.keywords, SLOWEST.index(item.path.stem) if slow else len(SLOWEST)

    items.sort(key=place)
    if os.environ["XLA_FLAGS"] == driver.COMPILED_FAST:
        wants = pytest.mark.skip(reason="wants optimised code: set XLA_FLAGS= (make test does)")
        for item in items:
            if "optimised" in item.keywords:
                item.add_marker(wants)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A folder that all tests share, those of other processes too: `programs/`, compiled once, and
    `model/`, a tiny random one."""
    from dreamlite_jax import tiny

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    if not (folder / "model").is_dir():
        with contextlib.suppress(OSError):  # another process was faster
            tiny.tiny_model_dir(own / "model").rename(folder / "model")
    return folder


@pytest.fixture
def quick(cache: Path) -> Callable:
    """A function that gives a config's quick variant with some keys changed, on the shared tiny
    model; `optim__lr` is the key optim.lr."""
    from configs.shapes import phase3_joint

    def make(module=phase3_joint, **changes):
        config = module.get_config("quick")
        config.model = str(cache / "model")
        for key, value in changes.items():
            *path, last = key.split("__")
            functools.reduce(lambda at, part: at[part], path, config)[last] = value
        return config

    return make


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def gpu() -> None:
    """LiteRT's GPU accelerator on some Vulkan driver; CI has one (`make gpu-driver`)."""
    from convert import vulkan

    if reason := vulkan.gpu_available():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
