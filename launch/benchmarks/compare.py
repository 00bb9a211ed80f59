"""Times contenders against each other: each in a process of its own, taking turns step by step.

Turns, not blocks, because a machine's speed drifts; the ratio is taken turn by turn. Processes of
their own, because peak memory is a process's, and so are thread pools.
"""

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP_STEPS = 2


class Contender(NamedTuple):
    """make(**arguments) prepares and returns `step`; step() runs once and waits for the result.

    make is a module-level function: it is called in a fresh process. A step of which only a part
    counts, or that has worker processes, returns a `Counted`.
    """

    name: str
    make: Callable[..., Callable[[], Any]]
    arguments: dict[str, Any]


class Counted(NamedTuple):
    """What a step says of itself: the seconds that count, and its largest worker's peak MiB."""

    seconds: float
    worker_mib: float = 0.0


class Timing(NamedTuple):
    """What one contender did: seconds of every counted step, of preparation, and peak MiB.

    Peak memory is the process's highest resident set while it prepared and ran. Where a contender
    failed, `error` says why in a line and the rest is empty.
    """

    name: str
    seconds: list[float]
    preparation: float
    peak_mib: float
    worker_mib: float = 0.0
    error: str = ""

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """Median over the turns of this contender's time by the other's (below 1: faster)."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def compare(contenders: list[Contender], rounds: int, apart: bool = False) -> list[Timing]:
    """Prepares all contenders one by one, then lets them take `rounds` turns of a step each.

    apart: each takes all its turns and ends before the next begins, so that the machine's memory
    need hold one at a time. Drift of its speed then is not divided out.
    """
    groups = [[contender] for contender in contenders] if apart else [contenders]
    return [timing for group in groups for timing in _turns(group, rounds)]


def _turns(contenders: list[Contender], rounds: int) -> Iterator[Timing]:
    context = multiprocessing.get_context("spawn")
    running = []
    for contender in contenders:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, contender))
        process.start()
        theirs.close()  # so that a process which dies is an end of file here, not a wait for ever
        running.append((contender, process, ours, _receive(ours)))
    seconds = {contender.name: [] for contender, _, _, ready in running if "error" not in ready}
    for _ in range(rounds):
        for contender, _, pipe, ready in running:
            if "error" not in ready:
                pipe.send("step")
                ready.update(answer := _receive(pipe))  # an error stays
                seconds[contender.name].append(answer.get("seconds", 0.0))
    yield from _finish(running, seconds)


def _finish(running: list, seconds: dict[str, list[float]]) -> Iterator[Timing]:
    for contender, process, pipe, ready in running:
        if "error" in ready:
            yield Timing(contender.name, [], 0.0, 0.0, error=ready["error"])
        else:
            pipe.send("stop")
            memory = _receive(pipe)
            yield Timing(contender.name, seconds[contender.name], ready["preparation"], **memory)
        process.join()


def _receive(pipe: Any) -> dict[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return {"error": "the process died (out of memory?)"}


def _serve(pipe: Any, contender: Contender) -> None:
    """The contender's process: prepare, then a step for every "step", then its peak memory."""
    start = time.perf_counter()
    try:
        step = contender.make(**contender.arguments)
        for _ in range(WARM_UP_STEPS):
            step()
    except Exception as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"})
        return
    pipe.send({"preparation": time.perf_counter() - start})
    worker_mib = 0.0
    while pipe.recv() == "step":
        start = time.perf_counter()
        done = step()
        if not isinstance(done, Counted):
            done = Counted(time.perf_counter() - start)
        pipe.send({"seconds": done.seconds})
        worker_mib = max(worker_mib, done.worker_mib)
    pipe.send({"peak_mib": peak_mib("self"), "worker_mib": worker_mib})


def peak_mib(process: int | str) -> float:
    """A process's highest resident set, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peaks[0]) / 1024 if peaks else 0.0  # a process that is ending has none
