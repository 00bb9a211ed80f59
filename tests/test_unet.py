"""What the U-Net refuses, and in which words; parameter paths; a network with other primitives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamlite_jax import pretrained
from dreamlite_jax.models.primitives import PLAIN
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.unet_config import DREAMLITE, TINY, UNetConfig
from dreamlite_jax.tiny import random_params

SMALL = dataclasses.replace(
    TINY, layers_per_block=1, transformer_layers_per_block=1, block_out_channels=(16, 32, 48)
)


def inputs(**changes):
    values = {
        "latents": (2, 8, 16, 4),
        "timesteps": (2,),
        "context": (2, 5, 64),
        "mask": (2, 5),
        "time_ids": (2, 2),
    } | changes
    return {k: jnp.ones(v) for k, v in values.items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": (2, 10, 16, 4)}, "latent height 10 and width 16 should be divisible by 4"),
        ({"latents": (2, 8, 18, 4)}, "latent height 8 and width 18 should be divisible by 4"),
        ({"latents": (2, 8, 16, 3)}, r"latents \(2, 8, 16, 3\) should be \[B, H, W, 4\]"),
        ({"context": (2, 5, 63)}, r"context \(2, 5, 63\) should be \[2, L, 64\]"),
        ({"mask": (2, 4)}, r"mask \(2, 4\) should be \[2, 5\]"),
        ({"timesteps": (1,)}, r"timesteps \(1,\) should be \[2\]"),
        ({"time_ids": (2, 6)}, r"time_ids \(2, 6\) should be \[2, 2\]"),
        ({"time_ids": None}, "time_ids .* are missing"),
        ({"context": (2, 5, 63), "mask": (2, 4)}, "context.*; mask"),
    ],
)
def test_wrong_inputs(changes, words):
    shapes = pretrained.param_shapes(pretrained.UNET, SMALL)
    with pytest.raises(ValueError, match=words) as error:
        jax.eval_shape(lambda p: UNet(SMALL).apply({"params": p}, **inputs(**changes)), shapes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ({"only_cross_attention": True}, "only_cross_attention=True is not supported"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types has 'AttnDownBlock2D'"),
        ({"mid_block_type": None}, "mid_block_type has None"),
        ({"qk_norm": "l2"}, "qk_norm='l2' is not supported"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),
        ({"encoder_hid_dim": None}, "encoder_hid_dim and encoder_hid_dim_type go together"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text' is not supported"),
        ({"projection_class_embeddings_input_dim": 9}, r"2 \* addition_time_embed_dim, got 9"),
        ({"transformer_layers_per_block": [1, [1, 2], 1]}, "should be positive whole numbers"),
        ({"transformer_layers_per_block": 0}, "transformer_layers_per_block=0 should be positive"),
        ({"norm_num_groups": None}, "norm_num_groups=None should be positive whole numbers"),
        ({"in_channels": "4", "ff_mult": 0}, "in_channels='4' should .*; ff_mult=0 should be"),
        ({"norm_eps": float("nan")}, "norm_eps=nan should be a small positive number"),
        ({"block_out_channels": 32}, "block_out_channels=32 should be a list"),
        ({"cross_attention_dim": [1, 2, 3]}, "cross_attention_dim=.* should be one number"),
        ({"layers_per_block": [1, 2]}, "layers_per_block has 2 values, block_out_channels 3"),
        ({"attention_head_dim": 5}, "attention_head_dim .number of heads. 5 does not divide"),
        ({"num_kv_heads": 4}, "not a multiple of num_kv_heads 4"),
        ({"norm_num_groups": 7}, "not a multiple of norm_num_groups 7"),
        ({"bogus": 1}, "unknown setting bogus=1"),
        ({"bogus": 1, "dropout": 0.5}, "bogus=1; dropout=0.5"),
    ],
)
def test_wrong_settings(change, words):
    with pytest.raises(ValueError, match=words) as error:
        UNetConfig.from_dict({**SMALL.to_dict(), **change})
    assert "\n" not in str(error.value)


def test_config_round_trip():
    for config in (DREAMLITE, SMALL, UNetConfig()):
        assert UNetConfig.from_dict(config.to_dict()) == config
        hash(config)


def test_a_width_of_text_without_a_type_means_a_projection():
    config = UNetConfig.from_dict({"encoder_hid_dim": 64})
    assert config.encoder_hid_dim_type == "text_proj"


@pytest.mark.parametrize(
    ("remat", "words"),
    [
        ("everything", 'remat: unknown policy "everything"'),
        ("save_only_these_names", "remat: unknown policy"),
        ("full@[", r'remat: "\[" is no regex'),
        ("full@down_block_0", 'remat: "full@down_block_0" matches no block'),
    ],
)
def test_wrong_remat(remat, words):
    shapes = pretrained.param_shapes(pretrained.UNET, SMALL)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda p: UNet(SMALL, remat=remat).apply({"params": p}, **inputs()), shapes)


def test_rematerialisation_changes_no_gradient():
    params = random_params(pretrained.UNET, SMALL)

    def gradient(remat):
        module = UNet(SMALL, remat=remat)
        return jax.grad(lambda p: jnp.sum(jnp.square(module.apply({"params": p}, **inputs()))))

    def blocks(remat):  # how many blocks are recomputed
        equations = jax.make_jaxpr(gradient(remat))(params).eqns
        return sum(equation.primitive.name.startswith("remat") for equation in equations)

    assert blocks("none") == 0
    # Residual and transformer blocks.
    assert blocks("full") == blocks("products") == 11 + 8
    assert blocks("full@down_blocks_0|up_blocks_2") == 3 + 1
    plain = jax.tree.leaves(jax.jit(gradient("none"))(params))
    again = jax.tree.leaves(jax.jit(gradient("full@down_blocks_0|up_blocks_2"))(params))
    largest = max(np.abs(a).max() for a in plain)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest)


def test_what_is_saved_for_the_gradient():
    """Of products, no product is made twice; of nothing but inputs, all of them are."""
    params = pretrained.param_shapes(pretrained.UNET, SMALL)

    def products(remat):
        module = UNet(SMALL, remat=remat)
        gradient = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, **inputs())))
        return jax.jit(gradient).lower(params).as_text().count("dot_general")

    none, saved, full = (products(remat) for remat in ("none", "products", "full"))
    attentions = sum("to_q" in path for path in map("/".join, flatten_dict(params)))
    # The plain attention's scores, and their product with the values, are no linear layer's.
    assert none < saved <= none + 2 * attentions < full


def test_paths_are_easy_to_match():
    paths = {"/".join(p) for p in flatten_dict(pretrained.param_shapes(pretrained.UNET, SMALL))}
    for path in (
        "down_blocks_2/attentions_0/transformer_blocks_0/attn1/to_q/kernel",
        "mid_block/resnets_1/time_emb_proj/bias",
        "up_blocks_0/upsamplers_0/conv/kernel",
        "encoder_hid_proj_1/scale",
    ):
        assert path in paths
    assert not any("attn1" in path for path in paths if path.startswith("down_blocks_0"))


def counting(forms):
    """Forms of the primitives that count their calls, and the counts."""
    calls = dict.fromkeys(forms, 0)

    def counted(name):
        def form(*args, **kw):
            calls[name] += 1
            return forms[name](*args, **kw)

        return form

    return PLAIN._replace(**{name: counted(name) for name in forms}), calls


def velocity_of(params, ops):
    module = UNet(SMALL, ops=ops)
    return jax.jit(lambda p: module.apply({"params": p}, **inputs()))(params)


@pytest.fixture(scope="module")
def plain():
    """Parameters, and the velocity that the plain primitives give."""
    params = random_params(pretrained.UNET, SMALL)
    return params, velocity_of(params, PLAIN)


def test_another_set_of_primitives_reaches_every_layer(plain):
    """A lowering passes its own forms; here each counts its calls and computes as before."""
    forms = {name: form for name, form in PLAIN._asdict().items() if form is not None}
    (ops, calls), (params, expected) = counting(forms), plain
    np.testing.assert_array_equal(expected, velocity_of(params, ops))
    assert all(calls.values()), calls
    # every product with a parameter goes through linear, conv or depthwise_conv
    kernels = sum(path[-1] == "kernel" for path in flatten_dict(params))
    assert calls["linear"] + calls["conv"] + calls["depthwise_conv"] == kernels


def test_several_primitives_at_once(plain):
    """Where a lowering has them so, the layers ask for them together, and for nothing twice."""

    def normed_attention(q, k, v, bias, scale, *, eps):
        return PLAIN.attention(PLAIN.rms_norm(q, scale, eps=eps), k, v, bias)

    def norm_silu_depthwise(x, shift, scale, bias, kernel, **how):
        x = x if shift is None else x + shift[:, None, None]
        return PLAIN.depthwise_conv(PLAIN.silu(PLAIN.group_norm(x, scale, bias, **how)), kernel)

    def geglu(x, kernel, bias):
        value, gate = jnp.split(PLAIN.linear(x, kernel) + bias, 2, axis=-1)
        return value * PLAIN.gelu(gate)

    def upsample_conv(x, kernel):
        return PLAIN.conv(PLAIN.upsample_nearest(x), kernel)

    forms = {f.__name__: f for f in (normed_attention, norm_silu_depthwise, geglu, upsample_conv)}
    assert forms.keys() == {name for name, form in PLAIN._asdict().items() if form is None}
    (ops, calls), (params, expected) = counting(forms), plain
    np.testing.assert_allclose(expected, velocity_of(params, ops), atol=1e-5)
    paths = ["/".join(path) for path in flatten_dict(params)]
    assert calls == {
        "normed_attention": sum(path.endswith("norm_q/scale") for path in paths),
        "norm_silu_depthwise": sum(path.endswith("depthwise/kernel") for path in paths),
        "geglu": sum(path.endswith("ff/net_0/proj/kernel") for path in paths),
        "upsample_conv": sum("upsamplers" in path and path.endswith("kernel") for path in paths),
    }
