"""The autoencoder's objective: its loss in 64 bits, and a picture learnt by heart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax import pretrained, system
from dreamlite_jax.data import pictures, shapes
from dreamlite_jax.models import autoencoder, unet_config
from dreamlite_jax.models.qwen3_vl import config as qwen3_vl
from dreamlite_jax.objectives import autoencoding
from dreamlite_jax.objectives.autoencoding import Settings
from dreamlite_jax.train import optim, stages
from dreamlite_jax.train.state import new_state
from dreamlite_jax.train.update import make_update

RNG = np.random.default_rng(0)
B, H, W = 3, 4, 8
PICTURES = RNG.uniform(-1, 1, (B, H, W, 3)).astype(np.float32)
DOWN = RNG.standard_normal((3, 2), np.float32)
UP = RNG.standard_normal((2, 3), np.float32)
KEYS = jax.random.split(jax.random.key(0), B)


def encode(pictures):
    """Means of 2 x 2 pixels, then two channels."""
    return pictures.reshape(-1, H // 2, 2, W // 2, 2, 3).mean((2, 4)) @ DOWN + 0.25


def decode(latents):
    return jnp.repeat(jnp.repeat(latents @ UP, 2, 1), 2, 2)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_loss_is_that_of_the_formula(noise):
    settings = Settings(moments=0.01, noise=noise)
    found = jax.jit(lambda x, k: autoencoding.losses(encode, decode, x, k, settings))(
        PICTURES, KEYS
    )
    drawn = np.array([jax.random.normal(key, (H // 2, W // 2, 2)) for key in KEYS], np.float64)
    pictures, down, up = (np.asarray(x, np.float64) for x in (PICTURES, DOWN, UP))
    latents = pictures.reshape(B, H // 2, 2, W // 2, 2, 3).mean((2, 4)) @ down + 0.25
    made = ((latents + noise * drawn) @ up).repeat(2, 1).repeat(2, 2)
    error = made - pictures
    absolute, square = np.abs(error).mean((1, 2, 3)), (error**2).mean((1, 2, 3))
    np.testing.assert_allclose(found.absolute, absolute, rtol=1e-5)
    np.testing.assert_allclose(found.square, square, rtol=1e-5)
    # N(m, v) from N(0, 1), channel by channel: (m^2 + v - 1 - log v) / 2
    flat = latents.reshape(-1, 2)
    m, v = flat.mean(0), flat.var(0)
    penalty = ((m**2 + v - 1 - np.log(v)) / 2).sum()
    assert float(found.moments) == pytest.approx(penalty, rel=1e-4)
    total = autoencoding.total(found, settings)
    assert float(total) == pytest.approx((absolute + square).mean() + 0.01 * penalty, rel=1e-5)


def test_the_penalty_is_least_at_mean_0_and_variance_1():
    normal = RNG.standard_normal((64, 8, 8, 2)).astype(np.float32)
    normal = (normal - normal.mean((0, 1, 2))) / normal.std((0, 1, 2))

    def penalty(latents):
        keys = jax.random.split(KEYS[0], 64)
        blank = jnp.zeros((64, 1, 1, 3))
        return autoencoding.losses(
            lambda _: jnp.asarray(latents), lambda z: blank, blank, keys, Settings()
        ).moments

    assert float(penalty(normal)) == pytest.approx(0, abs=1e-5)
    # By hand: a mean of 0.5 in both channels 2 * 0.25 / 2; a variance of 4: 2 * (3 - log 4) / 2.
    assert float(penalty(normal + 0.5)) == pytest.approx(0.25, abs=1e-4)
    assert float(penalty(2 * normal)) == pytest.approx(3 - np.log(4), abs=1e-4)
    assert np.isfinite(penalty(np.zeros_like(normal)))  # a dead channel is dear, not infinite


def test_psnr():
    """0 dB where all is wrong by the whole range, 20 dB more for a tenth of it, and an end."""
    np.testing.assert_allclose(
        autoencoding.psnr(jnp.array([4, 0.04, 4e-4])), [0, 20, 40], atol=1e-4
    )
    assert np.isfinite(autoencoding.psnr(jnp.zeros(())))


def test_what_is_wrong_with_settings():
    assert Settings().problems() == Settings(0.0, 0.0).problems() == []
    found = Settings(moments=-1.0, noise=float("nan")).problems()
    assert found == ["moments is -1.0, should be 0 or more", "noise is nan, should be 0 or more"]


@pytest.mark.optimised
def test_one_picture_is_learnt_by_heart():
    """A shape by the smallest TAESD in 800 steps, to 36 dB here. Fewer end on the steep part of the
    curve, where the rounding of another processor is worth 8 dB."""
    config = system.Config(unet_config.NANO, autoencoder.TINY, qwen3_vl.TINY)
    scene = shapes.sample_t2i(shapes.DEMO, "all", 0, 7).scene
    target = pictures.to_floats(shapes.render(scene, 32, 32))[None]
    params = {"vae": pretrained.init_params(pretrained.AUTOENCODER, config.vae, 0)}
    settings = optim.Settings(lr=1.5e-3, schedule="cosine", warmup=10)
    tx = optim.make_tx(settings, 800)
    loss_fn = stages.autoencoder_loss(config, Settings(moments=1e-2, noise=0.05))
    update = jax.jit(make_update(loss_fn, tx, 0.9, clip=1.0))
    state, found = new_state(jax.tree.map(jnp.asarray, params), tx), []
    for step in range(800):
        key = jax.random.fold_in(KEYS[0], step)
        state, metrics = update(state, {}, {"target": target}, key)
        found.append(metrics)
    assert found[0]["psnr"] < 12 and found[-1]["psnr"] > 28
    assert found[-1]["moments"] < 0.5 < 10 < found[0]["moments"]
    assert found[-1]["absolute"] < 0.1 * found[0]["absolute"]
    assert found[-1]["loss"] < 0.1 * found[0]["loss"]

    # Without noise, through the networks as sampling calls them.
    latents = system.encode_pictures(config, state.ema["vae"], target)
    made = system.decode_latents(config, state.ema["vae"], latents)
    assert latents.shape == (1, 4, 4, 4)
    quality = -10 * np.log10(np.square(np.asarray(made) - target).mean() / 4)
    assert quality > 28
