"""How good a model is at a benchmark with a judge.

    python -m launch.evaluate --model=DIR --suite=shapes --out=DIR
    python -m launch.evaluate --model=runs/shapes/sft --suite=shapes --out=DIR --task=edit \\
      --steps=4 --guidance=1 --image_guidance=1
    python -m launch.evaluate --suite=shapes --out=DIR \\
      --variants='[{"name": "a", "model": "DIR"}, {"name": "b", "model": "DIR", "steps": 4}]'

`--model` is a model directory or a run's workdir. Several variants share what was compiled, and
each is compared with the first over the prompts that both have drawn. A variant has a `name`, a
`model`, and any of the flags steps, guidance, image_guidance, stochastic, count, task, split,
diversity, inputs. Those of the same `group`, such as the seeds of a training, are averaged, too,
with the intervals of their change over prompts and over runs. In place of `model` one may have
`pictures`, a folder with what another program made of a variant's inputs (convert.run_bundle
--requests); where it wrote their prompts, these must be those of --seed and --world.

Writes scores.json, with accuracies and by attribute how much of what was asked is there, and for
every variant, task and split what was drawn and a contact sheet. Run again after an interruption it
does what is missing; what other settings made, or a model that has changed since, it makes anew.
"""

import itertools
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image

from dreamlite_jax import cli, generation, system
from dreamlite_jax.data import mixture, pictures, prompts
from dreamlite_jax.evals import shapes, statistics
from dreamlite_jax.evals.shapes import Case
from dreamlite_jax.train import checkpoint, origins, signals
from launch import compilation, variants
from launch.files import read_arrays, read_json, write_arrays, write_json
from launch.variants import Variant

MODEL = flags.DEFINE_string("model", None, "model directory, or a run's workdir")
VARIANTS = flags.DEFINE_string("variants", None, "JSON list of several variants, see above")
SUITE = flags.DEFINE_enum("suite", "shapes", ["shapes"], "benchmark")
OUT = flags.DEFINE_string("out", None, "folder for the scores", required=True)
STEPS = flags.DEFINE_integer("steps", None, "default: 28, mobile models their own", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "of the text; default: 3.5")
IMAGE_GUIDANCE = flags.DEFINE_float("image_guidance", None, "of the source; default: 1.5")
STOCHASTIC = flags.DEFINE_float("stochastic", 0.0, "fresh noise in every step, see launch.sample")
COUNT = flags.DEFINE_integer("count", 256, "prompts of each task and split", lower_bound=1)
TASK = flags.DEFINE_list("task", ["t2i", "edit"], "tasks")
SPLIT = flags.DEFINE_list("split", list(shapes.SPLITS), "splits")
WORLD = flags.DEFINE_string(
    "world", "demo", "settings of the world: quick, demo, told, clear, hard"
)
SEED = flags.DEFINE_integer("seed", shapes.SEED, "of the prompts", lower_bound=0)
DIVERSITY = flags.DEFINE_integer("diversity", 0, "prompts drawn several times, for the diversity")
INPUTS = flags.DEFINE_boolean("inputs", False, "also write what a bundle needs to draw the same")
BATCH = flags.DEFINE_integer("batch_size", 32, "pictures at a time", lower_bound=1)
use_cache = compilation.define()

GUIDED_STEPS, SAMPLES = 28, 4
DRAWN_BY = ("steps", "guidance", "image_guidance", "stochastic")
SETTINGS = (*DRAWN_BY, "count", "diversity")  # of a variant's pictures
SCORES, INPUTS_ENDING = "scores.json", "_inputs.npz"


class Cell(NamedTuple):
    """A variant at one task and split, and the files of it."""

    variant: Variant
    task: str
    split: str
    folder: Path

    @property
    def stem(self) -> str:
        return f"{self.task}_{self.split}"

    def file(self, ending: str) -> Path:
        return self.folder / f"{self.stem}{ending}"


def main() -> None:
    use_cache()
    found = [as_drawn(variant) for variant in asked_for()]
    out = Path(OUT.value)
    cells = [
        Cell(variant, task, split, out / variant.name)
        for variant in found
        for task in variant.task
        for split in variant.split
    ]
    model: tuple[str, system.System] | None = None
    results, makers = [], {}
    with signals.asked_to_leave() as asked:
        for k, cell in enumerate(cells):
            name = cell.variant.model
            if name not in makers:  # once, so that all is drawn by the same step of a run
                makers[name] = maker_of(name)
            wanted = made_with(cell, makers[name])
            if (reason := to_draw(cell, wanted)) is not None:
                if reason:
                    said = f"{cell.variant.name} {cell.task} {cell.split}"
                    print(f"{said}: made anew, as {reason}", flush=True)
                if name is not None and (model is None or model[0] != name):
                    model = (name, opened(name, makers[name]["step"]))
                    check_tasks(cell.variant, model[1])
                result = evaluated(cell, model[1] if name is not None else None, asked)
                write_json(cell.file(".json"), result | {"made_with": wanted})
            change = compared(beside(cell, cells[0]), cell)
            results.append(read_json(cell.file(".json")) | change)
            print(f"{k + 1}/{len(cells)} {line(results[-1])}", flush=True)
    for averaged in averages(cells, results):
        results.append(averaged)
        print(average_line(averaged))
    write_json(out / SCORES, results)


def asked_for() -> list[Variant]:
    """What --model or --variants asks for."""
    if (MODEL.value is None) == (VARIANTS.value is None):
        raise cli.CommandError("give either --model or --variants")
    common = {
        "steps": STEPS.value,
        "guidance": GUIDANCE.value,
        "image_guidance": IMAGE_GUIDANCE.value,
        "stochastic": STOCHASTIC.value,
        "count": COUNT.value,
        "task": tuple(TASK.value),
        "split": tuple(SPLIT.value),
        "diversity": DIVERSITY.value,
        "inputs": INPUTS.value,
    }
    if VARIANTS.value is not None:
        return variants.parsed(VARIANTS.value, common)
    name = Path(MODEL.value).resolve().name
    return variants.made([{"name": name, "model": MODEL.value}], common)


def as_drawn(variant: Variant) -> Variant:
    """The variant without the guidance that its model does not take, which is said."""
    unguided = variant._replace(guidance=None, image_guidance=None)
    if variant.model is None or variant == unguided:
        return variant
    kind = "run" if checkpoint.folder_kind(variant.model) == "run" else "model"
    if not origins.is_mobile(origins.Origin(kind, variant.model)):
        return variant
    cli.warn(f"{variant.name}: guidance and image_guidance are {generation.IGNORED}")
    return unguided


def maker_of(model: str | None) -> dict[str, Any]:
    """What tells a model from any other, and from itself at another time: its path, of a run the
    step that it has reached, and when that, or the newest of its files, was written."""
    if model is None:
        return {}
    folder, step = Path(model), None
    files = system.files(folder)
    if checkpoint.folder_kind(folder) == "run":
        step = checkpoint.read_meta(folder)[0]
        files = [folder / checkpoint.FOLDER / str(step)]
    return {"model": str(folder.resolve()), "step": step, "written": written(*files)}


def written(*files: Path) -> str | None:
    """When the newest of some files was written; None where there is none, of which its reader will
    tell."""
    times = [file.stat().st_mtime for file in files if file.exists()]
    return datetime.fromtimestamp(max(times), UTC).isoformat() if times else None


def made_with(cell: Cell, maker: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's pictures and verdicts depend on, as JSON gives it back; settings as they are
    given, None for a model's own. Networks of earlier runs are taken to be as they were."""
    world = {"world": WORLD.value, "seed": SEED.value}
    if not maker:
        file = pictures_of(cell)
        return {**world, "pictures": str(file.resolve()), "written": written(file)}
    given = {name: getattr(cell.variant, name) for name in SETTINGS}
    if cell.task != mixture.EDIT:
        del given["image_guidance"]
    return {**world, **given, **maker}


def to_draw(cell: Cell, wanted: Mapping[str, Any]) -> str | None:
    """Why a cell is to be drawn, "" if it never was; None: there it is, made with what is wanted.

    Args:
      wanted: of `made_with`.
    """
    if not cell.file(".json").is_file():
        return ""
    found = read_json(cell.file(".json")).get("made_with")
    if found is None:
        return "it does not say what it was made with"
    if found != wanted:
        keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
        changes = (f"{key} was {found.get(key)}, is {wanted.get(key)}" for key in keys)
        return ", ".join(changes)
    if cell.variant.inputs and cell.variant.model and not cell.file(INPUTS_ENDING).is_file():
        return "its inputs were not written"
    return None


def opened(folder: str, step: int | None) -> system.System:
    """A model directory, or the average of a run at a step."""
    return system.load(folder) if step is None else origins.load_run(folder, step)


def check_tasks(variant: Variant, model: system.System) -> None:
    if mixture.EDIT in variant.task and not model.config.pane:
        raise cli.CommandError(
            f"{variant.model} was trained without the source's pane: it cannot edit; say --task=t2i"
        )


def evaluated(cell: Cell, model: system.System | None, asked: Any) -> dict[str, Any]:
    """The result of a cell; its pictures are written beside it."""
    variant, began = cell.variant, time.monotonic()
    if model is None:
        images, given = drawn_elsewhere(cell)
        side, settings, spread = images.shape[1], {}, None
    else:
        side = model.config.default_side
        given = shapes.cases(cell.task, cell.split, variant.count, side, WORLD.value, SEED.value)
        again = shapes.repeated(given, variant.diversity, SAMPLES)
        wanted = wanted_settings(variant, model.config, side)
        settings = settings_used(wanted, model.config, cell.task)
        made = shapes.pictures(model, [*given, *again], wanted, lambda: leave(asked))
        images, spread = made[: len(given)], None
        if len(again):
            spread = shapes.diversity(made[len(given) :], SAMPLES)
    found = shapes.verdicts(images, given)
    cell.file(".json").unlink(missing_ok=True)  # lest, after a kill, it speaks of others' pictures
    if model is not None and variant.inputs:
        write_inputs(cell, model, given, side)
    write_arrays(cell.file(".npz"), shapes.arrays(images, found, given))
    sheet(cell, images, given, found)
    return {
        "variant": variant.name,
        "task": cell.task,
        "split": cell.split,
        "side": side,
        "seed": SEED.value,
        "world": WORLD.value,
        **settings,
        **shapes.summary(found, given),
        "diversity": spread,
        "seconds": time.monotonic() - began,
    }


def wanted_settings(variant: Variant, config: system.Config, side: int) -> generation.Settings:
    return generation.resolve(
        generation.Settings(
            height=side,
            width=side,
            steps=variant.steps or (None if config.mobile else GUIDED_STEPS),
            guidance=variant.guidance,
            image_guidance=variant.image_guidance,
            stochastic=variant.stochastic,
            batch_size=BATCH.value,
        ),
        config,
    )


def settings_used(wanted: generation.Settings, config: system.Config, task: str) -> dict[str, Any]:
    """What scores.json says of them; None: that has no part in it."""
    unused = generation.unused(config, task == mixture.EDIT)
    return {name: None if name in unused else getattr(wanted, name) for name in DRAWN_BY}


def leave(asked: Any) -> None:
    if asked():
        sys.exit(signals.EXIT_TO_RESUME)


def pictures_of(cell: Cell) -> Path:
    return Path(cell.variant.pictures) / f"{cell.stem}.npz"


def drawn_elsewhere(cell: Cell) -> tuple[np.ndarray, list[Case]]:
    """Pictures uint8 [N, S, S, 3] that another program has made of the cell's inputs, and what they
    were asked for; where it wrote the prompts [N] that it was given, these must be the same."""
    file = pictures_of(cell)
    try:
        drawn = read_arrays(file)
        images = drawn["images"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise cli.CommandError(f"{file}: no pictures of {cell.stem} ({error})") from error
    side = images.shape[1]
    given = shapes.cases(cell.task, cell.split, len(images), side, WORLD.value, SEED.value)
    wanted = [case.prompt for case in given]
    asked = drawn["prompts"].tolist() if "prompts" in drawn else wanted
    for k, (theirs, ours) in enumerate(itertools.zip_longest(asked, wanted)):
        if theirs != ours:
            raise cli.CommandError(
                f"{file}: picture {k} is of {theirs!r}, but of --seed={SEED.value} and "
                f"--world={WORLD.value} it would be {ours!r}; give those of its inputs"
            )
    return images, given


def write_inputs(cell: Cell, model: system.System, given: list[Case], side: int) -> None:
    """Prompts [N], noise float32 [N, h, w, c], the encoder's context float32 [N, L, F] and mask
    bool [N, L], and of edits source uint8 [N, S, S, 3]: for a bundle."""
    arrays = {
        "prompts": np.array([case.prompt for case in given]),
        "noise": shapes.noise(model.config, given, side),
    }
    mode, images = prompts.GENERATE, None
    if cell.task == mixture.EDIT:
        arrays["source"] = np.stack([case.source for case in given])
        mode, images = prompts.EDIT, [Image.fromarray(case.source) for case in given]
    texts = [prompts.tagged(mode, case.prompt) for case in given]
    encoded = system.encode_prompts(model, mode, texts, images, batch_size=BATCH.value)
    write_arrays(cell.file(INPUTS_ENDING), arrays | encoded._asdict())


def sheet(cell: Cell, images: np.ndarray, given: list[Case], found: list[shapes.Verdict]) -> None:
    """Source (of edits), one right answer, and the model's, of the first prompts."""
    rows, captions = [], []
    for image, case, verdict in list(zip(images, given, found, strict=True))[:16]:
        source = [] if case.source is None else [case.source]
        rows.append([*source, case.target, image])
        captions.append(f"{'right' if verdict.exact else f'{verdict.score:.2f}'}: {case.prompt}")
    pictures.write_png(cell.file(".png"), pictures.contact_sheet(rows, captions, 128))


def compared(first: Cell, *cells: Cell) -> dict[str, Any]:
    """The change of the accuracy from the first variant's to a cell's, or several cells' on
    average, with its 95 % interval."""
    cell = cells[0]
    drawn = cell.task in first.variant.task and cell.split in first.variant.split
    if first in cells or not drawn:
        return {}
    drawings = (read_arrays(one.file(".npz"), "exact", "prompts") for one in (first, *cells))
    found = statistics.change_of_drawn(*drawings)
    return {"change": {"against": first.variant.name, **found}}


def averages(cells: list[Cell], results: list[dict]) -> Iterator[dict[str, Any]]:
    """Of the cells of a group that have the same task and split."""
    groups: dict[tuple, list[int]] = {}
    for k, cell in enumerate(cells):
        if cell.variant.group is not None:
            groups.setdefault((cell.variant.group, cell.task, cell.split), []).append(k)
    for (group, task, split), members in groups.items():
        if len(members) > 1:
            yield {
                "group": group,
                "variants": [cells[k].variant.name for k in members],
                "task": task,
                "split": split,
                "accuracy": float(np.mean([results[k]["accuracy"] for k in members])),
                **compared(beside(cells[members[0]], cells[0]), *(cells[k] for k in members)),
            }


def beside(cell: Cell, other: Cell) -> Cell:
    """The other variant's cell of the same task and split."""
    return cell._replace(variant=other.variant, folder=other.folder)


def line(result: Mapping[str, Any]) -> str:
    accuracy, low, high = (100 * result[key] for key in ("accuracy", "low", "high"))
    said = (
        f"{result['variant']} {result['task']} {result['split']}: {accuracy:.1f} % exact "
        f"({low:.1f} to {high:.1f}, n = {result['count']}), score {result['score']:.3f}, "
        f"sharpness {result['sharpness']:.2f}"
    )
    return said + change_said(result)


def average_line(result: Mapping[str, Any]) -> str:
    return (
        f"{result['group']} {result['task']} {result['split']}: {100 * result['accuracy']:.1f} % "
        f"exact on average of {len(result['variants'])}{change_said(result)}"
    )


def change_said(result: Mapping[str, Any]) -> str:
    if "change" not in result:
        return ""
    change = {k: v if isinstance(v, str) else 100 * v for k, v in result["change"].items()}
    said = f", {change['value']:+.1f} points ({change['low']:+.1f} to {change['high']:+.1f}"
    if "runs_low" in change:
        said += f" over prompts) ({change['runs_low']:+.1f} to {change['runs_high']:+.1f} over runs"
    return f"{said}) against {change['against']}"


if __name__ == "__main__":
    cli.run(main)
