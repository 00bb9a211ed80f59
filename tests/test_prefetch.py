"""Elements made ahead, and the end of the processes that make them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dreamlite_jax.data import prefetch

# A user's program; its argument says how it ends.
_SCRIPT = """
import json, os, signal, sys, time
import numpy as np, psutil
from dreamlite_jax.data import prefetch

class Numbers:
    def __len__(self): return 2**40
    def __getitem__(self, k): return {"k": np.full((256, 256), k)}
    def __repr__(self): return "numbers"

if __name__ == "__main__":
    end = sys.argv[1]
    made = prefetch.prefetched(Numbers(), 3, workers=2)
    found = [int(next(made)["k"][0, 0]) for _ in range(6)]
    last = next(made)  # held to the end
    own = psutil.Process().children()
    workers = [child.pid for child in own if "spawn_main" in " ".join(child.cmdline())]
    print(json.dumps([found, workers]), flush=True)
    if end == "close":
        made.close()
        print(json.dumps([psutil.pid_exists(worker) for worker in workers]), flush=True)
    if end == "error":
        raise SystemExit(3)
    if end == "interrupt":
        os.killpg(0, signal.SIGINT)  # as a terminal does
        time.sleep(30)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


class Numbers:
    """A source whose element k holds k, sooner or later."""

    def __len__(self):
        return 2**40

    def __getitem__(self, k):
        time.sleep(0.002 * (k % 3))
        return {"k": np.array(k)}

    def __repr__(self):
        return "numbers"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_keep_the_order_and_start_anywhere(threads):
    made = prefetch.prefetched(Numbers(), 2**39, threads=threads)
    assert [int(next(made)["k"]) - 2**39 for _ in range(12)] == list(range(12))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("end", "code"), [("leave", 0), ("close", 0), ("error", 3), ("interrupt", -2), ("kill", -9)]
)
def test_workers_keep_the_order_and_end_with_their_parent(end, code):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, end],
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == code, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found, workers = lines[0]
    assert found == [3, 4, 5, 6, 7, 8] and len(workers) == 2
    if end == "close":
        assert lines[1] == [False, False]
    limit = time.monotonic() + 20
    while any(map(psutil.pid_exists, workers)):
        assert time.monotonic() < limit, "workers outlive their parent"
        time.sleep(0.05)
    own = 1 if end == "interrupt" else 0  # the parent's KeyboardInterrupt
    assert done.stderr.count("Traceback") == own, done.stderr
