"""The operations whose best form depends on where they run, in one place.

Every network of this project takes a `Primitives` and calls nothing else for these operations, so a lowering
for another target (the phone's GPU, a TPU kernel) passes its own forms and there is never a second copy of a
network. `PLAIN` holds the defaults: ordinary JAX that XLA compiles well on TPU, GPU and CPU.

Shapes: B batch, H height, W width, C channels, T queries, S keys, N query heads, K key/value heads, D head width.
Statistics, softmax and the error function are computed in float32 whatever the input's dtype; results return in
the input's dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, eps: float) -> Array:
    """GroupNorm of x [B, H, W, C] over H, W and C/groups; scale and bias [C] (Wu & He 2018, eq. 1-6).

    Two passes (mean, then mean of squared deviations), because E[x^2] - E[x]^2 loses its digits where a group's
    mean is large. Each pass reduces H and W first, so that only [B, C] is regrouped and no 5-D copy of x is made.
    """
    b, h, w, c = x.shape

    def group_mean(v):  # [B, H, W, C] -> [B, 1, 1, C], every channel holding its group's mean
        per_group = jnp.mean(v, axis=(1, 2)).reshape(b, groups, c // groups).mean(-1)
        return jnp.repeat(per_group, c // groups, axis=1)[:, None, None, :]

    x32 = x.astype(jnp.float32)
    centred = x32 - group_mean(x32)
    inverse = lax.rsqrt(group_mean(jnp.square(centred)) + eps)
    return (centred * (inverse * scale) + bias).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
    """LayerNorm of x [..., C] over C; scale and bias [C] (Ba et al. 2016)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, -1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
    return (centred * inverse * scale + bias).astype(x.dtype)


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    """RMSNorm of x [..., C] over C; scale [C] (Zhang & Sennrich 2019, eq. 4)."""
    x32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype)


def attention(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    """Softmax attention with grouped key/value heads; scores and softmax in float32.

    q [B, T, N, D]; k and v [B, S, K, D] with N a multiple of K: query head n reads key/value head n // (N / K).
    bias (float32) is added to the scores of every head and broadcasts to [B, 1, T, S]. Returns [B, T, N, D].
    With one key/value head (DreamLite's) the heads of a query are just more rows of one matmul: no transpose, and
    no copy of k or v.
    """
    b, t, n, d = q.shape
    heads = k.shape[2]
    q = q.reshape(b, t, heads, n // heads, d)
    scores = jnp.einsum("btkgd,bskd->bktgs", q, k, preferred_element_type=jnp.float32) * d**-0.5
    if bias is not None:
        scores = scores + bias[:, :, :, None, :]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bktgs,bskd->btkgd", weights, v).reshape(b, t, n, d)


def gelu(x: Array) -> Array:
    """Exact GELU, x * Phi(x), by the error function in float32 (Hendrycks & Gimpel 2016, eq. 2)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def upsample_nearest(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]; every pixel becomes a 2x2 square."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def linear(x: Array, kernel: Array) -> Array:
    """x [..., I] times kernel [I, O] -> [..., O], flattened to one 2-D matmul (XLA's CPU form of choice)."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolution of x [B, H, W, I] with an odd square kernel [k, k, I, O], zero-padded k // 2 on *both* sides.

    With stride 2 this is PyTorch's padding=1, not XLA's SAME, which would pad one side only.
    """
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def depthwise_conv(x: Array, kernel: Array) -> Array:
    """Depthwise 3x3 convolution of x [B, H, W, C] with kernel [3, 3, 1, C], zero-padded to the same size.

    XLA's grouped convolution on TPU and GPU; on the CPU, where that is some thirty times slower than it could be, nine
    shifted multiply-adds.
    """
    return lax.platform_dependent(x, kernel, cpu=_depthwise_shifted, default=_depthwise_grouped)


def _depthwise_grouped(x: Array, kernel: Array) -> Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=x.shape[-1]
    )


def _taps(x: Array) -> list[Array]:
    """The nine shifted views of x [B, H, W, C], row-major over the 3x3 window, zeros outside."""
    h, w = x.shape[1:3]
    # The barrier keeps XLA's CPU fusion from recomputing whatever produced x once per tap.
    padded = lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    return [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]


@jax.custom_vjp
def _depthwise_shifted(x: Array, kernel: Array) -> Array:
    products = (tap * weight for tap, weight in zip(_taps(x), kernel.reshape(9, -1), strict=True))
    return lax.optimization_barrier(sum(products))


def _depthwise_shifted_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise_shifted(x, kernel), (x, kernel)


def _depthwise_shifted_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """d/dx is the same convolution with the kernel turned round; d/dkernel is one dot product per tap."""
    x, kernel = saved
    g = lax.optimization_barrier(g)
    dx = _depthwise_shifted(g, kernel[::-1, ::-1])
    g32 = g.astype(jnp.float32)
    dk = jnp.stack([jnp.sum(tap.astype(jnp.float32) * g32, axis=(0, 1, 2)) for tap in _taps(x)])
    return dx, dk.reshape(kernel.shape).astype(kernel.dtype)


_depthwise_shifted.defvjp(_depthwise_shifted_fwd, _depthwise_shifted_bwd)


class Primitives(NamedTuple):
    """One form of every operation above; `PLAIN._replace(gelu=...)` makes another target's set."""

    group_norm: Callable[..., Array] = group_norm
    layer_norm: Callable[..., Array] = layer_norm
    rms_norm: Callable[..., Array] = rms_norm
    attention: Callable[..., Array] = attention
    gelu: Callable[[Array], Array] = gelu
    upsample_nearest: Callable[[Array], Array] = upsample_nearest
    linear: Callable[[Array, Array], Array] = linear
    conv: Callable[..., Array] = conv
    depthwise_conv: Callable[[Array, Array], Array] = depthwise_conv


PLAIN = Primitives()
