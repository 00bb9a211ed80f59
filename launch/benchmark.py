"""Measures this project beside what people would otherwise use, in one run.

    python -m launch.benchmark --suite=unet|sample|data|train|rl|distill|tflite

Prints one row a case: time of each contender, the ratio ours / theirs (below 1: ours is faster) and
peak memory. Numbers are for the machine it runs on; quote the ratio. Needs the extra "parity" (not
`rl` and `distill`, which compare this project with itself).
"""

import importlib
import os
import re

from absl import app, flags

from launch.benchmarks.compare import Timing, compare

_SUITES = ("unet", "sample", "data", "train", "rl", "distill", "tflite")
_SUITE = flags.DEFINE_enum("suite", None, _SUITES, "What to measure.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of every contender.", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "Regex: the cases to run.")
_APART = flags.DEFINE_bool(
    "apart", False, "One contender after the other, where memory does not hold them together."
)
_WITHOUT = flags.DEFINE_list("without", [], "Contenders to leave out, e.g. compile.")


def row(case: str, timings: list[Timing]) -> str:
    """A Markdown row: case, each contender's milliseconds and MiB, ratios to the first."""
    ours, *others = timings
    cells = [case]
    for timing in timings:
        workers = f" (a worker {timing.worker_mib:.0f})" if timing.worker_mib else ""
        cells.append(
            timing.error
            or f"{timing.median_ms:.1f} ms, {timing.peak_mib:.0f} MiB peak{workers}, "
            f"{timing.preparation:.0f} s to prepare"
        )
    for other in others:
        failed = ours.error or other.error
        cells.append("-" if failed else f"{ours.ratio(other):.2f}")
    return f"| {' | '.join(cells)} |"


def main(_: list[str]) -> None:
    suite = importlib.import_module(f"launch.benchmarks.{_SUITE.value}")
    order = ", one contender after the other" if _APART.value else ""
    print(f"{os.cpu_count()} CPU cores; medians of {_ROUNDS.value} turns{order}\n")
    headed, found = [], {}
    for case, contenders in suite.cases():
        if not re.search(_ONLY.value, case):
            continue
        contenders = [c for c in contenders if c.name not in _WITHOUT.value]
        names = [contender.name for contender in contenders]
        if names != headed:
            print(end="\n" if headed else "")
            head = ["case", *names, *(f"{names[0]} / {name}" for name in names[1:])]
            print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
            headed = names
        found[case] = compare(contenders, _ROUNDS.value, _APART.value)
        print(row(case, found[case]), flush=True)
    if hasattr(suite, "summary"):
        print(f"\n{suite.summary(found)}")


if __name__ == "__main__":
    app.run(main)
