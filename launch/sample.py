"""Pictures from prompts: text to image and, with --image, image editing.

    python -m launch.sample --model=DIR --prompt="a red boat" --out=boat.png
    python -m launch.sample --model=DIR --prompt="a blue sail" --image=boat.png --out=edited.png
    python -m launch.sample --model=DIR --prompts_file=prompts.txt --num_images=4 --out=DIR \\
      --contact_sheet=sheet.png

One picture goes to --out=boat.png; several go to boat-000.png, boat-001.png, ... or, where --out
does not end in .png, into that folder. Each PNG holds its settings; the seed among them makes the
picture again.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from dreamlite_jax import cli, generation, system
from dreamlite_jax.data import pictures
from dreamlite_jax.diffusion import sampling

NOTE = "dreamlite_jax"  # the PNG's text chunk with the settings, as JSON
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SEEDS = 2**32  # JAX takes the last 32 bits of a seed

MODEL = flags.DEFINE_string("model", None, "model directory (diffusers layout)", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "what to draw, or how to edit --image")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "text file with one prompt a line")
NEGATIVE = flags.DEFINE_string("negative_prompt", "", "what guidance leads away from")
IMAGE = flags.DEFINE_string("image", None, "picture to edit; without it pictures are generated")
OUT = flags.DEFINE_string("out", None, "PNG file, or folder for several pictures", required=True)
SHEET = flags.DEFINE_string("contact_sheet", None, "PNG file for an overview of all pictures")
LATENTS = flags.DEFINE_string("latents", None, ".npy file for the final latents [N, H/8, W/8, 4]")
HEIGHT = flags.DEFINE_integer("height", None, "pixels; default: --image's, or the model's own")
WIDTH = flags.DEFINE_integer("width", None, "pixels; default: --image's, or the model's own")
STEPS = flags.DEFINE_integer("steps", None, "sampling steps; default: 30, mobile models their own")
GUIDANCE = flags.DEFINE_float("guidance", None, "text guidance; default: 3.5")
IMAGE_GUIDANCE = flags.DEFINE_float(
    "image_guidance", None, "image guidance when editing; default: 1.5; 1 is a third cheaper"
)
METHOD = flags.DEFINE_enum("method", "euler", sampling.METHODS, "sampler")
STOCHASTIC = flags.DEFINE_float(
    "stochastic",
    0.0,
    "how much of the noise that is left every step replaces by fresh noise: 0 none, 1 all of it, "
    "as diffusers' stochastic_sampling",
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "of the first picture of each prompt; the next ones count on",
    lower_bound=0,
    upper_bound=SEEDS - 1,
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "pictures for each prompt", lower_bound=1)
NOISE = flags.DEFINE_string(
    "noise", None, "initial latents instead of --seed: .npy, float32 [N, H/8, W/8, 4]"
)
TRUNCATE = flags.DEFINE_boolean("truncate", False, "cut prompts that are too long")
RESIZE_BACK = flags.DEFINE_boolean("resize_back", False, "write edited pictures in --image's size")
BATCH = flags.DEFINE_integer("batch_size", 1, "pictures at a time", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "default: bfloat16 on TPU, else float32")


def main() -> None:
    prompts = read_prompts(PROMPT.value, PROMPTS_FILE.value)
    source = None if IMAGE.value is None else pictures.read_picture(IMAGE.value)
    if RESIZE_BACK.value and source is None:
        raise cli.CommandError("--resize_back needs --image")
    files = out_files(OUT.value, len(prompts) * NUM_IMAGES.value)
    if SHEET.present and Path(SHEET.value).suffix.lower() != ".png":
        raise cli.CommandError(f"--contact_sheet={SHEET.value}: should end in .png")
    check_places([*files, *filter(None, [LATENTS.value, SHEET.value])])
    dtype = DTYPES[DTYPE.value or ("bfloat16" if jax.default_backend() == "tpu" else "float32")]
    config = system.read_config(MODEL.value, dtype)
    settings = generation.resolve(
        generation.Settings(
            height=HEIGHT.value,
            width=WIDTH.value,
            steps=STEPS.value,
            guidance=GUIDANCE.value,
            image_guidance=IMAGE_GUIDANCE.value,
            negative_prompt=NEGATIVE.value,
            method=METHOD.value,
            stochastic=STOCHASTIC.value,
            truncate=TRUNCATE.value,
            batch_size=BATCH.value,
        ),
        config,
        source,
    )
    warn_of_unused(config.mobile, source is not None)
    requests = [prompt for prompt in prompts for _ in range(NUM_IMAGES.value)]
    seeds = [(SEED.value + i) % SEEDS for _ in prompts for i in range(NUM_IMAGES.value)]
    noise, origins = initial_noise(config, settings, seeds, NOISE.value)
    prompter = system.load_prompter(MODEL.value, config.text_encoder)
    generation.check_prompts(prompter, prompts, settings, source)
    model = system.load(MODEL.value, dtype, param_dtype=dtype)
    size = source.size[::-1] if RESIZE_BACK.value else None
    common = describe(model, settings, IMAGE.value)
    notes = [{"prompt": p, **o, **common} for p, o in zip(requests, origins, strict=True)]
    made, latents = [], []
    for latent, picture in progress(model, requests, noise, settings, source, seeds):
        file, note = files[len(made)], json.dumps(notes[len(made)], ensure_ascii=False)
        picture = Image.fromarray(picture)
        if size is not None:
            picture = pictures.resized(picture, *size)
        pictures.write_png(file, picture, {NOTE: note})
        made.append(picture)
        latents.append(latent)
    if LATENTS.value:
        with pictures.replaced_file(LATENTS.value) as stream:
            np.save(stream, np.stack(latents))
    if SHEET.value:
        write_sheet(SHEET.value, prompts, made, source)


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompts of --prompt or --prompts_file (empty lines are skipped)."""
    if (prompt is None) == (file is None):
        raise cli.CommandError("give either --prompt or --prompts_file")
    if file is None:
        return [prompt]
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise cli.CommandError(f"--prompts_file={file}: {error}") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise cli.CommandError(f"--prompts_file={file}: holds no prompt")
    return found


def warn_of_unused(mobile: bool, editing: bool) -> None:
    """Says which flags were given to no effect."""
    if mobile and (GUIDANCE.present or IMAGE_GUIDANCE.present or NEGATIVE.present):
        cli.warn(f"--guidance, --image_guidance and --negative_prompt are {generation.IGNORED}")
    elif IMAGE_GUIDANCE.present and not editing:
        cli.warn("--image_guidance is ignored without --image")
    if NOISE.present and SEED.present and not STOCHASTIC.value:
        cli.warn("--seed is ignored, because --noise is given")


def out_files(out: str, n: int) -> list[Path]:
    """The files of n pictures."""
    path = Path(out)
    if path.suffix.lower() in Image.registered_extensions().keys() - {".png"}:
        raise cli.CommandError(f"--out={out}: pictures are written as PNG, name it {path.stem}.png")
    if path.suffix.lower() != ".png":
        return [path / f"{i:03d}.png" for i in range(n)]
    return [path] if n == 1 else [path.with_stem(f"{path.stem}-{i:03d}") for i in range(n)]


def check_places(files: Sequence[str | os.PathLike]) -> None:
    """Refuses files that cannot be written, before hours are spent on what they would hold."""
    for file in files:
        if Path(file).is_dir():
            raise cli.CommandError(f"{file}: is a folder, should be a file")
        folder = next(parent for parent in Path(file).absolute().parents if parent.exists())
        if not folder.is_dir():
            raise cli.CommandError(f"{file}: {folder} is not a folder")
        if not os.access(folder, os.W_OK):
            raise cli.CommandError(f"{file}: no permission to write into {folder}")


def initial_noise(
    config: system.Config, settings: generation.Settings, seeds: Sequence[int], file: str | None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Initial latents float32 [N, h, w, c] and what the PNGs say of their origin."""
    if file is None:
        size = (settings.height, settings.width)
        noise = np.stack([generation.initial_noise(config, seed, *size) for seed in seeds])
        return noise, [{"seed": seed} for seed in seeds]
    factor, channels = config.vae.factor, config.vae.latent_channels
    shape = (len(seeds), settings.height // factor, settings.width // factor, channels)
    noise = cli.read_noise(file, shape)
    digest = hashlib.sha256(noise.tobytes()).hexdigest()
    drawn = [{"seed": seed} if settings.stochastic else {} for seed in seeds]  # of the steps
    return noise, [{"noise_sha256": digest, "noise_row": i, **d} for i, d in enumerate(drawn)]


def describe(
    model: system.System, settings: generation.Settings, image: str | None
) -> dict[str, Any]:
    """What the PNGs say of the settings, beside prompt and seed."""
    note = {"model": os.fspath(model.folder), **settings._asdict(), "image": image}
    note["dtype"] = jnp.dtype(model.config.dtype).name
    unused = {"batch_size", *generation.unused(model.config, image is not None)}
    if image is None:
        unused.add("image")
    return {key: value for key, value in note.items() if key not in unused}


def progress(
    model: system.System,
    requests: Sequence[str],
    noise: np.ndarray,
    settings: generation.Settings,
    source: Image.Image | None,
    seeds: Sequence[int],
):
    """`generation.generate` behind a bar that counts steps, where stderr is a terminal."""
    sources = None if source is None else [source] * len(requests)
    batches = -(-len(requests) // settings.batch_size)
    with tqdm(total=batches * settings.steps, unit="step", desc="sampling", disable=None) as bar:
        on_step = None if bar.disable else lambda _: bar.update()
        given = model, requests, noise, settings, sources, on_step, seeds
        yield from generation.generate(*given)
        jax.effects_barrier()  # the last steps are still to be reported


def write_sheet(
    file: str, prompts: Sequence[str], made: Sequence[Image.Image], source: Image.Image | None
) -> None:
    """A contact sheet: a row for each prompt, the source first where there is one."""
    n = len(made) // len(prompts)
    rows = [list(made[i * n : (i + 1) * n]) for i in range(len(prompts))]
    if source is not None:
        rows = [[source, *row] for row in rows]
    pictures.write_png(file, pictures.contact_sheet(rows, prompts))


if __name__ == "__main__":
    cli.run(main)
