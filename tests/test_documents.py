"""README and BENCHMARKS: their commands, settings, files and sections are there; snippets run."""

import importlib.util
import itertools
import re
import shlex

import commands
import pytest
from absl import flags

ROOT = commands.ROOT
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "BENCHMARKS.md")}
BLOCK = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


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


GIVEN = [
    pytest.param(module, arguments, id=f"{name}: {module} {' '.join(arguments)}"[:90])
    for name, text in TEXTS.items()
    for module, arguments in commands_of(text)
]


def test_there_are_commands():
    assert len(GIVEN) > 50
    assert {param.values[0] for param in GIVEN} >= {"launch.train", "convert.bundle"}


@pytest.mark.parametrize("module, arguments", GIVEN)
def test_a_command_has_the_flags_that_it_is_given(module, arguments):
    config = None
    with commands.only_flags_of(module):
        for argument in arguments:
            name, _, value = argument.removeprefix("--").partition("=")
            if name == "config":
                config = value != "..." and config_of(value)
            elif name.startswith("config."):
                assert config is not None, f"{argument} before --config"
                assert value and key_of(config, name.removeprefix("config.")) is not None
            else:
                assert name in flags.FLAGS, argument
                if "$" not in value and not value.isupper():  # a placeholder
                    flags.FLAGS[name].parser.parse(value or "true")


def config_of(value):
    file, _, variant = value.partition(":")
    spec = importlib.util.spec_from_file_location("given", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant or None)


def key_of(config, name):
    for part in name.split("."):
        config = config[part]  # KeyError: no such key
    return config


@pytest.mark.parametrize("number, snippet", list(enumerate(FENCE.findall(TEXTS["README.md"]))))
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
