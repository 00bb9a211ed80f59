"""The convolution: lax's own, with gradients that stay fast in loops on the CPU.

XLA's CPU compiler has a fast convolution for one order of axes: batch, rows, columns, channels. It
brings others into that order outside of loops and conditionals alone; within them it takes a plain
nest of loops, five to ten times as slow. The result of a convolution has the order, what lax makes
of its gradients has not. So on the CPU the gradients are said in that order from the start: the
same convolutions, to the bit, wherever they stand. Other platforms get what lax makes.

With x [B, H, W, I], kernel [k, k, I, O] and g [B, H', W', O], the sum of g * conv(x, kernel) is
linear in all three. The operations here are its three gradients, and each transpose of one is
another.

`stride`, `size` = (H, W) and `width` = k are static and the same for all three.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive

from dreamlite_jax.models import bilinear

ORDER = ("NHWC", "HWIO", "NHWC")


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolution of x [B, H, W, I] with an odd square kernel [k, k, I, O], zero-padded k // 2 on
    *both* sides.

    With stride 2 this is PyTorch's padding=1, not XLA's SAME, which would pad one side only.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    return _convolve.bind(x, kernel, stride=stride, size=x.shape[1:3], width=kernel.shape[0])


def convolve(x: Array, kernel: Array, *, stride: int, width: int, **_) -> Array:
    """`conv` as lax's: x [B, H, W, I], kernel [k, k, I, O] -> [B, H', W', O]."""
    pad = width // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=ORDER
    )


# --- The gradients as lax makes them --------------------------------------------------------------


def by_x(g: Array, kernel: Array, *, size: tuple[int, int], **how) -> Array:
    """g [B, H', W', O], kernel [k, k, I, O] -> [B, H, W, I]."""
    x = jax.ShapeDtypeStruct((g.shape[0], *size, kernel.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: convolve(x, kernel, size=size, **how), x)(g)[0]


def by_kernel(x: Array, g: Array, *, width: int, **how) -> Array:
    """x [B, H, W, I], g [B, H', W', O] -> [k, k, I, O]."""
    kernel = jax.ShapeDtypeStruct((width, width, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: convolve(x, kernel, width=width, **how), kernel)(g)[
        0
    ]


# --- The same, in the order that the CPU likes ----------------------------------------------------


def ordered_by_x(
    g: Array, kernel: Array, *, stride: int, size: tuple[int, int], width: int
) -> Array:
    """`by_x`: g with zeros between its pixels, convolved with the kernel turned round."""
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    pad = width // 2
    # Behind, as much as lets the kernel end beside the last row of x.
    pads = [(pad, n - 1 - stride * (m - 1) + pad) for n, m in zip(size, g.shape[1:3], strict=True)]
    return lax.conv_general_dilated(
        g, turned, (1, 1), pads, lhs_dilation=(stride, stride), dimension_numbers=ORDER
    )


def ordered_by_kernel(
    x: Array, g: Array, *, stride: int, size: tuple[int, int], width: int
) -> Array:
    """`by_kernel`: x convolved with g, B as the channels that are summed over."""
    pad = width // 2
    # Behind, as much as leaves the spread g so many places as the kernel has.
    pads = [(pad, stride * (m - 1) + pad + 1 - n) for n, m in zip(size, g.shape[1:3], strict=True)]
    return lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),  # [I, H, W, B]
        g.transpose(1, 2, 0, 3),  # [H', W', B, O]
        (1, 1),
        pads,
        rhs_dilation=(stride, stride),
        dimension_numbers=ORDER,
    ).transpose(1, 2, 0, 3)


# --- The three primitives -------------------------------------------------------------------------


def _primitive(name: str, cpu: bilinear.Form, default: bilinear.Form) -> Primitive:
    def abstract(left, right, **how):
        result = jax.eval_shape(functools.partial(default, **how), left, right)
        return left.update(shape=result.shape)

    def batched(primitive, args, dims, **how):  # nothing here is in a hurry: lax knows how
        del primitive
        return jax.vmap(functools.partial(default, **how), dims)(*args), 0

    return bilinear.operation(name, abstract, cpu, default, batched)


_convolve = _primitive("conv", convolve, convolve)
_by_x = _primitive("conv_by_x", ordered_by_x, by_x)
_by_kernel = _primitive("conv_by_kernel", ordered_by_kernel, by_kernel)

bilinear.transposes(
    _convolve,
    lambda g, x, kernel, **how: _by_x.bind(g, kernel, **how),
    lambda g, x, kernel, **how: _by_kernel.bind(x, g, **how),
)
bilinear.transposes(
    _by_x,
    lambda dx, g, kernel, **how: _convolve.bind(dx, kernel, **how),
    lambda dx, g, kernel, **how: _by_kernel.bind(dx, g, **how),
)
bilinear.transposes(
    _by_kernel,
    lambda dk, x, g, **how: _by_x.bind(g, dk, **how),
    lambda dk, x, g, **how: _convolve.bind(x, dk, **how),
)
