"""The vision tower of Qwen3-VL: patches of one image per prompt to tokens of the text.

Shapes: B prompts, P patches (padded), M = P / merge area tokens, E flattened patch, C hidden width,
N heads, D head width, O width of the text tower. Patches lie in blocks of `spatial_merge_size`
squared, so that merging is a reshape. Follows transformers' `models/qwen3_vl/modeling_qwen3_vl.py`
(Qwen3VLVisionModel). Norms, rotary angles, softmax and the interpolation of position embeddings are
float32 whatever `dtype` is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.layers import Dtype, LayerNorm, Linear, uniform_fan_in
from dreamlite_jax.models.primitives import PLAIN, Primitives
from dreamlite_jax.models.qwen3_vl.config import VisionConfig
from dreamlite_jax.models.qwen3_vl.text import MASKED, Embedding, inverse_frequencies, rotate

EPS = 1e-6  # of every LayerNorm; transformers has it fixed, too


def axial_angles(patch_positions: Array, config: VisionConfig) -> tuple[Array, Array]:
    """Cosines and sines, each float32 [B, P, D/2], of patch_positions [B, P, 2] (row, column).

    The first half of the frequencies turns with the row, the second with the column.
    """
    count = config.hidden_size // config.num_heads // 4
    frequencies = inverse_frequencies(count, config.rope_theta)
    angles = patch_positions.astype(jnp.float32)[..., None] * frequencies  # [B, P, 2, D/4]
    angles = angles.reshape(*patch_positions.shape[:2], 2 * count)
    return jnp.cos(angles), jnp.sin(angles)


def gelu_tanh(x: Array) -> Array:
    """GELU by its tanh approximation, in float32 (Hendrycks & Gimpel 2016, section 2)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class PatchConv(nn.Module):
    """Patches [B, P, E] -> [B, P, C]; a convolution whose kernel is its stride is one matmul.

    The kernel keeps the convolution's shape [T, k, k, I, C]; a patch is flat, in order I, T, k, k.
    """

    config: VisionConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        c = self.config
        shape = (c.temporal_patch_size, c.patch_size, c.patch_size, c.in_channels, c.hidden_size)
        kernel = self.param("kernel", uniform_fan_in, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c.hidden_size,), jnp.float32)
        kernel = kernel.transpose(3, 0, 1, 2, 4).reshape(-1, c.hidden_size).astype(self.dtype)
        return self.ops.linear(patches.astype(self.dtype), kernel) + bias.astype(self.dtype)


class PatchEmbed(nn.Module):
    """PatchConv under the name that transformers gives it."""

    config: VisionConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        return PatchConv(self.config, self.dtype, self.ops, name="proj")(patches)


class Attention(nn.Module):
    """Full attention over the valid patches of an image; x [B, P, C] -> [B, P, C]."""

    config: VisionConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], bias: Array) -> Array:
        c = self.config
        qkv = Linear(3 * c.hidden_size, True, self.dtype, self.ops, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, c.num_heads, c.hidden_size // c.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        y = self.ops.attention(rotate(q, *angles), rotate(k, *angles), v, bias).reshape(x.shape)
        return Linear(c.hidden_size, True, self.dtype, self.ops, name="proj")(y)


class MLP(nn.Module):
    """x [B, P, C] -> [B, P, C]."""

    config: VisionConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = Linear(c.intermediate_size, True, self.dtype, self.ops, name="linear_fc1")(x)
        return Linear(c.hidden_size, True, self.dtype, self.ops, name="linear_fc2")(gelu_tanh(x))


class Block(nn.Module):
    """One pre-norm block; x [B, P, C] -> [B, P, C]."""

    config: VisionConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], bias: Array) -> Array:
        h = LayerNorm(EPS, self.ops, name="norm1")(x)
        x = x + Attention(self.config, self.dtype, self.ops, name="attn")(h, angles, bias)
        h = LayerNorm(EPS, self.ops, name="norm2")(x)
        return x + MLP(self.config, self.dtype, self.ops, name="mlp")(h)


class Merger(nn.Module):
    """Patches [B, P, C] to tokens [B, M, O]: neighbours side by side, then a two-layer perceptron.

    The norm sees single patches in the last merger and merged ones (`norm_merged`) in those of
    DeepStack.
    """

    config: VisionConfig
    norm_merged: bool
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, norm = self.config, LayerNorm(EPS, self.ops, name="norm")
        wide = c.hidden_size * c.merge_area
        merged = (x.shape[0], x.shape[1] // c.merge_area, wide)
        x = norm(x.reshape(merged)) if self.norm_merged else norm(x).reshape(merged)
        x = self.ops.gelu(Linear(wide, True, self.dtype, self.ops, name="linear_fc1")(x))
        return Linear(c.out_hidden_size, True, self.dtype, self.ops, name="linear_fc2")(x)


class VisionModel(nn.Module):
    """Patches to image tokens, and to the features that DeepStack adds in the text tower."""

    config: VisionConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        patch_mask: Array,
        patch_positions: Array,
        interp_indices: Array,
        interp_weights: Array,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns the image tokens and one feature per `deepstack_visual_indexes`, each [B, M, O].

        pixel_values [B, P, E], patch_mask [B, P] (false is padding, which nothing valid looks at),
        patch_positions [B, P, 2], interp_indices and interp_weights [B, P, 4], all as
        `data.qwen_inputs` makes them. P must be a multiple of the merge area. What comes out at
        padding is finite and meaningless.
        """
        c = self.config
        x = PatchEmbed(c, self.dtype, self.ops, name="patch_embed")(pixel_values)
        table = Embedding(
            c.num_position_embeddings, c.hidden_size, c.initializer_range, name="pos_embed"
        )
        corners = table(interp_indices).astype(jnp.float32)  # [B, P, 4, C]
        x = x + jnp.sum(corners * interp_weights[..., None], axis=2).astype(self.dtype)
        angles = axial_angles(patch_positions, c)
        bias = jnp.where(patch_mask.astype(bool), 0.0, MASKED).astype(jnp.float32)[:, None, None, :]
        features = []
        for i in range(c.depth):
            x = Block(c, self.dtype, self.ops, name=f"blocks_{i}")(x, angles, bias)
            if i in c.deepstack_visual_indexes:
                # The features keep the order of the blocks; only the names follow the list.
                name = f"deepstack_merger_list_{c.deepstack_visual_indexes.index(i)}"
                features.append(Merger(c, True, self.dtype, self.ops, name=name)(x))
        tokens = Merger(c, False, self.dtype, self.ops, name="merger")(x)
        return tokens, tuple(features)
