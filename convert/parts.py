"""The files of a bundle: which networks they hold, at which sizes."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from convert import graphs
from dreamlite_jax import pretrained, system, tiny
from dreamlite_jax.errors import UserError
from dreamlite_jax.models import unet_config
from dreamlite_jax.models.autoencoder import TAESDXL
from dreamlite_jax.models.qwen3_vl.config import QWEN3_VL_2B


class SizeError(UserError):
    """A size that the networks cannot take: one line."""


PARTS = {"unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae", "text_encoder": "text_encoder"}
"""Parts of a bundle, and the networks of a model directory whose parameters they hold."""

# One length for both modes: an instruction and the 258 tokens of a source. Generating needs less,
# but cross-attention is a few per cent of the work, and a second signature may cost the weights
# twice in a GPU's memory.
LENGTH, PROMPT_LENGTH = 384, 128


class File(NamedTuple):
    """A .tflite file to be."""

    part: str  # of PARTS
    name: str  # of the file, without its ending
    layers: range | None = None  # of the text tower


def files(config: system.Config, text_parts: int = 1, names: Iterable[str] = PARTS) -> list[File]:
    """The files of some parts of a bundle, those of the text tower in the order in which they run.

    Args:
      text_parts: files of the text tower, each with as many layers as the others, or one more.

    Raises:
      SizeError: more files than layers.
    """
    layers = range(config.text_encoder.text.num_hidden_layers)
    if not 1 <= text_parts <= len(layers):
        raise SizeError(f"--text_parts={text_parts}: the text tower has {len(layers)} layers")
    bounds = [len(layers) * k // text_parts for k in range(text_parts + 1)]
    tower = [layers[start:stop] for start, stop in itertools.pairwise(bounds)]
    found = []
    for name in names:
        if name != "text_encoder":
            found.append(File(name, name))
        elif text_parts == 1:
            found.append(File(name, name, layers))
        else:
            found += [File(name, f"{name}_{k}", part) for k, part in enumerate(tower, 1)]
    return found


def part(
    name: str,
    config: system.Config,
    params: pretrained.Params,
    height: int,
    width: int,
    lengths: tuple[int, ...] = (LENGTH,),
    prompt_length: int = PROMPT_LENGTH,
    time: str = "host",
    layers: range | None = None,
) -> list[graphs.Graph]:
    """The graphs of one part's file; params of its network.

    Args:
      height, width: of the picture in pixels.
      lengths: context tokens of the U-Net; each further one is a signature `denoise_<length>`.
      prompt_length: context tokens of the text encoder, which is for generate mode.
      time: see `convert.graphs`.
      layers: of the text tower; None: all.
    """
    if name == "text_encoder":
        return [graphs.text_encoder(config, params, prompt_length, layers)]
    if name != "unet":
        return [getattr(graphs, name)(config, params, height, width)]
    first, *others = (graphs.unet(config, params, height, width, n, time) for n in lengths)
    further = zip(others, lengths[1:], strict=True)
    return [first, *(g._replace(signature=f"{g.signature}_{n}") for g, n in further)]


def random_config(preset: str) -> system.Config:
    """The configuration of a U-Net's preset with the networks that belong to it."""
    if preset == "dreamlite":
        return system.Config(unet_config.DREAMLITE, TAESDXL, QWEN3_VL_2B, mobile=True)
    return tiny.config(mobile=True)._replace(unet=unet_config.PRESETS[preset])


def checked_size(config: system.Config, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, the model's own where they are not given.

    Raises:
      SizeError: no multiple of what the networks take.
    """
    size = tuple(config.default_side if side is None else side for side in (height, width))
    if bad := [side for side in size if side < 1 or side % config.pixel_multiple]:
        raise SizeError(f"size {bad[0]} is no positive multiple of {config.pixel_multiple}")
    return size


def checked_lengths(words: Sequence[str]) -> tuple[int, ...]:
    """Context tokens of the U-Net, ascending, from the words of --text_lengths.

    Raises:
      SizeError: none, or one that is no positive whole number.
    """
    if bad := [word for word in words or [""] if not word.isdecimal() or int(word) < 1]:
        raise SizeError(
            f"--text_lengths: {bad[0]!r} is no positive whole number; two are written 128,384"
        )
    return tuple(sorted({int(word) for word in words}))


def parameters(config: system.Config, file: File, model: str | None) -> pretrained.Params:
    """float32 parameters from a model directory, or random ones: those of a file's network, and of
    the text encoder no others than the file needs."""
    network = PARTS[file.part]
    component = system.NETWORKS[network]
    modules = None if file.layers is None else graphs.text_modules(config, file.layers)

    def wanted(path: pretrained.Path_) -> bool:
        return modules is None or (path[:2] == ("model", "language_model") and path[2] in modules)

    if model is None:
        return tiny.random_params(component, getattr(config, network), wanted=wanted)
    return pretrained.read(model, component, wanted=wanted)[1]
