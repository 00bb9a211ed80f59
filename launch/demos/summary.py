"""A demo's results as flat numbers, and beside its aims."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamlite_jax.evals import statistics
from launch.files import read_arrays, read_json

TASKS = ("t2i", "edit")
NAMES = {"t2i": "Text to image", "edit": "Editing"}
# Variants in the order of a demo, and what they are.
VARIANTS = {
    "pretrain": "First lesson",
    "edit": "After editing lessons",
    "joint": "Both together",
    "sft": "Fine-tuned",
    "sft_unguided": "Fine-tuned, unguided",
    "rl": "Reinforced",
    "rl_unguided": "Reinforced, unguided",
    "teacher_4step": "Undistilled, 4 steps",
    "distilled": "Distilled, 4 steps",
    "bundle_fp16": "Bundle, fp16",
    "bundle_int8": "Bundle, int8",
}
BUNDLES = ("bundle_fp16", "bundle_int8")
CELL = ("accuracy", "score", "sharpness", "diversity")
# Differences over the same prompts: name, of what, from what.
CHANGES = (
    ("rl_gain", "rl", "sft"),
    ("rl_gain_unguided", "rl_unguided", "sft_unguided"),
    ("distilled_minus_teacher", "distilled", "rl"),
    ("distilled_minus_teacher_4step", "distilled", "teacher_4step"),
    ("bundle_fp16_minus_source", "bundle_fp16", "distilled"),
    ("bundle_int8_minus_source", "bundle_int8", "distilled"),
)
# Beginnings of the steps that a comparison adds: no part of a demo.
COMPARED = ("cost-", "direct", "evaluate-direct")
BEST_DB = 99.0  # what identical pictures count as


class Aim(NamedTuple):
    """What a demo should reach, and what it did."""

    what: str
    aim: str
    result: str
    met: bool | None  # None: not measured


def collect(folder: Path, quick: bool, seed: int) -> dict[str, Any]:
    """The flat numbers of a demo's folder.

    `minutes` are those of all together, of which steps beside each other share some. Accuracies are
    of held-out prompts, with `_low` and `_high` of their 95 % interval; `_iid` are
    those of combinations that training showed. Differences are over the same prompts.
    """
    done = {
        m.stem: read_json(m)
        for m in sorted((folder / "done").glob("*.json"))
        if not m.stem.startswith(COMPARED)
    }
    clock = max((step["clock"] for step in done.values()), default=0.0)
    found: dict[str, Any] = {"minutes": clock / 60, "quick": quick, "seed": seed}
    found |= {f"minutes_{name}": step["seconds"] / 60 for name, step in done.items()}
    for task in TASKS:
        for variant in VARIANTS:
            for split, ending in (("held_out", ""), ("iid", "_iid")):
                found |= cell(folder, variant, task, split, ending)
        for name, after, before in CHANGES:
            found |= changed(folder, task, name, after, before)
        for bundle in BUNDLES:
            found |= likeness(folder, task, bundle)
    for bundle in BUNDLES:
        found |= bundle_facts(folder, bundle)
    known = [aim.met for aim in aims(found) if aim.met is not None]
    return found | {"aims_met": sum(known), "aims": len(known)}


def tables_file(out: Path, quick: bool, share: float = 0.0) -> Path:
    """Of several demos side by side; a page shows that of demos like its own."""
    kind = "_quick" if quick else f"_pretraining_{share:g}" if share else ""
    return out / f"compare{kind}.json"


def cell(folder: Path, variant: str, task: str, split: str, ending: str) -> dict[str, float]:
    file = scores(folder, variant, task, split, ".json")
    if not file.is_file():
        return {}
    result = read_json(file)
    found = {
        f"{task}_{what}_{variant}{ending}": result[what]
        for what in CELL
        if result[what] is not None
    }
    found |= {f"{task}_accuracy_{variant}{ending}_{end}": result[end] for end in ("low", "high")}
    return found | {f"{task}_count_{variant}{ending}": result["count"]}


def scores(folder: Path, variant: str, task: str, split: str, ending: str) -> Path:
    return folder / "scores" / variant / f"{task}_{split}{ending}"


def arrays(folder: Path, variant: str, task: str, split: str = "held_out") -> dict | None:
    """What was drawn of a task and split, with its verdicts; None where nothing was."""
    file = scores(folder, variant, task, split, ".npz")
    if not file.is_file():
        return None
    return read_arrays(file)


def changed(folder: Path, task: str, name: str, after: str, before: str) -> dict[str, float]:
    """The difference of two variants' accuracies, over the prompts that both have drawn."""
    pair = [arrays(folder, variant, task) for variant in (before, after)]
    if None in pair:
        return {}
    found = statistics.change_of_drawn(*pair)
    endings = {"value": "", "low": "_low", "high": "_high", "count": "_count"}
    return {f"{task}_{name}{ending}": found[what] for what, ending in endings.items()}


def likeness(folder: Path, task: str, bundle: str) -> dict[str, float]:
    """Mean dB of a bundle's pictures beside those that JAX drew from the same noise."""
    ours, theirs = (arrays(folder, variant, task) for variant in (bundle, "distilled"))
    if ours is None or theirs is None:
        return {}
    a, b = (found["images"][: len(ours["images"])].astype(np.float64) for found in (ours, theirs))
    errors = np.maximum(((a - b) ** 2).mean((1, 2, 3)), 255**2 / 10 ** (BEST_DB / 10))
    return {f"{task}_psnr_{bundle}": float((10 * np.log10(255**2 / errors)).mean())}


def bundle_facts(folder: Path, bundle: str) -> dict[str, Any]:
    """A bundle's size, whether all of it runs on the GPU accelerator, and how long a picture takes
    where it was drawn."""
    found = {}
    if (folder / bundle / "manifest.json").is_file():
        made = read_json(folder / bundle / "manifest.json")
        found[f"{bundle}_megabytes"] = sum(file["bytes"] for file in made["files"].values()) / 1e6
        found[f"{bundle}_on_gpu"] = on_gpu(made)
    for task in TASKS:
        file = folder / "drawn" / bundle.removeprefix("bundle_") / f"{task}_held_out.npz"
        if file.is_file():
            with np.load(file) as drawn:
                found[f"{task}_seconds_{bundle}"] = float(np.median(drawn["seconds"]))
    return found


def on_gpu(manifest: Mapping[str, Any]) -> bool:
    """Whether every part of a bundle was seen to run on the GPU accelerator."""
    parts = (part for entries in manifest["components"].values() for part in entries)
    return all(part["gpu"] for part in parts)


# --- Aims -----------------------------------------------------------------------------------------


def aims(found: Mapping[str, Any]) -> list[Aim]:
    """All aims, in the order of the demo."""
    return [
        at_least(found, "Text to image, seen combinations", "t2i_accuracy_sft_iid", 0.80),
        at_least(found, "Text to image, held-out combinations", "t2i_accuracy_sft", 0.60),
        at_least(found, "Edits, held-out combinations", "edit_accuracy_sft", 0.50),
        *(gained(found, task) for task in TASKS),
        *distances(found),
    ]


def at_least(found: Mapping[str, Any], what: str, key: str, least: float) -> Aim:
    aim = f"at least {100 * least:.0f} %"
    if key not in found:
        return Aim(f"{what}, after fine-tuning", aim, "not measured", None)
    said = with_interval(found, key)
    return Aim(f"{what}, after fine-tuning", aim, said, found[key] >= least)


def gained(found: Mapping[str, Any], task: str) -> Aim:
    key, what = f"{task}_rl_gain", f"{NAMES[task]}: reinforcement learning gains"
    aim = "more than the interval"
    if key not in found:
        return Aim(what, aim, "not measured", None)
    return Aim(what, aim, points(found, key), found[f"{key}_low"] > 0)


def distances(found: Mapping[str, Any]) -> Iterator[Aim]:
    for key, what, aim, least in (
        (
            "distilled_minus_teacher",
            "4 distilled steps and the guided 28",
            "within 5 points",
            -5,
        ),
        (
            "distilled_minus_teacher_4step",
            "4 distilled steps and 4 undistilled",
            "at least 10 points above",
            10,
        ),
        ("bundle_fp16_minus_source", "Bundle with fp16 weights", "within 1 point", -1),
        ("bundle_int8_minus_source", "Bundle with int8 weights", "within 3 points", -3),
    ):
        for task in TASKS:
            full = f"{task}_{key}"
            if full not in found:
                yield Aim(f"{NAMES[task]}: {what}", aim, "not measured", None)
                continue
            near = 100 * found[full]
            if key.startswith("bundle"):
                near = -abs(near)
            # Two models that get nothing right are near each other, too.
            met = near >= least - 1e-9 and found[f"{task}_accuracy_distilled"] > 0
            yield Aim(f"{NAMES[task]}: {what}", aim, points(found, full), met)


def with_interval(found: Mapping[str, Any], key: str) -> str:
    low, high = (100 * found[f"{key}_{end}"] for end in ("low", "high"))
    return f"{100 * found[key]:.1f} % ({low:.1f} to {high:.1f})"


def points(found: Mapping[str, Any], key: str) -> str:
    value, low, high = (100 * found[name] for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def said(found: Mapping[str, Any]) -> Iterator[str]:
    """A demo's results in a few lines for the console."""
    for task in TASKS:
        parts = [
            f"{variant} {100 * found[key]:.0f} %"
            for variant in VARIANTS
            if (key := f"{task}_accuracy_{variant}") in found
        ]
        yield f"{NAMES[task]}, held-out prompts right: {', '.join(parts)}"
    if found["quick"]:
        yield "these few steps show that all works, and nothing of how well"
    else:
        yield f"{found['aims_met']} of {found['aims']} aims met"
    if elsewhere := [name for name in BUNDLES if not found.get(f"{name}_on_gpu", True)]:
        names, why = ", ".join(elsewhere), "driver.json, gpu_report.json"
        yield f"{names} drew on the CPU: no GPU driver here runs all of it ({why})"
    yield f"{found['minutes']:.1f} minutes in all"
