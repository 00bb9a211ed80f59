"""A demo's folder as its steps leave it, with made-up results: what the page is tested with."""

import json
import math
from pathlib import Path

import numpy as np

from dreamlite_jax.evals import shapes
from launch.demos import report, summary
from launch.files import write_arrays, write_json

RIGHT = {  # share of right pictures by variant: (t2i, edit)
    "pretrain": (0.55, 0.3),
    "edit": (0.1, None),
    "joint": (0.65, 0.45),
    "sft": (0.7, 0.55),
    "sft_unguided": (0.5, 0.4),
    "rl": (0.85, 0.65),
    "rl_unguided": (0.8, 0.6),
    "teacher_4step": (0.4, 0.3),
    "distilled": (0.8, 0.6),
    "bundle_fp16": (0.8, 0.6),
    "bundle_int8": (0.7, 0.5),
}
SECONDS = {
    "autoencoder": 170,
    "phase1_t2i": 490,
    "phase2_edit": 370,
    "phase3_joint": 355,
    "sft": 120,
    "rl_nft": 310,
    "distill_dmd2": 240,
    "evaluate-phase1_t2i": 40,
    "bundle-fp16": 60,
}


def make(folder: Path, count: int = 24, side: int = 32) -> Path:
    """Writes the folder; the same every time."""
    rng = np.random.default_rng(0)
    for variant, rights in RIGHT.items():
        for task, right in zip(summary.TASKS, rights, strict=True):
            n = count // 2 if variant.startswith("bundle") else count
            for split in ("held_out", "iid") if n == count else ("held_out",):
                if right is not None:
                    write_cell(folder, variant, task, split, n, side, right, rng)
    clock = 0
    for name, seconds in SECONDS.items():
        clock += seconds
        marker = {"seconds": seconds, "clock": clock, "command": []}
        write_json(folder / "done" / f"{name}.json", marker)
    for name in report.STAGES:
        write_curves(folder / "runs" / name / "metrics.jsonl", rng)
    for k, bundle in enumerate(summary.BUNDLES):
        write_bundle(folder, bundle, 2 - k)
    return folder


def write_cell(folder, variant, task, split, n, side, right, rng) -> None:
    given = shapes.cases(task, split, n, side)
    images = np.stack([case.target for case in given])
    for k in range(n):
        if rng.random() > right:
            images[k] = images[(k + 1) % n]
    found = shapes.verdicts(images, given)
    place = folder / "scores" / variant / f"{task}_{split}"
    write_arrays(place.with_suffix(".npz"), shapes.arrays(images, found, given))
    diverse = 0.21 if variant in ("rl", "teacher_4step", "distilled") else None
    write_json(place.with_suffix(".json"), shapes.summary(found, given) | {"diversity": diverse})


def write_curves(file: Path, rng) -> None:
    file.parent.mkdir(parents=True)
    lines = []
    for step in range(50, 3001, 50):
        loss = 0.05 + math.exp(-step / 600) * (1 + 0.1 * rng.standard_normal())
        line = {"step": step, "loss": loss}
        if step % 500 == 0:
            line["val/psnr"] = 15 + step / 200
        for k, task in enumerate(summary.TASKS):
            line[f"reward/shapes/{task}/mean"] = 0.7 + step / 20_000 - 0.1 * k
        lines.append(json.dumps(line))
    file.write_text("\n".join([*lines, '{"step": 99']))  # as a kill would leave it


def write_bundle(folder: Path, name: str, megabytes: float) -> None:
    parts = ("unet.tflite", "text_encoder.tflite", "vae_decoder.tflite", "vae_encoder.tflite")
    files = {part: {"bytes": int(megabytes * 1e6 / (k + 1))} for k, part in enumerate(parts)}
    components = {part.split(".")[0]: [{"gpu": True}] for part in parts}
    write_json(folder / name / "manifest.json", {"files": files, "components": components})
    one = {
        "operations": {"run": {"ADD": 40, "CONV_2D": 60}},
        "delegated": True,
        "psnr": {"cpu fp32": {"a": 71.0}, "gpu fp16": {"a": 52.0}},
        "reason": "",
    }
    write_json(folder / name / "gpu_report.json", dict.fromkeys(parts, one))
    for task in summary.TASKS:
        drawn = folder / "drawn" / name.removeprefix("bundle_") / f"{task}_held_out.npz"
        write_arrays(drawn, {"seconds": np.full(12, 0.3)})
