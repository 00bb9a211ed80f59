"""Checkpoints of a run: `workdir/checkpoints/<step>/`, written by Orbax in the background.

A checkpoint holds the state, as `state/` in Orbax's format, and a record, `meta/`: the caller's
JSON and every array's dtype, shape and checksum. Arrays go by their paths in the state
(`params/conv_in/kernel`, `opt_state/0/mu/...`), so that neither NamedTuples nor optax's empty
states matter to a reader, and a part of a state is what lies below a path.

The record answers what Orbax cannot: whether a state fits before anything is read, and whether what
was read is what had been saved; Orbax notices a truncated file but no flipped bit. Checksums are
integers computed on the devices, the same for every sharding and number of devices.

A checkpoint appears by a rename once it is whole, and older ones are deleted after that only. On
several hosts every process calls the functions here, in the same order; what one process cannot
read, none uses.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from dreamlite_jax.errors import UserError
from dreamlite_jax.train import folders, peers, signals
from dreamlite_jax.train.checksums import checksums
from dreamlite_jax.train.quiet import brief, first, hush_orbax

FOLDER = "checkpoints"
_STATE, _META = "state", "meta"  # the two folders of a checkpoint
_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX  # <step>.orbax-checkpoint-tmp

Source = str | os.PathLike | ocp.CheckpointManager
Arrays = dict[str, Any]  # by path: jax.Array, or jax.ShapeDtypeStruct with a sharding
T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found or used: one line."""


class _Damaged(Exception):
    """A checkpoint that cannot be read, or not as it was written."""


# --- Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_manager(
    workdir: str | os.PathLike, keep: int = 3, keep_every: int | None = None
) -> Iterator[ocp.CheckpointManager]:
    """The one writer of a run's checkpoints; on leaving, waits for the save that is under way.

    What a killed process left half-written is removed, hence no two runs may share a workdir, whose
    folder `checkpoints` is made where it is missing.

    Args:
      keep: how many of the latest checkpoints stay, at least 1.
      keep_every: checkpoints of steps that are multiples of this stay for good.

    Raises:
      CheckpointError: the folder cannot be used, or is not one for all processes; or, on leaving,
        the last save failed.
    """
    if keep < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep={keep}, keep_every={keep_every}: at least 1")
    hush_orbax()
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every:
        policies.append(checkpoint_managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # a damaged checkpoint's own metadata must not end the run
        # In the background, a save that cannot begin leaves threads that wait for a folder.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    folder = _folder(workdir)
    for path in folder.glob(f"*{_UNFINISHED}*"):
        step = path.name.split(".")[0]
        logging.warning("%s: checkpoint %s was cut short by a kill, it is removed", folder, step)
    for problem in folders.problems(folder):
        raise CheckpointError(f"{folder}: {problem}")
    try:
        manager = ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot hold checkpoints ({brief(error)})") from error
    try:
        yield manager
    except BaseException:
        try:
            wait(manager)
        except CheckpointError as error:  # must not hide why the run ends
            logging.error("%s", error)
        raise
    else:
        wait(manager)
    finally:
        with contextlib.suppress(Exception):  # reported by `wait`
            manager.close()


def save(manager: ocp.CheckpointManager, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Saves a checkpoint; returns as soon as the state may be changed or donated.

    The arrays are copied to the host, the rest happens in the background. A save that is still
    under way is waited for. A step that is the latest checkpoint already is not saved again.

    Args:
      step: how many steps the state has seen.
      state: any pytree of jax.Arrays, sharded or not; typed PRNG keys included.
      meta: a JSON object.

    Raises:
      CheckpointError: this save or the one before it failed (a full disk: nothing older was
        deleted); the folder holds later checkpoints, so they are another run's.
      TypeError: a leaf that is not a jax.Array, or meta is no JSON.
    """
    wait(manager)
    step, latest = int(step), manager.latest_step()
    if latest == step:
        return
    if latest is not None and latest > step:
        raise CheckpointError(
            f"{manager.directory}: has a checkpoint of step {latest}, so step {step} cannot be "
            "saved; continue from that checkpoint or use another workdir"
        )
    arrays = _named(state)
    items = ocp.args.Composite(
        **{
            _STATE: ocp.args.PyTreeSave(unflatten_dict(_stored(arrays), sep="/")),
            _META: ocp.args.JsonSave(_record(step, arrays, meta)),
        }
    )
    with _reported(manager, step):
        manager.save(step, args=items, force=True)


def wait(manager: ocp.CheckpointManager) -> None:
    """Returns once the save under way, if any, is complete; CheckpointError: it failed."""
    with _reported(manager, manager.latest_step()):
        manager.wait_until_finished()


@contextlib.contextmanager
def _reported(manager: ocp.CheckpointManager, step: int | None) -> Iterator[None]:
    """Turns whatever a save of `step` fails with into one line."""
    try:
        yield
    except Exception as error:
        if peers.is_lost(error):
            raise
        folder = manager.directory
        _remove_leftovers(folder, step)
        manager.reload()  # the manager has forgotten those it was about to delete
        steps = _steps(folder)
        older = f"older checkpoints are intact (latest: {steps[-1]})" if steps else "there is none"
        if _is_full(error):
            message = f"the disk is full, checkpoint {step} was not written; {older}; make room"
        else:
            message = f"checkpoint {step} was not written ({brief(error)}); {older}"
        raise CheckpointError(f"{folder}: {message}") from error


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # TensorStore has no exception of its own for it.
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


def _remove_leftovers(folder: epath.Path, step: int | None) -> None:
    """Gives back the room that a failed save has taken, where no other host may still write."""
    if jax.process_count() > 1:
        return  # they go when the next run opens the folder
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{step}{_UNFINISHED}*"):
            path.rmtree()


# --- Reading --------------------------------------------------------------------------------------


def restore(
    source: Source, abstract_state: Any, step: int | None = None
) -> tuple[int, Any, dict[str, Any]]:
    """Reads a checkpoint, bit by bit what was saved, on any number of devices.

    A damaged checkpoint is passed over for the one before it, with a line in the log. Given a
    manager, whose run goes on from here, later checkpoints are renamed so that they are out of its
    way: damaged ones to `<step>.damaged`, those of a future that is given up to `<step>.abandoned`.

    Args:
      source: the run's manager; or a workdir, in which nothing is changed.
      abstract_state: the state's tree of jax.ShapeDtypeStruct with shardings (or of arrays); each
        device reads its part. Without a sharding an array goes to the first device.
      step: None for the latest readable one.

    Returns:
      The step, the state and the meta that were saved together.

    Raises:
      CheckpointError: there is no checkpoint, none can be read, or the state does not fit (the
        first paths that differ are named).
    """
    wanted = _named(abstract_state)
    folder = _folder(source)
    if isinstance(source, ocp.CheckpointManager):
        wait(source)

    def read(path: epath.Path) -> tuple[Any, dict[str, Any]]:
        record = _record_of(path)
        _compare(path, record["arrays"], wanted)
        return _read_arrays(path, record["arrays"], wanted), record["meta"]

    step, (arrays, meta), damaged = _latest_readable(folder, step, read)
    if isinstance(source, ocp.CheckpointManager):
        _set_aside(source, step, damaged)
    structure = jax.tree.structure(abstract_state)
    return step, jax.tree.unflatten(structure, arrays.values()), meta


def read_part(
    workdir: str | os.PathLike, part: str, abstract_part: Any, step: int | None = None
) -> Any:
    """Reads what lies below one path of another run's state, e.g. "params" or "ema".

    Args:
      part: the path, with slashes.
      abstract_part, step: as `restore` takes them.

    Raises:
      CheckpointError: as `restore`; the state has no such part.
    """
    wanted = {_joined(part, path): leaf for path, leaf in _named(abstract_part).items()}

    def read(path: epath.Path) -> Arrays:
        record = _record_of(path)["arrays"]
        saved = {name: row for name, row in record.items() if f"{name}/".startswith(f"{part}/")}
        if not saved:
            parts = ", ".join(sorted({name.split("/")[0] for name in record}))
            raise CheckpointError(f"{path}: its state has no {part!r}, only {parts}")
        _compare(path, saved, wanted)
        return _read_arrays(path, saved, wanted)

    _, arrays, _ = _latest_readable(_folder(workdir), step, read)
    return jax.tree.unflatten(jax.tree.structure(abstract_part), arrays.values())


def read_meta(workdir: str | os.PathLike, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """The step and the meta of the latest readable checkpoint, or of `step`; no array is read.

    Raises:
      CheckpointError: there is none.
    """
    step, record, _ = _latest_readable(_folder(workdir), step, _record_of)
    return step, record["meta"]


def latest_step(workdir: str | os.PathLike) -> int | None:
    """The step of the latest complete checkpoint; None where there is none."""
    steps = _agreed_steps(_folder(workdir))
    return steps[-1] if steps else None


def folder_kind(
    folder: str | os.PathLike, workdir: str | os.PathLike | None = None
) -> Literal["own", "run", "model", "nothing"]:
    """What a folder is to the run in `workdir`: its own workdir with a checkpoint to go on from,
    another run's workdir, a model directory, or nothing to start from."""
    folder = _absolute(folder)
    if latest_step(folder) is not None:
        return "own" if workdir is not None and _absolute(workdir) == folder else "run"
    if (folder / "model_index.json").exists() or (folder / "unet").is_dir():
        return "model"
    return "nothing"


def _latest_readable(
    folder: epath.Path, step: int | None, read: Callable[[epath.Path], T]
) -> tuple[int, T, list[int]]:
    """The first checkpoint, from the latest back, that `read` can read: its step, what `read`
    gave, and the damaged steps that were passed over."""
    steps = _agreed_steps(folder)
    if step is not None and step not in steps:
        has = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{folder}: has no complete checkpoint {step} (it has {has})")
    if not steps:
        raise CheckpointError(f"{folder}: holds no complete checkpoint")
    hush_orbax()
    damaged, first = [], None
    for candidate in [step] if step is not None else reversed(steps):
        try:
            value = read(folder / str(candidate))
        except _Damaged as error:
            logging.warning("%s: checkpoint %d is damaged (%s)", folder, candidate, error)
            damaged.append(candidate)
            first = first or error
            continue
        if damaged:
            logging.warning("%s: checkpoint %d is used instead", folder, candidate)
        return candidate, value, damaged
    names = ", ".join(map(str, damaged))
    raise CheckpointError(
        f"{folder}: damaged, cannot be read: {names} ({first}); check the disk, or move the folder "
        "away to start afresh"
    )


def _set_aside(manager: ocp.CheckpointManager, step: int, damaged: list[int]) -> None:
    """Renames every checkpoint after `step`."""
    if jax.process_index() == 0:
        for other in (other for other in _steps(manager.directory) if other > step):
            path = manager.directory / str(other)
            why = "damaged" if other in damaged else "abandoned"
            names = (f"{other}.{why}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 100))))
            free = next(name for name in names if not (manager.directory / name).exists())
            path.rename(manager.directory / free)
            logging.warning("%s: renamed to %s; delete it to make room", path, free)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoints set aside")
    manager.reload()


def _read_arrays(path: epath.Path, record: Mapping[str, Any], wanted: Arrays) -> Arrays:
    """The arrays that `wanted` names, in its order; _Damaged unless every checksum is right."""
    target = unflatten_dict(_stored(wanted), sep="/")
    arguments = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )

    def read() -> Arrays:
        # Not by a Checkpointer, whose barrier would wait for a process that could not read.
        tree = ocp.PyTreeCheckpointHandler().restore(path / _STATE, args=arguments)
        arrays = flatten_dict(tree, sep="/")
        if missing := [name for name in wanted if not isinstance(arrays[name], jax.Array)]:
            raise ValueError(f"missing: {first(missing)}")
        return {name: arrays[name] for name in wanted}

    arrays = _together(read)
    wrong = [name for name, sum_ in checksums(arrays).items() if sum_ != record[name][2]]
    if wrong:
        raise _Damaged(f"not what was saved: {first(wrong)}")
    return {
        name: jax.random.wrap_key_data(array, impl=_key_impl(wanted[name]))
        if _is_key(wanted[name])
        else array
        for name, array in arrays.items()
    }


def _compare(path: epath.Path, record: Mapping[str, Any], wanted: Arrays) -> None:
    """CheckpointError unless both have the same paths, dtypes and shapes."""
    here = {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in wanted.items()}
    saved = {name: f"{row[0]} {row[1]}" for name, row in record.items()}
    differ = [
        f"{name} {saved.get(name, 'missing')} -> {here.get(name, 'missing')}"
        for name in sorted(here.keys() | saved.keys())
        if here.get(name) != saved.get(name)
    ]
    if differ:
        raise CheckpointError(
            f"{path}: does not fit the model and optimizer of this run (checkpoint -> run): "
            f"{first(differ)}; use the settings it was saved with, or another workdir"
        )


# --- The record -----------------------------------------------------------------------------------


def _record(step: int, arrays: Arrays, meta: Mapping[str, Any]) -> dict[str, Any]:
    sums = checksums(_stored(arrays))
    rows = {name: [str(a.dtype), list(a.shape), sums[name]] for name, a in arrays.items()}
    # As it will be read: a tuple is a list then.
    content = json.loads(json.dumps({"step": step, "meta": dict(meta), "arrays": rows}))
    return {**content, "sha256": _digest(content)}


def _record_of(path: epath.Path) -> dict[str, Any]:
    return _together(lambda: _read_record(path))


def _read_record(path: epath.Path) -> dict[str, Any]:
    try:
        record = ocp.JsonCheckpointHandler().restore(path / _META)
        digest = record.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _Damaged(f"{_META}: {brief(error)}") from error
    if digest != _digest(record):
        raise _Damaged(f"{_META}: not what was saved")
    return record


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- Trees, paths, processes ----------------------------------------------------------------------


def _named(tree: Any) -> Arrays:
    """The leaves of a tree by their paths, in its order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays of the state have the same path; no key may contain a slash")
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"{name} is of type {type(leaf).__name__}, a state holds jax.Arrays")
    return named


def _stored(arrays: Arrays) -> Arrays:
    """What of the arrays is stored: themselves, of PRNG keys their data."""
    return {name: _stored_leaf(leaf) for name, leaf in arrays.items()}


def _stored_leaf(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    shape = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    found = []  # of a ShapeDtypeStruct, JAX tells it under a trace only
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _joined(part: str, path: str) -> str:
    return f"{part}/{path}" if path else part


def _absolute(folder: str | os.PathLike) -> epath.Path:
    text = os.fspath(folder)
    return epath.Path(text if "://" in text else Path(text).resolve())


def _folder(source: Source) -> epath.Path:
    """Where the checkpoints of a manager or a workdir are."""
    if isinstance(source, ocp.CheckpointManager):
        return source.directory
    return _absolute(source) / FOLDER


def _steps(folder: epath.Path) -> list[int]:
    """Complete checkpoints, ascending."""
    names = ocp.path.step.standard_name_format()
    return sorted(found.step for found in names.find_all(folder))


def _agreed_steps(folder: epath.Path) -> list[int]:
    """As the first process sees them; a network's file system may show others older listings."""
    steps = _steps(folder)
    if jax.process_count() > 1:
        latest = np.full(256, -1, np.int32)
        latest[: len(steps)] = steps[-256:]
        steps = [int(step) for step in multihost_utils.broadcast_one_to_all(latest) if step >= 0]
    return steps


def _together(read: Callable[[], T]) -> T:
    """What `read` gives; _Damaged on every process if it fails on any."""
    value = problem = None
    try:
        value = read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # too little memory is no damage
    except Exception as error:  # Orbax and TensorStore raise what they like over damaged files
        problem = error
    if signals.on_any_process(problem is not None):
        raise _Damaged(brief(problem) if problem else "another process cannot read it")
    return value
