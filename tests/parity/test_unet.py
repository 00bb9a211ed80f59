"""The U-Net against diffusers: outputs, gradients, and the half-precision form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamlite_jax import pretrained
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.unet_config import DREAMLITE, TINY, UNetConfig

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from reference import largest_error, reference_model, run_unet, unet_inputs  # noqa: E402

pytestmark = pytest.mark.parity

SMALL = dataclasses.replace(
    TINY,
    block_out_channels=(16, 32, 48),
    layers_per_block=1,
    transformer_layers_per_block=1,
    cross_attention_dim=40,
    encoder_hid_dim=24,
)
NO_ATTENTION = ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D")
VARIANTS = {
    "all_kinds_of_depth": dataclasses.replace(
        SMALL, layers_per_block=(1, 2, 1), transformer_layers_per_block=(1, 2, 3), num_mid_layers=2
    ),
    "plain_convolutions": dataclasses.replace(SMALL, use_sep_conv=False),
    "convolutional_projection": dataclasses.replace(SMALL, use_linear_projection=False),
    "no_self_attention": dataclasses.replace(
        SMALL,
        down_block_types=(NO_ATTENTION[0],) * 3,
        up_block_types=(NO_ATTENTION[1],) * 3,
    ),
    "self_attention_everywhere": dataclasses.replace(
        SMALL,
        down_block_types=("DreamLiteCrossAttnDownBlock2D",) * 3,
        up_block_types=("DreamLiteCrossAttnUpBlock2D",) * 3,
    ),
    "grouped_query": dataclasses.replace(SMALL, num_kv_heads=2),
    "multi_head": dataclasses.replace(SMALL, num_kv_heads=None),
    "no_qk_norm": dataclasses.replace(SMALL, qk_norm=None),
    "no_time_ids": dataclasses.replace(
        SMALL,
        addition_embed_type=None,
        addition_time_embed_dim=None,
        projection_class_embeddings_input_dim=None,
    ),
    "text_proj": dataclasses.replace(SMALL, encoder_hid_dim_type="text_proj"),
    "no_text_proj": dataclasses.replace(SMALL, encoder_hid_dim=None, encoder_hid_dim_type=None),
    "two_levels_old_names": dataclasses.replace(
        SMALL,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownRemoveSelfAttnBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "three_levels_old_names": dataclasses.replace(
        SMALL,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DreamLiteDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=(
            "CrossAttnUpBlock2D",
            "CrossAttnUpRemoveSelfAttnBlock2DV1",
            "CrossAttnUpRemoveSelfAttnBlock2D",
        ),
        ff_mult=6,
        freq_shift=1,
        flip_sin_to_cos=False,
    ),
}


def load(model, config, tmp_path):
    """Our parameters from the directory that diffusers writes; each is its tensor, bit for bit."""
    model.save_pretrained(tmp_path / "unet")
    read_config, params = pretrained.read(tmp_path, pretrained.UNET)
    assert read_config == config
    theirs, ours = model.state_dict(), flatten_dict(params)
    for row in pretrained.tensor_table(params):
        tensor = row.to_file(ours[row.path])
        np.testing.assert_array_equal(tensor, theirs.pop(row.name), err_msg=row.name)
    assert not theirs
    return params


@functools.cache
def compiled(config, **kw):
    module = UNet(config, **kw)
    return jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))


def apply(config, params, inputs, **kw):
    return compiled(config, **kw)(params, inputs)


def check_outputs(config, tmp_path, size):
    model = reference_model(config)
    params = load(model, config, tmp_path)
    inputs = unet_inputs(config, *size)
    ours = apply(config, params, inputs)
    with torch.no_grad():
        theirs = run_unet(model, inputs).numpy()
        exact = run_unet(model, inputs, torch.float64).numpy()
    assert ours.dtype == jnp.float32
    assert largest_error(ours, theirs) < 1e-4
    assert largest_error(ours, exact) < 3 * largest_error(theirs, exact)


def test_released_network(tmp_path):
    table = pretrained.tensor_table(pretrained.param_shapes(pretrained.UNET, DREAMLITE))
    assert sum(np.prod(row.shape) for row in table) == 389_968_388
    assert len(table) == len({row.name for row in table}) == 1075
    check_outputs(DREAMLITE, tmp_path, size=(2, 8, 16, 6))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    check_outputs(VARIANTS[name], tmp_path, size=(3, 12, 8, 7))


def test_without_mask(tmp_path):
    model = reference_model(SMALL)
    params = load(model, SMALL, tmp_path)
    inputs = unet_inputs(SMALL, 2, 8, 16, 5)
    masked = apply(SMALL, params, inputs)
    unmasked = apply(SMALL, params, {**inputs, "mask": np.ones_like(inputs["mask"])})
    without = apply(SMALL, params, {k: v for k, v in inputs.items() if k != "mask"})
    np.testing.assert_allclose(without, unmasked, atol=1e-5)
    assert largest_error(without[1], masked[1]) > 1e-3  # the second prompt has padding
    hidden = {**inputs, "context": inputs["context"] + 9 * (1 - inputs["mask"])[..., None]}
    np.testing.assert_array_equal(apply(SMALL, params, hidden), masked)


def test_gradients(tmp_path):
    """Of a random projection of the output, by every parameter and by both inputs that carry
    gradients in training: the latents, and the text features of an encoder that learns."""
    config = dataclasses.replace(SMALL, transformer_layers_per_block=(1, 1, 2))
    model = reference_model(config)
    params = load(model, config, tmp_path)
    inputs = unet_inputs(config, 2, 8, 8, 5)
    weights = np.random.default_rng(2).standard_normal((2, 8, 8, 4)).astype(np.float32)

    def loss(params, changed):
        output = UNet(config).apply({"params": params}, **{**inputs, **changed})
        return jnp.sum(output * weights)

    learnt = {name: inputs[name] for name in ("latents", "context")}
    by_params, by_inputs = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, learnt)

    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in learnt.items()}
    (run_unet(model, {**inputs, **tensors}) * torch.tensor(weights)).sum().backward()
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    ours = flatten_dict(by_params)
    for row in pretrained.tensor_table(params):
        ours_here, theirs_here = row.to_file(ours[row.path]), theirs.pop(row.name)
        error = np.linalg.norm(ours_here - theirs_here) / np.linalg.norm(theirs_here)
        assert error < 1e-3, (row.name, error)
    assert not theirs
    for name, tensor in tensors.items():
        error = np.linalg.norm(by_inputs[name] - tensor.grad.numpy()) / tensor.grad.norm()
        assert error < 1e-3, (name, error)


def test_bfloat16_is_as_near_as_pytorch(tmp_path):
    """The compute dtype alone changes: float32 parameters in, float32 out, PyTorch's own loss."""
    model = reference_model(SMALL)
    params = load(model, SMALL, tmp_path)
    inputs = unet_inputs(SMALL, 2, 8, 16, 5)
    ours = apply(SMALL, params, inputs, dtype=jnp.bfloat16)
    with torch.no_grad():
        exact = run_unet(model, inputs).numpy()
        theirs = run_unet(model, inputs, torch.bfloat16).float().numpy()
    assert ours.dtype == jnp.float32

    def rms(x):
        return np.sqrt(np.mean(np.square(x)))

    assert rms(ours - exact) < 1.25 * rms(theirs - exact)


def test_config_is_the_one_diffusers_writes():
    model = reference_model(SMALL)
    assert UNetConfig.from_dict(dict(model.config)) == SMALL
