"""The sources that a config's `data` can name, opened.

data = [
    {"source": "shapes:demo:train", "task": "t2i", "weight": 1.0},
    {"source": "/data/edits", "weight": 0.5},  # of launch.prepare_data; knows its task
]
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_jax.data import prompts, shapes, transforms
from dreamlite_jax.data.decoding import Quarantined, opened
from dreamlite_jax.data.mixture import EDIT, T2I, TASKS, MixtureError, Stream
from dreamlite_jax.data.pipeline import Sample, digest
from dreamlite_jax.data.precomputed import PrecomputedSource, folder_of
from dreamlite_jax.data.records import PAIRS, TRIPLETS, PreparedSet, PreparedSetError
from dreamlite_jax.data.transforms import Size

_SHAPES = "shapes:"
TASK_OF = {PAIRS: T2I, TRIPLETS: EDIT}  # the tasks of the kinds of prepared sets
_KEYS = {
    "source": str,
    "task": str,
    "weight": float,
    "name": str,
    "count": int,
    "seed": int,
    "precomputed": bool,
}
SHAPES_COUNT = 1_000_000  # scenes of an epoch, where none is given


class ShapesSource:
    """The shapes world; its pictures are drawn at the size that is asked for."""

    def __init__(
        self, settings: str, split: str, task: str, count: int = SHAPES_COUNT, seed: int = 0
    ):
        if settings not in shapes.SETTINGS:
            raise MixtureError(
                f"unknown shapes settings {settings!r}; known are {', '.join(shapes.SETTINGS)}"
            )
        if split not in shapes.SPLITS:
            raise MixtureError(f"unknown split {split!r}; known are {', '.join(shapes.SPLITS)}")
        self.task, self._split, self._count, self._seed = task, split, count, seed
        self._name, self._settings = settings, shapes.SETTINGS[settings]
        self.sizes = np.broadcast_to(np.int32(1), (count, 2))  # square
        self.fingerprint = digest(
            [dataclasses.asdict(self._settings), split, task, count, seed, shapes.VERSION]
        )

    def __len__(self) -> int:
        return self._count

    def read(self, index: int, size: Size) -> Sample:
        at = self._settings, self._split, self._seed, index
        if self.task == T2I:
            made = shapes.sample_t2i(*at)
            return Sample([made.caption], size[::-1], _drawn(made.scene, size))
        edit = shapes.sample_edit(*at)
        pictures = (_drawn(scene, size) for scene in (edit.target, edit.source))
        return Sample([edit.instruction], size[::-1], *pictures)

    def metadata(self, index: int) -> dict[str, Any]:
        """Which sample it is; what the judge demands of it follows."""
        at = {"settings": self._name, "split": self._split, "task": self.task}
        return {**at, "seed": self._seed, "index": index}


def _drawn(scene: shapes.Scene, size: Size) -> Image.Image:
    return Image.fromarray(shapes.render(scene, *size))


class PreparedSource:
    """The records of a prepared set."""

    def __init__(self, prepared: PreparedSet):
        self._set = prepared
        self.task = TASK_OF[prepared.kind]
        self.fingerprint, self.sizes = prepared.fingerprint, prepared.sizes

    def __len__(self) -> int:
        return len(self._set)

    def read(self, index: int, size: Size) -> Sample:
        """A sample, decoded.

        Raises:
          ShardError: the record, or a picture of it, is damaged.
        """
        record = self._set[index]
        original = record["width"], record["height"]
        least = transforms.enough(*original, size)
        try:
            target = opened(record["image"], least)
            if self.task == T2I:
                return Sample(record["captions"], original, target)
            # The text encoder sees the source at a size of its own.
            least = max(least, transforms.enough(*original, prompts.SEEN))
            return Sample(record["captions"], original, target, opened(record["source"], least))
        except Quarantined as error:
            raise PreparedSetError(
                f"{self._set.folder}: a picture of record {index} ({record['key']}) cannot be read "
                f"({error}); copy the set again, or prepare it again into a new folder"
            ) from error

    def metadata(self, index: int) -> dict[str, Any]:
        return {"key": self._set[index]["key"]}


def open_streams(
    entries: Sequence[Mapping[str, Any]],
    image_size: int,
    made_with: Mapping[str, Any] | None = None,
    where: str = "data",
) -> tuple[Stream, ...]:
    """The streams of a config's `data`.

    Args:
      entries: dicts with `source` (the folder of a prepared set, or "shapes:SETTINGS:SPLIT"), and
        optionally `weight` (1), `name` (the source's), `task` (shapes only: t2i or edit), `count`
        and `seed` (shapes only), `precomputed` (True: the encoders' outputs for this image size,
        which must be there; False: not; absent: where there are some).
      image_size: whose precomputed outputs are looked for.
      made_with: what the encoders are, see `precompute.made_with`; None: never use precomputed
        outputs. Others' outputs are refused.
      where: the entries' key in the config, for errors.

    Raises:
      MixtureError: everything that is wrong with the entries, in one line.
    """
    streams, problems = [], []
    for number, entry in enumerate(entries):
        try:
            streams.append(_opened(_checked(entry), image_size, made_with))
        except ValueError as error:
            problems.append(f"{where}[{number}]: {error}")
    if problems:
        raise MixtureError("; ".join(problems))
    return tuple(streams)


def precomputed_folder(entry: Mapping[str, Any], image_size: int) -> Path | None:
    """Where an entry's precomputed outputs would lie; None for one that can have none, or shall
    not be served by them."""
    try:
        path = _checked(entry)["source"]
    except MixtureError:
        return None
    usable = entry.get("precomputed", True) and not path.startswith(_SHAPES)
    return folder_of(path, image_size) if usable else None


def _checked(entry: Any) -> dict[str, Any]:
    """An entry whose keys are known and whose values have their types."""
    if not isinstance(entry, Mapping):
        raise MixtureError(f"{entry!r} should be a dict, such as {{'source': 'data/t2i'}}")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise MixtureError(f"unknown keys {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    for key, value in entry.items():
        if not (type(value) is _KEYS[key] or (_KEYS[key] is float and type(value) is int)):
            raise MixtureError(f"{key} is {value!r}, should be {_KEYS[key].__name__}")
    if "source" not in entry:
        raise MixtureError("`source` is missing: a prepared set's folder, or shapes:SETTINGS:SPLIT")
    if entry.get("count", 0) < 0:
        raise MixtureError(f"count is {entry['count']}, should be positive")
    return dict(entry)


def _opened(entry: dict, image_size: int, made_with: Mapping[str, Any] | None) -> Stream:
    path = entry["source"]
    weight, name = float(entry.get("weight", 1.0)), entry.get("name")
    if path.startswith(_SHAPES):
        return Stream(name or f"{path}:{entry.get('task')}", _shapes(path, entry), weight)
    if given := [key for key in ("count", "seed") if key in entry]:
        raise MixtureError(f"{', '.join(given)} is for shapes sources only, not for {path}")
    prepared = PreparedSet(path)
    if entry.get("task", TASK_OF[prepared.kind]) != TASK_OF[prepared.kind]:
        raise MixtureError(f"{path} holds {prepared.kind}, which cannot serve {entry['task']!r}")
    wanted, folder = entry.get("precomputed"), folder_of(path, image_size)
    if made_with is None or wanted is False or (wanted is None and not folder.is_dir()):
        return Stream(name or Path(path).name, PreparedSource(prepared), weight)
    source = PrecomputedSource(folder, TASK_OF[prepared.kind], prepared.fingerprint, made_with)
    return Stream(name or Path(path).name, source, weight)


def _shapes(path: str, entry: Mapping[str, Any]) -> ShapesSource:
    parts = path.removeprefix(_SHAPES).split(":")
    if len(parts) != 2:
        raise MixtureError(f"{path!r} should be shapes:SETTINGS:SPLIT, such as shapes:demo:train")
    if (task := entry.get("task")) not in TASKS:
        raise MixtureError(f"{path} needs a task, {' or '.join(TASKS)}; got {task!r}")
    if entry.get("precomputed"):
        raise MixtureError(f"{path} is drawn as it is needed; it has nothing precomputed")
    options = {key: int(entry[key]) for key in ("count", "seed") if key in entry}
    return ShapesSource(*parts, task, **options)
