"""The variants that `launch.evaluate` is asked for, checked before anything is opened."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreamlite_jax import cli
from dreamlite_jax.data import mixture
from dreamlite_jax.data.shapes import SPLITS
from dreamlite_jax.evals import shapes


class Variant(NamedTuple):
    """A way to make pictures."""

    name: str
    model: str | None = None
    pictures: str | None = None
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    stochastic: float = 0.0
    count: int = 256
    task: tuple[str, ...] = ("t2i", "edit")
    split: tuple[str, ...] = shapes.SPLITS
    diversity: int = 0
    inputs: bool = False
    group: str | None = None


def parsed(text: str, common: Mapping[str, Any]) -> list[Variant]:
    """The variants of a JSON list of objects; raises as `made`."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise cli.CommandError(f"--variants: no JSON ({error})") from error
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise cli.CommandError("--variants: expected a JSON list of objects")
    return made(given, common)


def made(given: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> list[Variant]:
    """Variants of what each says itself and, where it does not, of what is common to all.

    Raises:
      cli.CommandError: keys that are missing or unknown; or all that is wrong with their values.
    """
    try:
        found = [Variant(**{**common, **one}) for one in given]
    except TypeError as error:
        known = ", ".join(Variant._fields)
        raise cli.CommandError(f"--variants: needs a name, and knows {known}") from error
    wrong = [f"variant {one.name!r}: {problem}" for one in found for problem in problems(one)]
    if wrong:
        raise cli.CommandError("; ".join(wrong))
    cells = Counter(
        (one.name, task, split) for one in found for task in one.task for split in one.split
    )
    if shared := [cell for cell, count in cells.items() if count > 1]:
        name, task, split = shared[0]
        raise cli.CommandError(
            f"variant {name!r}: {task} {split} is asked for twice under that name, and would be "
            "written to one place; give each variant a name"
        )
    return found


def problems(variant: Variant) -> list[str]:
    """What is wrong with a variant's values, a line each."""
    given = variant._asdict()
    found = [
        f"{key} is {given[key]!r}, should be {wanted}"
        for key, (fits, wanted) in _EXPECTED.items()
        if not fits(given[key]) and not (given[key] is None and key in _OPTIONAL)
    ]
    if (variant.model is None) == (variant.pictures is None):
        found.append("needs either a model or pictures")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_folder_name(value: Any) -> bool:
    return _is_text(value) and value not in ("", "..") and Path(value).name == value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # True is an int, too


def _from(least: int) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return type(value) is int and value >= least

    return fits, f"a whole number of at least {least}"


def _some_of(known: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        some = isinstance(value, list | tuple) and len(value) > 0
        return some and all(one in known for one in value)

    return fits, f"a list of some of {', '.join(known)}"


_OPTIONAL = {name for name, value in Variant._field_defaults.items() if value is None}
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_folder_name, "the name of a folder, without a path"),
    "model": (_is_text, "a path"),
    "pictures": (_is_text, "a path"),
    "steps": _from(1),
    "guidance": (_is_number, "a finite number"),
    "image_guidance": (_is_number, "a finite number"),
    "stochastic": (lambda value: _is_number(value) and 0 <= value <= 1, "a number in [0, 1]"),
    "count": _from(1),
    "task": _some_of(mixture.TASKS),
    "split": _some_of(SPLITS),
    "diversity": _from(0),
    "inputs": (lambda value: isinstance(value, bool), "true or false"),
    "group": (_is_text, "a text"),
}
