"""The primitives' forms for a TPU core: kernels of our own where XLA writes what need not be
written.

They are per device: `train.sharding.pinned` spreads them over a mesh.
"""

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
    x: Array,
    shift: Array | None,
    scale: Array,
    bias: Array,
    kernel: Array,
    *,
    groups: int,
    eps: float,
) -> Array:
    """See `Primitives.norm_silu_depthwise`; odd widths take the plain way."""
    how = {"groups": groups, "eps": eps}
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


def upsample_conv(x: Array, kernel: Array) -> Array:
    """See `Primitives.upsample_conv`; x [B, H, W, I], kernel [3, 3, I, O] -> [B, 2H, 2W, O].

    A pixel that is repeated 2x2 times meets sums of neighbouring taps. So it is a 4x4 kernel of
    such sums over pixels with zeros between them, of which a window has 2x2: 16 multiplications in
    place of 36, as the compiler skips the zeros.
    """
    taps = jnp.pad(kernel.astype(jnp.float32), ((1, 1), (1, 1), (0, 0), (0, 0)))
    for axis in range(2):
        n = taps.shape[axis]
        pair = (lax.slice_in_dim(taps, k, n - 1 + k, axis=axis) for k in range(2))
        taps = sum(pair)
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
