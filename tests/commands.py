"""Runs the commands that people type, in the tests' own process."""

import importlib

import pytest
from absl.testing import flagsaver

from launch import cli


def run(name: str, *arguments: str) -> int:
    """`python -m launch.<name> <arguments>`; returns the exit code."""
    module = importlib.import_module(f"launch.{name}")
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        cli.run(module.main, [name, *arguments])
    return ended.value.code or 0
