"""Whether a folder can hold a run's checkpoints: asked at the start, not at the first save."""

import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dreamlite_jax.train import peers
from dreamlite_jax.train.quiet import brief

LISTED = 10.0  # seconds until a file on a network's file system is seen by all


def problems(folder: epath.Path) -> list[str]:
    """What keeps a folder, which is made where it is missing, from holding checkpoints; a line at
    most. All processes have to call this, and where one has a problem, all have."""
    found = _unusable(folder)
    found += peers.elsewhere(found)
    return found or _unshared(folder)


def _unusable(folder: epath.Path) -> list[str]:
    """Does in it what a save will."""
    made, renamed = (folder / f".{jax.process_index()}{ending}" for ending in ("", ".renamed"))
    try:
        for old in (made, renamed):  # of a process that was killed
            if old.is_dir():
                old.rmtree()
            else:
                old.unlink(missing_ok=True)
        inner = made / "state"
        inner.mkdir(parents=True)
        (inner / "file").write_text("")
        made.rename(renamed)
        renamed.rmtree()
    except OSError as error:
        return [
            f"cannot hold checkpoints, whose folders are made and then renamed ({brief(error)})"
        ]
    return []


def _unshared(folder: epath.Path) -> list[str]:
    """Whether every process sees what the first one writes."""
    if jax.process_count() == 1:
        return []
    number = multihost_utils.broadcast_one_to_all(np.uint32(time.time_ns() % 2**32))
    file = folder / f".shared-{number}"
    if jax.process_index() == 0:
        file.write_text("")
    multihost_utils.sync_global_devices("a file for all processes")
    last = time.monotonic() + LISTED
    while not (seen := file.exists()) and time.monotonic() < last:
        time.sleep(0.1)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(seen)))
    if jax.process_index() == 0:
        file.unlink()
    if not len(blind):
        return []
    return [
        f"process {blind[0]} does not see what process 0 writes there; the workdir should be one "
        "folder for all, on a file system that they share"
    ]
