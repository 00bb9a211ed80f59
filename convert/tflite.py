"""The networks of a model directory as .tflite files, in one or several variants of weights.

    python -m convert.tflite --model=DIR --out=FILES --weights=fp16
    python -m convert.tflite --random=dreamlite --out=FILES --height=1024 --width=1024 \\
      --weights="fp32 fp16 int8" --parts="unet vae_decoder vae_encoder" --check=512

Files are FILES/<weights>/unet.tflite, vae_decoder.tflite, vae_encoder.tflite and
text_encoder.tflite; with --text_parts=N text_encoder_1.tflite to text_encoder_N.tflite instead,
which run one after another. Float32 parameters of one file at a time are in memory. Each file is
linted; with --check it is also lowered at that side in pixels (text has none) and run on the CPU
beside JAX. `convert.bundle` makes what a phone receives.
"""

import resource
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from convert import flatbuffer, graphs, lowering, manifest, quantize, verify
from convert.parts import (
    LENGTH,
    PARTS,
    PROMPT_LENGTH,
    File,
    checked_lengths,
    checked_size,
    files,
    parameters,
    part,
    random_config,
)
from dreamlite_jax import cli, pretrained, system
from dreamlite_jax.models import unet_config

MODEL = flags.DEFINE_string("model", None, "model directory (diffusers layout)")
RANDOM = flags.DEFINE_enum(
    "random", None, list(unet_config.PRESETS), "random weights of a preset instead"
)
OUT = flags.DEFINE_string("out", None, "folder for the files", required=True)
HEIGHT = flags.DEFINE_integer("height", None, "pixels; default: the model's own")
WIDTH = flags.DEFINE_integer("width", None, "pixels; default: the model's own")
LENGTHS = flags.DEFINE_list("text_lengths", [str(LENGTH)], "context tokens of the U-Net")
PROMPT = flags.DEFINE_integer("prompt_length", PROMPT_LENGTH, "of the text encoder", lower_bound=1)
WEIGHTS = flags.DEFINE_string(
    "weights", "fp16", "variants, with blanks between: convert/quantize.py"
)
TEXT_PARTS = flags.DEFINE_integer("text_parts", 1, "files of the text encoder", lower_bound=1)
NAMES = flags.DEFINE_string("parts", " ".join(PARTS), "which files, separated by blanks")
TIME = flags.DEFINE_enum("time", "host", graphs.TIMES, "who computes sinusoids: convert/graphs.py")
CHECK = flags.DEFINE_integer("check", None, "side in pixels at which the CPU is compared with JAX")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    out, names = Path(OUT.value), NAMES.value.split()
    if unknown := [name for name in names if name not in PARTS]:
        raise cli.CommandError(f"--parts: unknown {unknown[0]}, there are {', '.join(PARTS)}")
    if (MODEL.value is None) == (RANDOM.value is None):
        raise cli.CommandError("give either --model or --random")
    recipes = {text: quantize.recipe(text) for text in WEIGHTS.value.split()}
    check_folders(recipes)
    config = system.read_config(MODEL.value) if MODEL.value else random_config(RANDOM.value)
    size = checked_size(config, HEIGHT.value, WIDTH.value)
    lengths, before = checked_lengths(LENGTHS.value), None
    wanted = files(config, TEXT_PARTS.value, names)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as scratch:
        for file in wanted:
            start = time.monotonic()
            params = parameters(config, file, MODEL.value)
            made = graphs_of(file, config, params, *size, lengths)
            place = out if "fp32" in recipes else Path(scratch)
            plain = place / "fp32" / f"{file.name}.tflite"
            lowering.write(made, plain)
            report(plain, time.monotonic() - start)
            if CHECK.value:
                before = check(file, config, params, plain, before, Path(scratch))
            del made, params
            for text, recipe in recipes.items():
                if text != "fp32":
                    smaller = out / folder_of(text) / plain.name
                    start = time.monotonic()
                    quantize.write(plain, smaller, recipe)
                    report(smaller, time.monotonic() - start)
            if place != out:
                plain.unlink()


def folder_of(recipe: str) -> str:
    """The name of the folder of a recipe's files."""
    return recipe.split(",")[0]


def check_folders(recipes: Iterable[str]) -> None:
    """Refuses recipes whose files would replace each other."""
    first = {}
    for text in recipes:
        if (other := first.setdefault(folder_of(text), text)) != text:
            raise cli.CommandError(
                f"--weights: {other} and {text} would both be in {folder_of(text)}/; make them one "
                "after the other, each with an --out of its own"
            )


def graphs_of(
    file: File,
    config: system.Config,
    params: pretrained.Params,
    height: int,
    width: int,
    lengths: tuple[int, ...],
) -> list[lowering.Graph]:
    """A file's graphs at a size in pixels and with the U-Net's `lengths`, else as the flags say."""
    size = (height, width, lengths, PROMPT.value)
    return part(file.part, config, params, *size, TIME.value, file.layers)


def report(file: Path, seconds: float) -> None:
    """A line about a file. Raises `VerifyError` where the lint finds something."""
    findings = flatbuffer.lint(file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size, what = file.stat().st_size / 1e6, f"{file.parent.name}/{file.name}"
    verdict = "lint clean" if not findings else f"{len(findings)} findings"
    print(f"{what}: {size:.1f} MB, {seconds:.0f} s, {verdict}, {peak:.1f} GiB peak", flush=True)
    if findings:
        raise verify.VerifyError(f"{what}: {'; '.join(findings[:5])}")


def check(
    file: File,
    config: system.Config,
    params: pretrained.Params,
    plain: Path,
    before: tuple[np.ndarray, np.ndarray] | None,
    scratch: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """CPU parity with JAX at another size, in a line.

    A part of the text tower goes on from what the parts before gave, JAX from its own results and
    LiteRT from its own, so that the last part's line is about the whole tower.

    Args:
      plain: the float32 file.
      before: what JAX and LiteRT gave for the file before.
      scratch: a folder for the file at that size.

    Returns:
      The same for this one.
    """
    side = CHECK.value
    made = graphs_of(file, config, params, side, side, (LENGTH,))
    theirs, ours = before or (None, None)
    case = verify.case(file.part, made[0], config, params, 0, file.layers, theirs)
    checked, what = plain, file.name
    if file.part != "text_encoder":
        checked, what = scratch / plain.name, f"{file.name} at {side} px"
        lowering.write(made, checked)
    elif file.layers.start:
        case.inputs["inputs_embeds"] = ours
    (output,) = verify.run(checked, made[0].signature, [case.inputs])
    reached, demand = manifest.psnr(output, case.expected), verify.DEMANDS["cpu", "fp32"]
    print(f"{what} on the CPU: {reached:.1f} dB of JAX", flush=True)
    if checked != plain:
        checked.unlink()
    if reached < demand:
        raise verify.VerifyError(f"{file.name}: {reached:.1f} dB, should be {demand:g}")
    return case.expected, output


if __name__ == "__main__":
    cli.run(main)
