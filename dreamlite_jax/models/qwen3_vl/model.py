"""Qwen3-VL as DreamLite uses it: prompts, each with at most one image, to last hidden states.

Shapes: B prompts, L tokens, P patches, E numbers in a patch, C hidden width of the text tower.
Everything that depends on an image's size or on token values arrives as arrays from
`data.qwen_inputs`, so one compilation serves all prompts of a bucket.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.layers import Dtype, Linear
from dreamlite_jax.models.primitives import PLAIN, Primitives
from dreamlite_jax.models.qwen3_vl.config import Qwen3VLConfig
from dreamlite_jax.models.qwen3_vl.text import TextModel
from dreamlite_jax.models.qwen3_vl.vision import VisionModel

VISION_INPUTS = (
    "pixel_values",
    "patch_mask",
    "patch_positions",
    "interp_indices",
    "interp_weights",
)


class _Towers(nn.Module):
    """Both towers under the names that transformers gives them."""

    config: Qwen3VLConfig
    dtype: Dtype
    ops: Primitives

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        if self.is_initializing() and "pixel_values" not in inputs:
            inputs = {**inputs, **_blank_image(self.config, *inputs["input_ids"].shape)}
        text = TextModel(self.config.text, self.dtype, self.ops, name="language_model")
        words = (inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"])
        if "pixel_values" not in inputs:
            return text(*words)
        visual = VisionModel(self.config.vision, self.dtype, self.ops, name="visual")
        tokens, deepstack = visual(*(inputs[name] for name in VISION_INPUTS))
        return text(*words, inputs["image_index"], tokens, deepstack)


class Qwen3VL(nn.Module):
    """The encoder; `config` says its sizes, `dtype` is the dtype to compute in.

    Its parameters have the names of transformers' Qwen3VLForConditionalGeneration. `init` makes
    those of both towers even where the inputs hold no image, and untied embeddings bring an
    `lm_head` along, which is kept for the model directory and otherwise unused.
    """

    config: Qwen3VLConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        """inputs is what `data.qwen_inputs.qwen_inputs` returns; gives [B, L, C] in `dtype`.

        This is `hidden_states[-1]` of transformers' Qwen3VLForConditionalGeneration: after the
        final norm. Rows at padding are finite and meaningless. Inputs without an image leave the
        vision tower out of the graph.
        """
        hidden = _Towers(self.config, self.dtype, self.ops, name="model")(inputs)
        if self.is_initializing() and not self.config.tie_word_embeddings:
            Linear(self.config.text.vocab_size, False, self.dtype, self.ops, name="lm_head")(hidden)
        return hidden


def _blank_image(config: Qwen3VLConfig, batch: int, length: int) -> dict[str, Array]:
    """One merged token's worth of masked patches for each prompt, of which no prompt uses any."""
    patches = config.vision.merge_area
    return {
        "pixel_values": jnp.zeros((batch, patches, config.vision.patch_dim)),
        "patch_mask": jnp.zeros((batch, patches), bool),
        "patch_positions": jnp.zeros((batch, patches, 2), jnp.int32),
        "interp_indices": jnp.zeros((batch, patches, 4), jnp.int32),
        "interp_weights": jnp.zeros((batch, patches, 4)),
        "image_index": jnp.full((batch, length), -1, jnp.int32),
    }


def blank_inputs(config: Qwen3VLConfig, batch: int = 1, length: int = 1) -> dict[str, Array]:
    """Text-only inputs of the right shapes, enough for `init` and `jax.eval_shape`."""
    return {
        "input_ids": jnp.zeros((batch, length), jnp.int32),
        "attention_mask": jnp.ones((batch, length), bool),
        "position_ids": jnp.zeros((batch, 3, length), jnp.int32),
    }
