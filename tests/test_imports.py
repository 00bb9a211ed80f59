"""Imports point one way, as the layout promises; read from the sources, nothing is imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = "dreamlite_jax"
TOPS = (LIBRARY, "configs", "launch", "convert")

COMMON = ("errors",)  # what every part may import
# From the bottom up; a part imports from its own layer and those below.
LAYERS = (
    ("models", "diffusion", "data", "rewards"),
    ("system", "pretrained", "objectives", "generation", "tiny", "precompute"),
    ("evals",),
    ("train", "cli"),
)
# The parts of the lowest layer know nothing of each other, but what is listed here.
KNOWS = {"models": (), "diffusion": (), "data": (), "rewards": ("data",)}
# What data workers and reward servers run without.
HEAVY = {"data": ("jax", "jaxlib", "flax", "torch"), "rewards": ("jax", "jaxlib", "flax")}
CONFIGS_MAY = ("configs", "ml_collections")


def imports(file: Path):
    """Dotted names that a file imports anywhere, `from a import b` as a and a.b."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*base, *filter(None, [node.module])))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part(name: str) -> str | None:
    """The part of the library that a dotted name belongs to: "models", "system", ..."""
    names = name.split(".")
    return names[1] if names[0] == LIBRARY and len(names) > 1 else None


def layer(name: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if name in parts)


def within(name: str, packages) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def problems_of(file: Path):
    path = file.relative_to(ROOT)
    top, mine = path.parts[0], Path(path.parts[1]).stem if len(path.parts) > 1 else None
    for name in imports(file):
        theirs = part(name)
        if within(name, ("launch", "convert")) and not within(name, (top,)):
            yield f"{path} imports {name}; nothing imports launch or convert"
        if top == "configs" and not within(name, CONFIGS_MAY):
            yield f"{path} imports {name}; configs import only ml_collections and each other"
        if top != LIBRARY:
            continue
        if within(name, HEAVY.get(mine, ())):
            yield f"{path} imports {name}; {mine} never does"
        if within(name, ("torch", "diffusers")):
            yield f"{path} imports {name}; only tests/parity may"
        if theirs in (None, mine, "__init__", *COMMON) or mine == "__init__":
            continue
        if layer(theirs) > layer(mine):
            yield f"{path} imports {name}, which lies above it"
        if theirs not in KNOWS.get(mine, LAYERS[0]) and theirs in LAYERS[0]:
            yield f"{path} imports {name}; {mine} does not know {theirs}"


def sources():
    return sorted(file for top in TOPS for file in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("top", [top for top in TOPS if (ROOT / top).is_dir()])
def test_imports_point_one_way(top):
    found = [
        problem
        for file in sources()
        if file.relative_to(ROOT).parts[0] == top
        for problem in problems_of(file)
    ]
    assert not found, "\n".join(dict.fromkeys(found))


def test_every_part_has_its_layer():
    names = {Path(p.name).stem for p in (ROOT / LIBRARY).iterdir() if p.name[0] not in "._"}
    assert names <= {*COMMON, *(name for parts in LAYERS for name in parts)}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("dreamlite_jax/data/a.py", "import jax.numpy as jnp"),
        ("dreamlite_jax/data/a.py", "def f():\n  from jax import lax"),
        ("dreamlite_jax/data/a.py", "from dreamlite_jax.models import unet"),
        ("dreamlite_jax/diffusion/a.py", "from dreamlite_jax import models"),
        ("dreamlite_jax/models/b/a.py", "from ...system import load"),
        ("dreamlite_jax/system.py", "import dreamlite_jax.train.loop"),
        ("dreamlite_jax/evals/a.py", "from launch import cli"),
        ("dreamlite_jax/pretrained.py", "import torch"),
        ("configs/a.py", "import jax"),
        ("launch/a.py", "from convert import tflite"),
    ],
)
def test_the_rules_bite(file, line, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    assert list(problems_of(tmp_path / file))
