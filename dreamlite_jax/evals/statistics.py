"""Accuracies with their intervals, of independent prompts that are each right or wrong."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from dreamlite_jax.errors import UserError

Z = 1.959963984540054  # of the normal distribution, for 95 %


class Share(NamedTuple):
    """A share with its 95 % interval, all in [0, 1]."""

    value: float
    low: float
    high: float


class Change(NamedTuple):
    """A difference and half the width of its 95 % interval."""

    value: float
    half: float

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half


def wilson(hits: int, n: int) -> Share:
    """`hits` of `n` with Wilson's score interval (1927), which holds near 0 and 1 and for small n
    too. Raises ValueError for n < 1 or hits outside of [0, n]."""
    found = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    p = hits / n
    # Rounding may put an end of the interval on the wrong side of the share itself.
    return Share(p, min(p, float(found.low)), max(p, float(found.high)))


def change(before: Sequence[bool], after: Sequence[bool], z: float = Z) -> Change:
    """Mean of after - before over the same n prompts; pairs make the interval narrower than that of
    two accuracies. Where no prompt changed, or all did alike, the half width is that of one prompt
    in n. Raises ValueError for other numbers of prompts."""
    a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"{a.size} and {b.size} prompts are not the same ones")
    d = b - a
    spread = d.std(ddof=1) / math.sqrt(d.size) if d.size > 1 else math.inf
    return Change(float(d.mean()), max(float(z * spread), 1 / d.size))


def change_of_drawn(
    before: Mapping[str, np.ndarray], *runs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The change from what one variant has drawn (`shapes.arrays`) to what another has, or several
    runs of a training on average: `value`, `low`, `high` over the prompts of all, which are the
    first of each, and their `count`. Of several runs also `runs_low` and `runs_high`, the interval
    over them (Student's t): whether another run would gain, not whether these would elsewhere.

    Raises:
      UserError: they are not the same prompts.
    """
    n = min(len(drawn["exact"]) for drawn in (before, *runs))
    if not all(np.array_equal(before["prompts"][:n], run["prompts"][:n]) for run in runs):
        raise UserError(
            "pictures of different prompts cannot be compared; draw all variants of a folder with "
            "the same world and seed"
        )
    exact = before["exact"][:n], np.stack([run["exact"][:n] for run in runs])
    found = change(exact[0], exact[1].mean(0))
    said = {"value": found.value, "low": found.low, "high": found.high, "count": n}
    if len(runs) > 1:
        spread = exact[1].mean(1).std(ddof=1) / math.sqrt(len(runs))
        half = float(stats.t.ppf(0.975, len(runs) - 1) * spread)
        said |= {"runs_low": found.value - half, "runs_high": found.value + half}
    return said
