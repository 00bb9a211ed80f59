"""Interrupts the quick demo at random moments and compares its end with an undisturbed run's.

    python tests/interrupted.py [--times=10] [--seed=0] [--out=runs/interrupted]

Takes two quick demos and a start for every interruption; SIGINT, SIGTERM and SIGKILL take turns.
Exit code 1: a parameter or a number differs. (Not a test that pytest collects: it takes long.)
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# What depends on the clock, and what the stopping itself leaves.
TIMES = ("minutes", "t2i_seconds", "edit_seconds")


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.demo", "--quick", f"--out={out}"]
    command.append(f"--compilation_cache={out.parent / 'programs'}")
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen) -> None:
    if process.wait():
        sys.exit(f"the demo ended with exit code {process.returncode}; see its log")


def disturbed(out: Path, times: int, rng: random.Random, seconds: float) -> int:
    """Runs the demo with interruptions spread over the seconds that an undisturbed one takes with
    its programs compiled; returns how many there were."""
    count = 0
    for k in range(times):
        process = start(out)
        try:
            process.wait(rng.uniform(2, 2 + 2 * seconds / times))
            return count  # it was faster
        except subprocess.TimeoutExpired:
            pass
        number = SIGNALS[k % len(SIGNALS)]
        process.send_signal(number)
        code = process.wait()
        count += 1
        done = len(list((out / "quick" / "done").glob("*.json")))
        print(f"{number.name} after {done} steps: exit code {code}", flush=True)
        if code not in (75, 128 + number, -number, 130, 0):
            sys.exit(f"exit code {code} after {number.name}")
    finished(start(out))
    return count


def result(out: Path) -> dict:
    """All numbers but times, and the checksums of every stage's parameters."""
    metrics = json.loads((out / "metrics.json").read_text())
    found = {k: v for k, v in metrics.items() if not k.startswith(TIMES)}
    for run in sorted((out / "quick" / "runs").iterdir()):
        last = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
        saved = json.loads((last / "meta" / "metadata").read_text())
        found[f"{run.name} at {last.name}"] = saved["arrays"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "interrupted")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("undisturbed", "disturbed"):
        shutil.rmtree(out / name, ignore_errors=True)
    finished(start(out / "undisturbed"))  # compiles what the others use
    began = time.monotonic()
    shutil.rmtree(out / "undisturbed")
    finished(start(out / "undisturbed"))
    seconds = time.monotonic() - began
    count = disturbed(out / "disturbed", given.times, random.Random(given.seed), seconds)
    ours, theirs = result(out / "disturbed"), result(out / "undisturbed")
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differing:
        sys.exit(f"after {count} interruptions {len(differing)} differ: {', '.join(differing)}")
    print(f"{count} interruptions, {len(theirs)} results, all the same")


if __name__ == "__main__":
    main()
