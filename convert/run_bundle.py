"""A bundle at work: a prompt (and a picture) to a PNG with LiteRT alone, no JAX.

    python -m convert.run_bundle --bundle=BUNDLE --prompt="a red boat" --out=boat.png
    python -m convert.run_bundle --bundle=BUNDLE --golden --accelerator=gpu
    python -m convert.run_bundle --bundle=BUNDLE --requests=inputs.npz --out=pictures.npz

The pipeline is in `convert/phone.py`. Many requests are what `launch.evaluate --inputs` writes:
prompts [N], noise float32 [N, h, w, c]; to edit also source uint8 [N, H, W, 3], and context
[N, L, F] with its mask [N, L]. Answered by images uint8 [N, H, W, 3], their prompts [N] and seconds
[N].

Texts that were encoded elsewhere (--embeddings) may be of any length up to the bundle's: context
[1, L, F] with its mask [1, L]. Where the bundle's guidance is not 1, an edit also takes the empty
prompt's, encoded with the same picture: null_context and null_mask.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from convert import manifest, phone, vulkan
from convert.litert import ACCELERATORS, PRECISIONS, StillCompilingError
from dreamlite_jax import cli
from dreamlite_jax.data.pictures import read_picture, replaced_file, write_png
from dreamlite_jax.train import signals

BUNDLE = flags.DEFINE_string("bundle", None, "folder of the bundle", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "what to draw, or how to edit --image")
IMAGE = flags.DEFINE_string("image", None, "picture to edit; without it one is generated")
EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, ".npz with context and mask instead of --prompt's encoding, see above"
)
OUT = flags.DEFINE_string("out", None, "PNG file")
SEED = flags.DEFINE_integer("seed", 0, "of the noise")
NOISE = flags.DEFINE_string("noise", None, "initial latent: .npy, float32 [1, h, w, c]")
ACCELERATOR = flags.DEFINE_enum("accelerator", "cpu", list(ACCELERATORS), "where graphs run")
PRECISION = flags.DEFINE_enum("precision", "fp16", list(PRECISIONS), "of the GPU")
REQUESTS = flags.DEFINE_string("requests", None, ".npz with many requests, see above")
LIMIT = flags.DEFINE_integer("limit", None, "the first so many of --requests", lower_bound=1)
GOLDEN = flags.DEFINE_boolean("golden", False, "replay the bundle's golden cases; a verdict a step")


def main() -> None:
    if ACCELERATOR.value == "gpu" and (reason := vulkan.gpu_available()):
        cli.warn(f"{reason}; taking what the system has")
    folder = Path(BUNDLE.value)
    bundle = phone.Bundle(folder, manifest.read(folder), ACCELERATOR.value, PRECISION.value)
    if GOLDEN.value:
        return golden(bundle)
    if OUT.value is None:
        raise cli.CommandError("give --out, or --golden")
    if REQUESTS.value is not None:
        return many(bundle._replace(kept={}))
    if EMBEDDINGS.value is None and (PROMPT.value is None or IMAGE.value is not None):
        raise cli.CommandError(
            "give --prompt; to edit give --embeddings, because the bundle has no vision tower"
        )
    if EMBEDDINGS.value is not None:
        texts, null = phone.read_embeddings(bundle, EMBEDDINGS.value, IMAGE.value is not None)
    else:
        texts, null = encoded(bundle, PROMPT.value)
    noise = read_noise(bundle)
    source = np.zeros_like(noise)
    if IMAGE.value is not None:
        source = phone.encode_image(bundle, read_picture(IMAGE.value))
    *_, latent = phone.denoise(bundle, noise, texts, null, source)
    write_png(OUT.value, phone.decode(bundle, latent))


def encoded(bundle: phone.Bundle, prompt: str) -> tuple[phone.Context, phone.Context | None]:
    """The prompt's context, and the empty prompt's where the model needs guidance."""
    texts = phone.encode_prompt(bundle, prompt)
    if not bundle.guided:
        return texts, None
    return texts, phone.padded(bundle, phone.empty_prompt(bundle), texts.mask.shape[1])


def many(bundle: phone.Bundle) -> None:
    """Answers --requests. Exit code 75: the accelerator was not ready; run it again."""
    given = read_requests(bundle)
    n, images, seconds = len(given["prompts"]), [], []
    try:
        for k in range(n):
            began = time.monotonic()
            images.append(answered(bundle, {name: array[k] for name, array in given.items()}))
            seconds.append(time.monotonic() - began)
            print(f"{k + 1}/{n} pictures", flush=True)
    except StillCompilingError as error:
        print(f"{error}", file=sys.stderr, flush=True)
        os._exit(signals.EXIT_TO_RESUME)  # the shaders that are compiled are kept
    with replaced_file(OUT.value) as stream:
        made = {"images": np.stack(images), "seconds": np.array(seconds)}
        np.savez_compressed(stream, **made, prompts=given["prompts"])
    sys.stdout.flush()
    os._exit(0)  # a driver's threads may outlive the interpreter, which ends badly


def read_requests(bundle: phone.Bundle) -> dict[str, np.ndarray]:
    """The first --limit of --requests, by name.

    Raises:
      CommandError, PhoneError: arrays that are missing, or not what this bundle takes.
    """
    file, optional = REQUESTS.value, (["context", "mask"], ["source"])
    given = phone.read_arrays(file, ("prompts", "noise"), *optional)
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in given.items()}
    if len({*counts.values()}) > 1 or not counts["prompts"]:
        raise cli.CommandError(f"{file}: has {counts}, should be one of each for every request")
    if given["noise"].shape[1:] != (shape := latent_shape(bundle)):
        raise cli.CommandError(
            f"{file}: noise is {list(given['noise'].shape[1:])} each, should be {list(shape)} "
            "(height / 8, width / 8, channels)"
        )
    if "source" in given and "context" not in given:
        raise cli.CommandError(f"{file}: has source, so it needs context and mask, too")
    if "source" in given and bundle.guided:
        raise cli.CommandError("many edits are for mobile models only, which need no guidance")
    return {name: array[: LIMIT.value] for name, array in given.items()}


def answered(bundle: phone.Bundle, request: dict[str, np.ndarray]) -> np.ndarray:
    """The picture uint8 [H, W, 3] of one request."""
    noise, null = request["noise"].transpose(2, 0, 1)[None], None
    source = np.zeros_like(noise)
    if "source" in request:
        source = phone.encode_image(bundle, Image.fromarray(request["source"]))
        texts = phone.padded(bundle, request["context"][request["mask"] > 0][None])
    else:
        texts, null = encoded(bundle, str(request["prompts"]))
    *_, latent = phone.denoise(bundle, noise, texts, null, source)
    return phone.decode(bundle, latent)


def golden(bundle: phone.Bundle) -> None:
    """Replays the golden cases and prints how near every result comes."""
    missed = 0
    for mode in bundle.manifest["golden"]:
        for verdict in phone.replay(bundle, mode):
            passed = verdict.reached >= verdict.demand
            missed += not passed
            word = "ok" if passed else "FAIL"
            reached = f"{verdict.reached:.1f} dB (at least {verdict.demand:g})"
            print(f"{word:4} {verdict.what}: {reached}", flush=True)
    if missed:
        raise cli.CommandError(f"{missed} golden outputs were not reached")


def read_noise(bundle: phone.Bundle) -> np.ndarray:
    """The initial latent float32 [1, c, h, w] that --noise or --seed says."""
    h, w, c = latent_shape(bundle)
    if NOISE.value is None:
        return np.random.default_rng(SEED.value).standard_normal((1, c, h, w), np.float32)
    return cli.read_noise(NOISE.value, (1, h, w, c)).transpose(0, 3, 1, 2)


def latent_shape(bundle: phone.Bundle) -> tuple[int, int, int]:
    """(h, w, c)."""
    size, latent = bundle.manifest["size"], bundle.manifest["latent"]
    return (*(size[side] // latent["factor"] for side in ("height", "width")), latent["channels"])


if __name__ == "__main__":
    cli.run(main)
