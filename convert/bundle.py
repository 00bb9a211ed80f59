"""A model directory as a bundle: all that an app on a phone needs, and all that proves it right.

    python -m convert.bundle --model=DIR --out=BUNDLE [--weights=int8 --height=512 --width=512]

The folder (and BUNDLE.zip with --zip) holds the .tflite files, the tokenizer with the table of
embeddings, `manifest.json` (its schema: convert/manifest.schema.json), golden cases computed by
the JAX networks, `gpu_report.json` and a README for its receiver. With --text_parts the text tower
is several files that run one after another. The bundle appears whole, after its own golden cases
were replayed on the CPU, or not at all.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from PIL import Image

from convert import flatbuffer, lowering, manifest, phone, quantize, verify, vulkan
from convert import parts as tables
from convert.lowering import Graph
from dreamlite_jax import cli, generation, pretrained, system
from dreamlite_jax.data import pictures, prompts
from dreamlite_jax.diffusion import flow
from dreamlite_jax.models.unet import MASKED

MINIMUM_LITERT = "2.1.6"  # older ones compute masked attention wrongly on some GPUs
# dB that golden latents and pictures must reach, by the coarsest weights and where they run.
TOLERANCES = {
    "fp32": {"cpu": 60.0, "gpu_fp32": 60.0, "gpu_fp16": 35.0},
    "fp16": {"cpu": 35.0, "gpu_fp32": 35.0, "gpu_fp16": 35.0},
    "int8": {"cpu": 28.0, "gpu_fp32": 28.0, "gpu_fp16": 28.0},
    "int4": {"cpu": 10.0, "gpu_fp32": 10.0, "gpu_fp16": 10.0},
}


# dB that a file's output must reach on a random case with the weights that it keeps. On the CPU
# `verify.DEMANDS` must be reached before, with float32 weights.
DEMANDS = {"fp32": 45.0, "fp16": 45.0, "int8": 28.0, "int4": 10.0}


class Plan(NamedTuple):
    """How a bundle is made."""

    height: int
    width: int
    files: list[tables.File]
    weights: dict[str, quantize.Recipe]  # by part
    steps: int
    guidance: float
    lengths: tuple[int, ...] = (tables.LENGTH,)
    prompt_length: int = tables.PROMPT_LENGTH
    prompts: tuple[str, str] = ("a red circle", "make the circle yellow")  # of the golden cases
    checkpoint_step: int | None = None


def build(model: system.System, out: Path, plan: Plan, gpu: bool) -> dict[str, Any]:
    """Writes the bundle and returns its manifest.

    Args:
      gpu: run every file on the GPU accelerator, too. Without that no file is called a GPU variant.

    Raises:
      VerifyError, BundleError: a file is not what it should be; nothing is written.
      CommandError: a golden prompt is too long; nothing was lowered.
    """
    check_golden(model.prompter, plan)
    with pretrained.replaced_folder(out) as folder:
        parts, report, before = {}, {}, None
        for file in plan.files:
            entry, said, before = _part(folder, file, model, plan, gpu, before)
            parts.setdefault(file.part, []).append(entry)
            report[entry["file"]] = said
        _text_files(folder, model)
        shutil.copytree(model.folder / "tokenizer", folder / "tokenizer")
        golden = _golden(folder, model, plan)
        pretrained.write_json(folder / "gpu_report.json", report)
        (folder / "README.md").write_text(
            Path(__file__).with_name("receiver.md").read_text("utf-8"), "utf-8"
        )
        made = _manifest(folder, model, plan, parts, golden)
        pretrained.write_json(folder / "quality.json", _quality(phone.Bundle(folder, made)))
        made["files"]["quality.json"] = _entry(folder / "quality.json")
        manifest.check(folder, made)
        pretrained.write_json(folder / manifest.NAME, made)
    return made


# --- The parts of a bundle ------------------------------------------------------------------------


def _part(
    folder: Path,
    made: tables.File,
    model: system.System,
    plan: Plan,
    gpu: bool,
    before: np.ndarray | None,
) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Writes a file; its entry in the manifest, what gpu_report.json says of it, and what JAX gives
    for its random case, where the next part of the text tower goes on (`before`)."""
    name, recipe, params = made.part, plan.weights[made.part], model.params[tables.PARTS[made.part]]
    size = (plan.height, plan.width, plan.lengths, plan.prompt_length)
    graphs = tables.part(name, model.config, params, *size, layers=made.layers)
    cases = [
        verify.case(name, graph, model.config, params, 0, made.layers, before) for graph in graphs
    ]
    file, plain = folder / f"{made.name}.tflite", folder / f".{made.name}.tflite"
    lowering.write(graphs, plain)
    exact = _compared(plain, graphs, cases, verify.DEMANDS["cpu", "fp32"])
    quantize.write(plain, file, recipe)
    plain.unlink()
    if findings := flatbuffer.lint(file):
        raise verify.VerifyError(f"{file.name}: {'; '.join(findings[:5])}")
    weights = ",".join(f"{regex}={kind}" for regex, kind in recipe)
    report = {
        "operations": flatbuffer.counts(file),
        "weights": weights,
        "psnr_of_float32_weights": exact,
        **_measured(file, graphs, cases, gpu, DEMANDS[_coarsest(recipe)]),
    }
    entry = {
        "file": file.name,
        "weights": weights,
        "gpu": report["delegated"],
        "signatures": {graph.signature: _signature(graph) for graph in graphs},
    }
    return entry, report, cases[0].expected


def _measured(
    file: Path, graphs: list[Graph], cases: list[verify.Case], gpu: bool, demand: float
) -> dict[str, Any]:
    """dB of JAX's float32 output by place and signature; whether all operations are delegated, and
    the results near enough (`demand`) to call it a GPU variant."""
    found: dict[str, Any] = {"psnr": {}, "delegated": None, "reason": "not tried"}
    for accelerator, precision in verify.DEMANDS:
        if accelerator == "gpu" and not gpu:
            continue
        place = (accelerator, precision)
        try:
            found["psnr"][" ".join(place)] = _compared(file, graphs, cases, demand, *place)
        except verify.VerifyError as error:
            if accelerator == "cpu":
                raise
            reason = str(error).replace(f"{file.parent}{os.sep}", "")  # which will be gone
            return found | {"delegated": False, "reason": reason}
    return found | ({"delegated": True, "reason": ""} if gpu else {})


def _compared(
    file: Path,
    graphs: list[Graph],
    cases: list[verify.Case],
    demand: float,
    accelerator: str = "cpu",
    precision: str = "fp32",
) -> dict[str, float]:
    """dB of JAX's float32 output by signature.

    Raises:
      VerifyError: the file does not run there, or an output is below `demand`.
    """
    found = {}
    for graph, case in zip(graphs, cases, strict=True):
        (output,) = verify.run(file, graph.signature, [case.inputs], accelerator, precision)
        reached = found[graph.signature] = round(manifest.psnr(output, case.expected), 1)
        if reached < demand:
            where = f"{file.name} on the {accelerator} in {precision}"
            raise verify.VerifyError(f"{where}: {reached} dB of JAX, should be {demand:g}")
    return found


def _coarsest(recipe: quantize.Recipe) -> str:
    return max((kind for _, kind in recipe), key=list(TOLERANCES).index)


def _signature(graph: Graph) -> dict[str, Any]:
    def entry(tensor):
        return {**tensor._asdict(), "dtype": "float32"}

    return {"inputs": [entry(t) for t in graph.inputs], "outputs": [entry(graph.output)]}


def _text_files(folder: Path, model: system.System) -> None:
    """The table of embeddings, float16 [V, F], and the empty prompt's context, if it is needed."""
    (folder / "text").mkdir()
    embeddings = model.params["text_encoder"]["model"]["language_model"]["embed_tokens"]
    np.save(folder / "text" / "embeddings.npy", np.asarray(embeddings["embedding"], np.float16))
    if not model.config.mobile:
        context, mask = system.encode_prompts(model, prompts.GENERATE, [prompts.NULL])
        np.savez(folder / "text" / "null.npz", context=context[:, : mask.sum()])


def _golden(folder: Path, model: system.System, plan: Plan) -> dict[str, Any]:
    """Both modes' golden cases, by JAX in float32; the edit's source is the picture generated."""
    (folder / "golden").mkdir()
    coarsest = _coarsest([pair for recipe in plan.weights.values() for pair in recipe])
    entries, picture = {}, None
    for mode, prompt in zip(prompts.MODES, plan.prompts, strict=True):
        arrays, made = golden_case(model, plan, mode, prompt, picture)
        np.savez(folder / "golden" / f"{mode}.npz", **arrays)
        pictures.write_png(folder / "golden" / f"{mode}.png", made)
        entries[mode] = {
            "prompt": prompt,
            "arrays": f"golden/{mode}.npz",
            "picture": f"golden/{mode}.png",
            "tolerance": TOLERANCES[coarsest],
        }
        if picture is not None:
            entries[mode]["source"] = "golden/generate.png"
        picture = picture or Image.fromarray(made)
    return entries


def check_golden(prompter: prompts.Prompter, plan: Plan) -> None:
    """Refuses golden prompts that there is no room for."""
    source = Image.new("RGB", (plan.width, plan.height))  # as many tokens as any other
    for mode, prompt in zip(prompts.MODES, plan.prompts, strict=True):
        rooms, images = {"--text_lengths": max(plan.lengths)}, [source]
        if mode == prompts.GENERATE:
            rooms, images = rooms | {"--prompt_length": plan.prompt_length}, None
        inputs = prompts.prompt_inputs(prompter, mode, [prompts.tagged(mode, prompt)], images)
        n = int(inputs["attention_mask"].sum()) - getattr(prompter.drop, mode)
        for flag, room in rooms.items():
            if n > room:
                raise cli.CommandError(
                    f"{flag} has room for {room} tokens, but the prompt of the golden case to "
                    f"{mode} takes {n}; give as many or more"
                )


def golden_case(
    model: system.System, plan: Plan, mode: str, prompt: str, source: Image.Image | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """noise, context, mask (and of the empty prompt), latents of every step [N, 1, c, h, w] and the
    source's latent, all NCHW; and the picture uint8 [H, W, 3]."""
    config, params = model.config, model.params
    images = None if mode == prompts.GENERATE else [source]

    def encoded(text, least=0):
        return _padded(system.encode_prompts(model, mode, [text], images), plan, least)

    texts, null = encoded(prompts.tagged(mode, prompt)), None
    arrays = {"context": texts.context, "mask": texts.mask}
    if plan.guidance != 1:
        null = encoded(prompts.NULL, texts.mask.shape[1])
        arrays |= {"null_context": null.context, "null_mask": null.mask}
    noise = generation.initial_noise(config, 0, plan.height, plan.width)[None]
    latent = None
    if images is not None:
        values = pictures.to_floats(pictures.resized(source, plan.height, plan.width))[None]
        latent = np.asarray(system.encode_pictures(config, params["vae"], values))
        arrays["source"] = latent.transpose(0, 3, 1, 2)
    xt, steps, sigmas = noise, [], _sigmas(config, plan)
    for i in range(plan.steps):
        xt = system.sample_latents(
            config, params["unet"], xt, sigmas[i : i + 2], texts, null, latent, plan.guidance
        )
        steps.append(np.asarray(xt).transpose(0, 3, 1, 2))
    arrays |= {"noise": noise.transpose(0, 3, 1, 2), "latents": np.stack(steps)}
    return arrays, pictures.to_bytes(np.asarray(system.decode_latents(config, params["vae"], xt)))[
        0
    ]


def _padded(texts: system.Texts, plan: Plan, least: int) -> system.Texts:
    n = int(texts.mask.sum())
    length = min(length for length in plan.lengths if length >= max(n, least))
    context = np.zeros((1, length, texts.context.shape[2]), np.float32)
    context[:, :n] = texts.context[:, :n]
    return system.Texts(context, (np.arange(length) < n).astype(np.float32)[None])


def _sigmas(config: system.Config, plan: Plan) -> np.ndarray:
    size = (plan.height // config.vae.factor, plan.width // config.vae.factor)
    return flow.sigma_list(plan.steps, flow.resolution_mu(*size, config.shift))


def _quality(bundle: phone.Bundle) -> dict[str, Any]:
    """How near the files come to JAX's float32 on the CPU: dB of every result of the golden cases,
    and of the pictures the structural similarity, too.

    Raises:
      VerifyError: not near enough.
    """
    found = {}
    for mode in bundle.manifest["golden"]:
        for verdict in phone.replay(bundle, mode):
            if verdict.reached < verdict.demand:
                raise verify.VerifyError(
                    f"{verdict.what}: {verdict.reached:.1f} dB of JAX, should be {verdict.demand:g}"
                )
            found[verdict.what] = {"psnr": min(round(verdict.reached, 1), 999.0)}
        found[verdict.what]["ssim"] = round(verify.ssim(verdict.ours, verdict.expected), 4)
    return found


# --- The manifest ---------------------------------------------------------------------------------


def _manifest(
    folder: Path, model: system.System, plan: Plan, parts: dict[str, Any], golden: dict[str, Any]
) -> dict[str, Any]:
    config, sigmas = model.config, _sigmas(model.config, plan)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    text = {"embeddings": "text/embeddings.npy"}
    if not config.mobile:
        text["null"] = "text/null.npz"
    made = {
        "schema_version": manifest.VERSION,
        "model": {
            "pipeline": system.PIPELINES[config.mobile],
            "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
            "config_sha256": _config_digest(config),
            "checkpoint_step": plan.checkpoint_step,
            "license": "Apache-2.0 (code); weights: their owner's",
        },
        "size": {"height": plan.height, "width": plan.width},
        "files": {file.relative_to(folder).as_posix(): _entry(file) for file in files},
        "components": parts,
        "schedule": {
            "sigmas": [float(s) for s in sigmas],
            "timesteps": [float(t) for t in np.asarray(flow.timestep(sigmas[:-1]))],
            "guidance": plan.guidance,
        },
        "latent": {
            "channels": config.vae.latent_channels,
            "factor": config.vae.factor,
            "scale": 1.0,
            "shift": 0.0,
        },
        "text": {
            "lengths": list(plan.lengths),
            "prompt_length": plan.prompt_length,
            "pad_value": 0.0,
            "mask_value": MASKED,
            "image_side": config.image_side,
            "templates": {mode: _template(config, mode) for mode in prompts.MODES},
            **text,
        },
        "sinusoids": {
            "time_width": config.unet.block_out_channels[0],
            "size_width": config.unet.addition_time_embed_dim or 0,
            "cos_first": config.unet.flip_sin_to_cos,
            "shift": config.unet.freq_shift,
        },
        "golden": golden,
        "runtime": {
            "minimum": MINIMUM_LITERT,
            "made_with": {
                name: importlib.metadata.version(name)
                for name in ("jax", "litert-converter", "ai-edge-quantizer", "litert-lm-api")
            },
        },
    }
    return json.loads(json.dumps(made))  # as it will be read: lists, no tuples


def _entry(file: Path) -> dict[str, Any]:
    return {"sha256": manifest.digest(file), "bytes": file.stat().st_size}


def _template(config: system.Config, mode: str) -> dict[str, Any]:
    prefix, suffix = prompts.templated(mode, "\0").split("\0")
    drop = getattr(config.drop, mode)
    return {"prefix": prefix, "tag": prompts.TAGS[mode], "suffix": suffix, "drop": drop}


def _config_digest(config: system.Config) -> str:
    settings = [getattr(config, name).to_dict() for name in system.NETWORKS]
    text = json.dumps([*settings, config.shift._asdict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- The command ----------------------------------------------------------------------------------

MODEL = flags.DEFINE_string("model", None, "model directory (diffusers layout)", required=True)
OUT = flags.DEFINE_string("out", None, "folder of the bundle", required=True)
HEIGHT = flags.DEFINE_integer("height", None, "pixels; default: the model's own")
WIDTH = flags.DEFINE_integer("width", None, "pixels; default: the model's own")
WEIGHTS = flags.DEFINE_string("weights", "fp16", "of all parts: convert/quantize.py")
PART_WEIGHTS = {
    name: flags.DEFINE_string(f"{name}_weights", None, f"of the {name} instead")
    for name in tables.PARTS
}
LENGTHS = flags.DEFINE_list("text_lengths", [str(tables.LENGTH)], "context tokens of the U-Net")
PROMPT_LENGTH = flags.DEFINE_integer(
    "prompt_length", tables.PROMPT_LENGTH, "context tokens of the text encoder", lower_bound=1
)
TEXT_PARTS = flags.DEFINE_integer("text_parts", 1, "files of the text encoder", lower_bound=1)
STEPS = flags.DEFINE_integer(
    "steps", None, "default: 30, mobile models as distilled, mostly 4", lower_bound=1
)
GUIDANCE = flags.DEFINE_float("guidance", None, "of base models; default: 3.5")
STEP = flags.DEFINE_integer("checkpoint_step", None, "of the weights, for the manifest")
GPU = flags.DEFINE_boolean("gpu", True, "run the files on the GPU accelerator, too")
ZIP = flags.DEFINE_boolean("zip", False, "write OUT.zip beside it")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace a bundle at --out, and its zip")


def check_place(out: Path, overwrite: bool) -> None:
    """Refuses what must not be replaced: anything but a bundle, and that only with `overwrite`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / manifest.NAME).is_file():
        raise cli.CommandError(f"--out {out} exists and is no bundle; name another folder")
    if not overwrite:
        raise cli.CommandError(f"--out {out} exists; name another, or give --overwrite")


def check_archive(archive: Path, overwrite: bool) -> None:
    """The same for the zip file."""
    if archive.is_dir() or (archive.exists() and not overwrite):
        raise cli.CommandError(
            f"{archive} exists; name another --out, or let --overwrite replace a file"
        )


def write_zip(folder: Path, archive: Path) -> None:
    """All that is in a folder; the file appears whole or not at all."""
    with (
        pictures.replaced_file(archive) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as writer,
    ):
        for file in sorted(folder.rglob("*")):
            writer.write(file, file.relative_to(folder))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    out = Path(OUT.value)
    archive = Path(f"{out}.zip")
    check_place(out, OVERWRITE.value)
    if ZIP.value:
        check_archive(archive, OVERWRITE.value)
    if GPU.value and (reason := vulkan.gpu_available()):
        raise cli.CommandError(f"{reason}; or give --nogpu, then no file counts as a GPU variant")
    config = system.read_config(MODEL.value)
    height, width = tables.checked_size(config, HEIGHT.value, WIDTH.value)
    settings = generation.resolve(
        generation.Settings(height, width, STEPS.value, GUIDANCE.value), config
    )
    weights = {n: quantize.recipe(f.value or WEIGHTS.value) for n, f in PART_WEIGHTS.items()}
    plan = Plan(
        height,
        width,
        tables.files(config, TEXT_PARTS.value),
        weights,
        settings.steps,
        1.0 if config.mobile else settings.guidance,
        tables.checked_lengths(LENGTHS.value),
        PROMPT_LENGTH.value,
        checkpoint_step=STEP.value,
    )
    build(system.load(MODEL.value), out, plan, GPU.value)
    for name, said in pretrained.read_json(out / "gpu_report.json").items():
        if said["delegated"] is False:
            cli.warn(f"{name} is no GPU variant: {said['reason']}")
    if ZIP.value:
        write_zip(out, archive)
    print(f"{out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
