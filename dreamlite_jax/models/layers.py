"""Parameter-holding layers shared by every network: each owns its parameters and calls one
primitive.

Names follow diffusers' and transformers' modules, so that a parameter's path is its tensor's name
(see `pretrained.py`). Parameters are float32 unless `param_dtype` says otherwise; `dtype` is the
compute dtype to which inputs and kernels are cast. Norms take their statistics in float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.primitives import PLAIN, Primitives, add_bias

Dtype = Any

# PyTorch initialises Linear and Conv2d with U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernels and biases
# alike; keeping that law keeps the scale of activations that DreamLite's depth and norms were
# designed with.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Linear(nn.Module):
    """x [..., I] -> [..., features]; parameters kernel [I, O] and bias [O].

    `apply(x, kernel, bias)` replaces the arithmetic where more is to be done with the parameters.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(
        self, x: Array, apply: Callable[[Array, Array, Array | None], Array] | None = None
    ) -> Array:
        kernel = self.param("kernel", uniform_fan_in, (x.shape[-1], self.features), jnp.float32)
        x, kernel, bias = x.astype(self.dtype), kernel.astype(self.dtype), None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if apply is not None:
            return apply(x, kernel, bias)
        y = self.ops.linear(x, kernel)
        return y if bias is None else add_bias(y, bias)


class Conv(nn.Module):
    """x [B, H, W, I] -> [B, H/stride, W/stride, features]; kernel [k, k, I, O], zero padding k //
    2 on both sides.

    `convolve(x, kernel)` replaces the primitive where more than a convolution is to be done.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, convolve: Callable[[Array, Array], Array] | None = None) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", uniform_fan_in, shape, jnp.float32).astype(self.dtype)
        x = x.astype(self.dtype)
        if convolve is not None:
            y = convolve(x, kernel)
        elif self.kernel_size == 1:
            y = self.ops.linear(x, kernel[0, 0])
        else:
            y = self.ops.conv(x, kernel, self.stride)
        if self.use_bias:
            y = add_bias(
                y, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            )
        return y


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution of x [B, H, W, C], no bias; kernel [3, 3, 1, C].

    `convolve` replaces the primitive where more than a convolution is to be done with the kernel.
    """

    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, convolve: Callable[[Array, Array], Array] | None = None) -> Array:
        kernel = self.param("kernel", uniform_fan_in, (3, 3, 1, x.shape[-1]), jnp.float32)
        convolve = convolve or self.ops.depthwise_conv
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype))


class GroupNorm(nn.Module):
    """GroupNorm of x [B, H, W, C]; scale and bias [C]."""

    groups: int
    eps: float
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return self.ops.group_norm(x, scale, bias, groups=self.groups, eps=self.eps)


class NormWeights(nn.Module):
    """The parameters of a norm that is done as a part of something larger: scale [C], and bias [C]
    where it has one."""

    channels: int
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[Array, ...]:
        scale = self.param("scale", nn.initializers.ones, (self.channels,), jnp.float32)
        if not self.use_bias:
            return (scale,)
        return scale, self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)


class LayerNorm(nn.Module):
    """LayerNorm of x [..., C]; scale and bias [C]."""

    eps: float
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return self.ops.layer_norm(x, scale, bias, eps=self.eps)


class RMSNorm(nn.Module):
    """RMSNorm of x [..., C]; scale [C]."""

    eps: float
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return self.ops.rms_norm(x, scale, eps=self.eps)
