"""The primitives' forms for a TPU core: kernels of our own where XLA writes what need not be
written.

They are per device: `train.sharding.pinned` spreads them over a mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dreamlite_jax.models import flash, fused_depthwise, primitives
from dreamlite_jax.models.convolution import ORDER
from dreamlite_jax.models.primitives import PLAIN, PRODUCT

SUBLANES = 8


def normed_attention(
    q: Array, k: Array, v: Array, bias: Array | None, scale: Array, *, eps: float
) -> Array:
    """See `Primitives.normed_attention`; several key/value heads and biases by query take the plain
    way."""
    by_query = bias is not None and bias.shape[1:3] != (1, 1)
    if k.shape[2] > 1 or by_query:
        return primitives.attention(primitives.rms_norm(q, scale, eps=eps), k, v, bias)
    return flash.attention(q, k, v, bias, scale, eps)


def norm_silu_depthwise(
    x: Array, shift: Array | None, scale: Array, bias: Array, kernel: Array, **how: Any
) -> Array:
    """See `Primitives.norm_silu_depthwise`; odd widths take the plain way."""
    if x.shape[2] % SUBLANES:
        x = x if shift is None else primitives.add_bias(x, shift[:, None, None, :])
        h = primitives.group_norm(x, scale, bias, **how)
        return primitives.depthwise_conv(primitives.silu(h), kernel.astype(x.dtype))
    return fused_depthwise.norm_silu_depthwise(x, shift, scale, bias, kernel, **how)


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, eps: float) -> Array:
    """`primitives.group_norm` by `fused_depthwise.group_moments`."""
    mean, variance = fused_depthwise.group_moments(x, groups)
    factor = lax.rsqrt(variance + eps) * scale
    centred = x.astype(jnp.float32) - mean[:, None, None, :]
    return (centred * factor[:, None, None, :] + bias).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
    """`primitives.layer_norm`, in bfloat16 by one pass; what it sums is a product, being small."""
    if x.dtype != jnp.bfloat16:
        return primitives.layer_norm(x, scale, bias, eps=eps)
    x32 = x.astype(jnp.float32)
    means = (jnp.mean(v, -1) for v in (x32, jnp.square(x32)))
    mean, square = (checkpoint_name(v, PRODUCT)[..., None] for v in means)
    inverse = lax.rsqrt(fused_depthwise.one_pass_variance(square, mean) + eps)
    return ((x32 - mean) * inverse * scale + bias).astype(x.dtype)


def linear(x: Array, kernel: Array) -> Array:
    """`primitives.linear` without its reshapes, through which XLA fuses nothing here."""
    return checkpoint_name(primitives.contract("...i,io->...o", x, kernel), PRODUCT)


def geglu(x: Array, kernel: Array, bias: Array) -> Array:
    """See `Primitives.geglu`: two matmuls, so that nothing splits what one of them wrote."""
    features = kernel.shape[1] // 2
    value = linear(x, kernel[:, :features]).astype(jnp.float32) + bias[:features]
    gate = linear(x, kernel[:, features:]).astype(jnp.float32) + bias[features:]
    return (value * primitives.gelu(gate)).astype(x.dtype)


@jax.custom_jvp
def upsample_conv(x: Array, kernel: Array) -> Array:
    """See `Primitives.upsample_conv`; x [B, H, W, I], kernel [3, 3, I, O] -> [B, 2H, 2W, O].

    Of the repeated pixels that a kernel meets, some are the same: the result's even rows see two
    rows of x by the taps (k0, k1 + k2), the odd ones by (k0 + k1, k2), and columns likewise. So all
    four phases are sums over windows of 2x2 pixels, 16 multiplications in place of 36, in one
    matmul; XLA's convolution would lay out a batch of few rows badly.
    """
    (b, h, w, c), features = x.shape, kernel.shape[-1]

    def phases(taps: Array, axis: int) -> list[Array]:
        first, middle, last = jnp.split(taps, 3, axis)
        pairs = ([first, middle + last], [first + middle, last])
        return [jnp.concatenate(pair, axis) for pair in pairs]

    def windows(x: Array, axis: int) -> Array:
        """Two neighbours in the channels, H + 1 (or W + 1) times."""
        pad = [(1, 1) if k == axis else (0, 0) for k in range(4)]
        x = jnp.pad(x, pad)
        pair = [lax.slice_in_dim(x, k, x.shape[axis] - 1 + k, axis=axis) for k in range(2)]
        return jnp.concatenate(pair, axis=-1)

    taps = [tap for rows in phases(kernel.astype(jnp.float32), 0) for tap in phases(rows, 1)]
    # Channels of a window: [column, row, I]; of the result: [row's phase, column's phase, O].
    taps = jnp.concatenate([tap.swapaxes(0, 1).reshape(4 * c, features) for tap in taps], axis=1)
    y = linear(windows(windows(x, 1), 2), taps.astype(x.dtype))

    def row(i: int) -> Array:
        parts = jnp.split(y[:, i : i + h], 4, axis=-1)[2 * i : 2 * i + 2]
        columns = [part[:, :, j : j + w] for j, part in enumerate(parts)]
        return jnp.concatenate(columns, axis=-1).reshape(b, h, 2 * w, features)

    return jnp.stack([row(0), row(1)], axis=2).reshape(b, 2 * h, 2 * w, features)


@upsample_conv.defjvp
def _upsample_conv_jvp(primals, tangents):
    return upsample_conv(*primals), jax.jvp(_dilated, primals, tangents)[1]


def _dilated(x: Array, kernel: Array) -> Array:
    """The same as one convolution, whose gradients are convolutions, too, of as little arithmetic:
    by a 4x4 kernel of sums of neighbouring taps over pixels with zeros between them. (Forward, the
    compiler does not always skip the zeros.)"""
    taps = jnp.pad(kernel.astype(jnp.float32), ((1, 1), (1, 1), (0, 0), (0, 0)))
    for axis in range(2):
        n = taps.shape[axis]
        taps = sum(lax.slice_in_dim(taps, k, n - 1 + k, axis=axis) for k in range(2))
    return lax.conv_general_dilated(
        x,
        taps.astype(x.dtype),
        window_strides=(1, 1),
        padding=((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=ORDER,
    )


TPU = PLAIN._replace(
    group_norm=group_norm,
    layer_norm=layer_norm,
    linear=linear,
    normed_attention=normed_attention,
    norm_silu_depthwise=norm_silu_depthwise,
    geglu=geglu,
    upsample_conv=upsample_conv,
)
