"""GroupNorm, SiLU and depthwise 3x3 convolution on a TPU in one pass over memory, by Pallas.

XLA's grouped convolution spends tens of times what its bytes cost, and libtpu 0.0.52 dies of it at
two rows a device and more. Here a block of pixel rows is normalised and activated on its way into a
core's own memory, where its nine shifted views are read at their offsets; statistics come before,
in plain JAX. Backward there is again one pass: through the convolution, the activation and the
scaling, with the sums for all of their parameters.

Shapes: B batch, H height, W width, C channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dreamlite_jax.models.primitives import PRODUCT

LANES = 128
PIXELS = 8192  # of a block
EDGE = 8  # columns beside a block's own: a column more on either side, aligned
_VMEM = 60 * 2**20  # v5p has 64 MiB, v5e and v6e 128


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
    """depthwise_conv(silu(group_norm(x + shift))) of x [B, H, W, C].

    shift [B, C] or None, scale and bias [C], kernel [3, 3, 1, C].
    """
    shift = None if shift is None else shift.astype(jnp.float32)
    mean, variance = group_moments(x, groups, shift)
    factor = lax.rsqrt(variance + eps) * scale
    mean = mean if shift is None else mean - shift
    affine = jnp.stack([mean, factor, jnp.broadcast_to(bias, factor.shape)], axis=1)
    return _convolve(x, affine, kernel.reshape(9, -1).astype(jnp.float32))


def group_moments(x: Array, groups: int, shift: Array | None = None) -> tuple[Array, Array]:
    """Mean and variance of x + shift over H, W and C/groups, x [B, H, W, C] and shift float32 [B,
    C] or None: [B, C] float32, every channel holding its group's.

    A group's variance is the mean of its channels' plus that of their means: no sum goes over x +
    shift, nor is shift's gradient one over pixels.
    """
    b, c = x.shape[0], x.shape[-1]
    x32 = x.astype(jnp.float32)

    def channel_mean(v: Array) -> Array:
        return checkpoint_name(jnp.mean(v, axis=(1, 2)), PRODUCT)

    def group_mean(v: Array) -> Array:  # [B, C] -> the same
        return jnp.repeat(v.reshape(b, groups, c // groups).mean(-1), c // groups, axis=1)

    own = channel_mean(x32)
    if x.dtype == jnp.bfloat16:
        within = one_pass_variance(channel_mean(jnp.square(x32)), own)
    else:
        within = channel_mean(jnp.square(x32 - own[:, None, None, :]))
    moved = own if shift is None else own + shift
    mean = group_mean(moved)
    return mean, group_mean(within + jnp.square(moved - mean))


def one_pass_variance(mean_square: Array, mean: Array) -> Array:
    """E[x^2] - E[x]^2 of bfloat16 values, whose sums come of the pass that made them.

    What the difference loses, some 2^-24 of the squared mean, is little beside the variance of what
    the values lost when they were rounded: 2^-20 of it.
    """
    return jnp.maximum(mean_square - jnp.square(mean), 0)


@jax.custom_vjp
def _convolve(x, affine, kernel):
    """x [B, H, W, C], affine [B, 3, C] (mean, factor, bias), kernel [9, C]."""
    specs, grid = _specs(x.shape)
    y = pl.pallas_call(
        functools.partial(_forward, blocks=grid[2]),
        grid=grid,
        in_specs=[*specs["tall"], specs["affine"], specs["kernel"]],
        out_specs=specs["block"],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[_scratch(x.shape)],
        compiler_params=_params(),
        cost_estimate=_cost(x, 2, 27),
        interpret=INTERPRET,
    )(x, x, x, affine, kernel)
    return y


def _convolve_fwd(x, affine, kernel):
    return _convolve(x, affine, kernel), (x, affine, kernel)


def _convolve_bwd(saved, g):
    x, affine, kernel = saved
    b, _, _, c = x.shape
    specs, grid = _specs(x.shape)
    dx, daffine, dkernel = pl.pallas_call(
        functools.partial(_backward, blocks=grid[2]),
        grid=grid,
        in_specs=[*specs["tall"], *specs["tall"], specs["affine"], specs["kernel"]],
        out_specs=[specs["block"], specs["affine"], specs["sums"]],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(affine.shape, jnp.float32),
            jax.ShapeDtypeStruct((b, 9, c), jnp.float32),
        ],
        scratch_shapes=[_scratch(x.shape), _scratch(x.shape)],
        compiler_params=_params(),
        cost_estimate=_cost(x, 3, 60),
        interpret=INTERPRET,
    )(x, x, x, g, g, g, affine, kernel)
    return dx, daffine, dkernel.sum(0)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)
INTERPRET = False  # for tests on a CPU


def _rows(shape: tuple[int, ...]) -> int:
    """Pixel rows of a block."""
    _, h, w, _ = shape
    return math.gcd(h, 2 ** int(math.log2(max(1, PIXELS // w))))


def _specs(shape: tuple[int, ...]) -> tuple[dict, tuple[int, int, int]]:
    """Block specs by name, and the grid: rows of the batch, channels, blocks of pixel rows."""
    b, h, w, c = shape
    rows, lanes = _rows(shape), LANES if c % LANES == 0 else c
    block = pl.BlockSpec((1, rows, w, lanes), lambda i, j, k: (i, k, 0, j))
    # The row above and the row below a block; at the picture's edges any, for they are not read.
    above = pl.BlockSpec((1, 1, w, lanes), lambda i, j, k: (i, jnp.maximum(k * rows - 1, 0), 0, j))
    below = pl.BlockSpec(
        (1, 1, w, lanes), lambda i, j, k: (i, jnp.minimum((k + 1) * rows, h - 1), 0, j)
    )
    specs = {
        "block": block,
        "tall": (block, above, below),
        "affine": pl.BlockSpec((1, 3, lanes), lambda i, j, k: (i, 0, j)),
        "kernel": pl.BlockSpec((9, lanes), lambda i, j, k: (0, j)),
        "sums": pl.BlockSpec((1, 9, lanes), lambda i, j, k: (i, 0, j)),
    }
    return specs, (b, c // lanes, h // rows)


def _scratch(shape: tuple[int, ...]) -> pltpu.VMEM:
    _, _, w, c = shape
    return pltpu.VMEM((_rows(shape) + 2, w + 2 * EDGE, LANES if c % LANES == 0 else c), jnp.float32)


def _params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
    )


def _cost(x: Array, passes: int, operations: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=operations * x.size,
        transcendentals=x.size,
        bytes_accessed=passes * x.size * x.dtype.itemsize,
    )


# --- Within a block -------------------------------------------------------------------------------


def _activated(x: Array, affine: Array) -> tuple[Array, Array, Array, Array]:
    """SiLU of (x - mean) * factor + bias; with x - mean, that sum and its sigmoid. Float32."""
    centred = x.astype(jnp.float32) - affine[0:1]
    z = centred * affine[1:2] + affine[2:3]
    sigmoid = 0.5 * jnp.tanh(0.5 * z) + 0.5
    return z * sigmoid, centred, z, sigmoid


def _fill(padded, parts, blocks: int, function) -> None:
    """function of a block and of the rows above and below it, zeros around the picture."""
    block_ref, above_ref, below_ref = parts
    k, rows, w = pl.program_id(2), block_ref.shape[1], block_ref.shape[2]
    zero = jnp.zeros((EDGE, padded.shape[2]), jnp.float32)

    def put(i, row):
        padded[i, pl.ds(0, EDGE)] = zero
        padded[i, pl.ds(EDGE, w)] = row
        padded[i, pl.ds(EDGE + w, EDGE)] = zero

    put(0, jnp.where(k == 0, 0.0, function(above_ref[0, 0])))
    put(rows + 1, jnp.where(k == blocks - 1, 0.0, function(below_ref[0, 0])))

    @pl.loop(0, rows)
    def _(i):
        put(i + 1, function(block_ref[0, i]))


def _tap(padded, i, row: int, column: int) -> Array:
    """Row i of a block moved by up to one row and column, [W, C]."""
    return padded[i + 1 + row, pl.ds(EDGE + column, padded.shape[1] - 2 * EDGE)]


_TAPS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def _forward(x_ref, above_ref, below_ref, affine_ref, kernel_ref, y_ref, padded, *, blocks):
    affine = affine_ref[0]
    _fill(padded, (x_ref, above_ref, below_ref), blocks, lambda x: _activated(x, affine)[0])

    @pl.loop(0, x_ref.shape[1])
    def _(i):
        taps = enumerate(_TAPS)
        y = sum(_tap(padded, i, *tap) * kernel_ref[n : n + 1] for n, tap in taps)
        y_ref[0, i] = y.astype(y_ref.dtype)


def _backward(
    x_ref, x_above_ref, x_below_ref, g_ref, g_above_ref, g_below_ref, affine_ref, kernel_ref,
    dx_ref, daffine_ref, dkernel_ref, u_padded, g_padded, *, blocks,
):  # fmt: skip
    affine = affine_ref[0]
    x_parts = (x_ref, x_above_ref, x_below_ref)
    _fill(u_padded, x_parts, blocks, lambda x: _activated(x, affine)[0])
    g_parts = (g_ref, g_above_ref, g_below_ref)
    _fill(g_padded, g_parts, blocks, lambda g: g.astype(jnp.float32))

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (daffine_ref, dkernel_ref):
            ref[...] = jnp.zeros_like(ref)

    def by_eights(v):  # [W, C] -> [8, C]: the sum over columns, but for the last step
        return v.reshape(-1, 8, v.shape[-1]).sum(0)

    def row(i, sums):
        g = _tap(g_padded, i, 0, 0)
        dkernel = [by_eights(_tap(u_padded, i, *tap) * g) for tap in _TAPS]
        du = sum(
            _tap(g_padded, i, -row, -column) * kernel_ref[n : n + 1]
            for n, (row, column) in enumerate(_TAPS)
        )
        u, centred, _, sigmoid = _activated(x_ref[0, i], affine)
        dz = du * (sigmoid + u * (1 - sigmoid))
        dx_ref[0, i] = (dz * affine[1:2]).astype(dx_ref.dtype)
        found = [*dkernel, by_eights(dz * centred), by_eights(dz)]
        return tuple(a + b for a, b in zip(sums, found, strict=True))

    zero = jnp.zeros((8, x_ref.shape[3]), jnp.float32)
    sums = lax.fori_loop(0, x_ref.shape[1], row, (zero,) * 11)
    *dkernel, dfactor, dbias = (jnp.sum(v, axis=0, keepdims=True) for v in sums)
    for n, value in enumerate(dkernel):
        dkernel_ref[0, n : n + 1] += value
    daffine_ref[0, 0:1] += -dbias * affine[1:2]
    daffine_ref[0, 1:2] += dfactor
    daffine_ref[0, 2:3] += dbias
