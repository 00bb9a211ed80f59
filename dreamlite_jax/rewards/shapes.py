"""The shapes world's judge as a reward, and its pictures as examples for any reward.

Metadata says which sample of the world a prompt is of; what it asks for follows from that.
"""

import functools
from collections.abc import Sequence

import numpy as np

from dreamlite_jax.data import shapes
from dreamlite_jax.rewards.base import EDIT, T2I, Example, Metadata, Picture, Reward, RewardError

NEEDS = ("settings", "split", "task", "seed", "index")
_SIDE = 64  # of examples, pixels


def spec_of(metadata: Metadata) -> shapes.Spec:
    """What a sample's prompt asks for.

    Raises:
      RewardError: the metadata is of no sample of this world.
    """
    try:
        settings, split, task, seed, index = (metadata[key] for key in NEEDS)
        return _spec(settings, split, task, int(seed), int(index))
    except (KeyError, ValueError, TypeError) as error:
        raise RewardError(
            f"metadata {dict(metadata)} is of no sample of the shapes world: {error}"
        ) from error


@functools.lru_cache(maxsize=4096)
def _spec(settings: str, split: str, task: str, seed: int, index: int) -> shapes.Spec:
    draw = {T2I: shapes.sample_t2i, EDIT: shapes.sample_edit}[task]
    return draw(shapes.SETTINGS[settings], split, seed, index).spec


def _judged(images: Sequence[Picture], metadata: Sequence[Metadata]) -> list[shapes.Judgement]:
    return shapes.judge_batch(images, [spec_of(one) for one in metadata])


def _scores(images, prompts, sources, metadata) -> list[float]:
    return [judgement.score for judgement in _judged(images, metadata)]


def _exact(images, prompts, sources, metadata) -> list[float]:
    return [float(judgement.exact) for judgement in _judged(images, metadata)]


def examples(other: bool = False) -> list[Example]:
    """Of both tasks: what the prompt asks for, and noise or (`other`) another sample's picture."""
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
    found = []
    for index in (1, 2):
        drawn = shapes.sample_t2i(shapes.DEMO, "train", 0, index)
        wrong = _drawn(shapes.sample_t2i(shapes.DEMO, "train", 0, index + 10).scene)
        at = _metadata(T2I, index)
        bad = wrong if other else noise
        found.append(Example(_drawn(drawn.scene), bad, drawn.caption, None, at))
        edit = shapes.sample_edit(shapes.DEMO, "train", 0, index)
        source = _drawn(edit.source)
        bad = wrong if other else noise
        at = _metadata(EDIT, index)
        found.append(Example(_drawn(edit.target), bad, edit.instruction, source, at))
    return found


def _metadata(task: str, index: int) -> Metadata:
    return dict(zip(NEEDS, ("demo", "train", task, 0, index), strict=True))


def _drawn(scene: shapes.Scene) -> Picture:
    return shapes.render(scene, _SIDE, _SIDE)


def _wrong() -> list[Example]:
    return examples(other=True)


# How far a picture is what its prompt asks for; 1 where it is exactly that.
JUDGE = Reward("shapes", _scores, 0.0, 1.0, needs=NEEDS, examples=_wrong)
# 1 or 0: the accuracy that is reported. As a reward it says little of what is nearly right.
EXACT = Reward("shapes_exact", _exact, 0.0, 1.0, needs=NEEDS, examples=_wrong)
