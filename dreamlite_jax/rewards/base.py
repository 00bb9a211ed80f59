"""What a reward is, and the checks that every one goes through.

A reward is a function of N pictures (uint8 [H, W, 3], of any sizes), their prompts, the pictures
that edits start from (None for others) and metadata (JSON objects), which gives N scores; beside it
a name and the range of the scores. A higher score is better.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dreamlite_jax.errors import UserError

T2I, EDIT = TASKS = ("t2i", "edit")  # as `data.mixture`, which reward servers need not install

Picture = np.ndarray  # uint8 [H, W, 3]
Metadata = Mapping[str, Any]


class RewardError(UserError):
    """A reward that cannot be used: one line."""


class Requests(NamedTuple):
    """N pictures and what they were asked to be."""

    images: Sequence[Picture]
    prompts: Sequence[str]
    sources: Sequence[Picture | None]  # what an edit starts from
    metadata: Sequence[Metadata]

    def take(self, rows: Sequence[int]) -> "Requests":
        return Requests(*([part[i] for i in rows] for part in self))


class Example(NamedTuple):
    """Two pictures for one prompt, of which the first has to score higher."""

    good: Picture
    bad: Picture
    prompt: str
    source: Picture | None
    metadata: Metadata


class Reward(NamedTuple):
    name: str
    score: Callable[..., Sequence[float]]  # (images, prompts, sources, metadata) -> N scores
    least: float = -math.inf  # the range of the scores
    most: float = math.inf
    tasks: tuple[str, ...] = TASKS  # what it can be asked about
    needs: tuple[str, ...] = ()  # keys that metadata must have
    examples: Callable[[], list[Example]] = list  # for `self_test`


def scored(reward: Reward, requests: Requests) -> np.ndarray:
    """The scores, float32 [N], checked.

    Raises:
      RewardError: as many scores as pictures were expected, all finite and within the range.
    """
    n = len(requests.images)
    if not n:
        return np.zeros(0, np.float32)
    return checked(reward, reward.score(*requests), n)


def checked(reward: Reward, scores: Any, n: int) -> np.ndarray:
    """Scores as float32 [n]; raises as `scored`."""
    try:
        found = np.asarray(scores, np.float32)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {reward.name}: {error}") from error
    if found.shape != (n,):
        raise RewardError(
            f"reward {reward.name}: scores of shape {list(found.shape)} for {n} pictures"
        )
    if not np.isfinite(found).all():
        wrong = found[~np.isfinite(found)]
        raise RewardError(f"reward {reward.name}: {len(wrong)} of {n} scores are {wrong[0]}")
    outside = (found < reward.least) | (found > reward.most)
    if outside.any():
        raise RewardError(
            f"reward {reward.name}: a score of {found[outside][0]:g} is outside of its range "
            f"{reward.least:g} to {reward.most:g}"
        )
    return found


def self_test(reward: Reward) -> None:
    """Scores known good and known bad pictures, in two orders, before anything depends on it.

    Raises:
      RewardError: a bad picture scores as high as a good one, the scores do not follow the pictures
        when these change places, or what `scored` finds.
    """
    examples = reward.examples()
    if not examples:
        raise RewardError(f"reward {reward.name}: has no examples to be tested with")
    images = [picture for e in examples for picture in (e.good, e.bad)]
    asked = ([x for x in part for _ in range(2)] for part in list(zip(*examples, strict=True))[2:])
    together = Requests(images, *asked)
    found = scored(reward, together).reshape(-1, 2)
    gaps = found[:, 0] - found[:, 1]
    if not (gaps > 0).all():
        k = int(gaps.argmin())
        raise RewardError(
            f"reward {reward.name}: self-test: for {examples[k].prompt!r} a good picture scores "
            f"{found[k, 0]:g}, a bad one {found[k, 1]:g}"
        )
    order = np.random.default_rng(0).permutation(found.size)
    again = scored(reward, together.take(order))
    # A network's scores may depend a little on the batch, but less than on the picture.
    if np.abs(again - found.reshape(-1)[order]).max() > 0.1 * gaps.min():
        raise RewardError(
            f"reward {reward.name}: self-test: in another order the same pictures have other scores"
        )
