"""The TPU's forms of the primitives compute what the plain ones do; on a CPU, by interpretation."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamlite_jax import pretrained
from dreamlite_jax.models import blocks, flash, fused_depthwise, primitives, tpu, unet, unet_config
from dreamlite_jax.models.primitives import PLAIN

# Both compute in float32 and differ by the order of sums over a few hundred values.
RTOL = 3e-6


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(flash, "INTERPRET", True)
    monkeypatch.setattr(fused_depthwise, "INTERPRET", True)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def assert_same(plain, other, *arguments):
    """Results and gradients by all arguments, relative to each one's largest value."""

    @jax.jit
    def both(arguments, cotangent):
        found = []
        for function in (plain, other):
            y, pull = jax.vjp(function, *arguments)
            found.append((y, *pull(cotangent)))
        return found

    shape = jax.eval_shape(plain, *arguments).shape
    expected, found = both(arguments, normal(1, shape)[0])
    for k, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=RTOL, err_msg=f"part {k}")


@pytest.mark.parametrize(
    "b, t, n, d, s, scores",
    [
        (2, 64, 4, 64, 13, flash.SCORES),  # heads two at a time, keys padded
        (1, 24, 3, 8, 130, 1024),  # heads that do not pair up, several blocks of queries
        (2, 32, 2, 16, 4, 128 * 8),
        (1, 62, 2, 64, 260, 384 * 40),  # of 31 x 2: two rows of padding, blocks of 32
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_attention(b, t, n, d, s, scores, masked, monkeypatch):
    monkeypatch.setattr(flash, "SCORES", scores)
    q, k, v, scale = normal(0, (b, t, n, d), (b, s, 1, d), (b, s, 1, d), (d,))
    bias = jnp.where(jnp.arange(s) < s // 2, 0.0, -10000.0)[None, None, None] if masked else None
    bias = None if bias is None else jnp.broadcast_to(bias, (b, 1, 1, s))

    def plain(q, k, v, scale):
        return primitives.attention(primitives.rms_norm(q, scale, eps=1e-5), k, v, bias)

    def fused(q, k, v, scale):
        return tpu.normed_attention(q, k, v, bias, scale, eps=1e-5)

    assert_same(plain, fused, q, k, v, scale)


@pytest.mark.parametrize("s", range(128, 2177, 128))
def test_blocks_of_queries_are_whole_tiles(s):
    """Whatever the size of the bucket and the length of the texts, and large where they can be."""
    for t in (1, 62, 126, 1998, 2046, 2048):
        padding, largest = flash._padding(t, s), flash._largest_block(s)
        block = math.gcd(t + padding, largest)
        assert block % 8 == 0 and block * s <= flash.SCORES
        assert padding < 8 or padding <= t // 16
        assert t < 126 or block >= min(128, largest)


@pytest.mark.parametrize(
    "shape, groups, pixels",
    [
        ((2, 8, 16, 256), 32, fused_depthwise.PIXELS),  # two tiles of channels
        ((1, 6, 8, 24), 8, 16),  # blocks of two rows
        ((2, 3, 8, 128), 32, 1),  # of one
    ],
)
def test_norm_silu_depthwise(shape, groups, pixels, monkeypatch):
    monkeypatch.setattr(fused_depthwise, "PIXELS", pixels)
    c = shape[-1]
    x, shift, *rest = normal(0, shape, (shape[0], c), (c,), (c,), (3, 3, 1, c))
    how = {"groups": groups, "eps": 1e-5}

    def plain(x, shift, scale, bias, kernel):
        normed = primitives.group_norm(x + shift[:, None, None], scale, bias, **how)
        return primitives.depthwise_conv(primitives.silu(normed), kernel)

    ours = functools.partial(tpu.norm_silu_depthwise, **how)
    assert_same(plain, ours, x, shift, *rest)
    unmoved = functools.partial(plain, shift=jnp.zeros_like(shift))
    assert_same(
        lambda x, *rest: unmoved(x, scale=rest[0], bias=rest[1], kernel=rest[2]),
        lambda x, *rest: ours(x, None, *rest),
        x,
        *rest,
    )


def test_moments_of_what_is_shifted_in_one_pass():
    """In bfloat16, beside the moments of the sum in float64."""
    x, shift = normal(0, (2, 8, 8, 32), (2, 32))
    x, shift = (x + 3).astype(jnp.bfloat16), 4 * shift + 1000  # the square of which hides variances
    moved = (np.float64(x) + np.float64(shift)[:, None, None]).reshape(2, 64, 8, 4)
    for found, expected in zip(
        fused_depthwise.group_moments(x, 8, shift),
        (moved.mean((1, 3)), moved.var((1, 3))),
        strict=True,
    ):
        np.testing.assert_allclose(found, np.repeat(expected, 4, axis=1), rtol=1e-5)


def test_geglu():
    x, kernel, bias = normal(0, (2, 3, 4, 8), (8, 24), (24,))

    def plain(x, kernel, bias):
        value, gate = jnp.split(primitives.linear(x, kernel) + bias, 2, axis=-1)
        return value * primitives.gelu(gate)

    assert_same(plain, tpu.geglu, x, kernel, bias)


@pytest.mark.parametrize("shape, features", [((2, 4, 6, 8), 5), ((1, 1, 1, 3), 2)])
def test_upsample_conv(shape, features):
    x, kernel = normal(0, shape, (3, 3, shape[-1], features))

    def plain(x, kernel):
        return primitives.conv(primitives.upsample_nearest(x), kernel)

    assert_same(plain, tpu.upsample_conv, x, kernel)


def test_shapes_that_the_kernels_do_not_take():
    """Several key/value heads, biases by query, and widths that are no multiple of a tile."""
    q, k, v, scale = normal(0, (1, 12, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8), (8,))
    (bias,) = normal(2, (1, 1, 12, 5))
    normed = primitives.rms_norm(q, scale, eps=1e-5)
    for kv in (slice(0, 2), slice(0, 1)):
        expected = primitives.attention(normed, k[:, :, kv], v[:, :, kv], bias)
        found = tpu.normed_attention(q, k[:, :, kv], v[:, :, kv], bias, scale, eps=1e-5)
        np.testing.assert_array_equal(found, expected)
    x, c, kernel = normal(0, (1, 4, 6, 8), (8,), (3, 3, 1, 8))
    expected = primitives.depthwise_conv(
        primitives.silu(primitives.group_norm(x, c, c, groups=2, eps=1e-5)), kernel
    )
    found = tpu.norm_silu_depthwise(x, None, c, c, kernel, groups=2, eps=1e-5)
    np.testing.assert_array_equal(found, expected)
    (shift,) = normal(3, (1, 8))
    moved = x - shift[:, None, None]
    found = tpu.norm_silu_depthwise(moved, shift, c, c, kernel, groups=2, eps=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_of_norms_in_bfloat16():
    """By sums of one pass, beside the plain forms of the same values in float32."""
    x, shift, scale, bias = normal(0, (2, 8, 8, 32), (2, 32), (32,), (32,))
    x, how = (2 * x + 1).astype(jnp.bfloat16), {"groups": 8, "eps": 1e-5}

    def ours(x, shift):
        mean, variance = fused_depthwise.group_moments(x, 8, shift)
        return jnp.stack([mean, variance])

    def plain(x, shift):
        moved = (x + shift[:, None, None]).reshape(2, 64, 8, 4)
        return jnp.stack([jnp.repeat(f(moved, (1, 3)), 4, axis=1) for f in (jnp.mean, jnp.var)])

    def norms(ops):
        return lambda x, scale, bias: (
            ops.group_norm(x, scale, bias, **how) + ops.layer_norm(x, scale, bias, eps=1e-5)
        ).astype(jnp.float32)

    for one, other, given in (
        (ours, plain, (x, shift)),
        (norms(tpu.TPU), norms(PLAIN), (x, scale, bias)),
    ):
        exact = (x.astype(jnp.float32), *given[1:])
        y, pull = jax.vjp(other, *exact)
        (cotangent,) = normal(1, y.shape)
        _, pull_ours = jax.vjp(one, *given)
        for found, expected in zip(pull_ours(cotangent), pull(cotangent), strict=True):
            # By x in its own dtype, of 8 bits; results of the norms are rounded to these, too.
            largest = np.abs(expected).max()
            np.testing.assert_allclose(np.float32(found) / largest, expected / largest, atol=2**-7)


@pytest.mark.parametrize("policy, kernels, sums", [("full", 3, 2), ("products", 2, 1)])
def test_what_products_save(policy, kernels, sums):
    """What an attention gives, so that its kernel runs once forward and once backward, and the sums
    of norms."""
    config = {"heads": 2, "kv_heads": 1, "qk_norm": True, "dtype": jnp.bfloat16, "ops": tpu.TPU}
    x, context = normal(0, (1, 8, 8, 16), (1, 5, 16))
    block = blocks.rematerialised(blocks.Attention, policy, "")(**config)
    params = jax.jit(block.init)(jax.random.key(0), x, context)

    def text(loss, *given):
        return str(jax.make_jaxpr(jax.grad(loss))(*given))

    loss = lambda params: block.apply(params, x, context).astype(jnp.float32).sum()  # noqa: E731
    assert len(re.findall(r"= pallas_call\[", text(loss, params))) == kernels

    @functools.partial(jax.checkpoint, policy=blocks.REMAT_POLICIES[policy])
    def norm(x):
        y = tpu.layer_norm(x, jnp.ones(16), jnp.ones(16), eps=1e-5)
        return jnp.sin(y.astype(jnp.float32))

    found = text(lambda x: norm(x).sum(), x.astype(jnp.bfloat16))
    # Of x and of its square; the gradient has two sums more by that axis.
    assert len(re.findall(r"reduce_sum\[[^\]]*axes=\(3,\)", found)) == 2 * sums + 2


def test_a_network_is_the_same_on_both():
    """The same parameters by the same paths; the same velocity."""
    config, (b, h, w, tokens) = unet_config.NANO, (1, 16, 32, 5)
    sample, context = normal(3, (b, h, w, config.in_channels), (b, tokens, config.context_dim))
    mask, time_ids = jnp.arange(tokens)[None] < 3, jnp.full((b, 2), 128.0)
    inputs = sample, jnp.full((b,), 500.0), context, mask, time_ids
    params = pretrained.init_params(pretrained.UNET, config, 0)
    networks = [unet.UNet(config, ops=ops) for ops in (PLAIN, tpu.TPU)]
    shapes = [
        flatten_dict(jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"])
        for network in networks
    ]
    assert shapes[0] == shapes[1]
    plain, fused = (jax.jit(n.apply)({"params": params}, *inputs) for n in networks)
    scale = np.abs(plain).max()
    np.testing.assert_allclose(fused / scale, plain / scale, atol=1e-5)
