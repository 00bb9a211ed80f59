"""`launch.precompute`: what it stores is what training would compute, and is refused elsewhere."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from safetensors.numpy import load_file, save_file

from dreamlite_jax import precompute, system
from dreamlite_jax.data import pipeline, precomputed, prompts, streams, transforms
from dreamlite_jax.data.mixture import EDIT, T2I, MixtureError
from dreamlite_jax.data.pipeline import Recipe
from dreamlite_jax.data.records import PreparedSet
from dreamlite_jax.models.unet_config import NANO
from dreamlite_jax.objectives import flow_matching
from dreamlite_jax.pretrained import UNET
from dreamlite_jax.tiny import random_params, tiny_model_dir
from dreamlite_jax.train import stages

pytestmark = pytest.mark.e2e

SIZE = 64


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return tiny_model_dir(folder, image_side=96)  # not the pictures' own


@pytest.fixture(scope="module", params=[T2I, EDIT])
def prepared(request, tmp_path_factory, model_dir):
    """A prepared set of photographs with its precomputed outputs."""
    folder = tmp_path_factory.mktemp(request.param)
    samples = foreign.pairs() if request.param == T2I else foreign.triplets()
    foreign.write_folder(folder / "photos", samples)
    assert (
        commands.run("prepare_data", f"--source={folder / 'photos'}", f"--out={folder / 'set'}")
        == 0
    )
    assert encode(folder / "set", model_dir) == 0
    return folder / "set"


def encode(prepared, model_dir, *more):
    given = (f"--data={prepared}", f"--model={model_dir}", f"--image_size={SIZE}", "--batch_size=2")
    return commands.run("precompute", *given, "--max_ratio=2", "--least=2", *more)


def recipe(prepared, model_dir, with_outputs):
    config = system.read_config(model_dir)
    made_with = precompute.made_with(model_dir, config, image_size=SIZE, max_ratio=2.0)
    entry = {"source": str(prepared), "precomputed": with_outputs}
    found = streams.open_streams([entry], SIZE, made_with)
    made = Recipe(found, batch_size=4, image_size=SIZE, max_ratio=2.0, random_crop=False)
    if not with_outputs:
        made = made._replace(prompter=system.load_prompter(model_dir, config.text_encoder))
    return config, made


def test_both_ways_give_the_same_loss(prepared, model_dir):
    """Half precision rounds to 2^-11; through two norms and the U-Net the loss moves no further
    than a few of these."""
    params = system.load(model_dir).params | {"unet": random_params(UNET, NANO)}
    found = {}
    for with_outputs in (True, False):
        config, made = recipe(prepared, model_dir, with_outputs)
        plan = pipeline.check(made)
        config = config._replace(unet=NANO)
        loss_fn = stages.diffusion_loss(config, made.context_length, flow_matching.Settings())
        rows = jnp.arange(4)
        losses = []
        for step in range(3):
            batch = pipeline.batch(made, plan, range(4), step)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(step), rows)
            losses.append(float(jax.jit(loss_fn)(params, {}, batch, keys)[0]))
        found[with_outputs] = losses, batch
    np.testing.assert_allclose(found[True][0], found[False][0], rtol=2e-3)
    stored, made = found[True][1], found[False][1]
    for key in ("task", "index", "time_ids", "original_size", "has_source", "changed"):
        np.testing.assert_array_equal(stored[key], made[key])
    np.testing.assert_allclose(stored["crop"], made["crop"], rtol=1e-6)
    assert "target" not in stored and "input_ids" not in stored
    assert stored.keys() <= pipeline.Batch.__annotations__.keys()


def test_null_texts_for_guidance_are_stored_too(prepared, model_dir):
    """They are what a batch holds whose texts are all dropped."""
    _, given = recipe(prepared, model_dir, True)
    plan, rows = pipeline.check(given), range(2)
    both = pipeline.batch(given._replace(with_null=True), plan, rows, 0)
    dropped = given._replace(dropout=transforms.EVERY_TEXT)
    wanted = pipeline.batch(dropped, plan, rows, 0)
    for name in ("context", "context_mask"):
        np.testing.assert_array_equal(both[f"null_{name}"], wanted[name])
    assert both["context"].shape == wanted["context"].shape
    assert not np.array_equal(both["context"], wanted["context"])


def test_a_finished_set_stays(prepared, model_dir, capsys):
    assert encode(prepared, model_dir) == 0
    assert "already complete" in capsys.readouterr().out


def test_other_encoders_are_refused(prepared, model_dir, tmp_path):
    other = tiny_model_dir(tmp_path / "other", seed=1)
    with pytest.raises(
        MixtureError, match=r"does not fit: vae was .*; remove it and run launch.precompute again"
    ):
        recipe(prepared, other, True)


def test_unfinished_and_damaged_outputs_are_refused(prepared, model_dir, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(prepared, copy)
    folder = precomputed.folder_of(copy, SIZE)
    shard = next(folder.glob("*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MixtureError, match="incomplete"):
        recipe(copy, model_dir, True)
    (folder / precomputed.INDEX).unlink()
    with pytest.raises(MixtureError, match="is not finished"):
        recipe(copy, model_dir, True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A prepared set of pairs in three shards, and a copy for every test that writes into it."""
    folder = tmp_path_factory.mktemp("parts")
    foreign.write_folder(folder / "photos", foreign.pairs())
    given = f"--source={folder / 'photos'}", f"--out={folder / 'set'}", "--shard_size=2"
    assert commands.run("prepare_data", *given, "--workers=1") == 0
    copies = itertools.count()
    return lambda: Path(shutil.copytree(folder / "set", folder / f"copy-{next(copies)}"))


def test_an_interrupted_run_goes_on(parts, model_dir, monkeypatch, capsys):
    whole, stopped = parts(), parts()
    assert encode(whole, model_dir) == 0
    encoded, calls = precompute.encoded, itertools.count()

    def interrupted(*arguments):
        if next(calls):
            raise KeyboardInterrupt
        return encoded(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(precompute, "encoded", interrupted)
        capsys.readouterr()
        assert encode(stopped, model_dir) == 130
    assert capsys.readouterr().err == (
        "1 of 3 shards are finished; the same command goes on from there\ninterrupted\n"
    )
    assert encode(stopped, model_dir, "--least=3") == 2
    assert "was begun otherwise: least was 2, is 3" in capsys.readouterr().err
    assert encode(stopped, model_dir) == 0
    assert "1 of 3 shards are there, going on" in capsys.readouterr().out
    found = [
        {f.name: f.read_bytes() for f in precomputed.folder_of(one, SIZE).iterdir()}
        for one in (whole, stopped)
    ]
    assert found[0] == found[1]


def test_processes_of_several_devices_share_the_work(parts, model_dir):
    """Batches of other sizes sum in another order, by which half precision may round elsewhere."""
    alone, together = parts(), parts()
    assert encode(alone, model_dir) == 0
    given = (f"--data={together}", f"--model={model_dir}", f"--image_size={SIZE}", "--batch_size=2")
    joined = f"--coordinator=localhost:{training.free_port()}", "--processes=2"
    flags = *given, "--max_ratio=2", "--least=2", *joined
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.precompute", *flags, f"--process={k}"],
            cwd=training.ROOT,
            env=training.environment(devices=2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    folders = [precomputed.folder_of(one, SIZE) for one in (alone, together)]
    told = [out.count(f"{folders[1]}: 5 records") for out, _ in said]
    assert told == [1, 0]  # by one of them
    config = system.read_config(model_dir)
    made_with = precompute.made_with(model_dir, config, image_size=SIZE, max_ratio=2.0)
    prints = (PreparedSet(one).fingerprint for one in (alone, together))
    sources = [
        precomputed.PrecomputedSource(folder, T2I, prepared, made_with)
        for folder, prepared in zip(folders, prints, strict=True)
    ]
    for k, size in enumerate(sources[0].sizes):
        found = [jax.tree.leaves(source.read(k, size[::-1])) for source in sources]
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


def test_wrong_use_is_one_line_and_exit_code_2(parts, model_dir, tmp_path, capsys):
    """Later flags win over `encode`'s own."""
    prepared = parts()
    assert encode(prepared, model_dir) == 0
    other = tiny_model_dir(tmp_path / "other", seed=1)
    loud = tiny_model_dir(tmp_path / "loud")
    file = loud / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, values in tensors.items():
        if name.startswith("encoder"):
            tensors[name] = values * 1e3
    save_file(tensors, file, metadata={"format": "pt"})
    damaged, index = parts(), precomputed.folder_of(prepared, SIZE) / precomputed.INDEX
    shard = damaged / "part-00001.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-1])
    broken = precomputed.folder_of(damaged.parent / "broken", SIZE) / precomputed.INDEX
    shutil.copytree(prepared, damaged.parent / "broken")
    broken.write_text("{")
    for given, said in (
        (["--data=/nowhere"], "/nowhere: no such folder"),
        ([f"--data={tmp_path}"], "no prepared set, index.json is missing"),
        ([f"--data={damaged}"], "incomplete: part-00001.arrayrecord"),
        (["--model=/nowhere"], "/nowhere: no such directory"),
        ([f"--model={prepared}"], "expected a diffusers model directory"),
        ([f"--model={other}"], "does not fit: vae was .*; remove it and run launch.precompute"),
        ([f"--data={broken.parent.parent}"], "index.json: not readable .*; remove it and run"),
        ([f"--data={parts()}", f"--model={loud}"], "half precision only 65504; train without"),
        (["--image_size=60"], "60 is not a positive multiple of 32"),
        (["--max_ratio=0.5"], "0.5, should be at least 1"),
        (["--batch_size=0"], "not a positive integer"),
        (["--processes=2"], "--coordinator, --processes and --process go together"),
    ):
        capsys.readouterr()
        assert encode(prepared, model_dir, *given) == 2, given
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(said, err), (given, err)
    shutil.rmtree(index.parent)  # as the line says
    assert encode(prepared, model_dir, f"--model={other}") == 0


def test_samples_survive_the_file():
    rng = np.random.default_rng(0)

    def half(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    changed = rng.random((8, 9)) > 0.5
    crop = transforms.Crop(0.0, 0.25, 1.0, 0.75)
    sample = precomputed.Latents(
        half(8, 9, 4),
        half(8, 9, 4),
        changed,
        [half(5, 7), half(0, 7)],
        half(2, 7),
        (640, 480),
        crop,
    )
    found = precomputed.unpack(precomputed.pack(sample))
    for one, other in zip(jax.tree.leaves(sample), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)
    assert precomputed.unpack(precomputed.pack(sample._replace(source=None))).source is None
    assert prompts.NULL == ""
