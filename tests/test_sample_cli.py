"""`launch.sample` as people type it: files, reproducibility, compilations and errors."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from commands import run
from PIL import Image

from dreamlite_jax import generation, system
from dreamlite_jax.data import prompts
from dreamlite_jax.tiny import tiny_model_dir

pytestmark = pytest.mark.e2e

SIZE = ("--height=32", "--width=64", "--steps=2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: tiny_model_dir(folder / kind, seed=3, mobile=kind == "mobile")
        for kind in ("base", "mobile")
    }


@pytest.fixture(scope="module")
def boats(models, tmp_path_factory):
    """Two prompts, three pictures each, two at a time; with what was compiled for them."""
    folder = tmp_path_factory.mktemp("boats")
    (folder / "prompts.txt").write_text("a red boat\n\nein grünes Boot\n", "utf-8")
    before = compilations()
    code = run(
        "sample",
        f"--model={models['base']}",
        f"--prompts_file={folder / 'prompts.txt'}",
        *SIZE,
        "--num_images=3",
        "--batch_size=2",
        "--seed=7",
        f"--out={folder / 'out'}",
        f"--contact_sheet={folder / 'sheet.png'}",
        f"--latents={folder / 'latents.npy'}",
    )
    assert code == 0
    return folder, [after - b for after, b in zip(compilations(), before, strict=True)]


def compilations():
    functions = (system.encode_texts, system.sample_latents, system.decode_latents)
    return [function._cache_size() for function in (*functions, system.encode_pictures)]


def notes(file):
    return json.loads(Image.open(file).info["dreamlite_jax"])


def test_files_and_notes(boats, models):
    folder, _ = boats
    files = sorted((folder / "out").iterdir())
    assert [file.name for file in files] == [f"{i:03d}.png" for i in range(6)]
    assert all(Image.open(file).size == (64, 32) for file in files)
    made = [notes(file) for file in files]
    assert [(note["prompt"], note["seed"]) for note in made] == [
        (prompt, seed) for prompt in ("a red boat", "ein grünes Boot") for seed in (7, 8, 9)
    ]
    expected = {"model": str(models["base"]), "steps": 2, "guidance": 3.5, "height": 32}
    assert expected.items() <= made[0].items()
    assert "image_guidance" not in made[0]
    assert np.load(folder / "latents.npy").shape == (6, 4, 8, 4)
    assert Image.open(folder / "sheet.png").size == (8 + 3 * 264, 8 + 2 * 284)
    assert not list(folder.rglob(".*"))


def test_one_compilation_serves_all(boats):
    """Two prompts of one bucket and six pictures in three batches: each function compiled once."""
    assert boats[1] == [1, 1, 1, 0]


def test_edits_share_a_compilation_too(models, tmp_path):
    """However many pictures, and whatever the prompt, the guidance and the shape of the source."""
    counts = [compilations()]
    for i, (prompt, size, n) in enumerate((("a hat", (40, 75), 3), ("two blue hats", (90, 30), 1))):
        Image.new("RGB", size, "red").save(tmp_path / f"{i}.png")
        code = run(
            "sample",
            f"--model={models['mobile']}",
            f"--prompt={prompt}",
            f"--image={tmp_path / f'{i}.png'}",
            *SIZE,
            f"--num_images={n}",
            "--batch_size=2",
            f"--out={tmp_path / 'out'}",
        )
        assert code == 0
        counts.append(compilations())
    first, second = np.diff(counts, axis=0).tolist()
    assert first[1] == 1 and max(first) == 1 and second == [0, 0, 0, 0]


@pytest.mark.parametrize("edit", [False, True])
def test_guidance_of_1_costs_nothing(edit, models, tmp_path, monkeypatch):
    """The picture is a mobile model's, and no null text is encoded for it."""
    encoded, encode = [], generation.encode_prompts

    def watching(model, mode, texts, *rest):
        encoded.append(texts)
        return encode(model, mode, texts, *rest)

    monkeypatch.setattr(generation, "encode_prompts", watching)
    Image.new("RGB", (64, 32), "red").save(tmp_path / "source.png")
    given = ["--prompt=a hat", *SIZE, *([f"--image={tmp_path / 'source.png'}"] if edit else [])]
    ones = {"base": ["--guidance=1", "--image_guidance=1"], "mobile": []}
    for kind, flags in ones.items():
        if not edit:
            flags = flags[:1]
        out = f"--out={tmp_path / f'{kind}.png'}"
        assert run("sample", f"--model={models[kind]}", *given, *flags, out) == 0
    base, mobile = (np.asarray(Image.open(tmp_path / f"{kind}.png")) for kind in ones)
    np.testing.assert_array_equal(base, mobile)
    assert [len(texts) for texts in encoded] == [1, 1]


def test_pictures_follow_prompt_and_seed(boats):
    pictures = [np.asarray(Image.open(f), int) for f in sorted((boats[0] / "out").iterdir())]
    for i, a in enumerate(pictures):
        for b in pictures[i + 1 :]:
            assert np.abs(a - b).max() > 5


def test_a_note_makes_its_picture_again(boats, tmp_path, capsys):
    """Alone, from its own prompt and seed, whatever was beside it in the batch; what is given to no
    effect is named."""
    folder, _ = boats
    note = notes(folder / "out" / "004.png")
    code = run(
        "sample",
        f"--model={note['model']}",
        f"--prompt={note['prompt']}",
        f"--seed={note['seed']}",
        "--batch_size=2",
        *(f"--{key}={note[key]}" for key in ("height", "width", "steps", "guidance")),
        "--image_guidance=2",
        f"--out={tmp_path / 'again.png'}",
    )
    assert code == 0
    assert "warning: --image_guidance is ignored without --image" in capsys.readouterr().err
    a, b = (
        np.asarray(Image.open(f), int) for f in (folder / "out/004.png", tmp_path / "again.png")
    )
    assert np.abs(a - b).max() <= 1


def test_random_steps_are_a_picture_s_own(boats, models, tmp_path):
    """Alone, or beside others in a batch; other ones than the ODE's, and another seed's differ."""

    def drawn(name, *flags):
        given = f"--model={models['base']}", "--prompt=a red boat", *SIZE, "--steps=3"
        assert run("sample", *given, "--batch_size=2", *flags, f"--out={tmp_path / name}") == 0
        return [np.asarray(Image.open(f), int) for f in sorted((tmp_path / name).iterdir())]

    ode = drawn("ode", "--seed=7")[0]
    first, second = drawn("both", "--seed=7", "--num_images=2", "--stochastic=0.8")
    (alone,) = drawn("alone", "--seed=8", "--stochastic=0.8")
    assert np.abs(alone - second).max() <= 1
    for other in (ode, second):
        assert np.abs(first - other).max() > 5
    note = notes(next((tmp_path / "alone").iterdir()))
    assert (note["seed"], note["stochastic"]) == (8, 0.8)


WITHOUT_TORCH = """
import importlib.util, runpy
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
runpy.run_module("launch.sample", run_name="__main__", alter_sys=True)
"""


def test_mobile_edit_in_a_process_of_its_own(models, tmp_path):
    """Four steps, no guidance, a warning where it is asked for and nothing else, where there is no
    PyTorch; the size is the source's, and the result goes back to it."""
    noise = np.random.default_rng(0).integers(0, 255, (75, 40, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(tmp_path / "source.png")
    arguments = [
        f"--model={models['mobile']}",
        "--prompt=a hat",
        "--guidance=2",
        "--negative_prompt=ugly",
        f"--image={tmp_path / 'source.png'}",
        "--resize_back",
        f"--out={tmp_path / 'new' / 'edited.png'}",
        f"--contact_sheet={tmp_path / 'sheet.png'}",
    ]
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # accelerators' drivers talk, too
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("warning: --guidance, .*--negative_prompt are ignored.*\n", done.stderr)
    assert Image.open(tmp_path / "new" / "edited.png").size == (40, 75)
    note = notes(tmp_path / "new" / "edited.png")
    assert (note["height"], note["width"], note["steps"]) == (64, 32, 4)
    assert "guidance" not in note and note["image"] == str(tmp_path / "source.png")
    assert Image.open(tmp_path / "sheet.png").size == (8 + 2 * 264, 8 + 284)


def test_a_long_prompt_is_cut_when_told_to(boats, models, tmp_path, monkeypatch, capsys):
    """The limit is lowered so that the bucket stays that of the other tests."""
    monkeypatch.setitem(prompts.MAX_TOKENS, prompts.GENERATE, 15)
    long = [f"--model={models['base']}", "--prompt=a red boat with a sail", *SIZE, "--batch_size=2"]
    long.append(f"--out={tmp_path / 'a.png'}")
    assert run("sample", *long) == 2
    assert "the limit is 15" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert run("sample", *long, "--truncate") == 0
    assert (tmp_path / "a.png").is_file()


def _broken(models, tmp_path, name):
    """A model directory with one part missing or unusable."""
    folder = tmp_path / name
    folder.mkdir()
    for part in models["base"].iterdir():
        (folder / part.name).symlink_to(part)
    return folder


def _flags(models, tmp_path):
    """Each wrong use: the flags that make it, and what its line must say."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.txt").write_text("\n")
    np.save(tmp_path / "noise.npy", np.zeros((1, 4, 4, 4), np.float32))
    np.savez(tmp_path / "noise.npz", noise=np.zeros((1, 4, 8, 4), np.float32))
    partless, foreign = (_broken(models, tmp_path, name) for name in ("partless", "foreign"))
    (partless / "vae").unlink()
    (partless / "processor").unlink()
    (foreign / "model_index.json").unlink()
    (foreign / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    prompt, model = "--prompt=a", f"--model={models['base']}"
    return {
        "unknown flag": ([model, prompt, "--stps=3"], "'stps'"),
        "no number": ([model, prompt, "--steps=three"], "steps"),
        "stray argument": ([model, "a boat"], "'a boat'"),
        "no model": ([prompt], "--model"),
        "no directory": ([f"--model={tmp_path / 'nowhere'}", prompt], "no such directory"),
        "missing parts": ([f"--model={partless}", prompt], "lacks vae/, processor/"),
        "another pipeline": ([f"--model={foreign}", prompt], "FluxPipeline"),
        "no prompt": ([model], "--prompt or --prompts_file"),
        "no prompts file": ([model, f"--prompts_file={tmp_path / 'x.txt'}"], "x.txt"),
        "empty prompts file": ([model, f"--prompts_file={tmp_path / 'empty.txt'}"], "no prompt"),
        "no image": ([model, prompt, f"--image={tmp_path / 'x.png'}"], "no such file"),
        "bad image": ([model, prompt, f"--image={tmp_path / 'text.png'}"], "readable picture"),
        "odd size": ([model, prompt, "--height=40"], "height 40 .* 32 and 64"),
        "no steps": ([model, prompt, "--steps=0"], "steps is 0"),
        "no guidance": ([model, prompt, "--guidance=nan"], "guidance is nan"),
        "too random": ([model, prompt, "--stochastic=2"], r"stochastic is 2.0, .* \[0, 1\]"),
        "random Heun": (
            [model, prompt, "--stochastic=1", "--method=heun"],
            "stochastic steps are Euler's, method is 'heun'",
        ),
        "no seed": ([model, prompt, "--seed=-1"], r"seed.*\[0, 4294967295\]"),
        "no PNG": ([model, prompt, f"--out={tmp_path / 'boat.JPG'}"], "name it boat.png"),
        "no PNG sheet": ([model, prompt, "--contact_sheet=a.jpg"], "should end in .png"),
        "a folder": ([model, prompt, f"--latents={tmp_path}"], "is a folder"),
        "long prompt": ([model, f"--prompt={'boat ' * 300}", *SIZE], r"9\d\d tokens, .* 200"),
        "noise": ([model, prompt, *SIZE, f"--noise={tmp_path / 'noise.npy'}"], r"\[1, 4, 8, 4\]"),
        "bad noise": ([model, prompt, f"--noise={tmp_path / 'text.png'}"], "readable .npy"),
        "many noises": ([model, prompt, f"--noise={tmp_path / 'noise.npz'}"], "readable .npy"),
        "no folder": ([model, prompt, *SIZE, f"--latents={tmp_path}/text.png/a"], "not a folder"),
    }


def test_wrong_use_is_one_line_and_exit_code_2(models, tmp_path, capsys, monkeypatch):
    """And nobody waits for weights to be read before."""
    monkeypatch.setattr(system, "load", None)
    for name, (flags, expected) in _flags(models, tmp_path).items():
        capsys.readouterr()
        code = run("sample", f"--out={tmp_path / 'out' / 'a.png'}", *flags)
        err = capsys.readouterr().err
        assert code == 2, name
        assert err.count("\n") == 1 and err.startswith("error: "), (name, err)
        assert re.search(expected, err), (name, err)
        assert not (tmp_path / "out").exists(), name


def test_a_seed_is_one_noise():
    """A seed's noise depends on nothing else; neighbouring seeds are independent."""
    config = system.Config(None, system.AutoencoderConfig(), None)
    a, b = (generation.initial_noise(config, seed, 64, 128) for seed in (5, 6))
    assert a.shape == (8, 16, 4) and a.dtype == np.float32
    np.testing.assert_array_equal(a, generation.initial_noise(config, 5, 64, 128))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.2
