"""The shapes world as a benchmark: fixed prompts of both tasks, judged pictures, accuracies.

Case k of (world, split, task, seed) is always the same prompt with the same noise, so that any two
models, steps or bundles are compared picture by picture. Splits "iid" (combinations of attributes
that training showed) and "held_out" (of which it showed no picture; a distillation's prompts may
name them) share no sample with training.

Shapes: N cases, S the side of pictures, h w c of latents.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamlite_jax import generation, system
from dreamlite_jax.data import shapes
from dreamlite_jax.data.mixture import EDIT, T2I, TASKS
from dreamlite_jax.errors import UserError
from dreamlite_jax.evals import statistics

SEED = 1000  # of the prompts; training's and its validation's streams count from 0
SPLITS = ("held_out", "iid")


class EvalError(UserError):
    """An evaluation that cannot be made: one line."""


class Case(NamedTuple):
    """A prompt, what it asks for, and a picture that is one answer."""

    prompt: str
    spec: shapes.Spec
    kind: str  # "t2i" or one of shapes.EDITS
    target: np.ndarray  # uint8 [S, S, 3]
    source: np.ndarray | None  # of an edit
    seed: int  # of the noise


class Verdict(NamedTuple):
    """What the judge says of one picture."""

    exact: bool
    score: float  # in [0, 1]
    sharpness: float
    doubts: tuple[str, ...]
    demands: dict[str, float]  # in [0, 1] by attribute: how much of what was asked of it is there


def cases(
    task: str, split: str, count: int, side: int, world: str = "demo", seed: int = SEED
) -> list[Case]:
    """The first `count` cases, drawn at `side` pixels.

    Raises:
      EvalError: an unknown task, split or world, or a picture too small for the judge.
    """
    for name, given, known in (
        ("task", task, TASKS),
        ("split", split, shapes.SPLITS),
        ("world", world, shapes.SETTINGS),
    ):
        if given not in known:
            raise EvalError(f"{name} is {given!r}, known are {', '.join(known)}")
    if side < 16:
        raise EvalError(f"pictures of {side} px are too small for the judge: at least 16")
    make = {T2I: _drawing, EDIT: _edit}[task]
    return [make(shapes.SETTINGS[world], split, seed, index, side) for index in range(count)]


def _drawing(settings: shapes.Settings, split: str, seed: int, index: int, side: int) -> Case:
    made = shapes.sample_t2i(settings, split, seed, index)
    target = shapes.render(made.scene, side, side)
    return Case(made.caption, made.spec, T2I, target, None, index)


def _edit(settings: shapes.Settings, split: str, seed: int, index: int, side: int) -> Case:
    made = shapes.sample_edit(settings, split, seed, index)
    source, target = (shapes.render(scene, side, side) for scene in (made.source, made.target))
    return Case(made.instruction, made.spec, made.kind, target, source, index)


def repeated(given: Sequence[Case], prompts: int, samples: int) -> list[Case]:
    """The first `prompts` cases `samples` times each, in groups, from other noise each time."""
    return [
        case._replace(seed=10_000 + case.seed * samples + k)
        for case in given[:prompts]
        for k in range(samples)
    ]


def noise(config: system.Config, given: Sequence[Case], side: int) -> np.ndarray:
    """The cases' own initial latents, float32 [N, h, w, c]."""
    return np.stack([generation.initial_noise(config, case.seed, side, side) for case in given])


def pictures(
    model: system.System,
    given: Sequence[Case],
    settings: generation.Settings,
    on_picture: Callable[[], Any] = lambda: None,
) -> np.ndarray:
    """What a model makes of cases of one task: uint8 [N, S, S, 3].

    Args:
      settings: as `generation.generate` resolves them.
      on_picture: is called after each.
    """
    side = settings.height or model.config.default_side
    settings = settings._replace(height=side, width=side)
    settings = generation.resolve(settings, model.config)
    sources = None
    if given[0].source is not None:
        sources = [Image.fromarray(case.source) for case in given]
    made = []
    prompts, start = [case.prompt for case in given], noise(model.config, given, side)
    seeds = [case.seed for case in given]
    for _, picture in generation.generate(model, prompts, start, settings, sources, seeds=seeds):
        made.append(picture)
        on_picture()
    return np.stack(made)


def verdicts(images: Sequence[np.ndarray], given: Sequence[Case]) -> list[Verdict]:
    """The judge's, of a picture uint8 [S, S, 3] for each case."""
    judged = shapes.judge_batch(images, [case.spec for case in given])
    return [
        Verdict(j.exact, j.score, shapes.sharpness(image), j.percept.doubts, j.scores)
        for j, image in zip(judged, images, strict=True)
    ]


def arrays(
    images: np.ndarray, found: Sequence[Verdict], given: Sequence[Case]
) -> dict[str, np.ndarray]:
    """Pictures uint8 [N, S, S, 3] beside what was asked and what the judge says: `images`,
    `prompts`, `kinds`, `targets`, `exact`, `score`, and of edits `sources`."""
    out = {
        "images": images,
        "prompts": np.array([case.prompt for case in given]),
        "kinds": np.array([case.kind for case in given]),
        "targets": np.stack([case.target for case in given]),
        "exact": np.array([v.exact for v in found]),
        "score": np.array([v.score for v in found], np.float32),
    }
    if given[0].source is not None:
        out["sources"] = np.stack([case.source for case in given])
    return out


def summary(found: Sequence[Verdict], given: Sequence[Case]) -> dict[str, Any]:
    """`count`, `exact`, `accuracy` with `low` and `high` (Wilson, 95 %), means of score and
    sharpness, the share of pictures that cannot be read, [exact, count] by kind, and under
    `demands` [share fulfilled, pictures of which it was asked] by attribute."""
    exact = [v.exact for v in found]
    accuracy = statistics.wilson(sum(exact), len(exact))
    kinds: dict[str, list[int]] = {}
    demands: dict[str, list[float]] = {}
    for verdict in found:
        for name, share in verdict.demands.items():
            demands.setdefault(name, []).append(share)
    for case, right in zip(given, exact, strict=True):
        entry = kinds.setdefault(case.kind, [0, 0])
        entry[0] += right
        entry[1] += 1
    return {
        "count": len(exact),
        "exact": sum(exact),
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "score": float(np.mean([v.score for v in found])),
        "sharpness": float(np.mean([v.sharpness for v in found])),
        "unreadable": float(np.mean([bool(v.doubts) for v in found])),
        "kinds": dict(sorted(kinds.items())),
        "demands": {n: [float(np.mean(v)), len(v)] for n, v in sorted(demands.items())},
    }


def diversity(images: np.ndarray, samples: int) -> float:
    """Mean over prompts of `shapes.diversity` of the pictures of each: uint8 [P * samples, ...] in
    groups."""
    groups = images.reshape(-1, samples, *images.shape[1:])
    return float(np.mean([shapes.diversity(group) for group in groups]))
