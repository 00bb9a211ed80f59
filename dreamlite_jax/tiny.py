"""A complete model directory from nothing: small random networks and a tokenizer made on the spot.

"tiny" is for first steps and tests, "shapes" is large enough to learn the shapes world. Pictures of
a random model are noise; all else (files, shapes, modes, tokens to drop) is as in a released model,
and diffusers opens the directory. Only, sources are seen at 64 px, not at 512, which costs less and
gives other edits than diffusers', unless it is told `image_side`.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamlite_jax import pretrained, system
from dreamlite_jax.data import prompts, shapes
from dreamlite_jax.models import autoencoder, unet_config
from dreamlite_jax.models.qwen3_vl import config as qwen3_vl

# Qwen's special tokens in the order of their ids, which the tiny encoder's config knows; 256 bytes
# stand before them.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|im_start|>",
    "<|im_end|>",
)
VOCAB_SIZE = 512
PRESETS = ("tiny", "shapes")
# Side in pixels at which encoders see sources: 4 tokens of each, 256 at the released 512.
IMAGE_SIDE = 64
_CAPTIONS = 2000  # of each task, that the tokenizer of "shapes" is made of

# preprocessor_config.json and video_preprocessor_config.json as Qwen3-VL is released with them.
_PIXELS = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
_IMAGES = {
    **_PIXELS,
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
}
_VIDEOS = {
    **_PIXELS,
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
}


def config(
    mobile: bool = False, preset: str = "tiny", image_side: int = IMAGE_SIDE
) -> system.Config:
    """The networks of a preset together; the encoder's vocabulary has room for `tokenizer`."""
    unet, vae, encoder = unet_config.TINY, autoencoder.TINY, qwen3_vl.TINY
    encoder = dataclasses.replace(
        encoder, text=dataclasses.replace(encoder.text, vocab_size=VOCAB_SIZE)
    )
    if preset == "shapes":
        unet, vae, encoder = unet_config.SHAPES, autoencoder.SHAPES, qwen3_vl.SHAPES
    return system.Config(
        unet=unet,
        vae=vae,
        text_encoder=encoder,
        drop=prompts.drop_counts(tokenizer(preset)),
        image_side=image_side,
        mobile=mobile,
    )


@functools.cache
def tokenizer(preset: str = "tiny") -> Any:
    """A byte-level BPE of Qwen's kind, trained on the chat templates: every word of theirs is one
    token, as for Qwen, so the templates' prefixes are 34 and 64 tokens long here too. That of
    "shapes" has a token for every word of its captions and instructions, too."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = qwen3_vl.SHAPES.text.vocab_size if preset == "shapes" else VOCAB_SIZE
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words = [prompts.templated(mode, prompts.tagged(mode, "")) for mode in prompts.MODES]
    if preset == "shapes":
        at = shapes.DEMO, "all", 0
        words += [shapes.sample_t2i(*at, k).caption for k in range(_CAPTIONS)]
        words += [shapes.sample_edit(*at, k).instruction for k in range(_CAPTIONS)]
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    learner.train_from_iterator([part for text in words for part in special.split(text)], trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]

    tokens = [*alphabet, *SPECIAL_TOKENS]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def write_processor(folder: Path, settings: system.Config, preset: str = "tiny") -> None:
    """A `processor/` folder in the released form, for the encoder's patches, with the tokenizer."""
    vision, size = settings.text_encoder.vision, _IMAGES["size"]
    # The processor would enlarge a smaller view to its least area.
    least = min(size["shortest_edge"], settings.image_side**2)
    images = {**_IMAGES, "size": {**size, "shortest_edge": least}}
    patches = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    tokenizer(preset).save_pretrained(folder)
    pretrained.write_json(folder / "preprocessor_config.json", {**images, **patches})
    pretrained.write_json(folder / "video_preprocessor_config.json", {**_VIDEOS, **patches})


def random_params(
    component: pretrained.Component,
    config: Any,
    seed: int = 0,
    wanted: Callable[[pretrained.Path_], bool] = lambda path: True,
) -> pretrained.Params:
    """Parameters of a network, drawn with NumPy: nothing is compiled.

    Kernels and embeddings keep the variance of what passes through them; norms lie around 1 and
    biases around 0, but none of them there, lest a test miss a forgotten one. Of the paths that are
    not `wanted` nothing is kept; the others have the values that they have in the whole network.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)  # of every path: the next draws depend on it
        if not wanted(path):
            return None
        noise = noise.astype(np.float32)
        if path[-1] == "kernel":
            return noise * np.sqrt(1 / np.prod(leaf.shape[:-1]), dtype=np.float32)
        if path[-1] == "embedding":
            return noise
        return 0.1 * noise + np.float32(path[-1] == "scale")

    shapes = flatten_dict(pretrained.param_shapes(component, config))
    drawn = {path: draw(path, leaf) for path, leaf in shapes.items()}
    return unflatten_dict({path: leaf for path, leaf in drawn.items() if leaf is not None})


def tiny_model_dir(
    model_dir: str | os.PathLike,
    seed: int = 0,
    mobile: bool = False,
    preset: str = "tiny",
    image_side: int = IMAGE_SIDE,
) -> Path:
    """Writes a complete random model directory (14 MB; "shapes" 20 MB) and returns its path.

    The tokens to drop are counted with the tokenizer that is written, never taken from elsewhere.

    Args:
      image_side: in pixels, at which the text encoder sees sources, a multiple of 32.
    """
    folder, settings = Path(model_dir), config(mobile, preset, image_side)
    for name, component in system.NETWORKS.items():
        network = getattr(settings, name)
        params = random_params(component, network, seed)
        pretrained.write(folder, component, network, params)
    with pretrained.replaced_folder(folder / "tokenizer") as new:
        tokenizer(preset).save_pretrained(new)
    with pretrained.replaced_folder(folder / "processor") as new:
        write_processor(new, settings, preset)
    system.write_settings(folder, settings)
    return folder
