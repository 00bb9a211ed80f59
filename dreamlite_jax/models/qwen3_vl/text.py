"""The text tower of Qwen3-VL: a decoder used as an encoder, in one pass and without a cache.

Shapes: B prompts, L tokens, C hidden width, N query heads, K key/value heads, D head width, V
vocabulary. Follows transformers' `models/qwen3_vl/modeling_qwen3_vl.py` (Qwen3VLTextModel); M-RoPE
with interleaved axes is arXiv 2511.21631, DeepStack is arXiv 2406.04334. Norms, rotary angles and
softmax are float32 whatever `dtype` is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dreamlite_jax.models.layers import Dtype, Linear, RMSNorm
from dreamlite_jax.models.primitives import PLAIN, Primitives
from dreamlite_jax.models.qwen3_vl.config import TextConfig

# Finite, so that a row whose keys are all masked (padding in front) stays free of NaN.
MASKED = -1e9


class Embedding(nn.Module):
    """ids [...] int32 -> rows [..., C] of a table [V, C], in the table's own dtype.

    The rows are cast by the caller: casting the table first, as flax's Embed does, copies all of
    it.
    """

    num_embeddings: int
    features: int
    stddev: float

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        shape = (self.num_embeddings, self.features)
        table = self.param("embedding", nn.initializers.normal(self.stddev), shape, jnp.float32)
        return jnp.take(table, ids, axis=0)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + D/2) of x [B, L, N, D] by angles, given as cos and sin [B, L, D/2].

    In float32; returns x's dtype.
    """
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def inverse_frequencies(count: int, theta: float) -> np.ndarray:
    """theta^(-i/count) for i = 0..count-1, float32 (Su et al. 2021, section 3.2.2)."""
    return (theta ** -(np.arange(count) / count)).astype(np.float32)


def mrope_axes(count: int, section: tuple[int, int, int]) -> np.ndarray:
    """The axis (0 time, 1 row, 2 column) that each of `count` rotary frequencies turns with.

    Rows and columns take every third frequency from the second and third on, as many as their
    section says; time has all that remain.
    """
    axes = np.zeros(count, np.int32)
    axes[1 : 3 * section[1] : 3] = 1
    axes[2 : 3 * section[2] : 3] = 2
    return axes


def mrope_angles(position_ids: Array, config: TextConfig) -> tuple[Array, Array]:
    """Cosines and sines, float32 [B, L, D/2], of position_ids [B, 3, L] (time, row, column)."""
    count = config.head_dim // 2
    positions = position_ids[:, mrope_axes(count, config.mrope_section)].astype(jnp.float32)
    angles = jnp.swapaxes(positions, 1, 2) * inverse_frequencies(count, config.rope_theta)
    return jnp.cos(angles), jnp.sin(angles)


def causal_bias(attention_mask: Array) -> Array:
    """float32 [B, 1, L, L]: 0 where a token may look (back, at valid tokens), else `MASKED`."""
    length = attention_mask.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    allowed = causal & attention_mask.astype(bool)[:, None, None, :]
    return jnp.where(allowed, 0.0, MASKED).astype(jnp.float32)


class Attention(nn.Module):
    """Grouped-query attention, queries and keys RMS-normed per head; x [B, L, C] -> [B, L, C]."""

    config: TextConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], bias: Array) -> Array:
        c = self.config

        def project(x, features, name):
            return Linear(features, c.attention_bias, self.dtype, self.ops, name=name)(x)

        def heads(count, name):
            return project(x, count * c.head_dim, name).reshape(*x.shape[:2], count, c.head_dim)

        q = heads(c.num_attention_heads, "q_proj")
        k = heads(c.num_key_value_heads, "k_proj")
        v = heads(c.num_key_value_heads, "v_proj")
        q = rotate(RMSNorm(c.rms_norm_eps, self.ops, name="q_norm")(q), *angles)
        k = rotate(RMSNorm(c.rms_norm_eps, self.ops, name="k_norm")(k), *angles)
        y = self.ops.attention(q, k, v, bias)
        return project(y.reshape(*x.shape[:2], -1), c.hidden_size, "o_proj")


class MLP(nn.Module):
    """SwiGLU, down(silu(gate x) * up x) (Shazeer 2020); x [B, L, C] -> [B, L, C]."""

    config: TextConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def project(x, features, name):
            return Linear(features, False, self.dtype, self.ops, name=name)(x)

        gate = project(x, self.config.intermediate_size, "gate_proj")
        up = project(x, self.config.intermediate_size, "up_proj")
        gate = self.ops.silu(gate)
        return project(gate * up, self.config.hidden_size, "down_proj")


class DecoderLayer(nn.Module):
    """One pre-norm layer; x [B, L, C] -> [B, L, C]."""

    config: TextConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], bias: Array) -> Array:
        c = self.config
        h = RMSNorm(c.rms_norm_eps, self.ops, name="input_layernorm")(x)
        x = x + Attention(c, self.dtype, self.ops, name="self_attn")(h, angles, bias)
        h = RMSNorm(c.rms_norm_eps, self.ops, name="post_attention_layernorm")(x)
        return x + MLP(c, self.dtype, self.ops, name="mlp")(h)


class TextModel(nn.Module):
    """Token ids, with the image's tokens put in their places, to the last hidden states."""

    config: TextConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        position_ids: Array,
        image_index: Array | None = None,
        image_tokens: Array | None = None,
        deepstack: tuple[Array, ...] = (),
    ) -> Array:
        """Returns [B, L, C] in `dtype`, after the final norm.

        input_ids int32 [B, L]; attention_mask [B, L], true (or 1) at tokens; position_ids int32
        [B, 3, L]. With images: image_index int32 [B, L], the image token that stands at each place
        or -1, and the vision tower's image_tokens and deepstack features, each [B, M, C]. Image
        tokens replace embeddings; the i-th deepstack feature is added after the i-th layer.
        """
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, c.initializer_range, name="embed_tokens")
        x = embed(input_ids).astype(self.dtype)
        if image_index is not None:
            is_image, index = image_index[..., None] >= 0, jnp.maximum(image_index, 0)

            def at_places(tokens):  # [B, M, C] -> [B, L, C]
                return jax.vmap(lambda rows, i: rows[i])(tokens.astype(self.dtype), index)

            x = jnp.where(is_image, at_places(image_tokens), x)
        angles, bias = mrope_angles(position_ids, c), causal_bias(attention_mask)
        for i in range(c.num_hidden_layers):
            x = DecoderLayer(c, self.dtype, self.ops, name=f"layers_{i}")(x, angles, bias)
            if i < len(deepstack):
                x = x + jnp.where(is_image, at_places(deepstack[i]), 0)
        return RMSNorm(c.rms_norm_eps, self.ops, name="norm")(x)
