"""The primitives against float64 formulas; the convolutions' lowerings against lax's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dreamlite_jax.models import depthwise, primitives
from dreamlite_jax.models.blocks import REMAT_POLICIES
from dreamlite_jax.models.primitives import PLAIN


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(ours, exact, tolerance=2e-6):
    np.testing.assert_allclose(ours, exact, atol=tolerance * np.abs(exact).max())


def test_group_norm_with_a_large_mean():
    """Groups whose mean is a thousand times their spread: E[x^2] - E[x]^2 would be noise there."""
    x, scale, bias = 1000 + draw(2, 5, 3, 12), draw(12, seed=1), draw(12, seed=2)
    groups = x.astype(np.float64).reshape(2, 15, 4, 3)
    mean = groups.mean((1, 3), keepdims=True)
    exact = (groups - mean) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    exact = exact.reshape(x.shape) * scale + bias
    ours = PLAIN.group_norm(x, scale, bias, groups=4, eps=1e-5)
    close(ours, exact, 1e-4)  # float32 holds 1000 + x to 6e-5


def test_layer_and_rms_norm():
    x, scale, bias = draw(4, 7, 10), draw(10, seed=1), draw(10, seed=2)
    x64 = x.astype(np.float64)
    centred = x64 - x64.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    rms = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * scale
    close(PLAIN.layer_norm(x, scale, bias, eps=1e-5), layer)
    close(PLAIN.rms_norm(x, scale, eps=1e-6), rms)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: PLAIN.group_norm(x, np.ones(64), np.zeros(64), groups=1, eps=1e-5),
        lambda x: PLAIN.layer_norm(x, np.ones(64), np.zeros(64), eps=1e-5),
        lambda x: PLAIN.rms_norm(x, np.ones(64), eps=1e-6),
        PLAIN.gelu,
        PLAIN.silu,
    ],
)
def test_bfloat16_is_float32_inside(operation):
    x = (9 + draw(2, 4, 4, 64)).astype(jnp.bfloat16)
    ours, exact = operation(x), operation(x.astype(np.float32))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


def test_scores_of_bfloat16_are_float32():
    """Two keys whose scores of about 1000 differ by less than bfloat16 can tell there."""
    q = jnp.full((1, 1, 1, 4), 32, jnp.bfloat16)
    k = jnp.array([16, 15.9375], jnp.bfloat16).reshape(1, 2, 1, 1).repeat(4, 3)
    v = jnp.array([1.0, 0.0], jnp.bfloat16).reshape(1, 2, 1, 1).repeat(4, 3)
    weight = PLAIN.attention(q, k, v)[0, 0, 0, 0]
    np.testing.assert_allclose(weight, 1 / (1 + np.exp(-64 * 0.0625)), rtol=5e-3)


def test_a_long_bfloat16_sum_keeps_growing():
    """The gradient by a bias: 32,768 pixels, far past where bfloat16 stops counting."""
    g = jnp.full((32768, 8), 0.3, jnp.bfloat16)
    _, vjp = jax.vjp(lambda bias: primitives.add_bias(jnp.zeros_like(g), bias), jnp.zeros(8))
    np.testing.assert_allclose(vjp(g)[0], 32768 * float(jnp.bfloat16(0.3)), rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("bias_shape", [None, (3, 1, 1, 9), (1, 1, 5, 9), (3, 1, 5, 9)])
def test_attention(kv_heads, bias_shape):
    q, k, v = draw(3, 5, 6, 4), draw(3, 9, kv_heads, 4, seed=1), draw(3, 9, kv_heads, 4, seed=2)
    bias = None if bias_shape is None else 3 * draw(*bias_shape, seed=3)
    k64, v64 = (np.repeat(x.astype(np.float64), 6 // kv_heads, axis=2) for x in (k, v))
    scores = np.einsum("btnd,bsnd->bnts", q, k64) / 2 + (0 if bias is None else bias)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    close(PLAIN.attention(q, k, v, bias), np.einsum("bnts,bsnd->btnd", weights, v64))


def test_attention_survives_huge_scores():
    q = 100 * draw(1, 3, 2, 8)
    y = PLAIN.attention(q, q[:, :, :1], q[:, :, :1])
    assert np.isfinite(y).all()


def test_upsampling_and_stride_two():
    x = draw(2, 3, 5, 4)
    np.testing.assert_array_equal(PLAIN.upsample_nearest(x), x.repeat(2, axis=1).repeat(2, axis=2))
    # padding on both sides: the first output of a stride-2 convolution sees row and column -1
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 0] = 1
    y = PLAIN.conv(np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1), kernel, 2)
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 0], [0, 5]])


def test_contract_keeps_gradients_in_the_operands_dtype():
    x, w = draw(4, 8).astype(jnp.bfloat16), draw(8, 3, seed=1).astype(jnp.bfloat16)

    def loss(x, w):
        return jnp.sum(primitives.contract("mi,io->mo", x, w, jnp.float32) ** 2)

    gradient = jax.grad(loss, argnums=(0, 1))
    dots = [e for e in jax.make_jaxpr(gradient)(x, w).eqns if e.primitive.name == "dot_general"]
    assert dots and all(v.aval.dtype == jnp.bfloat16 for e in dots for v in e.invars)
    exact = jax.grad(loss, argnums=(0, 1))(x.astype(np.float32), w.astype(np.float32))
    for ours, true in zip(gradient(x, w), exact, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), true, rtol=0.03, atol=0.1)


def convolutions(x, kernel, stride):
    """Ours and lax's, as a reader of PyTorch would write it."""
    pad = kernel.shape[0] // 2
    dims = ("NHWC", "HWIO", "NHWC")

    def lax_conv(x, kernel):
        window = (stride, stride), [(pad, pad)] * 2
        return lax.conv_general_dilated(x, kernel, *window, dimension_numbers=dims)

    return lambda x, kernel: PLAIN.conv(x, kernel, stride), lax_conv


class TestConvolution:
    """The primitive with its own gradients against lax's."""

    x, turned = draw(2, 6, 7, 5), draw(2, 6, 7, 5, seed=1)

    def agree(self, ours, theirs, tolerance=1e-6):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            close(np.float32(a), np.float32(b), tolerance)

    @pytest.mark.parametrize("width", [1, 3, 5])
    @pytest.mark.parametrize("stride", [1, 2, 3])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("looped", [False, True])
    def test_gradients(self, width, stride, dtype, looped):
        x, kernel = jnp.asarray(self.x, dtype), jnp.asarray(draw(width, width, 5, 4), dtype)

        def gradients(conv):
            y, vjp = jax.vjp(conv, x, kernel)
            g = jnp.asarray(draw(*y.shape, seed=2), dtype)
            if not looped:
                return y, jax.jit(vjp)(g)
            return y, jax.jit(lambda gs: lax.map(vjp, gs))(g[None])

        self.agree(*map(gradients, convolutions(x, kernel, stride)))

    @pytest.mark.parametrize("order", ["jvp", "grad of grad", "grad of vmap", "vmap of grad"])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_every_mode_of_differentiation(self, order, stride):
        kernel = draw(3, 3, 5, 4, seed=2)

        def result(conv):
            def loss(x, kernel):
                return jnp.sum(jnp.sin(conv(x, kernel)))

            by_both = jax.grad(loss, argnums=(0, 1))
            xs, kernels = np.stack([self.x, self.turned]), np.stack([kernel, kernel[::-1]])
            square = lambda *given: sum(jnp.sum(g**2) for g in by_both(*given))  # noqa: E731
            return {
                "jvp": lambda: jax.jvp(conv, (self.x, kernel), (self.turned, kernel[::-1])),
                "grad of grad": lambda: jax.grad(square, argnums=(0, 1))(self.x, kernel),
                "grad of vmap": lambda: jax.grad(
                    lambda k: jnp.sum(jax.vmap(loss, (0, None))(xs, k))
                )(kernel),
                "vmap of grad": lambda: jax.vmap(by_both)(xs, kernels),
            }[order]()

        self.agree(*map(result, convolutions(self.x, kernel, stride)), 1e-5)

    @pytest.mark.parametrize("platform", ["cpu", "tpu"])
    def test_the_order_of_axes(self, platform):
        """On the CPU all three have the order that is fast in loops, elsewhere lax's gradients."""
        kernel = draw(3, 3, 5, 4)

        def orders(conv):
            def loss(x, kernel):
                return jnp.sum(conv(x, kernel) ** 2)

            traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(self.x, kernel)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            return sorted(re.findall(r"dim_numbers = (.+?), window", text))

        ours, theirs = map(orders, convolutions(self.x, kernel, 2))
        assert len(ours) == 3
        assert ours == (
            ["[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"] * 3 if platform == "cpu" else theirs
        )


class TestDepthwise:
    x, kernel, g = draw(2, 5, 7, 6), draw(3, 3, 1, 6, seed=1), draw(2, 5, 7, 6, seed=2)

    def test_the_two_lowerings_agree(self):
        close(depthwise.shifted(self.x, self.kernel), depthwise.grouped(self.x, self.kernel), 1e-6)

    def test_gradients_agree(self):
        _, ours = jax.vjp(PLAIN.depthwise_conv, self.x, self.kernel)
        _, theirs = jax.vjp(depthwise.grouped, self.x, self.kernel)
        for a, b in zip(ours(self.g), theirs(self.g), strict=True):
            close(a, b)

    @pytest.mark.parametrize("order", ["jvp", "grad of grad", "grad of vmap", "vmap of grad"])
    def test_every_mode_of_differentiation(self, order):
        def result(conv):
            def loss(x, kernel):
                return jnp.sum(jnp.sin(conv(x, kernel)) * self.g)

            by_both = jax.grad(loss, argnums=(0, 1))
            xs = jnp.stack([self.x, self.g])
            return {
                "jvp": lambda: jax.jvp(conv, (self.x, self.kernel), (self.g, self.kernel[::-1])),
                "grad of grad": lambda: jax.grad(
                    lambda x: jnp.sum(by_both(x, self.kernel)[1] ** 2)
                )(self.x),
                "grad of vmap": lambda: jax.grad(
                    lambda k: jnp.sum(jax.vmap(loss, (0, None))(xs, k))
                )(self.kernel),
                "vmap of grad": lambda: jax.vmap(by_both, (0, None))(xs, self.kernel),
            }[order]()

        ours, theirs = result(PLAIN.depthwise_conv), result(depthwise.grouped)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            close(a, b, 1e-5)

    @pytest.mark.parametrize(("platform", "grouped"), [("cpu", False), ("tpu", True)])
    def test_each_platform_gets_its_own(self, platform, grouped):
        def loss(x, kernel):
            return jnp.sum(PLAIN.depthwise_conv(x, kernel) ** 2)

        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(self.x, self.kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == grouped


@pytest.mark.parametrize("named_itself", [False, True])
def test_a_product_is_saved_as_it_is(named_itself):
    """For the gradient of what is made of it, it is neither made again nor rounded."""
    policy = REMAT_POLICIES["products"]

    def plain(x, kernel):
        return (jnp.sin(x) @ kernel).sum()

    @functools.partial(jax.checkpoint, policy=policy)
    def ours(x, kernel):
        if named_itself:  # what there is to avoid
            return (checkpoint_name(jnp.sin(x), primitives.PRODUCT) @ kernel).sum()
        return primitives.of_product(jnp.dot, jnp.sin(x), kernel).sum()

    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 4), (4, 5))]
    gradient = jax.grad(ours, argnums=(0, 1))
    for found, expected in zip(
        gradient(*given), jax.grad(plain, argnums=(0, 1))(*given), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    directions = [jnp.cos(x) for x in given]
    found, expected = (jax.jvp(f, given, directions)[1] for f in (ours, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    text = str(jax.make_jaxpr(gradient)(*given))
    assert len(re.findall(r"= sin ", text)) == 1
    assert ("reduce_precision" in text) == named_itself
