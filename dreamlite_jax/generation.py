"""Prompts to pictures: settings with their defaults, and one batched way through the networks.

Shapes: N pictures, H and W pixels, h and w latent pixels, c latent channels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from dreamlite_jax.data import pictures, prompts
from dreamlite_jax.data.prompts import EDIT, GENERATE
from dreamlite_jax.diffusion import flow, sampling
from dreamlite_jax.errors import UserError
from dreamlite_jax.system import (
    Config,
    System,
    Texts,
    batches,
    decode_latents,
    encode_pictures,
    encode_prompts,
    sample_latents,
)

# Of guidance, as commands say it.
IGNORED = "ignored by a mobile model, because classifier-free guidance was distilled away"


class SettingsError(UserError):
    """Settings that this model cannot sample with: one line."""


class Settings(NamedTuple):
    """How to sample; None: the model's own default (`resolve`)."""

    height: int | None = None  # pixels
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    negative_prompt: str = prompts.NULL
    method: str = "euler"
    stochastic: float = 0.0  # level of random steps (`sde.coefficients`, "cps"); 0: the ODE
    truncate: bool = False  # cut prompts that are too long
    batch_size: int = 1  # pictures at a time


def resolve(settings: Settings, config: Config, source: Image.Image | None = None) -> Settings:
    """Settings with diffusers' defaults filled in and checked.

    Steps 30 (mobile: as many as it was distilled to), guidance 3.5, image guidance 1.5; the size is
    that of the source, down to a multiple that the networks can take, or the model's own.

    Raises:
      SettingsError: a size that is no multiple of `config.pixel_multiple`, less than one step, a
        guidance that is no finite number, ...
    """
    height, width, multiple = settings.height, settings.width, config.pixel_multiple
    own_steps = config.mobile_steps if config.mobile else 30
    if height is None and width is None and source is not None:
        width, height = (max(side // multiple, 1) * multiple for side in source.size)
    settings = settings._replace(
        height=config.default_side if height is None else height,
        width=config.default_side if width is None else width,
        steps=own_steps if settings.steps is None else settings.steps,
        guidance=3.5 if settings.guidance is None else settings.guidance,
        image_guidance=1.5 if settings.image_guidance is None else settings.image_guidance,
    )
    problems = [
        f"{name} {value} is not a positive multiple of {multiple}; the nearest are "
        f"{max(value // multiple, 1) * multiple} and {(max(value // multiple, 1) + 1) * multiple}"
        for name, value in (("height", settings.height), ("width", settings.width))
        if value < multiple or value % multiple
    ]
    for name, value in (("steps", settings.steps), ("batch size", settings.batch_size)):
        if value < 1:
            problems.append(f"{name} is {value}, should be at least 1")
    for name, value in (
        ("guidance", settings.guidance),
        ("image guidance", settings.image_guidance),
    ):
        if not math.isfinite(value):
            problems.append(f"{name} is {value}, should be a finite number")
    if not 0 <= settings.stochastic <= 1:
        problems.append(f"stochastic is {settings.stochastic}, should be in [0, 1]")
    elif settings.stochastic and settings.method != "euler":
        problems.append(f"stochastic steps are Euler's, method is {settings.method!r}")
    if settings.method not in sampling.METHODS:
        problems.append(
            f"method is {settings.method!r}, supported are {' and '.join(sampling.METHODS)}"
        )
    if problems:
        raise SettingsError("; ".join(problems))
    return settings


def unused(config: Config, editing: bool) -> set[str]:
    """The settings that change nothing: guidance of a mobile model, and of a source that is not."""
    of_guided = {"guidance", "image_guidance", "negative_prompt"}
    return (of_guided if config.mobile else set()) | (set() if editing else {"image_guidance"})


def check_prompts(
    prompter: prompts.Prompter,
    requests: Sequence[str],
    settings: Settings,
    source: Image.Image | None = None,
) -> None:
    """Raises what `generate` would of its prompts, before any weights are read.

    Raises:
      PromptError: as `prompts.prompt_inputs`.
    """
    mode, images = (GENERATE, None) if source is None else (EDIT, [source])
    texts = [*(prompts.tagged(mode, request) for request in requests), settings.negative_prompt]
    for text in dict.fromkeys(texts):
        prompts.prompt_inputs(prompter, mode, [text], images, truncate=settings.truncate)


def initial_noise(config: Config, seed: int, height: int, width: int) -> np.ndarray:
    """float32 [h, w, c] for a picture of height x width pixels; the same on every backend and in
    every batch."""
    factor = config.vae.factor
    shape = (height // factor, width // factor, config.vae.latent_channels)
    return np.asarray(jax.random.normal(jax.random.key(seed), shape, jnp.float32))


def step_keys(seeds: Sequence[int]) -> Array:
    """PRNG keys [N] of random steps, independent of what `initial_noise` draws from the seeds."""
    return jnp.stack([jax.random.fold_in(jax.random.key(seed), 1) for seed in seeds])


def generate(
    system: System,
    requests: Sequence[str],
    noise: np.ndarray,
    settings: Settings,
    sources: Sequence[Image.Image] | None = None,
    on_step: Callable[[Array], None] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each of N prompts its latent float32 [h, w, c] and its picture uint8 [H, W, 3].

    Everything runs in batches of `settings.batch_size`, the last one filled up, so that another N
    compiles nothing. A prompt that comes several times is encoded once.

    Args:
      requests: N prompts, untagged.
      noise: float32 [N, h, w, c].
      settings: as `resolve` returns them.
      sources: N RGB pictures to edit, of any size; None: generate.
      on_step: see `sampling.sample`.
      seeds: N, of what random steps draw (`settings.stochastic`); None: those from 0.

    Raises:
      SettingsError: pictures to edit by a model that has never seen any (`Config.pane`).
    """
    config, params = system.config, system.params
    if sources is not None and not config.pane:
        raise SettingsError("this model was trained without the source's pane: it cannot edit")
    mode = GENERATE if sources is None else EDIT
    scales = {settings.guidance} | ({settings.image_guidance} if sources is not None else set())
    guided = not config.mobile and scales != {1}  # by 1 is by nothing
    nulls = [settings.negative_prompt] * len(requests) if guided else []
    texts = [*(prompts.tagged(mode, prompt) for prompt in requests), *nulls]
    images = None if sources is None else [*sources, *(sources if nulls else ())]
    keys = [(text, None if images is None else id(images[i])) for i, text in enumerate(texts)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}  # each text's first place
    places = {key: row for row, key in enumerate(first)}
    encoded = encode_prompts(
        system,
        mode,
        [texts[i] for i in first.values()],
        None if images is None else [images[i] for i in first.values()],
        settings.truncate,
        settings.batch_size * (2 if nulls else 1),
    )

    def gathered(rows):
        chosen = [places[keys[i]] for i in rows]
        return Texts(*(array[chosen] for array in encoded))

    latent_size = (settings.height // config.vae.factor, settings.width // config.vae.factor)
    sigmas = flow.sigma_list(settings.steps, flow.resolution_mu(*latent_size, config.shift))
    fresh = None
    if settings.stochastic and settings.steps > 1:
        fresh = step_keys(range(len(requests)) if seeds is None else seeds)
    done = 0
    for rows in batches(len(requests), settings.batch_size):
        latents = sample_latents(
            config,
            params["unet"],
            noise[rows],
            sigmas,
            gathered(rows),
            gathered([len(requests) + i for i in rows]) if nulls else None,
            None if sources is None else _source_latents(system, settings, sources, rows),
            settings.guidance,
            settings.image_guidance,
            settings.method,
            on_step,
            settings.stochastic,
            None if fresh is None else fresh[np.array(rows)],
        )
        decoded = pictures.to_bytes(np.asarray(decode_latents(config, params["vae"], latents)))
        for latent, picture in zip(np.asarray(latents), decoded, strict=True):
            if done < len(requests):
                yield latent, picture
            done += 1


def _source_latents(
    system: System, settings: Settings, sources: Sequence[Image.Image], rows: list[int]
) -> Array:
    fitted = [pictures.resized(sources[i], settings.height, settings.width) for i in rows]
    values = np.stack([pictures.to_floats(image) for image in fitted])
    return encode_pictures(system.config, system.params["vae"], values)
