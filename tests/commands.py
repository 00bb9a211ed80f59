"""Runs the commands that people type, in the tests' own process."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from absl.testing import flagsaver

from dreamlite_jax import cli

ROOT = Path(__file__).parent.parent


def run(name: str, *arguments: str) -> int:
    """`python -m launch.<name> <arguments>`, or of `convert.<name>`; returns the exit code."""
    name = name if "." in name else f"launch.{name}"
    with (
        only_flags_of(name) as module,
        flagsaver.flagsaver(),
        mock.patch.object(sys, "argv", [name, *arguments]),  # where ml_collections finds overrides
        pytest.raises(SystemExit) as ended,
    ):
        cli.run(module.main, [name, *arguments])
    return ended.value.code or 0


_known: dict[str, list[flags.Flag]] = {}  # flags of commands, by module


@contextlib.contextmanager
def only_flags_of(command: str) -> Iterator:
    """Commands have flags of the same names, and required ones: one command's at a time."""
    _forget_all()
    for flag in _known.pop(command, ()):
        flags.FLAGS[flag.name] = flag
        flags.FLAGS.register_flag_by_module(command, flag)
    try:
        yield importlib.import_module(command)
    finally:
        _forget_all()


def _forget_all() -> None:
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith(("launch.", "convert.")) and found:
            _known[module] = list(found)
            for flag in _known[module]:
                delattr(flags.FLAGS, flag.name)
