"""A bundle's manifest: what it must say (`manifest.schema.json`), and whether the files are those
that it speaks of.

No JAX: whoever receives a bundle checks it with this.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from convert import flatbuffer
from dreamlite_jax.errors import UserError

NAME, VERSION = "manifest.json", 1


class BundleError(UserError):
    """A bundle that must not be used: one line that says why."""


@functools.cache
def schema() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("manifest.schema.json").read_text())


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle that is complete and undamaged.

    Raises:
      BundleError: no manifest, another schema version, a manifest against the schema, a file that
        is missing or has other bytes, a graph whose tensors are not those of the manifest.
    """
    try:
        manifest = json.loads((folder / NAME).read_text("utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: has no {NAME}; is it a bundle?") from error
    except ValueError as error:
        raise BundleError(f"{folder / NAME}: not valid JSON ({error})") from error
    check(folder, manifest)
    return manifest


def check(folder: Path, manifest: dict[str, Any]) -> None:
    """As `read`, of a manifest that is not yet in its file."""
    import jsonschema

    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise BundleError(f"{folder / NAME}: schema version {version}, this reads {VERSION}")
    problem = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(schema()).iter_errors(manifest)
    )
    if problem is not None:
        place = "/".join(map(str, problem.absolute_path)) or "top level"
        raise BundleError(f"{folder / NAME}: {place}: {problem.message}")
    for name, entry in manifest["files"].items():
        _check_file(folder / name, entry)
    for parts in manifest["components"].values():
        for part in parts:
            _check_signatures(folder / part["file"], part)


def _check_file(file: Path, entry: dict[str, Any]) -> None:
    if not file.is_file():
        raise BundleError(f"{file}: is missing")
    if (size := file.stat().st_size) != entry["bytes"]:
        raise BundleError(f"{file}: {size} bytes, should be {entry['bytes']}")
    if digest(file) != entry["sha256"]:
        raise BundleError(f"{file}: is damaged (its SHA-256 is not the manifest's)")


def _check_signatures(file: Path, part: dict[str, Any]) -> None:
    found = flatbuffer.signatures(file)
    if found.keys() != part["signatures"].keys():
        raise BundleError(f"{file}: signatures {sorted(found)}, not {sorted(part['signatures'])}")
    for name, sides in found.items():
        for side, tensors in sides.items():
            theirs = {t["name"]: tuple(t["shape"]) for t in part["signatures"][name][side]}
            if tensors != theirs:
                raise BundleError(f"{file}: {name} has the {side} {tensors}, not {theirs}")


def psnr(ours: np.ndarray, expected: np.ndarray) -> float:
    """dB: the range of `expected` over the root mean square of the error; infinite if equal."""
    error = np.sqrt(np.mean((np.asarray(ours, np.float64) - expected) ** 2))
    if not np.isfinite(error):
        return -np.inf
    return float(20 * np.log10(np.ptp(expected) / error)) if error else np.inf
