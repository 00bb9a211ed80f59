"""TAESD against diffusers' AutoencoderTiny."""

import dataclasses

import jax
import numpy as np
import pytest

from dreamlite_jax import pretrained
from dreamlite_jax.models.autoencoder import TAESDXL, TINY, Autoencoder, AutoencoderConfig
from dreamlite_jax.tiny import random_params

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from reference import largest_error, reference_model  # noqa: E402

pytestmark = pytest.mark.parity

VARIANTS = {
    "released": TAESDXL,
    "tiny": TINY,
    "two_levels": AutoencoderConfig(
        encoder_block_out_channels=(32, 32),
        decoder_block_out_channels=(24, 24),
        num_encoder_blocks=(0, 2),
        num_decoder_blocks=(2, 1),
        latent_channels=6,
    ),
    "one_level": dataclasses.replace(
        TINY,
        encoder_block_out_channels=(16,),
        decoder_block_out_channels=(16,),
        num_encoder_blocks=(2,),
        num_decoder_blocks=(1,),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_encoder_and_decoder(name, tmp_path):
    config = VARIANTS[name]
    model = reference_model(config)
    model.save_pretrained(tmp_path / "vae")
    read_config, params = pretrained.read(tmp_path, pretrained.AUTOENCODER)
    assert read_config == config
    module = Autoencoder(config)
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    side = config.factor
    latents = 4 * rng.standard_normal(
        (2, 24 // side, 32 // side, config.latent_channels), np.float32
    )

    for method, network, x in (
        ("encode", model.encoder, pictures),
        ("decode", model.decoder, latents),
    ):
        ours = jax.jit(lambda p, x, m=method: module.apply({"params": p}, x, method=m))(params, x)
        with torch.no_grad():
            theirs, exact = (
                network.to(dtype)(torch.tensor(x, dtype=dtype).permute(0, 3, 1, 2))
                .permute(0, 2, 3, 1)
                .numpy()
                for dtype in (torch.float32, torch.float64)
            )
        assert largest_error(ours, theirs) < 1e-4
        assert largest_error(ours, exact) < 3 * largest_error(theirs, exact)


def test_what_we_write_opens_in_diffusers(tmp_path):
    from diffusers import AutoencoderTiny

    params = random_params(pretrained.AUTOENCODER, TINY, 0)
    pretrained.write(tmp_path, pretrained.AUTOENCODER, TINY, params)
    model = AutoencoderTiny.from_pretrained(tmp_path, subfolder="vae").eval()
    pictures = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model.decode(model.encode(torch.tensor(pictures).permute(0, 3, 1, 2)).latents)
    ours = Autoencoder(TINY).apply({"params": params}, pictures)
    assert largest_error(ours, theirs.sample.permute(0, 2, 3, 1)) < 1e-5


def test_settings():
    assert TAESDXL.factor == 8
    with pytest.raises(ValueError, match="all be the same"):
        dataclasses.replace(TINY, encoder_block_out_channels=(16, 16, 16, 32))
    with pytest.raises(ValueError, match=r"act_fn=.gelu. is not supported.*unknown setting foo=1"):
        AutoencoderConfig.from_dict({"act_fn": "gelu", "foo": 1})
    params = random_params(pretrained.AUTOENCODER, TINY, 0)
    with pytest.raises(ValueError, match="H and W divisible by 8"):
        Autoencoder(TINY).apply({"params": params}, np.zeros((1, 20, 16, 3), np.float32))
