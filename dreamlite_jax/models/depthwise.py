"""The depthwise 3x3 convolution: one bilinear operation, two lowerings.

XLA's grouped convolution on TPU and GPU; on the CPU, where that is tens of times slower than it
could be, nine shifted multiply-adds. Each transpose is again one of the two primitives here (see
`bilinear`).

Shapes: x and y [B, H, W, C], zero-padded to the same size; kernel [3, 3, 1, C].
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive

from dreamlite_jax.models import bilinear


def depthwise_conv(x: Array, kernel: Array) -> Array:
    """Depthwise convolution of x [B, H, W, C] with kernel [3, 3, 1, C] -> [B, H, W, C]."""
    return _convolve.bind(jnp.asarray(x), jnp.asarray(kernel))


def grouped(x: Array, kernel: Array) -> Array:
    """`depthwise_conv` as XLA's grouped convolution."""
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=x.shape[-1]
    )


def shifted(x: Array, kernel: Array) -> Array:
    """`depthwise_conv` as nine shifted multiply-adds in float32."""
    weights = kernel.reshape(9, -1).astype(jnp.float32)
    products = (tap * weight for tap, weight in zip(_taps(x), weights, strict=True))
    return lax.optimization_barrier(sum(products).astype(x.dtype))


def _grouped_gradient(x: Array, g: Array) -> Array:
    kernel = jax.ShapeDtypeStruct((3, 3, 1, x.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: grouped(x, kernel), kernel)(g)[0]


def _shifted_gradient(x: Array, g: Array) -> Array:
    """One dot product a tap, all nine in one pass over x and g."""
    g32 = lax.optimization_barrier(g).astype(jnp.float32)
    products = [tap * g32 for tap in _taps(x)]
    zeros = [jnp.float32(0)] * len(products)
    add = lambda left, right: [a + b for a, b in zip(left, right, strict=True)]  # noqa: E731
    sums = lax.reduce(products, zeros, add, (0, 1, 2))
    return jnp.stack(sums).reshape(3, 3, 1, -1).astype(x.dtype)


def _taps(x: Array) -> list[Array]:
    """The nine shifted views of x, float32, row-major over the window, zeros outside."""
    h, w = x.shape[1:3]
    # The barriers keep XLA's CPU fusion from recomputing whatever produced x once per tap.
    padded = jnp.pad(lax.optimization_barrier(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    padded = lax.optimization_barrier(padded.astype(jnp.float32))
    return [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]


# --- The two primitives ---------------------------------------------------------------------------


def _batched(primitive: Primitive, args: tuple, dims: tuple) -> tuple[Array, int]:
    """A mapped axis becomes channels: they do not mix."""
    n = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)

    def into_channels(a, d):
        a = jnp.broadcast_to(a[..., None, :], (*a.shape[:-1], n, a.shape[-1])) if d is None else a
        a = a if d is None else jnp.moveaxis(a, d, -2)
        return a.reshape(*a.shape[:-2], -1)

    y = primitive.bind(*(into_channels(a, d) for a, d in zip(args, dims, strict=True)))
    return y.reshape(*y.shape[:-1], n, -1), y.ndim - 1


def _turned(kernel: Array) -> Array:
    return kernel[::-1, ::-1]


_convolve = bilinear.operation(
    "depthwise_conv", lambda x, kernel: x.update(), shifted, grouped, _batched
)
_kernel_gradient = bilinear.operation(
    "depthwise_kernel_gradient",
    lambda x, g: x.update(shape=(3, 3, 1, x.shape[-1])),
    _shifted_gradient,
    _grouped_gradient,
    _batched,
)
# By x the convolution's transpose is itself with the kernel turned round, by the kernel it is the
# kernel's gradient; and the same again for that.
bilinear.transposes(
    _convolve,
    lambda g, x, kernel: _convolve.bind(g, _turned(kernel)),
    lambda g, x, kernel: _kernel_gradient.bind(x, g),
)
bilinear.transposes(
    _kernel_gradient,
    lambda dk, x, g: _convolve.bind(g, _turned(dk)),
    lambda dk, x, g: _convolve.bind(x, dk),
)
