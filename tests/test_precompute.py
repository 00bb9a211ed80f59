"""`launch.precompute`: what it stores is what training would compute, and is refused elsewhere."""

import json

import commands
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax import precompute, system
from dreamlite_jax.data import pipeline, precomputed, prompts, streams, transforms
from dreamlite_jax.data.mixture import EDIT, T2I, MixtureError
from dreamlite_jax.data.pipeline import Recipe
from dreamlite_jax.objectives import flow_matching
from dreamlite_jax.tiny import tiny_model_dir
from dreamlite_jax.train import stages

pytestmark = pytest.mark.e2e

SIZE = 64


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


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
    params = system.load(model_dir).params
    found = {}
    for with_outputs in (True, False):
        config, made = recipe(prepared, model_dir, with_outputs)
        plan = pipeline.check(made)
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


def test_a_finished_set_stays(prepared, model_dir, capsys):
    assert encode(prepared, model_dir) == 0
    assert "already complete" in capsys.readouterr().out


def test_other_encoders_are_refused(prepared, model_dir, tmp_path):
    other = tiny_model_dir(tmp_path / "other", seed=1)
    with pytest.raises(
        MixtureError, match=r"does not fit: vae was .*; run launch.precompute again"
    ):
        recipe(prepared, other, True)


def test_unfinished_and_damaged_outputs_are_refused(prepared, model_dir, tmp_path):
    import shutil

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


def test_an_interrupted_run_goes_on(prepared, model_dir, tmp_path, capsys):
    import shutil

    copy = tmp_path / "set"
    shutil.copytree(prepared, copy)
    folder = precomputed.folder_of(copy, SIZE)
    index = json.loads((folder / precomputed.INDEX).read_text())
    (folder / precomputed.INDEX).unlink()
    for note in sorted(folder.glob("part-*.json"))[1:]:
        note.unlink()
    assert encode(copy, model_dir) == 0
    assert json.loads((folder / precomputed.INDEX).read_text()) == index
    (folder / precomputed.INDEX).unlink()
    assert encode(copy, model_dir, "--least=3") == 2
    assert "was begun otherwise: least was 2, is 3" in capsys.readouterr().err


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
