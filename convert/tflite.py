"""The networks of a model directory as .tflite files, in one or several variants of weights.

    python -m convert.tflite --model=DIR --out=FILES --weights=fp16
    python -m convert.tflite --random=dreamlite --out=FILES --height=1024 --width=1024 \\
      --weights="fp32 fp16 int8" --parts="unet vae_decoder vae_encoder" --check=512

Files are FILES/<weights>/unet.tflite, vae_decoder.tflite, vae_encoder.tflite and
text_encoder.tflite. Each is linted; with --check it is also lowered at that side in pixels and run
on the CPU beside JAX. `convert.bundle` makes what a phone receives.
"""

import resource
import time
from pathlib import Path

import jax
from absl import flags

from convert import flatbuffer, graphs, lowering, manifest, quantize, verify
from convert.parts import (
    LENGTH,
    PARTS,
    PROMPT_LENGTH,
    checked_size,
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
    config = system.read_config(MODEL.value) if MODEL.value else random_config(RANDOM.value)
    size = checked_size(config, HEIGHT.value, WIDTH.value)
    lengths = tuple(sorted(int(length) for length in LENGTHS.value))
    for name in names:
        start = time.monotonic()
        params = parameters(config, PARTS[name], MODEL.value)
        made = part(name, config, params, *size, lengths, PROMPT.value, TIME.value)
        plain = out / "fp32" / f"{name}.tflite"
        lowering.write(made, plain)
        report(plain, time.monotonic() - start)
        if CHECK.value:
            check(name, config, params, out)
        del made, params
        for text, parts in recipes.items():
            if text != "fp32":
                file = out / text.split(",")[0] / f"{name}.tflite"
                start = time.monotonic()
                quantize.write(plain, file, parts)
                report(file, time.monotonic() - start)
        if "fp32" not in recipes:
            plain.unlink()
    if "fp32" not in recipes:
        plain.parent.rmdir()


def report(file: Path, seconds: float) -> None:
    """A line about a file. Raises `VerifyError` where the lint finds something."""
    findings = flatbuffer.lint(file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = file.stat().st_size / 1e6
    verdict = "lint clean" if not findings else f"{len(findings)} findings"
    print(f"{file}: {size:.1f} MB, {seconds:.0f} s, {verdict}, {peak:.1f} GiB peak", flush=True)
    if findings:
        raise verify.VerifyError(f"{file}: {'; '.join(findings[:5])}")


def check(name: str, config: system.Config, params: pretrained.Params, out: Path) -> None:
    """CPU parity with JAX at another size, in a line."""
    made = part(name, config, params, CHECK.value, CHECK.value, (LENGTH,), PROMPT.value, TIME.value)
    file = out / "check" / f"{name}.tflite"
    lowering.write(made, file)
    case = verify.case(name, made[0], config, params)
    (output,) = verify.run(file, made[0].signature, [case.inputs])
    reached, demand = manifest.psnr(output, case.expected), verify.DEMANDS["cpu", "fp32"]
    print(f"{name} at {CHECK.value} px on the CPU: {reached:.1f} dB of JAX", flush=True)
    file.unlink()
    if reached < demand:
        raise verify.VerifyError(f"{name}: {reached:.1f} dB, should be {demand:g}")


if __name__ == "__main__":
    cli.run(main)
