"""Checkpoints: bit-exact on any number of devices, and a run that can start whatever befell it."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training

from dreamlite_jax.train import checkpoint
from dreamlite_jax.train import checksums as checksums_module
from dreamlite_jax.train.checkpoint import CheckpointError
from dreamlite_jax.train.checksums import checksums

ROOT = Path(__file__).parent.parent


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any


def new_state(step: int) -> State:
    key = jax.random.key(step)
    params = {
        "conv": {"kernel": jax.random.normal(key, (3, 3, 8, 16)), "bias": jnp.zeros(16)},
        "scale": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-42], jnp.float32),
        "half": jax.random.normal(key, (5, 7), jnp.bfloat16),
    }
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ema = jax.tree.map(lambda x: x + 1, params)
    return State(jnp.int32(step), params, chain.init(params), ema, jax.random.split(key, 3))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def raw(leaf) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))


def saved(workdir, *steps, **options):
    with checkpoint.open_manager(workdir, **options) as manager:
        for step in steps:
            checkpoint.save(manager, step, new_state(step), {"seed": step})


def folder_of(workdir, step) -> Path:
    return Path(workdir) / checkpoint.FOLDER / str(step)


def names(workdir) -> set[str]:
    return {path.name for path in (Path(workdir) / checkpoint.FOLDER).iterdir()}


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 900
    return message


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    saved(workdir, 100, 200)
    return workdir


@pytest.fixture
def workdir(two_saved, tmp_path):
    """A run with checkpoints 100 and 200, free to be damaged."""
    shutil.copytree(two_saved, tmp_path / "run")
    return tmp_path / "run"


# --- What is read is what was saved ---------------------------------------------------------------


def test_round_trip_is_bit_exact(tmp_path):
    state, meta = new_state(7), {"config": {"lr": 1e-4, "betas": [0.9, 0.95]}, "name": "ü"}
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, 7, state, meta)
        step, again, meta_again = checkpoint.restore(manager, abstract(state))
    assert (step, meta_again) == (7, meta)
    assert_same(again, state)
    assert_same(checkpoint.restore(tmp_path, state)[1], state)  # arrays will do for shapes


def test_the_state_may_be_donated_at_once(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x + 1, tree), donate_argnums=0)
    state = {name: jnp.full((400, 1000), float(i)) for i, name in enumerate("abcd")}
    before = jax.tree.map(np.array, state)
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, 1, state, {})
        for _ in range(5):
            state = update(state)
    assert_same(checkpoint.restore(tmp_path, abstract(state))[1], jax.tree.map(jnp.array, before))


def test_parts_and_meta(two_saved):
    state = new_state(200)
    assert_same(checkpoint.read_part(two_saved, "ema", abstract(state.ema)), state.ema)
    assert_same(checkpoint.read_part(two_saved, "params", abstract(new_state(100).params), 100),
                new_state(100).params)  # fmt: skip
    assert int(checkpoint.read_part(two_saved, "step", abstract(state.step))) == 200
    assert checkpoint.read_meta(two_saved) == (200, {"seed": 200})
    assert checkpoint.read_meta(two_saved, 100) == (100, {"seed": 100})
    message = error_of(checkpoint.read_part, two_saved, "lora", abstract(state.ema))
    assert "no 'lora', only ema, key, opt_state, params, step" in message


def test_checksums_see_every_bit_and_the_order():
    values = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)

    def checksum(array):
        return checksums({"x": jnp.asarray(array)})["x"]

    for bit in range(0, values.nbytes * 8, 37):
        flipped = bytearray(values.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksum(np.frombuffer(flipped, np.float32).reshape(6, 5)) != checksum(values)
    assert checksum(values[::-1]) != checksum(values)
    assert checksum(values.ravel()) == checksum(values)
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8, jnp.uint32, bool, jnp.complex64):
        assert checksum(jnp.ones(3, dtype)) != checksum(
            jnp.ones(3, dtype).at[1].set(jnp.zeros((), dtype))
        )


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_checksums_of_a_cpu_are_those_of_other_devices(shape):
    numbers = np.random.default_rng(0).standard_normal(shape) * 5
    place = np.array([[7, 8, 9, 10], [12, 4, 1, 1]], np.uint32)
    for dtype in ("float32", "bfloat16", "float64", "int64", "int4", "uint8", "bool", "complex64"):
        with jax.enable_x64(True):
            array = jnp.asarray(numbers).astype(dtype)
            there = checksums_module._checksum(array, place)
            words = checksums_module._words(np.asarray(array), np)
            assert checksums_module._sum(words, place, np) == there, dtype


def test_only_arrays_are_saved(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager, pytest.raises(TypeError, match="a/n is"):
        checkpoint.save(manager, 1, {"a": {"n": 3}}, {})


# --- Several devices, several processes -----------------------------------------------------------

SHARDED = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from dreamlite_jax.train import checkpoint

    def mesh_of(n):
        return jax.make_mesh((n,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:n])

    def state_on(mesh, step):
        specs = {"kernel": P(None, "fsdp"), "bias": P("fsdp"), "step": P()}
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        def init():
            kernel = jnp.sin(jnp.arange(16 * 24, dtype=jnp.float32)).reshape(16, 24) * step
            return {"kernel": kernel, "bias": jnp.arange(8, dtype=jnp.bfloat16) / 3, "step": step}
        return jax.jit(init, out_shardings=shardings)()

    def abstract(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

    def same(tree, other):
        return all(bool(jnp.array_equal(x, y)) and x.sharding == y.sharding
                   for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
"""

JOINED = """
    import sys
    import jax
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
"""


def start(code: str, *arguments, devices: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env=training.environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out


def test_other_numbers_of_devices(tmp_path):
    code = (
        SHARDED
        + """
    with checkpoint.open_manager(sys.argv[1]) as manager:
        checkpoint.save(manager, 3, state_on(mesh_of(8), 3), {})
    for n in (8, 4, 1):
        state = state_on(mesh_of(n), 3)
        assert same(checkpoint.restore(sys.argv[1], abstract(state))[1], state), n
    """
    )
    output_of(start(code, tmp_path, devices=8))
    shapes = {"kernel": (16, 24), "bias": (8,), "step": ()}
    dtypes = {"kernel": jnp.float32, "bias": jnp.bfloat16, "step": jnp.int32}
    here = {name: jax.ShapeDtypeStruct(shapes[name], dtypes[name]) for name in shapes}
    _, state, _ = checkpoint.restore(tmp_path, here)
    np.testing.assert_array_equal(state["bias"], jnp.arange(8, dtype=jnp.bfloat16) / 3)


def test_two_processes_agree(tmp_path):
    """Both write, one finds a file damaged: both go back to the checkpoint before."""
    code = JOINED + SHARDED + """
    import pathlib
    from jax.experimental.multihost_utils import sync_global_devices
    with checkpoint.open_manager(sys.argv[1]) as manager:
        for step in (1, 2):
            checkpoint.save(manager, step, state_on(mesh_of(4), step), {"step": step})
        checkpoint.wait(manager)
        if jax.process_index() == 0:
            for file in pathlib.Path(sys.argv[1]).glob("checkpoints/2/state/d/*"):
                file.write_bytes(file.read_bytes()[:-20])
        sync_global_devices("damaged")
        step, state, meta = checkpoint.restore(manager, abstract(state_on(mesh_of(4), 0)))
        assert meta == {"step": step}
        checkpoint.save(manager, 2, state, {})
        print("restored", step)
    kernel = jax.ShapeDtypeStruct((16, 24), jnp.float32)  # each reads it all, as of another run
    whole = checkpoint.read_part(sys.argv[1], "kernel", kernel, 1)
    assert whole.is_fully_addressable
    np.testing.assert_array_equal(whole, jnp.sin(jnp.arange(16.0 * 24)).reshape(16, 24))
    """  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start(code, tmp_path, address, i, devices=2) for i in range(2)]
    assert all("restored 1\n" in output_of(process) for process in processes)
    assert names(tmp_path) == {"1", "2", "2.damaged"}


# --- Damage, kills, full disks --------------------------------------------------------------------


def cut(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def data_of(folder: Path) -> list[Path]:
    """Several, as not all of what a save leaves is in use."""
    return sorted(folder.glob("state/ocdbt.process_0/d/*"))


DAMAGES = {
    "data cut": lambda folder: [cut(file) for file in data_of(folder)],
    "data flipped": lambda folder: [flip(file) for file in data_of(folder)],
    "data missing": lambda folder: [file.unlink() for file in data_of(folder)],
    "tree cut": lambda folder: cut(folder / "state" / "_METADATA"),
    "manifest empty": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "record cut": lambda folder: cut(folder / "meta" / "metadata"),
    "record flipped": lambda folder: flip(folder / "meta" / "metadata"),
    "record missing": lambda folder: shutil.rmtree(folder / "meta"),
    "state missing": lambda folder: shutil.rmtree(folder / "state"),
    "all missing": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, workdir, caplog, capfd):
    DAMAGES[damage](folder_of(workdir, 200))
    step, state, meta = checkpoint.restore(workdir, abstract(new_state(0)))
    assert (step, meta) == (100, {"seed": 100})
    assert_same(state, new_state(100))
    assert names(workdir) == {"100", "200"}  # a reader changes nothing

    with checkpoint.open_manager(workdir) as manager:
        step, state, _ = checkpoint.restore(manager, abstract(new_state(0)))
        checkpoint.save(manager, 200, state, {"again": True})
    assert names(workdir) == {"100", "200", "200.damaged"}
    assert checkpoint.read_meta(workdir) == (200, {"again": True})
    assert "checkpoint 200 is damaged" in caplog.text
    assert "checkpoint 100 is used instead" in caplog.text
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_nothing_readable_is_an_error_and_stays(workdir):
    for step in (100, 200):
        DAMAGES["data cut"](folder_of(workdir, step))
    with checkpoint.open_manager(workdir) as manager:
        message = error_of(checkpoint.restore, manager, abstract(new_state(0)))
    assert "cannot be read: 200, 100" in message and "move the folder away" in message
    assert names(workdir) == {"100", "200"}
    assert "cannot be read" in error_of(checkpoint.restore, workdir, abstract(new_state(0)), 100)


KILLED = """
    import sys
    import jax, jax.numpy as jnp
    from dreamlite_jax.train import checkpoint

    def new_state(step):
        return {"w": jnp.arange(2_000_000.0) * step, "v": jnp.ones(500_000) / (step + 1)}

    if __name__ == "__main__":
        with checkpoint.open_manager(sys.argv[1], keep=2) as manager:
            first = 0
            if checkpoint.latest_step(sys.argv[1]):
                first, state, meta = checkpoint.restore(manager, jax.eval_shape(new_state, 0))
                assert meta == {"step": first}
            for step in range(first + 1, first + 1000):
                checkpoint.save(manager, step, new_state(step), {"step": step})
                print(step, flush=True)
"""


def test_killed_while_saving(tmp_path, caplog):
    rng = random.Random(0)
    code = {}
    exec(textwrap.dedent(KILLED).replace("__main__", ""), code)
    for _ in range(3):
        process = start(KILLED, tmp_path)
        step = int(process.stdout.readline())
        while step < 3 and process.poll() is None:
            step = int(process.stdout.readline())
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()

        latest = checkpoint.latest_step(tmp_path)
        assert latest >= step - 1
        found, state, meta = checkpoint.restore(tmp_path, jax.eval_shape(code["new_state"], 0))
        assert found == latest and meta == {"step": found}
        assert_same(state, code["new_state"](found))
    (tmp_path / checkpoint.FOLDER / "999.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        checkpoint.save(manager, 1999, state, {})
    assert "checkpoint 999 was cut short" in caplog.text
    assert not [name for name in names(tmp_path) if not name.isdigit()]


def big_state():
    return {f"w{i}": jax.random.normal(jax.random.key(i), (100_000,)) for i in range(8)}


def test_a_full_disk(tiny_disk, caplog, capfd):
    small = {"w": jnp.ones(10)}
    message = ""
    with checkpoint.open_manager(tiny_disk, keep=1) as manager:
        checkpoint.save(manager, 1, small, {})
        checkpoint.save(manager, 2, big_state(), {})  # fails in the background
        message = error_of(checkpoint.save, manager, 3, small, {})
        assert "the disk is full, checkpoint 2 was not written" in message
        assert "older checkpoints are intact (latest: 1)" in message and str(tiny_disk) in message
        checkpoint.save(manager, 4, small, {})  # there is room again
    assert checkpoint.latest_step(tiny_disk) == 4
    with pytest.raises(CheckpointError, match="checkpoint 5 was not written"):  # noqa: SIM117
        with checkpoint.open_manager(tiny_disk, keep=1) as manager:
            checkpoint.save(manager, 5, big_state(), {})
    assert checkpoint.latest_step(tiny_disk) == 4
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path, caplog, capfd):
    """As above where nothing may be mounted: files must not grow beyond a limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 1, {"w": jnp.ones(10)}, {})
        checkpoint.wait(manager)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpoint.save(manager, 2, big_state(), {})
            message = error_of(checkpoint.wait, manager)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint 2 was not written" in message and "File too large" in message
    assert names(tmp_path) == {"1"}
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("a file")
    with pytest.raises(CheckpointError, match="cannot hold checkpoints"):  # noqa: SIM117
        with checkpoint.open_manager(tmp_path):
            pass


# --- Which checkpoints there are ------------------------------------------------------------------


def test_what_is_kept(tmp_path):
    small = {"w": jnp.ones(3)}
    with checkpoint.open_manager(tmp_path, keep=2, keep_every=40) as manager:
        for step in range(10, 101, 10):
            checkpoint.save(manager, step, small, {})
    assert names(tmp_path) == {"40", "80", "90", "100"}
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 100, {"w": jnp.zeros(3)}, {})  # is there: not saved again
        assert float(checkpoint.restore(manager, small)[1]["w"][0]) == 1
        checkpoint.save(manager, 110, small, {})
    assert names(tmp_path) == {"110"}


def test_going_back_gives_the_future_up(workdir):
    with checkpoint.open_manager(workdir) as manager:
        assert "of step 200" in error_of(checkpoint.save, manager, 150, new_state(0), {})
        step, state, _ = checkpoint.restore(manager, abstract(new_state(0)), step=100)
        checkpoint.save(manager, 150, state, {})
    assert step == 100 and names(workdir) == {"100", "150", "200.abandoned"}


def test_an_error_of_the_run_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with checkpoint.open_manager(tmp_path) as manager:
            checkpoint.save(manager, 1, new_state(1), {})
            1 / 0  # noqa: B018
    assert checkpoint.latest_step(tmp_path) == 1  # but the save is complete


def test_a_state_that_does_not_fit(workdir):
    state = abstract(new_state(0))
    other = {**state.params, "half": jax.ShapeDtypeStruct((5, 8), jnp.bfloat16)}
    message = error_of(checkpoint.restore, workdir, state._replace(params=other))
    assert "params/half bfloat16 [5, 7] -> bfloat16 [5, 8];" in message
    other = jax.ShapeDtypeStruct((), jnp.float32)
    message = error_of(checkpoint.restore, workdir, state._replace(step=other))
    assert "step int32 [] -> float32 []" in message
    message = error_of(checkpoint.restore, workdir, state._replace(opt_state=()))
    assert "opt_state/1/0/count int32 [] -> missing" in message and "more" in message


def test_what_a_folder_is(two_saved, tmp_path):
    for folder in ("a/unet", "b", "c/checkpoints/7.orbax-checkpoint-tmp"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "b" / "model_index.json").write_text(json.dumps({}))
    kinds = [checkpoint.folder_kind(tmp_path / name) for name in ("a", "b", "c", "d")]
    assert kinds == ["model", "model", "nothing", "nothing"]
    assert checkpoint.folder_kind(two_saved) == "run"
    assert checkpoint.folder_kind(two_saved, workdir=tmp_path) == "run"
    assert checkpoint.folder_kind(os.path.relpath(two_saved), workdir=two_saved) == "own"
    assert checkpoint.latest_step(tmp_path / "c") is None
    assert "no complete checkpoint" in error_of(checkpoint.read_meta, tmp_path / "d")
    assert "it has 100, 200" in error_of(checkpoint.restore, two_saved, new_state(0), 150)
