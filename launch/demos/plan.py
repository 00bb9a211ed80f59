"""The steps of a demo: which stages there are, what each starts from, and what is asked of it."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamlite_jax.train import signals
from launch.demos import driver, summary
from launch.demos.driver import Step
from launch.files import read_json, write_json


class Stage(NamedTuple):
    """A stage of training, and what is asked of its result."""

    config: str  # of configs/shapes/; also its run's name
    title: str
    about: str  # for people who see it the first time
    seconds: float  # of the full demo on two cores, about
    variants: tuple[dict, ...] = ()  # of launch.evaluate; `model` is the run


GUIDED = {"guidance": 2.0, "image_guidance": 1.0}  # more is worse for edits in this small world
UNGUIDED = {"guidance": 1.0, "image_guidance": 1.0}
FEW = {"steps": 4, **UNGUIDED}
STAGES = (
    Stage(
        "autoencoder",
        "Autoencoder",
        "Turns pictures into small latents and back. It sees every pair of shape and "
        "colour, so that what is held out later tests the model and not the decoder.",
        165,
    ),
    Stage(
        "phase1_t2i",
        "Text to image",
        "Learns to draw what a caption says, and to read captions on the way. Some pairs of "
        "shape and colour are held out: no lesson shows a picture of them, here or later.",
        505,
        ({"name": "pretrain", "task": ["t2i"], **GUIDED},),
    ),
    Stage(
        "phase2_edit",
        "Editing",
        "Learns to change one thing of a picture and leave the rest alone; some lessons are on "
        "text to image, which would be forgotten.",
        445,
        (
            {"name": "edit", "task": ["t2i"], **GUIDED},
            {"name": "pretrain", "task": ["edit"], **GUIDED},
        ),
    ),
    Stage(
        "phase3_joint",
        "Both together",
        "Both tasks in equal parts, which brings back what lessons on editing made it forget.",
        410,
        ({"name": "joint", **GUIDED},),
    ),
    Stage(
        "sft",
        "Fine-tuning",
        "Few steps more on a set of its own, with the text encoder frozen.",
        75,
        ({"name": "sft", **GUIDED}, {"name": "sft_unguided", **UNGUIDED}),
    ),
    Stage(
        "rl_nft",
        "Reinforcement learning",
        "Draws a group of pictures for each prompt; those that the judge prefers become likelier. "
        "No answer need be known for that, so half of the edits are about held-out pairs.",
        405,
        (
            {"name": "rl", "diversity": 16, **GUIDED},
            {"name": "rl_unguided", **UNGUIDED},  # as in training, though there in 6 steps
            {"name": "teacher_4step", "diversity": 16, **FEW},
        ),
    ),
    Stage(
        "distill_dmd2",
        "Distillation",
        "A student learns to do in few steps, unguided, what its teacher does in many guided "
        "ones. Prompts and sources are enough, so these are about the held-out pairs, too.",
        175,
    ),
)
PRETRAINING = ("phase1_t2i", "phase2_edit", "phase3_joint")
DISTILLED = {"name": "distilled", "diversity": 16, "inputs": True}
BUNDLES = ("fp16", "int8")
QUICK_STEPS = 10
# Of the quick variants: most of their time is compilation, which these shorten.
SMALLEST = (
    "--config.image_size=32",
    "--config.text_length=120",
    "--config.sample.every=0",
)
QUICK_FLAGS = {
    "rl_nft": ("--config.steps=2",),
    "distill_dmd2": ("--config.distill.steps=4",),  # which the page says of its student
}


class Plan(NamedTuple):
    """A demo: where, and how much."""

    folder: Path
    seed: int
    quick: bool
    cache: str
    share: float = 0.0  # of pretraining's steps, and no stage behind it; 0: the whole demo

    @property
    def count(self) -> int:
        """Prompts of each task and split."""
        return 8 if self.quick else 128

    @property
    def on_bundles(self) -> int:
        """Those of them that the bundles draw, too."""
        return 4 if self.quick else 128

    @property
    def splits(self) -> tuple[str, ...]:
        return ("held_out",) if self.quick else ("held_out", "iid")

    @property
    def world(self) -> str:
        return "quick" if self.quick else "demo"

    def run(self, stage: Stage) -> Path:
        return self.folder / "runs" / stage.config

    def time(self, seconds: float) -> float:
        return 20.0 if self.quick else seconds


def of(out: Path, seed: int, quick: bool, cache: str, share: float = 0.0) -> Plan:
    """A demo in its own folder below `out`."""
    name = f"pretraining_{share:g}" if share else "quick" if quick else "full"
    return Plan(out / (name + (f"-{seed}" if seed else "")), seed, quick, cache, share)


def run(plan: Plan, wanted: Sequence[Step]) -> None:
    """Runs the steps that are not finished; leaves with exit code 75 where it is asked to."""
    show = driver.Display()
    try:
        driver.run_all(wanted, plan.folder, show)
    except driver.Interrupted:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(signals.EXIT_TO_RESUME)
    finally:
        show.close()


def steps(plan: Plan) -> list[Step]:
    """All steps of a demo in their order."""
    found, before, pending, judged = [], None, [], ()
    # The variants of a quick demo are evaluated together: most of their time is compilation.
    # Those of others beside the next stage's training, which leaves a core half idle; one after the
    # other, as they share a folder.
    for stage in STAGES:
        found.append(train(plan, stage, before))
        variants = [{**v, "model": str(plan.run(stage))} for v in stage.variants]
        if plan.quick:  # in one number of steps, which is one program for each task
            pending += [v | FEW if v["guidance"] == 1.0 else v for v in variants]
        elif variants:
            step = evaluate(plan, stage.config, f"Judging: {stage.title}", variants, 30)
            found.append(step._replace(needs=(stage.config, *judged), modest=True))
            judged = (step.name,)
        before = stage
        if plan.share and stage.config == PRETRAINING[-1]:
            return found
    exported = plan.folder / "model"
    flags = (f"--workdir={plan.run(before)}", f"--out={exported}", "--overwrite")
    found.append(Step("export", "Export", lambda: ("convert.export", *flags), plan.time(5)))
    pending.append({**DISTILLED, "model": str(exported)})
    found.append(
        evaluate(
            plan,
            "distilled",
            "Judging: all" if plan.quick else "Judging: Distillation",
            pending,
            15,
        )
    )
    return found + bundling(plan, exported)


def train(plan: Plan, stage: Stage, before: Stage | None) -> Step:
    start = plan.run(before) if before else None
    flags = training(plan, stage.config, plan.run(stage), start)
    if plan.quick:
        flags += (f"--config.steps={QUICK_STEPS}", *QUICK_FLAGS.get(stage.config, ()))
    seconds = plan.time(stage.seconds)
    if plan.share and before:
        short = config_of(plan, stage.config)
        flags += [f"--config.steps={short.steps}", f"--config.optim.warmup={short.optim.warmup}"]
        seconds *= plan.share
    needs = (before.config,) if before else ()
    return Step(stage.config, stage.title, lambda: ("launch.train", *flags), seconds, needs)


def config_of(plan: Plan, name: str) -> Any:
    """A config of configs/shapes/, with its schedule as short as the plan asks for."""
    module = importlib.import_module(f"configs.shapes.{name}")
    config = module.get_config("quick" if plan.quick else None)
    if plan.share:
        with config.unlocked():
            config.steps = max(1, round(plan.share * config.steps))
            config.optim.warmup = round(plan.share * config.optim.warmup)
    return config


def training(plan: Plan, config: str, workdir: Path, start: Path | None) -> list[str]:
    """What all stages' flags have in common."""
    file = f"configs/shapes/{config}.py"
    # The first run makes the small random networks and their tokenizer, for all.
    model = plan.run(STAGES[0]) / "shapes_model" if start else "shapes"
    return [
        f"--config={file}:quick" if plan.quick else f"--config={file}",
        f"--workdir={workdir}",
        f"--compilation_cache={plan.cache}",
        f"--config.seed={plan.seed}",
        f"--config.model={model}",
        *([f"--config.init_from={start}"] if start else []),
        *(SMALLEST if plan.quick else ()),
    ]


def evaluate(
    plan: Plan, name: str, title: str, variants: Sequence[dict], seconds: float, *more: str
) -> Step:
    flags = (
        "--suite=shapes",
        f"--out={plan.folder / 'scores'}",
        f"--compilation_cache={plan.cache}",
        f"--count={plan.count}",
        f"--split={','.join(plan.splits)}",
        f"--world={plan.world}",
        f"--batch_size={8 if plan.quick else 64}",
        f"--variants={json.dumps(variants)}",
        *more,
    )
    return Step(f"evaluate-{name}", title, lambda: ("launch.evaluate", *flags), plan.time(seconds))


def bundling(plan: Plan, model: Path) -> list[Step]:
    """Bundles, what they draw of the held-out prompts, and the judge's opinion of it."""
    found, variants = [], []
    for kind in BUNDLES:
        bundle, drawn = plan.folder / f"bundle_{kind}", plan.folder / "drawn" / kind
        found += [
            Step(
                f"bundle-{kind}",
                f"Bundle, {kind} weights",
                bundle_flags(plan, model, kind),
                plan.time(60),
            ),
            *(
                Step(
                    f"draw-{kind}-{task}",
                    f"Pictures by the {kind} bundle, {task}",
                    draw_flags(plan, bundle, task, drawn),
                    plan.time(37),
                )
                for task in summary.TASKS
            ),
        ]
        variants.append({"name": f"bundle_{kind}", "pictures": str(drawn), "split": ["held_out"]})
    return [*found, evaluate(plan, "bundles", "Judging: bundles", variants, 10)]


def inputs(plan: Plan, task: str) -> Path:
    return plan.folder / "scores" / "distilled" / f"{task}_held_out_inputs.npz"


def bundle_flags(plan: Plan, model: Path, kind: str) -> Callable[[], Sequence[str]]:
    """Of convert.bundle, with room for the prompts that it will be asked."""

    def flags() -> Sequence[str]:
        rooms = {}
        for task in summary.TASKS:
            with np.load(inputs(plan, task)) as arrays:
                rooms[task] = -(-int(arrays["mask"].sum(1).max()) // 8) * 8
        return (
            "convert.bundle",
            f"--model={model}",
            f"--out={plan.folder / f'bundle_{kind}'}",
            f"--weights={kind}",
            f"--text_lengths={max(rooms.values())}",
            f"--prompt_length={rooms['t2i']}",
            f"--gpu={str(has_driver(plan)).lower()}",
            "--overwrite",
        )

    return flags


def draw_flags(plan: Plan, bundle: Path, task: str, drawn: Path) -> Callable[[], Sequence[str]]:
    """Of convert.run_bundle, for many prompts at once."""

    def flags() -> Sequence[str]:
        return (
            "convert.run_bundle",
            f"--bundle={bundle}",
            f"--requests={inputs(plan, task)}",
            f"--limit={plan.on_bundles}",
            f"--out={drawn / f'{task}_held_out.npz'}",
            f"--accelerator={accelerator(bundle)}",
        )

    return flags


def has_driver(plan: Plan) -> bool:
    """Whether there is a Vulkan driver, or one can be had; decided once for a demo."""
    file = plan.folder / "driver.json"
    if not file.is_file():
        command = [sys.executable, "-m", "convert.vulkan"]
        # In a session of its own: a Ctrl-C is no answer, and the demo's own business.
        how = {"capture_output": True, "text": True, "start_new_session": True}
        asked = subprocess.run(command, cwd=driver.ROOT, **how)
        said = (asked.stderr.strip().splitlines() or [""])[-1]
        write_json(file, {"driver": not asked.returncode, "reason": said})
    return read_json(file)["driver"]


def accelerator(bundle: Path) -> str:
    """The GPU where every part of the bundle was seen to run there, else the CPU."""
    return "gpu" if summary.on_gpu(read_json(bundle / "manifest.json")) else "cpu"
