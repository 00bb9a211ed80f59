"""Training that only generates does without the pane that an edit's source stands in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import distill_dmd2, phase3_joint, rl_grpo, rl_nft
from dreamlite_jax import generation, system, tiny
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.unet_config import NANO
from dreamlite_jax.pretrained import UNET
from dreamlite_jax.train import checkpoint, origins, stages
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train.checks import ConfigError


@pytest.fixture(scope="module")
def model(cache):
    found = system.load(cache / "model")
    smaller = {"unet": tiny.random_params(UNET, NANO)}
    return found._replace(config=found.config._replace(unet=NANO), params=found.params | smaller)


def batch_of(config, b=2, side=32):
    rng = np.random.default_rng(0)
    return {
        "target": rng.uniform(-1, 1, (b, side, side, 3)).astype(np.float32),
        "has_source": np.zeros(b, bool),
        "time_ids": np.full((b, 2), side, np.float32),
        "context": rng.standard_normal((b, 6, config.unet.context_dim)).astype(np.float32),
        "context_mask": np.ones((b, 6), bool),
    }


def test_the_network_sees_the_target_alone(model):
    config = model.config._replace(pane=False)
    x0, at = stages.conditioned(config, model.params, batch_of(config), 6)
    b, h, _, c = x0.shape
    assert at.source.shape == (b, h, 0, c)
    inputs = x0, np.full(b, 500.0, np.float32), *at.texts, at.time_ids
    wanted = jax.jit(UNet(config.unet).apply)({"params": model.params["unet"]}, *inputs)
    got = jax.jit(system.velocity, static_argnums=0)(config, model.params["unet"], x0, 0.5, at)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    with_pane = stages.conditioned(model.config, model.params, batch_of(config), 6)[1]
    assert with_pane.source.shape == x0.shape and not with_pane.source.any()


def test_pictures_of_encoded_texts_take_no_text_encoder(model):
    batch = batch_of(model.config)
    drawing = stages.drawing(model.params, batch)
    assert model.params.keys() - drawing.keys() == {"text_encoder"}
    x0, _ = stages.conditioned(model.config, drawing, batch, 6)  # which is all that it needs
    assert x0.shape[0] == 2
    tokens = {"input_ids": np.zeros((2, 6), int)}
    assert stages.drawing(model.params, tokens).keys() == model.params.keys()


def test_pictures_are_made_without_it_too(model):
    config = model.config._replace(pane=False)
    settings = generation.resolve(generation.Settings(height=32, width=32, steps=1), config)
    noise = generation.initial_noise(config, 0, 32, 32)[None]
    ((latents, picture),) = generation.generate(
        model._replace(config=config), ["a red square"], noise, settings
    )
    assert picture.shape == (32, 32, 3)
    ((other, _),) = generation.generate(model, ["a red square"], noise, settings)
    assert latents.shape == other.shape and not np.allclose(latents, other, atol=1e-3)


def test_it_cannot_edit(model):
    config = model.config._replace(pane=False)
    settings = generation.resolve(generation.Settings(height=32, width=32, steps=1), config)
    noise = np.zeros((1, *generation.initial_noise(config, 0, 32, 32).shape), np.float32)
    made = generation.generate(model._replace(config=config), ["no"], noise, settings, [None])
    with pytest.raises(generation.SettingsError, match="without the source's pane"):
        next(made)


def test_a_run_that_did_not_train_the_unet_knows_what_the_one_before_knew(tmp_path):
    before, own = tmp_path / "before", {"trained": ["text_encoder"], "trained_by": {}, "pane": True}
    assert origins.learned_pane(own)
    with checkpoint.open_manager(before) as manager:
        meta = {"trained": ["unet"], "trained_by": {}, "pane": False}
        checkpoint.save(manager, 1, {"x": jnp.ones(1)}, meta)
    assert not origins.learned_pane(meta)
    assert not origins.learned_pane({**own, "trained_by": {"unet": str(before)}})


@pytest.mark.parametrize(
    "module, message",
    [
        (phase3_joint, "pane is False, but there are edits, whose source stands in it"),
        (rl_grpo, "pane is False, but the stage grpo makes a model that has it"),
        (rl_nft, "pane is False, but the stage nft makes a model that has it"),
        (distill_dmd2, "pane is False, but the stage dmd2 makes a model that has it"),
    ],
)
def test_where_it_is_missed(module, message, cache, tmp_path):
    config = module.get_config("quick")
    config.model, config.pane = str(cache / "model"), False
    with pytest.raises(ConfigError) as error:
        train_config.opened(config, tmp_path)
    assert message in str(error.value)
