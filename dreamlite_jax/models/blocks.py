"""The blocks of the DreamLite U-Net: residual, transformer, and the down / mid / up levels made of
them.

Shapes: B batch, H height, W width, C channels, E width of the time embedding, L text length,
N heads, D head width, F text feature width. Activations are [B, H, W, C] everywhere, inside the
transformers too (a token is a pixel), so no block reshapes what the next one wants back.
Names are diffusers' (`unet_dreamlite.py`, `transformer_2d_dreamlite.py`): a path is a tensor name.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dreamlite_jax.models.layers import (
    Conv,
    DepthwiseConv,
    GroupNorm,
    LayerNorm,
    Linear,
    NormWeights,
    RMSNorm,
)
from dreamlite_jax.models.primitives import PLAIN, PRODUCT, Primitives, add_bias, of_product

Dtype = Any

QK_NORM_EPS = 1e-5  # diffusers' Attention
LAYER_NORM_EPS = 1e-5  # diffusers' BasicTransformerBlock
TRANSFORMER_GROUP_NORM_EPS = 1e-6  # diffusers' Transformer2DModel


REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


def rematerialised(block: type[nn.Module], spec: str, path: str) -> type[nn.Module]:
    """`block`, recomputed in the backward pass where `spec` asks for it at `path`.

    spec is one of REMAT_POLICIES: "none", "full" (a block's inputs alone are saved) or "products"
    (what linear layers and attention give is saved, too, in the compute dtype, and on TPUs the sums
    of norms; the cheap rest is computed again); optionally followed by "@" and a regex of the block
    paths it applies to: "full@down_blocks_0|up_blocks_2". Residual and transformer blocks are the
    units.
    """
    policy, where = split_remat(spec)
    if policy == "none" or not where.search(path):
        return block
    return nn.remat(block, policy=REMAT_POLICIES[policy])


def split_remat(spec: str) -> tuple[str, re.Pattern]:
    """A remat string's policy and places.

    Raises:
      ValueError: an unknown policy or an unusable regex.
    """
    policy, _, where = spec.partition("@")
    if policy not in REMAT_POLICIES:
        raise ValueError(
            f'remat: unknown policy "{policy}"; supported are {", ".join(REMAT_POLICIES)}'
        )
    try:
        return policy, re.compile(where)
    except re.error as error:
        raise ValueError(f'remat: "{where}" is no regex ({error})') from error


class SeparableConv(nn.Module):
    """Depthwise 3x3 then pointwise convolution, no biases: [B, H, W, I] -> [B, H, W, features]."""

    features: int
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, convolve: Callable[[Array, Array], Array] | None = None) -> Array:
        """convolve: see `DepthwiseConv`."""
        x = DepthwiseConv(self.dtype, self.ops, name="depthwise")(x, convolve)
        return Conv(self.features, 1, 1, False, self.dtype, self.ops, name="pointwise")(x)


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice around the time embedding, plus a shortcut.

    With `separable` both convolutions are depthwise-separable and the width between them, to which
    the time embedding is added, is doubled (an inverted residual).
    """

    features: int
    groups: int
    eps: float
    separable: bool
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, temb: Array) -> Array:
        """x [B, H, W, I], temb [B, E] -> [B, H, W, features]."""

        def activated_conv(h, shift, features, norm, name):
            """The convolution `name` of silu(norm(h + shift)), shift [B, 1, 1, I] or None."""
            if self.separable:
                conv = SeparableConv(features, self.dtype, self.ops, name=name)
            else:
                conv = Conv(features, 3, 1, True, self.dtype, self.ops, name=name)
            if not self.separable or self.ops.norm_silu_depthwise is None:
                h = h if shift is None else add_bias(h, shift)
                return conv(self.ops.silu(GroupNorm(self.groups, self.eps, self.ops, name=norm)(h)))
            weights = NormWeights(h.shape[-1], name=norm)()
            how = {"groups": self.groups, "eps": self.eps}
            by_row = None if shift is None else shift[:, 0, 0]
            return conv(h, lambda h, k: self.ops.norm_silu_depthwise(h, by_row, *weights, k, **how))

        inner = 2 * self.features if self.separable else self.features
        h = activated_conv(x, None, inner, "norm1", "conv1")
        temb = self.ops.silu(temb)[:, None, None, :]
        temb = Linear(inner, True, self.dtype, self.ops, name="time_emb_proj")(temb)
        h = activated_conv(h, temb, self.features, "norm2", "conv2")
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, 1, True, self.dtype, self.ops, name="conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Multi-head attention of tokens x to `context` (or to themselves) with grouped key/value
    heads."""

    heads: int
    kv_heads: int
    qk_norm: bool
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, bias: Array | None = None) -> Array:
        """x [B, H, W, C], context [B, L, F] or None, bias float32 [B, 1, 1, L] or None -> [B, H,
        W, C]."""
        b, h, w, c = x.shape
        width = c // self.heads
        source = x if context is None else context

        def project(value, heads, name):
            y = Linear(heads * width, False, self.dtype, self.ops, name=name)(value)
            return y.reshape(b, -1, heads, width)

        q = project(x, self.heads, "to_q")
        k = project(source, self.kv_heads, "to_k")
        v = project(source, self.kv_heads, "to_v")
        if self.qk_norm:
            k = RMSNorm(QK_NORM_EPS, self.ops, name="norm_k")(k)
        if self.qk_norm and self.ops.normed_attention is not None:
            weights = NormWeights(width, use_bias=False, name="norm_q")()
            y = self.ops.normed_attention(q, k, v, bias, *weights, eps=QK_NORM_EPS)
        else:
            q = RMSNorm(QK_NORM_EPS, self.ops, name="norm_q")(q) if self.qk_norm else q
            y = self.ops.attention(q, k, v, bias)

        def project_back(y, kernel, bias):
            return add_bias(of_product(self.ops.linear, y, kernel), bias)

        out = Linear(c, True, self.dtype, self.ops, name="to_out_0")
        return out(y.reshape(b, h, w, c), project_back)


class GEGLU(nn.Module):
    """x [..., C] -> [..., features]: one half gates the other by GELU (Shazeer 2020, eq. 6)."""

    features: int
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        proj = Linear(2 * self.features, True, self.dtype, self.ops, name="proj")
        if self.ops.geglu is not None:
            return proj(x, self.ops.geglu)
        value, gate = jnp.split(proj(x), 2, axis=-1)
        return value * self.ops.gelu(gate)


class FeedForward(nn.Module):
    """x [..., C] -> [..., C] through a GEGLU of mult * C."""

    mult: int
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = GEGLU(self.mult * x.shape[-1], self.dtype, self.ops, name="net_0")(x)
        return Linear(x.shape[-1], True, self.dtype, self.ops, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a LayerNorm with a residual.

    Without self-attention the residual stream is *replaced* by norm1's output before the
    cross-attention; this is how DreamLite removed it from its high-resolution levels.
    """

    heads: int
    kv_heads: int
    qk_norm: bool
    ff_mult: int
    self_attention: bool
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, context: Array, bias: Array | None) -> Array:
        """x [B, H, W, C], context [B, L, F], bias float32 [B, 1, 1, L] or None -> [B, H, W, C]."""

        def attend(name, *args):
            module = Attention(
                self.heads, self.kv_heads, self.qk_norm, self.dtype, self.ops, name=name
            )
            return module(*args)

        def norm(name, value):
            return LayerNorm(LAYER_NORM_EPS, self.ops, name=name)(value)

        h = norm("norm1", x)
        x = x + attend("attn1", h) if self.self_attention else h
        x = x + attend("attn2", norm("norm2", x), context, bias)
        return x + FeedForward(self.ff_mult, self.dtype, self.ops, name="ff")(norm("norm3", x))


class Transformer2D(nn.Module):
    """GroupNorm, projection, `layers` transformer blocks and projection back, around a residual."""

    layers: int
    heads: int
    kv_heads: int
    qk_norm: bool
    ff_mult: int
    groups: int
    self_attention: bool
    linear_projection: bool
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Array, context: Array, bias: Array | None) -> Array:
        """x [B, H, W, C], context [B, L, F], bias float32 [B, 1, 1, L] or None -> [B, H, W, C]."""
        residual, c = x, x.shape[-1]

        def project(
            name,
        ):  # the same arithmetic; what differs is the kernel's rank in the checkpoint
            if self.linear_projection:
                return Linear(c, True, self.dtype, self.ops, name=name)
            return Conv(c, 1, 1, True, self.dtype, self.ops, name=name)

        x = GroupNorm(self.groups, TRANSFORMER_GROUP_NORM_EPS, self.ops, name="norm")(x)
        x = project("proj_in")(x)
        for i in range(self.layers):
            name = f"transformer_blocks_{i}"
            block = rematerialised(TransformerBlock, self.remat, "/".join((*self.path, name)))
            x = block(
                self.heads, self.kv_heads, self.qk_norm, self.ff_mult, self.self_attention,
                self.dtype, self.ops, name=name,
            )(x, context, bias)  # fmt: skip
        return project("proj_out")(x) + residual


class Level(nn.Module):
    """What the down, mid and up blocks share: how one residual block and one transformer are made.

    layers: residual blocks; transformer_layers: depth of the transformer after each (0: none);
    resample: whether the level ends by halving (down) or doubling (up) the resolution.
    """

    features: int
    layers: int
    transformer_layers: int
    heads: int
    kv_heads: int
    qk_norm: bool
    ff_mult: int
    groups: int
    eps: float
    separable: bool
    self_attention: bool
    linear_projection: bool
    resample: bool
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN
    remat: str = "none"

    def resnet(self, i: int, x: Array, temb: Array) -> Array:
        name = f"resnets_{i}"
        block = rematerialised(ResnetBlock, self.remat, "/".join((*self.path, name)))
        return block(
            self.features, self.groups, self.eps, self.separable, self.dtype, self.ops, name=name
        )(x, temb)

    def transformer(self, i: int, x: Array, context: Array, bias: Array | None) -> Array:
        if not self.transformer_layers:
            return x
        return Transformer2D(
            self.transformer_layers, self.heads, self.kv_heads, self.qk_norm, self.ff_mult,
            self.groups, self.self_attention, self.linear_projection, self.dtype, self.ops,
            self.remat, name=f"attentions_{i}",
        )(x, context, bias)  # fmt: skip


class DownBlock(Level):
    @nn.compact
    def __call__(
        self, x: Array, temb: Array, context: Array, bias: Array | None
    ) -> tuple[Array, list[Array]]:
        """x [B, H, W, I] -> [B, H/2, W/2, features] (or H x W in the last level) and every state on
        the way, for the skip connections."""
        skips = []
        for i in range(self.layers):
            x = self.resnet(i, x, temb)
            x = self.transformer(i, x, context, bias)
            skips.append(x)
        if self.resample:
            x = Downsample(self.features, self.dtype, self.ops, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(Level):
    @nn.compact
    def __call__(self, x: Array, temb: Array, context: Array, bias: Array | None) -> Array:
        """x [B, H, W, features] -> the same shape; `layers` transformers between residual
        blocks."""
        x = self.resnet(0, x, temb)
        for i in range(self.layers):
            x = self.transformer(i, x, context, bias)
            x = self.resnet(i + 1, x, temb)
        return x


class UpBlock(Level):
    @nn.compact
    def __call__(
        self, x: Array, skips: list[Array], temb: Array, context: Array, bias: Array | None
    ) -> Array:
        """x [B, H, W, I] -> [B, 2H, 2W, features] (or H x W in the last level); skips in the order
        in which they are joined on."""
        for i, skip in enumerate(skips):
            x = self.resnet(i, jnp.concatenate([x, skip], axis=-1), temb)
            x = self.transformer(i, x, context, bias)
        if self.resample:
            x = Upsample(self.features, self.dtype, self.ops, name="upsamplers_0")(x)
        return x


class Downsample(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, C] by a 3x3 convolution of stride 2."""

    features: int
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(self.features, 3, 2, True, self.dtype, self.ops, name="conv")(x)


class Upsample(nn.Module):
    """[B, H, W, C] -> [B, 2H, 2W, C]: nearest neighbour, then a 3x3 convolution."""

    features: int
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = Conv(self.features, 3, 1, True, self.dtype, self.ops, name="conv")
        if self.ops.upsample_conv is not None:
            return conv(x, self.ops.upsample_conv)
        return conv(self.ops.upsample_nearest(x))


def sinusoids(positions: Array, width: int, *, cos_first: bool, shift: float) -> Array:
    """positions [...] -> float32 [..., width]: sines and cosines at `width / 2` frequencies.

    frequency_i = 10000 ** (-i / (width / 2 - shift)); Ho et al. 2020, diffusers'
    `get_timestep_embedding` with `flip_sin_to_cos` = cos_first and `downscale_freq_shift` = shift.
    The frequencies are NumPy's: angles are up to 1000 times as large, and devices round `exp` each
    in its own way.
    """
    half = width // 2
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents / np.float32(half - shift))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if cos_first else [sin, cos], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers around a SiLU: [B, I] -> [B, features]."""

    features: int
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.ops.silu(Linear(self.features, True, self.dtype, self.ops, name="linear_1")(x))
        return Linear(self.features, True, self.dtype, self.ops, name="linear_2")(x)
