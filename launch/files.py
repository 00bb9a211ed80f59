"""Small files that appear whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax.data.pictures import replaced_file


def write_json(file: Path, value: Any) -> None:
    with replaced_file(file) as stream:
        stream.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with replaced_file(file) as stream:
        np.savez_compressed(stream, **arrays)


def read_arrays(file: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of those names, or all."""
    with np.load(file) as arrays:
        return {name: arrays[name] for name in names or arrays.files}
