"""Accuracies with their intervals, of independent prompts that are each right or wrong."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

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
