"""The phone's forms of the primitives: what LiteRT's GPU accelerator runs as single operations.

Each form computes what its namesake in `dreamlite_jax.models.primitives` computes. Norms and GELU
are *composites*: a name that the accelerator knows, around a decomposition that runs elsewhere. In
half precision a composite keeps its statistics in float32, the decomposition would overflow.

Rules that all forms keep, because the accelerator runs other graphs wrongly or not at all: batch 1,
at most four axes, no broadcast that feeds a matmul, operands of one rank, attention without a
copy of keys and values.

Shapes: H height, W width, C channels, T queries, S keys, N query heads, K key/value heads, D head
width; the batch is 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dreamlite_jax.models.depthwise import grouped
from dreamlite_jax.models.primitives import PLAIN, conv


def _rank4(x: Array) -> Array:
    """x [..., C] as [1, ., ., C]: what it lacks in axes stands in front."""
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _channels(v: Array) -> Array:
    return v.reshape(1, 1, 1, -1)


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, eps: float) -> Array:
    """GroupNorm of x [1, H, W, C] as `odml.group_norm`.

    `reduction_axes` = [3] without `sub_type` is the one spelling that every version of the
    accelerator takes for a GroupNorm; without it a LayerNorm runs, silently.
    """

    def decomposition(x, scale, bias, **_):
        _, h, w, c = x.shape
        split = x.reshape(1, h * w, groups, c // groups)
        centred = split - jnp.mean(split, (1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(centred), (1, 3), keepdims=True)
        normed = (centred * lax.rsqrt(variance + eps)).reshape(x.shape)
        return normed * _channels(scale) + _channels(bias)

    return lax.composite(decomposition, "odml.group_norm", version=1)(
        x,
        scale,
        bias,
        num_groups=np.int32(groups),
        epsilon=np.float32(eps),
        channel_axis=np.int32(3),
        reduction_axes=np.array([3], np.int64),
    )


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
    """LayerNorm of x [..., C] over C as `odml.group_norm` without `reduction_axes`."""

    def decomposition(x, scale, bias, **_):
        centred = x - jnp.mean(x, -1, keepdims=True)
        inverse = lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
        return centred * inverse * _channels(scale) + _channels(bias)

    y = lax.composite(decomposition, "odml.group_norm", version=1)(
        _rank4(x), scale, bias, epsilon=np.float32(eps)
    )
    return y.reshape(x.shape)


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    """RMSNorm of x [..., C] over C as `odml.rms_norm`."""

    def decomposition(x, scale, **_):
        inverse = lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
        return x * inverse * _channels(scale)

    y = lax.composite(decomposition, "odml.rms_norm", version=1)(
        _rank4(x), scale, epsilon=np.float32(eps)
    )
    return y.reshape(x.shape)


def gelu(x: Array) -> Array:
    """Exact GELU as `aten.gelu.default`, which becomes the one operation GELU."""
    return lax.composite(lambda x, **_: PLAIN.gelu(x), "aten.gelu.default", version=1)(
        x, approximate="none"
    )


def silu(x: Array) -> Array:
    """x * sigmoid(x): LOGISTIC and MUL."""
    return x * lax.logistic(x)


def attention(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    """As `primitives.attention` for a batch of 1, every head's queries as rows of one matmul.

    With one key/value head [1, T, N, D] is [1, 1, T N, D] as it lies in memory. Keys and values
    spread over the heads would be a matmul whose batches broadcast, which the accelerator computes
    wrongly.
    """
    _, t, n, d = q.shape
    heads, group = k.shape[2], n // k.shape[2]
    q = q * np.float32(d**-0.5)
    if heads == 1:
        rows, k, v = (x.reshape(1, 1, -1, d) for x in (q, k, v))
    else:
        rows = q.swapaxes(1, 2).reshape(1, heads, group * t, d)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bhrd,bhsd->bhrs", rows, k)
    if bias is not None:
        if bias.shape[2] > 1:  # one row a query: query heads of a group lie one after another
            assert heads > 1 or group == 1
            bias = jnp.concatenate([bias] * group, axis=2)
        scores = scores + bias
    y = jnp.einsum("bhrs,bhsd->bhrd", jax.nn.softmax(scores, axis=-1), v)
    if heads == 1:
        return y.reshape(1, t, n, d)
    return y.reshape(1, n, t, d).swapaxes(1, 2)


def upsample_nearest(x: Array) -> Array:
    """[1, H, W, C] -> [1, 2H, 2W, C] as RESIZE_NEAREST_NEIGHBOR."""
    _, h, w, _ = x.shape
    return lax.composite(
        lambda x, **_: PLAIN.upsample_nearest(x), "tfl.resize_nearest_neighbor", version=1
    )(x, size=np.array([2 * h, 2 * w], np.int64), is_nchw_op=False)


def linear(x: Array, kernel: Array) -> Array:
    """x [..., I] times kernel [I, O] -> [..., O] as a 1x1 convolution, which leaves pixels and
    tokens where they lie."""
    y = conv(_rank4(x), kernel[None, None])
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


PHONE = PLAIN._replace(
    group_norm=group_norm,
    layer_norm=layer_norm,
    rms_norm=rms_norm,
    attention=attention,
    silu=silu,
    gelu=gelu,
    upsample_nearest=upsample_nearest,
    linear=linear,
    depthwise_conv=grouped,
)
