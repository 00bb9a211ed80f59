"""README, BENCHMARKS and configs' docstrings: their commands, settings, files and sections are
there; snippets run."""

import ast
import importlib
import itertools
import re
import shlex

import commands
import pytest
from absl import flags
from absl.testing import flagsaver

from dreamlite_jax import cli

ROOT = commands.ROOT
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "BENCHMARKS.md")}
DOCSTRINGS = {
    file.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(file.read_text("utf-8")))
    for file in sorted((ROOT / "configs").rglob("*.py"))
    if "def get_config" in file.read_text("utf-8")
}
BLOCK = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_of(text):
    """(module, flags) of what is typed in a document's blocks."""
    for block in BLOCK.findall(text):
        if "python -m" in block:
            yield from commands_in(re.sub(r"\\\n|\s# .*", " ", block))


def commands_in(script):
    ends = ";|&\n"
    lexer = shlex.shlex(script, posix=True, punctuation_chars=ends)
    lexer.whitespace, lexer.whitespace_split = " ", True
    for ended, words in itertools.groupby(lexer, lambda word: set(word) <= set(ends)):
        words = () if ended else (*words,)
        for k, word in enumerate(words):
            if words[k - 1] == "-m" and word.startswith(("launch.", "convert.")):
                yield word, [one for one in words[k:] if one.startswith("--")]


SNIPPETS = SNIPPET.findall(TEXTS["README.md"])
GIVEN = [
    pytest.param(module, arguments, id=f"{name}: {module} {' '.join(arguments)}"[:90])
    for name, text in {**TEXTS, **DOCSTRINGS}.items()
    for module, arguments in commands_of(text)
]
PRECOMPUTED = [
    pytest.param(name, arguments, id=f"{name}: {arguments[0]}")
    for name, text in DOCSTRINGS.items()
    for module, arguments in commands_of(text)
    if module == "launch.precompute"
]


def test_there_are_some():
    assert len(GIVEN) > 50 and len(SNIPPETS) > 3
    assert {param.values[0] for param in GIVEN} >= {"launch.train", "convert.bundle"}


@pytest.mark.parametrize("module, arguments", GIVEN)
def test_a_command_takes_its_flags(module, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = [re.sub(r"\$\w+", "1", one) for one in arguments if one != "--config=..."]
    with commands.only_flags_of(module), flagsaver.flagsaver():
        _, problem = cli._read([module, *given])
        for file in [one.partition("=")[2] for one in given if one.startswith("--config=")]:
            assert (ROOT / file.partition(":")[0]).is_file()
    assert not problem


def test_configs_tell_what_to_precompute():
    assert len(PRECOMPUTED) >= 4


@pytest.mark.parametrize("name, arguments", PRECOMPUTED)
def test_what_a_config_tells_to_precompute_is_what_it_takes(name, arguments):
    module = name.removesuffix(".py").replace("/", ".")
    config = importlib.import_module(module).get_config()
    with commands.only_flags_of("launch.precompute"), flagsaver.flagsaver():
        assert not cli._read(["launch.precompute", *arguments])[1]
        given = {key: flags.FLAGS[key].value for key in ("image_size", "max_ratio", "model")}
        data = flags.FLAGS["data"].value
    assert given == {key: config[key] for key in given}
    assert data in [entry["source"] for entry in config.data]


@pytest.mark.parametrize("number, snippet", list(enumerate(SNIPPETS)))
def test_a_snippet_runs(number, snippet, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = snippet.replace('"DIR"', repr(str(cache / "model"))).replace(
        '"OUT"', repr(str(tmp_path / "out"))
    )
    names = {}
    exec(compile(code, f"snippet {number}", "exec"), names)
    if "get_config" in names:
        assert names["get_config"]().loss.density == "uniform"


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name):
    text = TEXTS[name]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    files = re.findall(
        r"`((?:configs|dreamlite_jax|launch|convert|tests)/[\w/]+(?:\.\w+)?)/?`", text
    )
    assert links or files
    assert not [one for one in links + files if not (ROOT / one).exists()]


def test_sections_that_are_named_exist():
    found = re.findall(r"^#+ (.*)$|\*\*([^*]+)\.?\*\*", TEXTS["BENCHMARKS.md"], re.MULTILINE)
    titles = {(heading or bold).rstrip(".") for heading, bold in found}
    named = re.findall(r"BENCHMARKS\.md,\s+\*([^*]+)\*", TEXTS["README.md"])
    assert len(named) > 3
    assert {" ".join(one.split()) for one in named} <= titles
