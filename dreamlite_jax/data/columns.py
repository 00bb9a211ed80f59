"""Which columns of foreign tables hold what: usual names, told apart by what they hold."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from dreamlite_jax.errors import UserError

ROLES = ("image", "source", "caption", "key")

# Names in the order of preference, compared without regard to case. Targets stand before plain
# pictures: beside `edited_image`, a column `image` is what was edited.
_TARGETS = (
    *("target", "target_image", "target_img", "target_file_name", "target_path"),
    *("edited_image", "edited_img", "edited_file_name", "output_image", "output_img"),
)
_IMAGES = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes"),
    *("file_name", "filename", "image_file", "image_path", "path"),
)
_SOURCES = (
    *("source", "source_image", "source_img", "src_img", "src_image"),
    *("source_file_name", "source_path", "original_image", "original_img", "original_file_name"),
    *("input_image", "input_img", "input_file_name"),
)
_CAPTIONS = ("captions", "caption", "texts", "text", "txt", "prompts", "prompt", "description")
_INSTRUCTIONS = (
    *("instructions", "instruction", "edit_instruction", "edit_prompts", "edit_prompt", "edit"),
    "edited_prompt_list",
)
_KEYS = ("key", "__key__")
# As texts these are more often an origin and a label than names of files.
_AMBIGUOUS = ("source", "target")

_DATA, _NAME = "data", "name"  # what a column of pictures may hold: themselves, or names of files


class SourceError(UserError):
    """Foreign data that cannot be read as samples: one line that says what was looked for."""


class Columns(NamedTuple):
    """Column names; None: there is no such column."""

    image: str
    source: str | None
    caption: str
    key: str | None


def caption_names(triplets: bool) -> tuple[str, ...]:
    """Fields that may hold the captions; those of an edit's instructions first where it is one."""
    return _INSTRUCTIONS + _CAPTIONS if triplets else _CAPTIONS


def first(names: Iterable[str], fields: Iterable[str]) -> str | None:
    """The first of the names that there is, as the fields spell it."""
    spelled = {field.lower(): field for field in reversed(list(fields))}
    return next((spelled[name] for name in names if name in spelled), None)


def of_table(file: Path, header: Sequence[str], given: Mapping[str, str]) -> Columns:
    """The columns of a CSV or JSON Lines table, whose pictures are names of files."""
    return _chosen(file, dict.fromkeys(header, _NAME), given)


def of_schema(file: Path, schema: pa.Schema, given: Mapping[str, str]) -> Columns:
    """The columns of a Parquet file."""
    return _chosen(file, {field.name: _holds(field.type) for field in schema}, given)


def _holds(kind: pa.DataType) -> str | None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _DATA
    if pa.types.is_struct(kind):
        return _DATA if "bytes" in {field.name for field in kind} else None
    return _NAME if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _chosen(file: Path, holds: Mapping[str, str | None], given: Mapping[str, str]) -> Columns:
    """The columns of each role, from what columns there are and what pictures each may hold.

    Raises:
      SourceError: a given column is not there, or there is none for pictures or captions.
    """
    for role, name in given.items():
        if name not in holds:
            raise SourceError(f"{file}: no column {name!r} ({role}); it has {_listed(holds)}")
    image, source = _pictures(holds, given)
    if image is None:
        raise SourceError(
            f"{file}: no column of pictures; looked for {', '.join(_IMAGES + _TARGETS)}; it has "
            f"{_listed(holds)}; --columns=image=NAME names another"
        )
    wanted = caption_names(source is not None)
    caption = given.get("caption") or first(wanted, holds)
    if caption is None:
        raise SourceError(
            f"{file}: no column of captions; looked for {', '.join(wanted)}; it has "
            f"{_listed(holds)}; --columns=caption=NAME names another"
        )
    return Columns(image, source, caption, given.get("key") or first(_KEYS, holds))


def _pictures(
    holds: Mapping[str, str | None], given: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """Columns of the picture and, in a table of edits, of the one before the edit."""
    edits = first(_INSTRUCTIONS, holds) is not None or "source" in given
    possible = [
        name
        for name, what in holds.items()
        if what == _DATA or (what == _NAME and (edits or name.lower() not in _AMBIGUOUS))
    ]
    image = given.get("image") or first(_TARGETS, possible) or first(_IMAGES, possible)
    if image is None or "source" in given:
        return image, given.get("source")
    others = [name for name in possible if name != image and holds[name] == holds[image]]
    names = _SOURCES + (_IMAGES if image.lower() in _TARGETS else ())
    return image, first(names, others)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(listed[:20]) or "none") + more
