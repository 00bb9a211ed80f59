"""Several demos side by side, and the order of their stages against training on both tasks at once.

The direct way takes the same compute and the same schedule: for each of the three stages of
pretraining it makes a run on both tasks with that stage's learning rate, warmup, decay and noise,
of as many steps as the stage's floating-point operations pay for.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launch.demos import plan, summary
from launch.demos.driver import Step
from launch.demos.plan import Plan
from launch.demos.summary import NAMES, TASKS, VARIANTS
from launch.files import read_json

PHASES = plan.PRETRAINING
JOINT = PHASES[-1]
# Of a stage's config, what makes its schedule.
_OF_OPTIM = ("lr", "schedule", "warmup", "decay_from")
_OF_LOSS = ("mean", "edit_offset")
SCHEDULE = (
    *(f"optim.{key}" for key in _OF_OPTIM),
    "ema_decay",
    *(f"loss.{key}" for key in _OF_LOSS),
)
SPLITS = {"": "held-out", "_iid": "seen"}

Table = dict[str, Any]  # title, note, head, rows of texts


# --- The direct way -------------------------------------------------------------------------------


def steps(made: Plan) -> list[Step]:
    """What the comparison with direct training adds to a demo."""
    found = [cost(made, phase) for phase in PHASES]
    start = made.folder / "runs" / "autoencoder"
    for number, phase in enumerate(PHASES, 1):
        workdir = made.folder / "runs" / f"direct{number}"
        found.append(leg(made, number, phase, workdir, start))
        start = workdir
    variant = {"name": "direct", "model": str(start), **plan.GUIDED}
    return [*found, plan.evaluate(made, "direct", "Judging: direct", [variant], 30)]


def cost(made: Plan, phase: str) -> Step:
    config = f"configs/shapes/{phase}.py" + (":quick" if made.quick else "")
    workdir = made.folder / "runs" / phase
    flags = (f"--config={config}", f"--workdir={workdir}", f"--out={cost_file(made, phase)}")
    title = f"Cost of a step: {phase}"
    return Step(f"cost-{phase}", title, lambda: ("launch.demos.costs", *flags), 15)


def cost_file(made: Plan, phase: str) -> Path:
    return made.folder / "costs" / f"{phase}.json"


def leg(made: Plan, number: int, phase: str, workdir: Path, start: Path) -> Step:
    """A run on both tasks in place of one stage."""

    def flags() -> Sequence[str]:
        own, joint = (read_json(cost_file(made, name)) for name in (phase, JOINT))
        count = plan.QUICK_STEPS if made.quick else plan.config_of(made, phase).steps
        paid = max(1, round(count * own["flops"] / joint["flops"]))
        common = plan.training(made, JOINT, workdir, start)
        return ("launch.train", *common, f"--config.steps={paid}", *schedule(made, phase))

    title, seconds = f"Both tasks at once, part {number} of 3", 450 * (made.share or 1)
    return Step(f"direct{number}", title, flags, made.time(seconds))


def schedule(made: Plan, phase: str) -> list[str]:
    """The overrides that give a run the schedule of a stage."""
    config = plan.config_of(made, phase)
    return [f"--config.{key}={getattr_path(config, key)}" for key in SCHEDULE]


def getattr_path(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


# --- Tables ---------------------------------------------------------------------------------------


def tables(made: Sequence[Plan]) -> list[Table]:
    """All seeds' accuracies, and the two ways beside each other where both were gone."""
    found = [summary.collect(one.folder, one.quick, one.seed) for one in made]
    result = [by_variant(found)] if len(made) > 1 else []
    direct = [scores(one, "direct") for one in made]
    if all(direct):
        result.append(by_way(found, direct))
    share = made[0].share
    short = f" Pretraining took {100 * share:g} % of the demo's steps." if share else ""
    return [{**table, "note": table["note"] + short} for table in result]


def scores(made: Plan, variant: str) -> dict[str, float]:
    found = {}
    for task in TASKS:
        for ending, split in (("", "held_out"), ("_iid", "iid")):
            found |= summary.cell(made.folder, variant, task, split, ending)
    return found


def by_variant(found: Sequence[dict[str, Any]]) -> Table:
    rows, columns = [], [(task, ending) for task in TASKS for ending in SPLITS]
    for variant, name in VARIANTS.items():
        keys = [f"{task}_accuracy_{variant}{ending}" for task, ending in columns]
        known = [all(key in one for one in found) for key in keys]
        cells = [
            spread([one[key] for one in found]) if there else ""
            for key, there in zip(keys, known, strict=True)
        ]
        if any(known):
            rows.append([name, *cells])
    head = ["", *(f"{NAMES[task]}, {split}" for task in TASKS for split in SPLITS.values())]
    seeds = ", ".join(str(one["seed"]) for one in found)
    note = f"Accuracy in %, mean and standard deviation over the seeds {seeds}."
    return {"title": "Every stage", "note": note, "head": head, "rows": rows}


def by_way(found: Sequence[dict[str, Any]], direct: Sequence[dict[str, float]]) -> Table:
    rows = []
    for task in TASKS:
        for ending, split in SPLITS.items():
            ours, theirs = f"{task}_accuracy_joint{ending}", f"{task}_accuracy_direct{ending}"
            if not all(ours in a and theirs in b for a, b in zip(found, direct, strict=True)):
                continue
            staged, at_once = [one[ours] for one in found], [one[theirs] for one in direct]
            difference = [a - b for a, b in zip(staged, at_once, strict=True)]
            rows.append(
                [f"{NAMES[task]}, {split}", spread(staged), spread(at_once), interval(difference)]
            )
    note = (
        "Accuracy in % after pretraining: in stages, and on both tasks at once with the same "
        "floating-point operations and learning rates. The difference is over the same seeds, with "
        "its 95 % interval (Student's t) where there are several."
    )
    head = ["", "In stages", "At once", "Difference"]
    return {"title": "The order of the stages", "note": note, "head": head, "rows": rows}


def spread(values: Sequence[float]) -> str:
    middle = f"{100 * mean(values):.1f}"
    return f"{middle} ± {100 * stdev(values):.1f}" if len(values) > 1 else middle


def interval(values: Sequence[float]) -> str:
    """The mean of differences with its 95 % interval."""
    middle = 100 * mean(values)
    if len(values) < 2:
        return f"{middle:+.1f}"
    from scipy import stats

    n = len(values)
    half = 100 * stats.t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n)
    return f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"


def said(found: Sequence[Table]) -> Iterator[str]:
    """The tables as Markdown."""
    for table in found:
        yield f"\n{table['title']}. {table['note']}\n"
        yield f"| {' | '.join(table['head'])} |"
        yield f"|{'---|' * len(table['head'])}"
        yield from (f"| {' | '.join(row)} |" for row in table["rows"])
