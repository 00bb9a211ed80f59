"""Attention on a TPU that never writes its scores: one Pallas kernel forward, one backward.

All keys of DreamLite's attentions fit a TPU core's own memory (2048 pixels or a prompt, one
key/value head of 64), so a block of queries sees them at once and there is no online softmax; the
backward kernel makes the scores again. Queries stay [B, T, N D] as the projections write and read
them: heads of 64 are handled two at a time, as tiles of 128 lanes. A tile's head i meets keys that
are zero outside the lanes of head i, which costs the matrix unit nothing (64 lanes occupy it as 128
do) and spares every shuffle. RMSNorm of the queries' heads happens inside, too.

Shapes: B batch, T queries, S keys, N query heads, D head width; G heads and W = G D lanes a tile.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SCORES = 512 * 1024  # that a block of one head has at most
_VMEM = 60 * 2**20  # v5p has 64 MiB, v5e and v6e 128


def attention(q: Array, k: Array, v: Array, bias: Array | None, scale: Array, eps: float) -> Array:
    """Softmax attention of RMS-normalised queries [B, T, N, D] to one key/value head -> [B, T, N,
    D].

    Args:
      q: before its RMSNorm, whose scale [D] and eps follow.
      k, v: [B, S, 1, D], k normalised.
      bias: float32 [B, 1, 1, S], added to the scores; a constant, without a gradient.
    """
    b, t, n, d = q.shape
    s = k.shape[1]
    q = jnp.pad(q, ((0, 0), (0, _padding(t, s + -s % LANES)), (0, 0), (0, 0)))
    bias = jnp.zeros((b, 1, 1, s)) if bias is None else bias
    width = d * max(g for g in range(1, n + 1) if n % g == 0 and g * d <= max(LANES, d))
    pad = -s % LANES
    k, v = (jnp.pad(x[:, :, 0], ((0, 0), (0, pad), (0, 0))) for x in (k, v))
    bias = jnp.pad(
        bias[:, 0].astype(jnp.float32), ((0, 0), (0, 0), (0, pad)), constant_values=-1e30
    )
    scale = jnp.tile(scale.astype(jnp.float32) * d**-0.5, width // d)[None]
    y = _attend(q.reshape(b, -1, n * d), _spread(k, width), _spread(v, width), bias, scale, d, eps)
    return y[:, :t].reshape(b, t, n, d)


def _largest_block(s: int) -> int:
    """Queries of a block whose scores of S keys fit: a power of two, at least 8."""
    return 2 ** int(math.log2(max(8, SCORES // s)))


def _padding(t: int, s: int) -> int:
    """Rows to add to T queries so that large blocks divide them: a sixteenth of them at most, or
    what makes them a multiple of 8."""
    block = _largest_block(s)
    while block > 8 and -t % block > t // 16:
        block //= 2
    return -t % block


def _spread(x: Array, width: int) -> Array:
    """[B, S, D] -> [B, G, S, W]: in part i the lanes of head i hold x, the others zeros."""
    d = x.shape[-1]
    g = width // d
    parts = [jnp.pad(x, ((0, 0), (0, 0), (i * d, (g - 1 - i) * d))) for i in range(g)]
    return jnp.stack(parts, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, bias, scale, d, eps):
    """q [B, T, N D], k and v [B, G, S, W], bias [B, 1, S], scale [1, W] -> [B, T, N D]."""
    run = _call(functools.partial(_forward, d=d, eps=eps), q, k, "q", matmuls=2)
    return run(q, k, v, bias, scale)


def _attend_fwd(q, k, v, bias, scale, d, eps):
    return _attend(q, k, v, bias, scale, d, eps), (q, k, v, bias, scale)


def _attend_bwd(d, eps, saved, dy):
    q, k, v, bias, scale = saved
    run = _call(functools.partial(_backward, d=d, eps=eps), q, k, "qkvs", matmuls=5)
    dq, dk, dv, dscale = run(q, k, v, bias, scale, dy)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), jnp.zeros_like(bias), dscale.sum(0)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _call(kernel: Callable, q: Array, k: Array, outputs: str, matmuls: int) -> Callable:
    """A kernel over (rows of the batch, blocks of queries, tiles of heads)."""
    (b, t, c), (_, g, s, w) = q.shape, k.shape
    block = math.gcd(t, _largest_block(s))
    queries = pl.BlockSpec((1, block, w), lambda i, j, h: (i, j, h))
    keys = pl.BlockSpec((1, g, s, w), lambda i, j, h: (i, 0, 0, 0))
    row = pl.BlockSpec((1, 1, s), lambda i, j, h: (i, 0, 0))
    scale = pl.BlockSpec((1, w), lambda i, j, h: (0, 0))
    scale_out = pl.BlockSpec((1, 1, w), lambda i, j, h: (i, 0, 0))
    shapes = {
        "q": (queries, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        "k": (keys, jax.ShapeDtypeStruct(k.shape, jnp.float32)),
        "v": (keys, jax.ShapeDtypeStruct(k.shape, jnp.float32)),
        "s": (scale_out, jax.ShapeDtypeStruct((b, 1, w), jnp.float32)),
    }
    specs, out = zip(*(shapes[name] for name in outputs), strict=True)
    backward = len(outputs) > 1
    scores = b * t * s * (c // w) * g
    return pl.pallas_call(
        kernel,
        grid=(b, t // block, c // w),
        in_specs=[queries, keys, keys, row, scale] + [queries] * backward,
        out_specs=list(specs) if backward else specs[0],
        out_shape=list(out) if backward else out[0],
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * scores * (w // g),
            transcendentals=scores,
            bytes_accessed=(3 if backward else 2) * q.size * q.dtype.itemsize
            + (4 if backward else 2) * k.size * k.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=INTERPRET,
    )


INTERPRET = False  # for tests on a CPU


def _heads(x: Array, d: int) -> list[Array]:
    """For every head of a tile [T, W], which lanes are its own: [1, W] of 0 and 1."""
    lane = lax.broadcasted_iota(jnp.int32, (1, x.shape[-1]), 1)
    return [
        ((lane >= i * d) & (lane < (i + 1) * d)).astype(jnp.float32)
        for i in range(x.shape[-1] // d)
    ]


def _inverse(x: Array, d: int, eps: float) -> Array:
    """1 / RMS of every head of x [T, W] float32, in all lanes of the head."""
    square = jnp.square(x)
    found = 0.0
    for mine in _heads(x, d):
        mean = jnp.sum(square * mine, axis=-1, keepdims=True) / d
        found = found + lax.rsqrt(mean + eps) * mine
    return found


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _weights(q: Array, k: Array, bias: Array) -> tuple[Array, Array]:
    """exp(scores - their maximum) [T, S] and 1 / their sums [T, 1]."""
    scores = _dot(q, k, (1, 1)) + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights, 1 / jnp.sum(weights, axis=-1, keepdims=True)


def _forward(q_ref, k_ref, v_ref, bias_ref, scale_ref, y_ref, *, d, eps):
    q = q_ref[0].astype(jnp.float32)
    q = (q * _inverse(q, d, eps) * scale_ref[...]).astype(k_ref.dtype)
    y = 0.0
    for i in range(k_ref.shape[1]):
        weights, inverse = _weights(q, k_ref[0, i], bias_ref[0])
        y = y + _dot(weights.astype(v_ref.dtype), v_ref[0, i], (1, 0)) * inverse
    y_ref[0] = y.astype(y_ref.dtype)


def _backward(
    q_ref, k_ref, v_ref, bias_ref, scale_ref, dy_ref,
    dq_ref, dk_ref, dv_ref, dscale_ref, *, d, eps,
):  # fmt: skip
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        for ref in (dk_ref, dv_ref, dscale_ref):
            ref[...] = jnp.zeros_like(ref)

    raw = q_ref[0].astype(jnp.float32)
    norm = _inverse(raw, d, eps)
    unit = raw * norm
    q = (unit * scale_ref[...]).astype(k_ref.dtype)
    dy = dy_ref[0]
    dq = 0.0
    for i in range(k_ref.shape[1]):
        k, v = k_ref[0, i], v_ref[0, i]
        weights, inverse = _weights(q, k, bias_ref[0])
        weights = weights * inverse
        dv_ref[0, i] += _dot(weights.astype(dy.dtype), dy, (0, 0))
        dweights = _dot(dy, v, (1, 1))
        mean = jnp.sum(weights * dweights, axis=-1, keepdims=True)
        dscores = weights * (dweights - mean)
        dscores = dscores.astype(k.dtype)
        dk_ref[0, i] += _dot(dscores, q, (0, 0))
        dq = dq + _dot(dscores, k, (1, 0))
    dscale_ref[0] += jnp.sum(dq * unit, axis=0, keepdims=True)
    dunit = dq * scale_ref[...]
    along = 0.0
    for mine in _heads(raw, d):
        along = along + jnp.sum(dunit * unit * mine, axis=-1, keepdims=True) / d * mine
    dq_ref[0] = (norm * (dunit - unit * along)).astype(dq_ref.dtype)
