"""The three networks together: texts and pictures in, velocities and pictures out.

`load` reads a model directory, `save` writes one. The jitted functions are pure: `config` is
static and hashable, `params` are those of the one network that is asked; training calls the same
functions from within its own jit.

Shapes: B batch, H and W pixels, h and w latent pixels (H / 8), c latent channels, L context tokens,
F text feature width.

A model directory is diffusers' own; the one file added to it is `prompts.json`, only where a
tokenizer's template prefixes are not Qwen's 34 and 64 tokens long, its encoder sees sources at
another size than 512 px, or a mobile model takes other than 4 steps:
`{"drop": {"generate": 34, "edit": 64}, "image_side": 512, "mobile_steps": 4}`.
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from dreamlite_jax import pretrained
from dreamlite_jax.data import prompts
from dreamlite_jax.data.prompts import DropCounts, Prompter
from dreamlite_jax.diffusion import flow, sampling, sde
from dreamlite_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from dreamlite_jax.models.primitives import PLAIN, Primitives
from dreamlite_jax.models.qwen3_vl.config import Qwen3VLConfig
from dreamlite_jax.models.qwen3_vl.model import Qwen3VL
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.unet_config import UNetConfig
from dreamlite_jax.pretrained import ModelDirectoryError, Params

PIPELINES = {False: "DreamLitePipeline", True: "DreamLiteMobilePipeline"}  # by Config.mobile
NETWORKS = {
    "unet": pretrained.UNET,
    "vae": pretrained.AUTOENCODER,
    "text_encoder": pretrained.TEXT_ENCODER,
}
FOLDERS = (*NETWORKS, "tokenizer", "processor", "scheduler")
MOBILE_STEPS = 4  # of the released mobile model
_INDEX, _PROMPTS, _SCHEDULER = "model_index.json", "prompts.json", "scheduler_config.json"


class Config(NamedTuple):
    """All that is static about a model.

    `pane`: what is generated, not edited, has zeros beside it, as released; a U-Net that has only
    ever generated does without, at half the arithmetic (`no_source`). `mobile_steps`: in how many a
    mobile model draws. `dtype` is what the networks compute in, `remat` what the U-Net computes
    again for its gradient (`blocks.rematerialised`), `ops` the form of the primitives.
    """

    unet: UNetConfig
    vae: AutoencoderConfig
    text_encoder: Qwen3VLConfig
    shift: flow.ResolutionShift = flow.ResolutionShift()
    drop: DropCounts = DropCounts()
    image_side: int = prompts.IMAGE_SIDE
    mobile: bool = False
    mobile_steps: int = MOBILE_STEPS
    pane: bool = True
    dtype: Any = jnp.float32
    remat: str = "none"
    ops: Primitives = PLAIN

    @property
    def pixel_multiple(self) -> int:
        """What height and width of a picture must be multiples of: both networks' factors."""
        return self.vae.factor * 2 ** (self.unet.levels - 1)

    @property
    def default_side(self) -> int:
        """Side in pixels of pictures whose size nobody asked for: 1024 for the release."""
        return (self.unet.sample_size or 128) * self.vae.factor


class System(NamedTuple):
    """A loaded model. `params` has the keys of NETWORKS; `folder` is where the rest came from."""

    config: Config
    params: dict[str, Params]
    prompter: Prompter
    folder: Path


class Texts(NamedTuple):
    """Encoded texts: context [B, L, F], zero at padding, and mask bool [B, L]."""

    context: Array
    mask: Array


class Condition(NamedTuple):
    """What the U-Net sees beside xt: texts, source latents [B, h, w, c] (`no_source`: none),
    time_ids float32 [B, 2]."""

    texts: Texts
    source: Array
    time_ids: Array


# --- The networks' work ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "drop"))
def encode_texts(
    config: Config,
    params: Params,
    inputs: prompts.QwenInputs,
    drop: int,
    pad_embedding: Array | None = None,
) -> Texts:
    """The encoder's last hidden states behind the template's prefix of `drop` tokens.

    Args:
      params: of the text encoder.
      inputs: of `prompts.prompt_inputs`.
      pad_embedding: [F], stands at padding instead of zeros. (The U-Net masks padding either way.)
    """
    hidden = Qwen3VL(config.text_encoder, config.dtype, config.ops).apply(
        {"params": params}, inputs
    )
    return _padded(hidden[:, drop:], inputs["attention_mask"][:, drop:], pad_embedding)


@functools.partial(jax.jit, static_argnames=("config", "length"))
def encode_rows(
    config: Config,
    params: Params,
    inputs: prompts.QwenInputs,
    drop: Array,
    length: int,
    pad_embedding: Array | None = None,
) -> Texts:
    """As `encode_texts`, of rows of both modes: row b drops its own drop[b] tokens (int32 [B]) and
    keeps the `length` behind them."""
    hidden = Qwen3VL(config.text_encoder, config.dtype, config.ops).apply(
        {"params": params}, inputs
    )
    places = drop[:, None] + jnp.arange(length)
    mask = jnp.take_along_axis(inputs["attention_mask"], places, 1, mode="fill", fill_value=False)
    hidden = jnp.take_along_axis(hidden, places[:, :, None], 1, mode="clip")
    return _padded(hidden, mask, pad_embedding)


def _padded(hidden: Array, mask: Array, pad_embedding: Array | None) -> Texts:
    padding = jnp.zeros((), hidden.dtype) if pad_embedding is None else pad_embedding
    return Texts(jnp.where(mask[:, :, None], hidden, padding.astype(hidden.dtype)), mask)


@functools.partial(jax.jit, static_argnames="config")
def encode_pictures(config: Config, params: Params, values: Array) -> Array:
    """float32 [B, H, W, 3] in [-1, 1] -> latents float32 [B, h, w, c]; params of the
    autoencoder."""
    model = Autoencoder(config.vae, config.dtype, config.ops)
    return model.apply({"params": params}, values, method="encode")


@functools.partial(jax.jit, static_argnames="config")
def decode_latents(config: Config, params: Params, latents: Array) -> Array:
    """Latents [B, h, w, c] -> float32 [B, H, W, 3], about [-1, 1]; params of the autoencoder."""
    model = Autoencoder(config.vae, config.dtype, config.ops)
    return model.apply({"params": params}, latents, method="decode")


def time_ids(height: int, width: int, batch: int) -> Array:
    """float32 [B, 2]: (width, height) of the target in pixels."""
    return jnp.tile(jnp.array([[width, height]], jnp.float32), (batch, 1))


def no_source(config: Config, latents: Array) -> Array:
    """The source beside latents [B, h, w, c] that are generated: zeros of that shape, or, of a
    config without the pane, of width 0."""
    b, h, w, c = latents.shape
    return jnp.zeros((b, h, w if config.pane else 0, c), latents.dtype)


def velocity(config: Config, params: Params, xt: Array, sigma: Array, at: Condition) -> Array:
    """v [B, h, w, c] of xt [B, h, w, c] at sigma, a scalar or [B]; params of the U-Net.

    The U-Net sees `[xt | source]` along the width; the left half of its answer counts.
    """
    vt = _unet(config).apply({"params": params}, *_unet_inputs(xt, sigma, at))
    return vt[:, :, : xt.shape[2]]


def features(config: Config, params: Params, xt: Array, sigma: Array, at: Condition) -> Array:
    """What the U-Net's middle block makes of the target's half, [B, h / f, w / f, C] with f = 2 to
    the number of levels less one. Arguments as `velocity`'s."""
    _, seen = _unet(config).apply(
        {"params": params},
        *_unet_inputs(xt, sigma, at),
        capture_intermediates=lambda module, _: module.name == "mid_block",
        mutable="intermediates",
    )
    (found,) = seen["intermediates"]["mid_block"]["__call__"]
    return found[:, :, : found.shape[2] // 2]


def _unet(config: Config) -> UNet:
    return UNet(config.unet, config.dtype, config.remat, config.ops)


def _unet_inputs(xt: Array, sigma: Array, at: Condition) -> tuple[Array, ...]:
    both = jnp.concatenate([xt, at.source.astype(xt.dtype)], axis=2)
    timesteps = jnp.broadcast_to(flow.timestep(sigma), xt.shape[:1])
    return both, timesteps, *at.texts, at.time_ids


@functools.partial(jax.jit, static_argnames=("config", "image_guidance", "method", "on_step"))
def sample_latents(
    config: Config,
    params: Params,
    noise: Array,
    sigmas: Array,
    texts: Texts,
    null: Texts | None = None,
    source: Array | None = None,
    guidance: float | Array = 1.0,
    image_guidance: float = 1.0,
    method: str = "euler",
    on_step: Callable[[Array], None] | None = None,
    level: float | Array = 0.0,
    keys: Array | None = None,
) -> Array:
    """x0 float32 [B, h, w, c] from noise of that shape; params of the U-Net.

    Args:
      sigmas: float32 [N + 1], see `flow.sigma_list`.
      texts: the prompts.
      null: the null prompts, in edit mode encoded with the same source; None: no guidance (mobile).
      source: latents [B, h, w, c] of the pictures to edit; None: generate.
      guidance: of the text.
      image_guidance: of the source, with `null` in edit mode. Static: 1 saves a branch.
      method, on_step: see `sampling.sample`.
      level, keys: of random steps, all but the last, of the form "cps" (`sde.sample`); keys None:
        the ODE.
    """
    blank, b = no_source(config, noise), noise.shape[0]
    factor = config.vae.factor
    sizes = time_ids(noise.shape[1] * factor, noise.shape[2] * factor, b)
    model = functools.partial(velocity, config, params)

    target = Condition(texts, blank if source is None else source, sizes)
    if null is None:
        velocity_fn = sampling.plain(model, target)
    elif source is None:
        velocity_fn = sampling.single_guidance(
            model, Condition(null, blank, sizes), target, guidance
        )
    else:
        nothing, image = Condition(null, blank, sizes), Condition(null, source, sizes)
        velocity_fn = sampling.dual_guidance(
            model, nothing, image, target, guidance, image_guidance
        )
    if keys is None:
        return sampling.sample(velocity_fn, noise, sigmas, method, on_step)
    window = sigmas.shape[0] - 2
    return sde.sample(velocity_fn, noise, sigmas, "cps", level, 0, window, keys, on_step)[0]


# --- Many texts -----------------------------------------------------------------------------------


def encode_prompts(
    system: System,
    mode: str,
    texts: Sequence[str],
    images: Sequence[Image.Image] | None = None,
    truncate: bool = False,
    batch_size: int = 8,
) -> Texts:
    """Texts (tagged or null) of one mode, with an image each in edit mode, as NumPy.

    They are encoded `batch_size` at a time, the last batch filled up, so the encoder is compiled
    once for each bucket of lengths. Raises as `prompts.prompt_inputs`.
    """
    drop, parts = getattr(system.config.drop, mode), []
    for rows in batches(len(texts), batch_size):
        inputs = prompts.prompt_inputs(
            system.prompter,
            mode,
            [texts[i] for i in rows],
            None if images is None else [images[i] for i in rows],
            truncate=truncate,
        )
        parts.append(encode_texts(system.config, system.params["text_encoder"], inputs, drop))
    length = max(part.mask.shape[1] for part in parts)

    def joined(arrays):  # padded to one length, without the rows that filled up the last batch
        widened = [
            np.pad(a, [(0, 0), (0, length - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
            for a in map(np.asarray, arrays)
        ]
        return np.concatenate(widened)[: len(texts)]

    return Texts(joined([p.context for p in parts]), joined([p.mask for p in parts]))


def batches(n: int, size: int) -> Iterator[list[int]]:
    """0 to n - 1 in lists of `size`; the last one repeats n - 1 until it is full."""
    for start in range(0, n, size):
        yield [min(i, n - 1) for i in range(start, start + size)]


# --- Model directories ----------------------------------------------------------------------------


def read_config(model_dir: str | os.PathLike, dtype: Any = jnp.float32) -> Config:
    """The static side of a model directory, in an instant: no weights are read.

    Raises:
      ModelDirectoryError: no such directory, missing parts, unusable settings.
    """
    folder = Path(model_dir)
    mobile = _read_index(folder)
    configs = {name: pretrained.read_config(folder, part) for name, part in NETWORKS.items()}
    file = folder / "scheduler" / _SCHEDULER
    settings = pretrained.read_json(file)
    try:
        shift = flow.ResolutionShift.from_scheduler(settings)
    except (ValueError, TypeError) as error:
        raise ModelDirectoryError(f"{file}: {error}") from error
    ours = _read_ours(folder)._asdict()
    return Config(**configs, shift=shift, **ours, mobile=mobile, dtype=dtype)


def load(
    model_dir: str | os.PathLike, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> System:
    """Reads a whole model directory.

    Args:
      dtype: what the networks compute in.
      param_dtype: of the parameters; dtype for sampling in half precision.

    Raises:
      ModelDirectoryError: no such directory, missing or unusable parts, a tokenizer that does not
        fit the encoder or the number of tokens to drop.
    """
    folder = Path(model_dir)
    config = read_config(folder, dtype)
    prompter = load_prompter(folder, config.text_encoder)
    params = {
        name: pretrained.read(folder, part, param_dtype)[1] for name, part in NETWORKS.items()
    }
    return System(config, params, prompter, folder)


def files(model_dir: str | os.PathLike) -> list[Path]:
    """The files of a model directory, without others that lie there; none where there is none."""
    folder = Path(model_dir)
    parts = (file for name in FOLDERS for file in (folder / name).rglob("*"))
    return [file for file in (folder / _INDEX, folder / _PROMPTS, *parts) if file.is_file()]


def load_prompter(model_dir: str | os.PathLike, config: Qwen3VLConfig) -> Prompter:
    """The host's part of a model directory alone: tokenizer, image processor, tokens to drop.

    Raises as `load`.
    """
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil  # slow to import

    folder = Path(model_dir)
    tokenizer = _opened(AutoTokenizer, folder / "tokenizer")
    image_processor = _opened(Qwen2VLImageProcessorPil, folder / "processor")
    counted = prompts.drop_counts(tokenizer)
    drop, side, _ = _read_ours(folder)
    problems = [
        f"{token} is token {tokenizer.convert_tokens_to_ids(token)}, but {expected} for the encoder"
        for token, expected in (
            (prompts.IMAGE_PAD, config.image_token_id),
            ("<|vision_start|>", config.vision_start_token_id),
            ("<|vision_end|>", config.vision_end_token_id),
        )
        if tokenizer.convert_tokens_to_ids(token) != expected
    ]
    if len(tokenizer) > config.text.vocab_size:
        problems.append(f"it has {len(tokenizer)} tokens, but the encoder {config.text.vocab_size}")
    if counted != drop:
        problems.append(
            f"its template prefixes take {tuple(counted)} tokens, but {tuple(drop)} are to be "
            f'dropped; put {{"drop": {{"generate": {counted.generate}, "edit": {counted.edit}}}}} '
            f"into {_PROMPTS}"
        )
    for name, ours in (
        ("patch_size", config.vision.patch_size),
        ("temporal_patch_size", config.vision.temporal_patch_size),
        ("merge_size", config.vision.spatial_merge_size),
    ):
        if (theirs := getattr(image_processor, name)) != ours:
            problems.append(f"the processor's {name} is {theirs}, but {ours} for the encoder")
    if problems:
        raise ModelDirectoryError(f"{folder / 'tokenizer'}: {'; '.join(problems)}")
    return Prompter(tokenizer, image_processor, config.input_numbers, drop, side)


def save(system: System, model_dir: str | os.PathLike, dtype: Any = None) -> None:
    """Writes a whole model directory, which diffusers opens with its pipeline.

    Tokenizer and processor are copied from `system.folder`. An index that is there goes
    first, the new one comes last: a directory with a model_index.json is complete.

    Args:
      dtype: of the tensors in the files; None keeps each parameter's own.
    """
    folder = Path(model_dir)
    (folder / _INDEX).unlink(missing_ok=True)
    for name, component in NETWORKS.items():
        config = getattr(system.config, name)
        pretrained.write(folder, component, config, system.params[name], dtype)
    if folder.resolve() != system.folder.resolve():
        for name in ("tokenizer", "processor"):
            with pretrained.replaced_folder(folder / name) as new:
                shutil.copytree(system.folder / name, new, dirs_exist_ok=True)
    write_settings(folder, system.config)


def write_settings(model_dir: Path, config: Config) -> None:
    """The small files of a model directory: scheduler/, prompts.json, and model_index.json."""
    with pretrained.replaced_folder(model_dir / "scheduler") as new:
        pretrained.write_json(new / _SCHEDULER, config.shift.to_scheduler())
    (model_dir / _PROMPTS).unlink(missing_ok=True)
    ours = _Ours(config.drop, config.image_side, config.mobile_steps)
    if ours != _Ours():
        given = {**ours._asdict(), "drop": ours.drop._asdict()}
        pretrained.write_json(model_dir / _PROMPTS, given)
    index = {
        "_class_name": PIPELINES[config.mobile],
        "processor": ["transformers", "Qwen3VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "unet": ["diffusers", "DreamLiteUNetModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    pretrained.write_json(model_dir / _INDEX, index)


def _read_index(folder: Path) -> bool:
    """Whether the model is a mobile one, after checking that all its parts are there."""
    if not folder.is_dir():
        raise ModelDirectoryError(f"{folder}: no such directory")
    missing = [f"{name}/" for name in FOLDERS if not (folder / name).is_dir()]
    if not (folder / _INDEX).is_file():
        missing.append(_INDEX)
    if missing:
        raise ModelDirectoryError(
            f"{folder}: lacks {', '.join(missing)}; expected a diffusers model directory"
        )
    name = pretrained.read_json(folder / _INDEX).get("_class_name")
    if name not in PIPELINES.values():
        raise ModelDirectoryError(
            f"{folder / _INDEX}: _class_name is {name!r}, supported are "
            f"{' and '.join(PIPELINES.values())}"
        )
    return name == PIPELINES[True]


class _Ours(NamedTuple):
    """What `prompts.json` says of a model, by the names of `Config`."""

    drop: DropCounts = DropCounts()
    image_side: int = prompts.IMAGE_SIDE
    mobile_steps: int = MOBILE_STEPS


def _read_ours(folder: Path) -> _Ours:
    if not (folder / _PROMPTS).is_file():
        return _Ours()
    given = pretrained.read_json(folder / _PROMPTS)
    try:
        numbers = {name: int(given[name]) for name in _Ours._fields[1:] if name in given}
        return _Ours(DropCounts(**given["drop"]), **numbers)
    except (TypeError, KeyError, ValueError) as error:
        raise ModelDirectoryError(
            f'{folder / _PROMPTS}: expected {{"drop": {{"generate": ..., "edit": ...}}, '
            '"image_side": ..., "mobile_steps": ...}'
        ) from error


def _opened(kind: Any, folder: Path) -> Any:
    """A transformers object from a folder; its errors become one line."""
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises nearly everything here
        reason = " ".join(str(error).split())
        raise ModelDirectoryError(f"{folder}: {reason}") from error
