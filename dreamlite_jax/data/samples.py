"""Samples as they are found, by extension or in the fields of a row, and what ails them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dreamlite_jax.data import columns
from dreamlite_jax.data.prompts import IMAGE_PAD
from dreamlite_jax.data.records import PAIRS, TRIPLETS

# Extensions that mean a picture, those that nobody here decodes too: they are then reported.
PICTURES = frozenset(
    {"jpg", "jpeg", "jfif", "jpe", "mpo", "png", "apng", "webp", "gif", "tif", "tiff", "bmp"}
    | {"heic", "heif", "avif", "jxl", "jp2"}
)
TEXTS = frozenset({"txt", "json"})
SOURCE = "source"  # `name.source.jpg` is what `name.jpg` was made from

# Reasons for which a sample is no sample; scripts count them, so they stay as they are.
NO_PICTURE = "no picture"
SEVERAL_PICTURES = "several pictures"
NO_SOURCE = "no source picture"
UNEXPECTED_SOURCE = "unexpected source picture"
NO_CAPTION = "no caption"
NOT_UTF8 = "caption is not UTF-8"
BROKEN_CAPTIONS = "broken captions"
BROKEN_ROW = "broken row"
MISSING_FILE = "missing file"
DAMAGED = "damaged source"


class RawSample(NamedTuple):
    """A sample as it was found.

    Attributes:
      key: its name within the source; unique only as far as the source's names are.
      image: the encoded picture (of a triplet: the edited one).
      captions: without surrounding white space, none empty; of a triplet: the instructions.
      source: of a triplet: the encoded picture before the edit.
      error: None, or why it cannot be used: "reason" or "reason: detail"; then only `key` counts.
    """

    key: str
    image: bytes
    captions: list[str]
    source: bytes | None
    error: str | None


class _BrokenError(Exception):
    """A sample that cannot be used; the text is `RawSample.error`."""


def broken(key: str, error: str) -> RawSample:
    """A sample that cannot be used, for a reason or "reason: detail"."""
    return RawSample(_printable(key), b"", [], None, _printable(" ".join(error.split())))


def is_member(extension: str) -> bool:
    """Whether files with this extension ("jpg", "source.png", "txt") can belong to a sample."""
    return extension.lower().rpartition(".")[2] in PICTURES | TEXTS


def is_source(extension: str) -> bool:
    """Whether this is the extension of a triplet's source picture."""
    role, _, last = extension.lower().rpartition(".")
    return role == SOURCE and last in PICTURES


def from_members(key: str, members: Mapping[str, bytes], kind: str) -> RawSample:
    """The sample of the files `key.jpg`, `key.txt`, ..., whether a folder's or a tar's.

    Args:
      key: what their names have in common.
      members: contents by extension: a picture ("jpg", ...), its source ("source.jpg", ...),
        captions, one a line ("txt"), or a JSON map that has them ("json"). Others are passed over.
      kind: "pairs" or "triplets".
    """
    pictures: dict[str, list[bytes]] = {"": [], SOURCE: []}
    for extension, data in members.items():
        role, _, last = extension.lower().rpartition(".")
        if last in PICTURES and role in pictures:
            pictures[role].append(data)
    if max(map(len, pictures.values())) > 1:
        return broken(key, f"{SEVERAL_PICTURES}: {', '.join(members)}")
    images, sources = pictures.values()
    if not images:
        return broken(key, f"{NO_PICTURE}: only {', '.join(members)}")
    try:
        captions = _sidecar_captions({name.lower(): data for name, data in members.items()}, kind)
    except _BrokenError as error:
        return broken(key, str(error))
    return _checked(key, images[0], captions, sources[0] if sources else None, kind)


def from_row(
    row: Mapping[str, Any], names: columns.Columns, folder: Path, key: str, kind: str
) -> RawSample:
    """The sample of a row.

    Args:
      row: fields by column; pictures are bytes, file names, or Hugging Face's {bytes, path}.
      names: the columns.
      folder: what file names are relative to.
      key: for rows that have none and whose pictures have no names.
      kind: "pairs" or "triplets".
    """
    image = row.get(names.image)
    if names.key is not None and row.get(names.key) not in (None, ""):
        key = str(row[names.key])
    elif isinstance(image, str) and image:
        key = PurePosixPath(os.path.splitext(image)[0]).as_posix()
    try:
        captions = _captions(row.get(names.caption))
        source = None if names.source is None else _picture(row.get(names.source), folder)
        image = _picture(image, folder)
    except _BrokenError as error:
        return broken(key, str(error))
    return _checked(key, image, captions, source, kind)


def _checked(
    key: str, image: bytes | None, captions: list[str], source: bytes | None, kind: str
) -> RawSample:
    if image is None:
        return broken(key, NO_PICTURE)
    if kind == TRIPLETS and source is None:
        return broken(key, NO_SOURCE)
    if kind == PAIRS and source is not None:
        return broken(key, UNEXPECTED_SOURCE)
    if not captions:
        return broken(key, NO_CAPTION)
    return RawSample(_printable(key), image, captions, source, None)


def _printable(text: str) -> str:
    """Names that are not UTF-8 come with surrogates, which no file of ours can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _sidecar_captions(members: Mapping[str, bytes], kind: str) -> list[str]:
    """Of `name.txt` and, where that has none, `name.json`."""
    try:
        if captions := _captions(members.get("txt", b"").decode("utf-8-sig").splitlines()):
            return captions
        fields = json.loads(members["json"].decode("utf-8-sig")) if "json" in members else {}
    except UnicodeDecodeError as error:
        raise _BrokenError(f"{NOT_UTF8}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _BrokenError(f"{BROKEN_CAPTIONS}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _BrokenError(f'{BROKEN_CAPTIONS}: JSON, but not {{"caption": ...}}')
    name = columns.first(columns.caption_names(kind == TRIPLETS), fields)
    return [] if name is None else _captions(fields[name])


def _captions(value: Any) -> list[str]:
    """Captions of a field: a text, or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    decoded = [_decoded(text) for text in texts if isinstance(text, str | bytes)]
    if any(IMAGE_PAD in text for text in decoded):  # training would stop at it, days later
        raise _BrokenError(f"{BROKEN_CAPTIONS}: one contains {IMAGE_PAD}, which is reserved")
    return [text.strip() for text in decoded if text.strip()]


def _decoded(text: str | bytes) -> str:
    try:
        text = text.decode() if isinstance(text, bytes) else text
        text.encode()  # surrogates stand for bytes that were not UTF-8
    except UnicodeError as error:
        raise _BrokenError(f"{NOT_UTF8}: {error}") from error
    return text


def _picture(value: Any, folder: Path) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        try:
            return (folder / value).read_bytes()
        except (OSError, ValueError) as error:
            raise _BrokenError(f"{MISSING_FILE}: {error}") from error
    return value if isinstance(value, bytes) and value else None
