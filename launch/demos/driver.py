"""Runs commands once each, however often it is stopped and started again.

A step is a command. When it has ended well, a marker says so; started again, the driver passes over
steps with a marker and runs the rest: in their order, and where a step need not wait for all before
it, beside one of these. What a stopped command goes on from is its own affair. A SIGTERM or Ctrl-C
is handed to the commands, which save and leave with exit code 75.
"""

import contextlib
import ctypes
import fcntl
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from dreamlite_jax import cli
from dreamlite_jax.train import signals
from launch.files import read_json, write_json

TICK = 0.2  # seconds
ATTEMPTS = 8  # of a step that leaves with 75 although nobody asked it to
AT_ONCE = 2  # steps
CLOCK = "clock.json"
ROOT = Path(__file__).parent.parent.parent
# XLA_FLAGS of programs that run for few steps on a CPU: compiled in a third of the time, but not as
# well. XLA ends a process for a flag that it does not know; jaxlib 0.10.2 knows these.
COMPILED_FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# GLIBC_TUNABLES: XLA takes a step's memory from malloc and gives it back with every step; kept, and
# in huge pages, it costs few page faults. (Only the first of malloc's arenas keeps what is large.)
KEEP_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184"
)


class Step(NamedTuple):
    """A command to be run once."""

    name: str  # of its marker and log
    title: str  # for people
    arguments: Callable[[], Sequence[str]]  # behind `python -m`; asked when its turn comes
    seconds: float  # that it takes on two cores, about
    needs: tuple[str, ...] | None = None  # steps before it that have to be done; None: all
    modest: bool = False  # takes what processor time others leave


class Interrupted(Exception):
    """The driver was asked to leave, and what was under way has been saved."""


def run_all(
    steps: Sequence[Step],
    folder: Path,
    show: Callable[["Progress"], None],
    runner: Callable[..., int] | None = None,
) -> None:
    """Runs the steps that have no marker in `folder` yet.

    Args:
      folder: gets `done/NAME.json` with a step's command, the seconds that it took and those that
        all had taken when it ended, `logs/NAME.log` with all it said, and what a step that was
        stopped and all together have taken so far.
      show: is told of the progress, several times a second.
      runner: (step, arguments, log, asked, on_line) -> exit code; None: `run_process`. It is called
        by threads of its own.

    Raises:
      CommandError: a step failed, or a marker is of another command.
      Interrupted: run it again to go on.
      ValueError: a step needs one that is not before it.
    """
    check(steps)
    (folder / "done").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    failures: list[str] = []
    with only_one(folder), signals.asked_to_leave() as asked:

        def leaving() -> bool:
            return asked() or bool(failures)

        progress = Progress(steps, before=clocked(folder), leaving=leaving)
        for step in steps:
            if (seconds := finished(step, folder)) is not None:
                progress.took[step.name] = seconds
        begun: dict[futures.Future, Step] = {}
        with futures.ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                while True:
                    while not leaving() and (step := progress.next_one()):
                        progress.begin(step, spent(step, folder))
                        show(progress)
                        how = (step, folder, leaving, progress, runner or run_process)
                        begun[pool.submit(attempt, list(step.arguments()), *how)] = step
                    show(progress)
                    if not begun:
                        break
                    over, _ = futures.wait(begun, TICK, futures.FIRST_COMPLETED)
                    for future in over:
                        step = begun.pop(future)
                        said = close(step, future.result(), folder, progress)
                        if said and not asked():
                            failures.append(said)
            except BaseException as error:  # the other one leaves, too: the pool waits for it
                failures.append(str(error))
                raise
        if asked() and not failures:
            raise Interrupted
    if failures:
        raise cli.CommandError(failures[0])


def check(steps: Sequence[Step]) -> None:
    for k, step in enumerate(steps):
        unknown = set(step.needs or ()) - {one.name for one in steps[:k]}
        if unknown:
            raise ValueError(f"{step.name} needs {sorted(unknown)}, which is not before it")


def attempt(arguments, step, folder, leaving, progress, runner) -> int:
    """Runs a step; one that says "try again later" of its own is tried again."""
    log = folder / "logs" / f"{step.name}.log"
    for _ in range(ATTEMPTS):
        code = runner(step, arguments, log, leaving, lambda line: progress.read(step, line))
        if code != signals.EXIT_TO_RESUME or leaving():
            break
    return code


def close(step: Step, code: int, folder: Path, progress: "Progress") -> str:
    """Notes that a step is done, or how long it was under way; returns what is wrong with it."""
    took, clock = progress.end(step, not code), progress.spent()
    write_json(folder / CLOCK, clock)
    if code:
        write_json(part(step, folder), took)
        return failure(step, folder, code)
    marker = {"seconds": took, "clock": clock, "command": list(step.arguments())}
    write_json(folder / "done" / f"{step.name}.json", marker)
    part(step, folder).unlink(missing_ok=True)
    return ""


def ready(steps: Sequence[Step], begun: Collection[str], done: Collection[str]) -> Iterator[Step]:
    """The steps that have not begun and whose needs are done, in their order."""
    for k, step in enumerate(steps):
        needs = [one.name for one in steps[:k]] if step.needs is None else step.needs
        if step.name not in begun and all(name in done for name in needs):
            yield step


def finished(step: Step, folder: Path) -> float | None:
    """The seconds that a finished step took; None where it is not finished."""
    marker = folder / "done" / f"{step.name}.json"
    if not marker.is_file():
        return None
    found = read_json(marker)
    if found["command"] != list(step.arguments()) or "clock" not in found:
        raise cli.CommandError(
            f"{marker} is of another command than this demo's: it was begun with other flags or by "
            f"another version; name another --out, or remove {folder}"
        )
    return found["seconds"]


def part(step: Step, folder: Path) -> Path:
    """Where the seconds of a step that was interrupted stand."""
    return folder / "done" / f"{step.name}.part"


def spent(step: Step, folder: Path) -> float:
    file = part(step, folder)
    return read_json(file) if file.is_file() else 0.0


def clocked(folder: Path) -> float:
    """Seconds that all steps in a folder had taken when the last of them ended or was stopped; what
    two take beside each other counts once."""
    file = folder / CLOCK
    return read_json(file) if file.is_file() else 0.0


def failure(step: Step, folder: Path, code: int) -> str:
    log = folder / "logs" / f"{step.name}.log"
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    said = lines[-1].removeprefix("error: ") if lines else "said nothing"
    return f"{step.title} ended with exit code {code}: {said} ({log})"


# --- Processes ------------------------------------------------------------------------------------


def run_process(
    step: Step,
    arguments: Sequence[str],
    log: Path,
    asked: Callable[[], bool],
    on_line: Callable[[str], None],
) -> int:
    """Runs `python -m ARGUMENTS`; its lines go to the log, and are told one by one.

    It is in a session of its own, so that a Ctrl-C reaches it once, from here.
    """
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent if LIBC is not None else None,
        )
        said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=listen, args=(process, said), daemon=True).start()
        told = False
        try:
            if step.modest:
                leave_to_others(process.pid)
            while True:
                if asked() and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
                try:
                    line = said.get(timeout=TICK)
                except queue.Empty:
                    on_line("")
                    continue
                if line is None:
                    return process.wait()
                stream.write(line)
                stream.flush()
                on_line(line)
        finally:
            process.kill()
            process.wait()


def leave_to_others(pid: int) -> None:
    """Lets a process have what processor time others do not want."""
    os.setpriority(os.PRIO_PROCESS, pid, 19)
    # Linux may share time among sessions first, of which the process has its own.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("19", "ascii")


def listen(process: subprocess.Popen, said: queue.Queue) -> None:
    for line in process.stdout:
        said.put(line)
    said.put(None)


# A driver that is killed must not leave a command behind, which the next driver would meet. Linux
# ends it with the thread that has started it, which waits for it.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuses a second driver in the same folder."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise cli.CommandError(f"{folder}: another demo is at work here") from error
        yield


# --- Progress -------------------------------------------------------------------------------------

_COUNTED = re.compile(r"^(?:step )?(\d+)/(\d+)\b")
_LEFT = re.compile(r"\b(\d+):(\d\d):(\d\d) left")


class Running:
    """A step that is under way: since when, and what it says of its progress."""

    def __init__(self, begun: float, before: float):
        self.begun, self.before = begun, before  # seconds; of earlier attempts
        self.line, self.share, self.left = "", 0.0, None


class Progress:
    """How far all steps and those under way are, and how long the rest will take.

    Steps to come are expected to take their usual time, times what the finished ones took of
    theirs, and to begin as `run_all` begins them.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        clock: Callable[[], float] = time.monotonic,
        before: float = 0.0,
        leaving: Callable[[], bool] = lambda: False,
    ):
        """before: seconds that the steps have taken already."""
        self.steps, self.clock, self.leaving = list(steps), clock, leaving
        self.took: dict[str, float] = {}
        self.running: dict[str, Running] = {}
        self._begun = clock() - before

    def next_one(self) -> Step | None:
        """One that can begin now."""
        if len(self.running) == AT_ONCE:
            return None
        return next(ready(self.steps, {*self.took, *self.running}, self.took), None)

    def begin(self, step: Step, before: float) -> None:
        self.running[step.name] = Running(self.clock(), before)

    def end(self, step: Step, done: bool = True) -> float:
        """Returns the seconds that it took, over all attempts."""
        seconds = self.elapsed(step)
        del self.running[step.name]
        if done:
            self.took[step.name] = seconds
        return seconds

    def now(self) -> list[Step]:
        """The steps that are under way, in their order."""
        return [step for step in self.steps if step.name in self.running]

    def spent(self) -> float:
        """Seconds that all has taken."""
        return self.clock() - self._begun

    def elapsed(self, step: Step) -> float:
        """Seconds that a step under way has taken, over all attempts."""
        running = self.running[step.name]
        return running.before + self.clock() - running.begun

    def read(self, step: Step, line: str) -> None:
        """Takes what a line of a step says of its progress."""
        if not (counted := _COUNTED.match(line)):
            return
        running, left = self.running[step.name], None
        if found := _LEFT.search(line):
            hours, minutes, seconds = map(int, found.groups())
            left = (self.clock(), 3600 * hours + 60 * minutes + seconds)
        done, of = map(int, counted.groups())
        running.line, running.share, running.left = line.strip(), done / max(of, 1), left

    def pace(self) -> float:
        """Seconds that steps take for each that was expected."""
        done = [step for step in self.steps if step.name in self.took and not step.modest]
        expected = sum(step.seconds for step in done)
        return sum(self.took[step.name] for step in done) / expected if expected > 30 else 1.0

    def step_left(self, step: Step) -> float:
        """Seconds that a step under way has left."""
        running = self.running[step.name]
        if (left := running.left) is not None:  # another thread may read a line meanwhile
            at, seconds = left
            return max(0.0, seconds - (self.clock() - at))
        return max(
            0.0,
            step.seconds * self.pace() * (1 - running.share)
            - (0 if running.share else self.elapsed(step)),
        )

    def left(self) -> float:
        """Seconds that all has left."""
        pace, now = self.pace(), 0.0
        ends = {step.name: self.step_left(step) for step in self.now()}
        done = set(self.took)
        while True:
            for step in ready(self.steps, done | ends.keys(), done):
                if len(ends) < AT_ONCE:
                    ends[step.name] = now + pace * step.seconds
            if not ends:
                return now
            first = min(ends, key=ends.get)
            now = ends.pop(first)
            done.add(first)

    def share(self) -> float:
        """How much of all is done, in [0, 1], by time."""
        spent = self.spent()
        return spent / max(spent + self.left(), 1e-9)


def lines(progress: Progress) -> list[str]:
    """A line on the whole and one on each step that is under way."""
    share = progress.share()
    bar = "#" * round(24 * share)
    number = len(progress.took) + len(progress.running)
    found = [
        f"[{bar:<24}] {100 * share:3.0f} %  step {number} of {len(progress.steps)}  "
        f"{clock(progress.left())} left in all" + ("  saves and leaves" * progress.leaving())
    ]
    for step in progress.now():
        said = progress.running[step.name].line or "begins"
        if "left" not in said and (left := progress.step_left(step)):
            said += f"  about {clock(left)} left"
        elif "left" not in said:
            said += f"  {clock(progress.elapsed(step))} so far"
        found.append(f"{step.title}: {said}")
    return found


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class Display:
    """Lines that change where stderr is a terminal; elsewhere one now and then."""

    def __init__(self, stream=None, every: float | None = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every = every if every is not None else (0.1 if self.live else 15.0)
        self._last, self._steps, self._drawn = -1e9, None, 0

    def __call__(self, progress: Progress) -> None:
        now, steps = time.monotonic(), list(progress.running)
        if now - self._last < self.every and steps == self._steps:
            return
        self._last, self._steps = now, steps
        said = lines(progress)
        if not self.live:
            print("  |  ".join(said), file=self.stream, flush=True)
            return
        width = os.get_terminal_size(self.stream.fileno()).columns - 1
        up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
        # What is below the cursor is cleared: there may have been more lines before.
        self.stream.write(f"{up}\r\x1b[J" + "\n".join(line[:width] for line in said))
        self.stream.flush()
        self._drawn = len(said)

    def close(self) -> None:
        if self._drawn:
            self.stream.write("\n")
            self._drawn = 0
