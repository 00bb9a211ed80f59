"""The prepared set: clean samples in ArrayRecord shards, each read at once by its number.

    part-00000.arrayrecord, ...   one msgpack map a record
    sizes.npy                     int32 [N, 2]: (width, height) of every record's picture, in order
    index.json                    what the set holds; written last, so that a set has it or is none

Shapes: N records. NumPy, msgpack and ArrayRecord only.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgpack
import numpy as np

from dreamlite_jax.data import shards as shards_
from dreamlite_jax.data.pictures import replaced_file
from dreamlite_jax.data.shards import Shard, ShardError, Shards, some, write_json

VERSION = 1
INDEX, SIZES = "index.json", "sizes.npy"

PAIRS, TRIPLETS = "pairs", "triplets"  # caption and picture; instruction, source and picture
KINDS = (PAIRS, TRIPLETS)

_ASPECTS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")


class Record(TypedDict):
    """A sample: encoded clean pictures (`decoding.Normalised.data`) and texts.

    In a set of triplets `image` is the edited picture, `source` the one before and `captions` are
    the instructions. `width` and `height` are those of `image`, in pixels.
    """

    key: str
    captions: list[str]
    image: bytes
    source: NotRequired[bytes]
    width: int
    height: int


class PreparedSetError(ShardError):
    """A prepared set that is none, unfinished or damaged: one line."""


def pack(record: Record) -> bytes:
    """The stored bytes of a record; equal records give equal bytes."""
    return msgpack.packb({key: record[key] for key in Record.__annotations__ if key in record})


def unpack(data: bytes) -> Record:
    """The record of stored bytes."""
    return msgpack.unpackb(data)


def write_shard(file: str | os.PathLike, records: Iterable[Record]) -> Shard:
    """Writes records as they come; the file appears whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    return shards_.write_shard(file, map(pack, records))


def write_index(
    folder: str | os.PathLike,
    kind: str,
    shards: Sequence[Shard],
    sizes: Sequence[tuple[int, int]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Makes the shards in a folder a prepared set.

    Args:
      folder: holds the shards.
      kind: "pairs" or "triplets".
      shards: in the order of their records.
      sizes: (width, height) of every record, in pixels.
      facts: what else the index says: sources, settings, quarantined and changes (counts).

    Returns:
      The index as written.
    """
    folder = Path(folder)
    table = np.asarray(sizes, np.int32).reshape(-1, 2)
    index = {
        "version": VERSION,
        "kind": kind,
        "count": len(table),
        "fingerprint": fingerprint(kind, shards),
        **facts,
        "aspects": aspect_counts(table),
        "sizes": SIZES,
        "shards": [shard._asdict() for shard in shards],
    }
    with replaced_file(folder / SIZES) as stream:
        np.save(stream, table)
    write_json(folder / INDEX, index)
    return index


def fingerprint(kind: str, shards: Sequence[Shard]) -> str:
    """What tells sets apart: SHA-256 over the shards' digests, the kind and the version."""
    lines = [*(shard.sha256 for shard in shards), kind, str(VERSION)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def aspect_counts(sizes: np.ndarray) -> dict[str, int]:
    """Pictures by the nearest usual width:height; int [N, 2] in, as (width, height)."""
    steps = [math.log(int(w) / int(h)) for w, h in (name.split(":") for name in _ASPECTS)]
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    nearest = np.abs(ratios[:, None] - np.asarray(steps)).argmin(1)
    counts = np.bincount(nearest, minlength=len(steps))
    return {name: int(n) for name, n in zip(_ASPECTS, counts, strict=True)}


class PreparedSet:
    """A prepared set on disk: `len(it)`, `it[i]`.

    Threads may share it. Pickling takes the folder's name along, no file: workers open shards when
    they read them.

    Attributes:
      folder: where it lies.
      index: `index.json`.
      kind: "pairs" or "triplets".
      shards: in the order of their records.
      fingerprint: changes with every byte of the shards.
      sizes: int32 [N, 2], (width, height) of the pictures in pixels; mapped from its file.

    Raises:
      PreparedSetError: no such folder, not (or not yet) a prepared set, another version, shards
        missing or not of their recorded size.
    """

    index: dict[str, Any]
    kind: str
    shards: list[Shard]
    fingerprint: str
    sizes: np.ndarray

    def __init__(self, folder: str | os.PathLike):
        self._open(folder)
        if problems := self._records.problems():
            raise PreparedSetError(f"{self.folder}: {'; '.join(problems)}; {_ANEW}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        """Record i, from 0 (negative numbers count from the end, as in lists).

        Raises:
          IndexError: there is no such record.
          ShardError: its shard is damaged.
        """
        return unpack(self._records[i])

    def __repr__(self) -> str:
        return f"PreparedSet({os.fspath(self.folder)!r})"

    def __getstate__(self) -> tuple[str, str]:
        return os.fspath(self.folder), self.fingerprint

    def __setstate__(self, state: tuple[str, str]) -> None:
        """Without a look at each shard: whoever pickled it had one."""
        folder, expected = state
        self._open(folder)
        if self.fingerprint != expected:
            raise PreparedSetError(f"{folder}: was prepared anew while it was in use; start again")

    def _open(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        self.kind, self.fingerprint = self.index["kind"], self.index["fingerprint"]
        self.shards = [Shard(**shard) for shard in self.index["shards"]]
        self._records = Shards(self.folder, self.shards)
        self.sizes = _read_sizes(self.folder / self.index["sizes"], len(self))


def verify(folder: str | os.PathLike) -> None:
    """Reads every byte of a prepared set's shards.

    Raises:
      PreparedSetError: as `PreparedSet`, or shards that are not what was written; names them.
    """
    prepared = PreparedSet(folder)
    if wrong := Shards(prepared.folder, prepared.shards).damaged():
        raise PreparedSetError(f"{folder}: damaged: {some(wrong)}; {_ANEW}")
    if prepared.fingerprint != fingerprint(prepared.kind, prepared.shards):
        raise PreparedSetError(f"{folder}/{INDEX}: its fingerprint is not that of its shards")


_ANEW = "copy it again, or prepare it again into a new folder"


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not folder.is_dir():
        raise PreparedSetError(f"{folder}: no such folder")
    if not file.is_file():
        if parts := len(list(folder.glob("part-*"))):
            raise PreparedSetError(
                f"{folder}: preparation is unfinished ({parts} part files, no {INDEX}); "
                "run launch.prepare_data again as before"
            )
        raise PreparedSetError(f"{folder}: no prepared set, {INDEX} is missing")
    try:
        index = json.loads(file.read_bytes())
        version = index["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise PreparedSetError(f"{file}: no index of a prepared set ({error!r})") from error
    if version != VERSION:
        raise PreparedSetError(f"{file}: version {version}, this program reads {VERSION}")
    missing = {"kind", "count", "fingerprint", "sizes", "shards"} - index.keys()
    if missing:
        raise PreparedSetError(f"{file}: lacks {', '.join(sorted(missing))}; {_ANEW}")
    return index


def _read_sizes(file: Path, count: int) -> np.ndarray:
    try:
        sizes = np.load(file, mmap_mode="r" if count else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PreparedSetError(f"{file}: not readable ({error}); {_ANEW}") from error
    if sizes.shape != (count, 2) or sizes.dtype != np.int32:
        raise PreparedSetError(
            f"{file}: {sizes.dtype} {list(sizes.shape)}, expected int32 {[count, 2]}; {_ANEW}"
        )
    return sizes
