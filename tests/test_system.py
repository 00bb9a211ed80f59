"""Model directories as a whole, defaults, and the encoder's output as the U-Net gets it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dreamlite_jax import generation, pretrained, system, tiny
from dreamlite_jax.data import prompts
from dreamlite_jax.data.prompts import DropCounts
from dreamlite_jax.generation import Settings, SettingsError
from dreamlite_jax.pretrained import ModelDirectoryError

CONFIG = tiny.config()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny.tiny_model_dir(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "copy")


def rewritten(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_tiny_directory_is_reproducible_and_seeded(model_dir, tmp_path):
    again = tiny.tiny_model_dir(tmp_path / "again")
    other = tiny.tiny_model_dir(tmp_path / "other", seed=1, mobile=True)
    weights = "unet/diffusion_pytorch_model.safetensors"
    first = (model_dir / weights).read_bytes()
    assert (again / weights).read_bytes() == first != (other / weights).read_bytes()
    assert not system.read_config(again).mobile and system.read_config(other).mobile


def test_drop_counts_are_stored_only_where_they_differ(copy):
    assert system.read_config(copy).image_side == tiny.IMAGE_SIDE != prompts.IMAGE_SIDE
    as_released = CONFIG._replace(image_side=prompts.IMAGE_SIDE)
    system.write_settings(copy, as_released._replace(drop=DropCounts(10, 20)))
    assert system.read_config(copy).drop == DropCounts(10, 20)
    system.write_settings(copy, as_released)
    assert not (copy / "prompts.json").exists()
    assert system.read_config(copy).drop == DropCounts(34, 64)


def test_a_mobile_model_may_have_steps_of_its_own(copy):
    base = system.read_config(copy)
    assert base.mobile_steps == 4
    system.write_settings(copy, base._replace(mobile=True, mobile_steps=8))
    student = system.read_config(copy)
    assert student == base._replace(mobile=True, mobile_steps=8)
    assert generation.resolve(Settings(), student).steps == 8
    assert generation.resolve(Settings(steps=2), student).steps == 2
    (copy / "prompts.json").write_text(json.dumps({"drop": base.drop._asdict()}))  # as once written
    assert system.read_config(copy).mobile_steps == 4


def test_a_directory_with_an_index_is_complete(copy, monkeypatch):
    """What is written over a model and fails half-way is none; other files stay."""
    model, write = system.load(copy), pretrained.write
    (copy / "notes.txt").write_text("mine")

    def full(folder, component, *rest):
        if component is pretrained.AUTOENCODER:
            raise OSError(28, "No space left on device")
        write(folder, component, *rest)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(pretrained, "write", full)
        system.save(model, copy)
    with pytest.raises(ModelDirectoryError, match=r"lacks model_index\.json"):
        system.read_config(copy)
    system.save(model, copy)
    assert system.read_config(copy) == model.config
    assert (copy / "notes.txt").read_text() == "mine"


def test_wrong_drop_counts_are_refused(copy):
    system.write_settings(copy, CONFIG._replace(drop=DropCounts(33, 64)))
    with pytest.raises(ModelDirectoryError, match=r'"generate": 34, "edit": 64'):
        system.load_prompter(copy, CONFIG.text_encoder)
    (copy / "prompts.json").write_text('{"drop": 34}')
    with pytest.raises(ModelDirectoryError, match=r"prompts\.json: expected"):
        system.read_config(copy)


def test_a_tokenizer_that_does_not_fit_the_encoder_is_refused(copy):
    rewritten(copy / "text_encoder" / "config.json", image_token_id=300)
    rewritten(copy / "processor" / "preprocessor_config.json", patch_size=14)
    with pytest.raises(ModelDirectoryError) as refused:
        system.load_prompter(copy, system.read_config(copy).text_encoder)
    for part in ("<|image_pad|> is token 259, but 300", "patch_size is 14, but 16"):
        assert part in str(refused.value)


@pytest.mark.parametrize("folder", ["tokenizer", "processor"])
def test_damaged_host_parts_are_one_line(copy, folder):
    for file in (copy / folder).iterdir():
        file.write_text("{")
    with pytest.raises(ModelDirectoryError, match=folder) as refused:
        system.load_prompter(copy, CONFIG.text_encoder)
    assert "\n" not in str(refused.value)


def test_an_unsupported_schedule_names_its_file(copy):
    rewritten(copy / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    with pytest.raises(ModelDirectoryError, match=r"scheduler_config.json: .*use_karras_sigmas"):
        system.read_config(copy)


def test_defaults_are_those_of_diffusers():
    got = generation.resolve(Settings(), CONFIG)
    assert (got.height, got.width, got.steps) == (64, 64, 30)
    assert (got.guidance, got.image_guidance) == (3.5, 1.5)
    assert generation.resolve(Settings(), CONFIG._replace(mobile=True)).steps == 4
    released = CONFIG._replace(unet=system.UNetConfig(sample_size=128))
    assert generation.resolve(Settings(), released)[:2] == (1024, 1024)


def test_an_edit_takes_the_sources_size():
    source = Image.new("RGB", (100, 20))
    assert generation.resolve(Settings(), CONFIG, source)[:2] == (32, 96)
    assert generation.resolve(Settings(height=64), CONFIG, source)[:2] == (64, 64)


def test_all_wrong_settings_in_one_line():
    with pytest.raises(SettingsError) as refused:
        generation.resolve(Settings(40, 0, 0, method="rk4"), CONFIG)
    for part in ("height 40", "width 0", "steps is 0", "'rk4'"):
        assert part in str(refused.value)


def test_what_the_unet_gets_of_a_text():
    """The prefix is gone; zeros, or a learned embedding, stand at padding."""
    params = tiny.random_params(pretrained.TEXT_ENCODER, CONFIG.text_encoder)
    prompter = prompts.Prompter(tiny.tokenizer(), None, CONFIG.text_encoder.input_numbers)
    inputs = prompts.prompt_inputs(prompter, prompts.GENERATE, ["", "a boat"])
    plain = system.encode_texts(CONFIG, params, inputs, 34)
    assert plain.context.shape == (2, 30, 64) and plain.mask.shape == (2, 30)
    np.testing.assert_array_equal(plain.mask.sum(1), inputs["attention_mask"].sum(1) - 34)
    padding = ~np.asarray(plain.mask)
    assert (np.asarray(plain.context)[padding] == 0).all()
    learned = np.arange(64, dtype=np.float32)
    filled = system.encode_texts(CONFIG, params, inputs, 34, learned)
    np.testing.assert_array_equal(
        filled.context, np.where(padding[..., None], learned, plain.context)
    )
