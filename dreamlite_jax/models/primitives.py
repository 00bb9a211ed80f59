"""The operations whose best form depends on where they run, in one place.

Every network of this project takes a `Primitives` and calls nothing else for these operations, so
a lowering for another target (the phone's GPU, a TPU kernel) passes its own forms and there is
never a second copy of a network. `PLAIN` holds the defaults: ordinary JAX that XLA compiles well
on TPU, GPU and CPU.

Shapes: B batch, H height, W width, C channels, T queries, S keys, N query heads, K key/value
heads, D head width. Statistics, softmax and the error function are computed in float32 whatever
the input's dtype; results return in the input's dtype.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dreamlite_jax.models.convolution import conv
from dreamlite_jax.models.depthwise import depthwise_conv

PRODUCT = "product"  # the name of results that are worth saving for a gradient, see `blocks`


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, eps: float) -> Array:
    """GroupNorm of x [B, H, W, C] over H, W and C/groups; scale and bias [C] (Wu & He 2018, eq.
    1-6).

    Two passes (mean, then mean of squared deviations), because E[x^2] - E[x]^2 loses its digits
    where a group's mean is large. Each pass reduces H and W first, so that only [B, C] is
    regrouped and no 5-D copy of x is made.
    """
    b, c = x.shape[0], x.shape[-1]

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def contract(spec: str, x: Array, y: Array, dtype: Any = None) -> Array:
    """einsum of two operands, accumulated in float32 and returned as `dtype` (None: that of x).

    In float32 this is jnp.einsum. In bfloat16 it is the same arithmetic said so that every backend
    takes its fast path: XLA's CPU compiler otherwise widens both operands, weights included, at
    every call. Gradients are contractions of operands in x's dtype, never of a float32 cotangent
    with bfloat16 weights.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


@contract.defjvp
def _contract_jvp(spec, dtype, primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    tangent = jnp.einsum(spec, dx, y) + jnp.einsum(spec, x, dy)
    return contract(spec, x, y, dtype), tangent.astype(dtype or x.dtype)


def attention(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    """Softmax attention with grouped key/value heads; scores and softmax in float32.

    q [B, T, N, D]; k and v [B, S, K, D] with N a multiple of K: query head n reads key/value head
    n // (N / K). bias (float32) is added to the scores of every head and broadcasts to [B, 1, T,
    S]. Returns [B, T, N, D]. With one key/value head (DreamLite's) the heads of a query are just
    more rows of one matmul: no transpose, and no copy of k or v. The division by the softmax's sum
    comes last (Dao et al. 2022), which spares a pass over [T, S] forward and two backward.
    """
    b, t, n, d = q.shape
    heads, group = k.shape[2], n // k.shape[2]

    def batched(x):  # [B, ., K, ...] -> [B K, ., ...]: one batch axis is what XLA's CPU dots like
        x = x.swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    q = batched((q * d**-0.5).reshape(b, t, heads, group, d)).reshape(-1, t * group, d)
    k, v = batched(k), batched(v)
    scores = contract("brd,bsd->brs", q, k, jnp.float32)
    if bias is not None:
        rows = jnp.repeat(bias, group, axis=2) if bias.shape[2] > 1 else bias
        rows = jnp.broadcast_to(rows, (b, heads, *rows.shape[2:]))
        scores = scores + rows.reshape(-1, *rows.shape[2:])
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = contract("brs,bsd->brd", weights.astype(v.dtype), v, jnp.float32) / total
    y = y.astype(v.dtype).reshape(b, heads, t, group, d).swapaxes(1, 2)
    return y.reshape(b, t, n, d)


def silu(x: Array) -> Array:
    """x * sigmoid(x) in float32 (Elfwing et al. 2017)."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Array) -> Array:
    """Exact GELU, x * Phi(x), by the error function in float32 (Hendrycks & Gimpel 2016, eq. 2)."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + lax.erf(x32 * 2**-0.5))).astype(x.dtype)


def upsample_nearest(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]; every pixel becomes a 2x2 square."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(
        b, 2 * h, 2 * w, c
    )


def linear(x: Array, kernel: Array) -> Array:
    """x [..., I] times kernel [I, O] -> [..., O], flattened to one matmul (XLA's CPU prefers
    2-D)."""
    y = contract("mi,io->mo", x.reshape(-1, x.shape[-1]), kernel)
    return checkpoint_name(y.reshape(*x.shape[:-1], kernel.shape[-1]), PRODUCT)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def of_product(linear: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    """linear(x, kernel), for whose gradient x is saved where products are.

    What is both used and saved is rounded to its own dtype first, which on a TPU is an operation,
    and of what a kernel of ours wrote a copy. So x is used here, and a name for it saved.
    """
    return linear(x, kernel)


@of_product.defjvp
def _of_product_jvp(linear, primals, tangents):
    x, kernel = primals
    saved = checkpoint_name(x, PRODUCT), kernel
    return linear(x, kernel), jax.jvp(linear, saved, tangents)[1]


def add_bias(y: Array, bias: Array) -> Array:
    """y [..., C] + bias, added in float32 and returned in y's dtype.

    The gradient by the bias is a sum over every pixel of a batch; in bfloat16 such a sum stops
    growing after a few hundred terms.
    """
    return (y + bias.astype(jnp.float32)).astype(y.dtype)


class Primitives(NamedTuple):
    """One form of every operation above; `PLAIN._replace(gelu=...)` makes another target's set."""

    group_norm: Callable[..., Array] = group_norm
    layer_norm: Callable[..., Array] = layer_norm
    rms_norm: Callable[..., Array] = rms_norm
    attention: Callable[..., Array] = attention
    silu: Callable[[Array], Array] = silu
    gelu: Callable[[Array], Array] = gelu
    upsample_nearest: Callable[[Array], Array] = upsample_nearest
    linear: Callable[[Array, Array], Array] = linear
    conv: Callable[..., Array] = conv
    depthwise_conv: Callable[[Array, Array], Array] = depthwise_conv
    # Several at once, where a target has them so; None: one after the other.
    # (q, k, v, bias, scale, *, eps): `attention` of RMS-normalised queries.
    normed_attention: Callable[..., Array] | None = None
    # (x, shift, scale, bias, kernel, *, groups, eps): `group_norm`, `silu`, `depthwise_conv` of x,
    # to which shift [B, C] is added first where it is not None.
    norm_silu_depthwise: Callable[..., Array] | None = None
    # (x, kernel, bias): `linear`, whose second half of channels gates the first by `gelu`.
    geglu: Callable[[Array, Array, Array], Array] | None = None
    # (x, kernel): `upsample_nearest`, `conv` by a 3x3 kernel.
    upsample_conv: Callable[[Array, Array], Array] | None = None


PLAIN = Primitives()
