"""The encoders' outputs of a prepared set, stored beside its records. NumPy only.

`SET/precomputed-256/` holds, for pictures of about 256 x 256 pixels and record by record, the
latents, the encoded captions and what batches need besides; `dreamlite_jax/precompute.py` makes
them. A crop cannot be random then: it is the middle. Half precision, as stored.

Shapes: h and w latent pixels, c latent channels, n tokens behind the template's prefix, F text
feature width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from dreamlite_jax.data import pictures
from dreamlite_jax.data.mixture import MixtureError
from dreamlite_jax.data.records import fingerprint
from dreamlite_jax.data.shards import Shard, Shards, write_json
from dreamlite_jax.data.transforms import Crop, Size

VERSION = 1
INDEX = "index.json"


class Latents(NamedTuple):
    """A sample as the U-Net sees it."""

    target: np.ndarray  # float16 [h, w, c]
    source: np.ndarray | None  # likewise; None: T2I
    changed: np.ndarray  # bool [h, w]
    contexts: list[np.ndarray]  # float16 [n, F] for each caption
    null: np.ndarray  # float16 [n, F], the encoded null text (of an edit: with its source)
    original_size: tuple[int, int]  # (width, height) in pixels
    crop: Crop


def folder_of(prepared: str | Path, image_size: int) -> Path:
    """Where a prepared set's outputs for an image size lie."""
    return Path(prepared) / f"precomputed-{image_size}"


def pack(sample: Latents) -> bytes:
    """A record's bytes."""
    fields = {
        "target": _packed(sample.target),
        "changed": _packed(np.packbits(sample.changed, axis=-1)),
        "contexts": [_packed(context) for context in sample.contexts],
        "null": _packed(sample.null),
        "original_size": list(sample.original_size),
        "crop": list(sample.crop),
    }
    if sample.source is not None:
        fields["source"] = _packed(sample.source)
    return msgpack.packb(fields)


def unpack(data: bytes) -> Latents:
    """`pack`'s inverse."""
    fields = msgpack.unpackb(data)
    target = _unpacked(fields["target"])
    changed = np.unpackbits(_unpacked(fields["changed"]), axis=-1, count=target.shape[1])
    return Latents(
        target,
        _unpacked(fields["source"]) if "source" in fields else None,
        changed.astype(bool),
        [_unpacked(context) for context in fields["contexts"]],
        _unpacked(fields["null"]),
        tuple(fields["original_size"]),
        Crop(*fields["crop"]),
    )


def _packed(array: np.ndarray) -> list:
    return [array.dtype.str, list(array.shape), array.tobytes()]


def _unpacked(fields: list) -> np.ndarray:
    dtype, shape, data = fields
    return np.frombuffer(data, dtype).reshape(shape)


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    sizes: np.ndarray,
    prepared: str,
    made_with: Mapping[str, Any],
    drop: int,
) -> None:
    """The last file of a folder: with it the folder is complete.

    Args:
      shards: in the records' order.
      sizes: int32 [N, 2], (width, height) in pixels that each record's target was brought to.
      prepared: the prepared set's fingerprint.
      made_with: what made the outputs, by JSON values; compared key by key when they are used.
      drop: tokens of the template's prefix, which the contexts lack.
    """
    with pictures.replaced_file(folder / "sizes.npy") as stream:
        np.save(stream, sizes.astype(np.int32))
    index = {
        "version": VERSION,
        "count": len(sizes),
        "fingerprint": fingerprint("precomputed", shards),
        "shards": [shard._asdict() for shard in shards],
        "prepared": prepared,
        "made_with": dict(made_with),
        "drop": drop,
    }
    write_json(folder / INDEX, index)


def _read_index(folder: Path) -> dict[str, Any]:
    again = "remove it and run launch.precompute again"
    try:
        index = json.loads((folder / INDEX).read_bytes())
        version = index["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise MixtureError(f"{folder / INDEX}: not readable ({error!r}); {again}") from error
    if version != VERSION:
        raise MixtureError(f"{folder}: version {version}, this program reads {VERSION}; {again}")
    return index


class PrecomputedSource:
    """A `mixture.Source` of `Latents`.

    Raises:
      MixtureError: unfinished, of another state of the prepared set, or made with other encoders or
        settings; the line names what differs.
    """

    def __init__(self, folder: Path, task: str, prepared: str, made_with: Mapping[str, Any]):
        again = "launch.precompute again, or set precomputed=False"
        if not (folder / INDEX).is_file():
            raise MixtureError(f"{folder} is not finished: it has no {INDEX}; run {again}")
        index = _read_index(folder)
        differing = [
            # Of the digests a few digits do.
            f"{key} was {str(index['made_with'].get(key))[:8]}, is {str(value)[:8]}"
            for key, value in made_with.items()
            if index["made_with"].get(key) != value
        ]
        if index["prepared"] != prepared:
            differing.append("the prepared set has changed")
        self._shards = Shards(folder, [Shard(**shard) for shard in index["shards"]])
        differing += self._shards.problems()
        if differing:
            raise MixtureError(
                f"{folder} does not fit: {'; '.join(differing)}; remove it and run {again}"
            )
        self.task, self.drop = task, index["drop"]
        self.sizes = np.load(folder / "sizes.npy")
        self.fingerprint = index["fingerprint"]

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: int, size: Size) -> Latents:
        sample = unpack(self._shards[index])
        if tuple(self.sizes[index][::-1]) != tuple(size):
            raise MixtureError(f"record {index} was encoded at {self.sizes[index]}, not at {size}")
        return sample
