"""Prompts as the text encoder gets them: tags, chat templates, tokens. NumPy only.

Templates, tags and counts are those of diffusers' `pipeline_dreamlite.py`. A *text* below is what
stands in a template: a tagged prompt (`tagged`), or an untagged one for the null branch (`NULL`).

Shapes: B texts, L tokens, C context tokens (behind the template's prefix).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamlite_jax.data.pictures import resized
from dreamlite_jax.data.qwen_inputs import TEXT_BUCKETS, QwenInputs, qwen_inputs
from dreamlite_jax.errors import UserError

GENERATE, EDIT = "generate", "edit"
MODES = (GENERATE, EDIT)

NULL = ""
TAGS = {
    GENERATE: "[Generate]: ",
    EDIT: (
        "[Edit]: A diptych with two side-by-side images of the same scene. "
        "Compared to the right side, the left one has "
    ),
}

IMAGE_PAD = "<|image_pad|>"
# The side in pixels at which a released model's encoder sees a source image of any size.
IMAGE_SIDE = 512
SEEN = (IMAGE_SIDE, IMAGE_SIDE)

# A template's prefix is all up to the user's turn; its hidden states are dropped. In edit mode the
# image's tokens and the two around them stay.
_PREFIXES = {
    GENERATE: (
        "<|im_start|>system\n"
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    ),
    EDIT: (
        "<|im_start|>system\n"
        "Describe the key features of the input image (color, shape, size, texture, objects, "
        "background), then explain how the user's text instruction should alter or modify the "
        "image. Generate a new image that meets the user's requirements while maintaining "
        "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
    ),
}
_IMAGE = {GENERATE: "", EDIT: f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"}
_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

# Context tokens a text may take, the template's end among them. Edit mode has no limit in
# diffusers; here it is what the largest bucket holds.
MAX_TOKENS = {GENERATE: 200, EDIT: TEXT_BUCKETS[-1] - 64}


class PromptError(UserError):
    """A prompt that cannot be encoded: one line with what is wrong and what to do."""


class DropCounts(NamedTuple):
    """Tokens of each template's prefix; the defaults are those of Qwen's tokenizer."""

    generate: int = 34
    edit: int = 64


class Prompter(NamedTuple):
    """What the host needs to turn texts into the encoder's inputs; picklable, for data workers."""

    tokenizer: Any  # a transformers tokenizer
    image_processor: Any  # a transformers image processor of Qwen2-VL's kind
    numbers: Mapping[str, int]  # `Qwen3VLConfig.input_numbers`
    drop: DropCounts = DropCounts()
    image_side: int = IMAGE_SIDE

    @property
    def image_patches(self) -> int:
        """Patches of a source image, before they are merged to tokens."""
        return (self.image_side // self.image_processor.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        return self.image_patches // self.numbers["spatial_merge_size"] ** 2


def tagged(mode: str, prompt: str) -> str:
    """The prompt behind the tag of its mode."""
    return TAGS[mode] + prompt


def templated(mode: str, text: str) -> str:
    """The text within the chat template of its mode."""
    return _PREFIXES[mode] + _IMAGE[mode] + text + _SUFFIX


def drop_counts(tokenizer: Any) -> DropCounts:
    """The numbers that fit a tokenizer, counted."""
    return DropCounts(**{m: len(tokenizer(_PREFIXES[m])["input_ids"]) for m in MODES})


def rules(drop: DropCounts, image_side: int) -> list:
    """All that decides how a text is put into its template and cut, by JSON values."""
    texts = [templated(m, text) for m in MODES for text in (NULL, tagged(m, NULL))]
    return [texts, list(drop), MAX_TOKENS, image_side]


def fingerprint(prompter: Prompter) -> str:
    """What tells prompters apart that make other tokens of a text: sha256 in hex."""
    given = [rules(prompter.drop, prompter.image_side), dict(prompter.numbers)]
    total = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    total.update(prompter.tokenizer.backend_tokenizer.to_str().encode())
    return total.hexdigest()


def prompt_inputs(
    prompter: Prompter,
    mode: str,
    texts: Sequence[str],
    images: Sequence[Image.Image] | None = None,
    *,
    max_tokens: int | None = None,
    truncate: bool = False,
    **buckets: Sequence[int],
) -> QwenInputs:
    """The encoder's inputs of B texts of one mode.

    Args:
      mode: GENERATE or EDIT.
      texts: tagged prompts or NULL.
      images: in edit mode one RGB picture of any size for each text; otherwise None.
      max_tokens: context tokens that a text may take (in edit mode with its image's); None:
        MAX_TOKENS of the mode.
      truncate: cut a longer text, as diffusers does (the template's end goes first).
      buckets: text_buckets and patch_buckets, passed on to `qwen_inputs`.

    Raises:
      PromptError: a text is too long (names the count and the limit) or contains <|image_pad|>.
      ValueError: images and mode do not fit.
    """
    if (images is not None) != (mode == EDIT) or (images is not None and len(images) != len(texts)):
        raise ValueError(f"{mode} mode got {len(texts)} texts and images: {images}")
    for text in texts:
        if IMAGE_PAD in text:
            raise PromptError(f"the prompt {_short(text)} contains {IMAGE_PAD}, which is reserved")
    filled, pixels = [templated(mode, text) for text in texts], {}
    if images is not None:
        pixels = image_patches(prompter.image_processor, images, prompter.image_side)
        merged = pixels["image_grid_thw"].prod(1) // prompter.numbers["spatial_merge_size"] ** 2
        # as Qwen3VLProcessor does: one pad becomes as many as the image has tokens
        filled = [
            text.replace(IMAGE_PAD, IMAGE_PAD * n) for text, n in zip(filled, merged, strict=True)
        ]
    most = getattr(prompter.drop, mode) + (max_tokens or MAX_TOKENS[mode])
    rows = prompter.tokenizer(filled)["input_ids"]
    for i, row in enumerate(rows):
        if len(row) > most and not truncate:
            drop = getattr(prompter.drop, mode)
            raise PromptError(
                f"the prompt {_short(texts[i])} takes {len(row) - drop} tokens, the limit is "
                f"{most - drop}; shorten it, or let it be cut (truncate)"
            )
        rows[i] = row[:most]
    return qwen_inputs({**_padded(rows), **pixels}, **prompter.numbers, **buckets)


def image_patches(
    image_processor: Any, images: Sequence[Image.Image], side: int = IMAGE_SIDE
) -> dict[str, np.ndarray]:
    """The encoder's patches of RGB pictures, each seen as a square of `side` pixels: pixel_values
    and image_grid_thw."""
    views = [resized(image, side, side) for image in images]
    return dict(image_processor(images=views, return_tensors="np"))


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    shape = (len(rows), max(map(len, rows)))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, True
    return {"input_ids": ids, "attention_mask": mask}


def _short(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[: width - 3] + "...")
