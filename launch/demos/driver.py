"""Runs commands one after another, once each, however often it is stopped and started again.

A step is a command. When it has ended well, a marker says so; started again, the driver passes over
steps with a marker and runs the rest. What a stopped command goes on from is its own affair. A
SIGTERM or Ctrl-C is handed to the command, which saves and leaves with exit code 75.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dreamlite_jax import cli
from dreamlite_jax.train import signals
from launch.files import read_json, write_json

TICK = 0.2  # seconds
ATTEMPTS = 8  # of a step that leaves with 75 although nobody asked it to
ROOT = Path(__file__).parent.parent.parent
# XLA_FLAGS of programs that run for few steps on a CPU: compiled in a third of the time, but not as
# well. XLA ends a process for a flag that it does not know; jaxlib 0.10.2 knows these.
COMPILED_FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


class Step(NamedTuple):
    """A command to be run once."""

    name: str  # of its marker and log
    title: str  # for people
    arguments: Callable[[], Sequence[str]]  # behind `python -m`; asked when its turn comes
    seconds: float  # that it takes on two cores, about


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
      folder: gets `done/NAME.json` with the seconds that a step took and its command, and
        `logs/NAME.log` with all it said.
      show: is told of the progress, several times a second.
      runner: (step, arguments, log, asked, on_line) -> exit code; None: `run_process`.

    Raises:
      CommandError: a step failed, or a marker is of another command.
      Interrupted: run it again to go on.
    """
    (folder / "done").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    with only_one(folder), signals.asked_to_leave() as asked:
        progress = Progress(steps)
        for step in steps:
            if (seconds := finished(step, folder)) is not None:
                progress.took[step.name] = seconds
                continue
            progress.begin(step, spent(step, folder))
            show(progress)
            code = attempt(step, folder, asked, progress, show, runner or run_process)
            took = progress.elapsed()
            if code and asked():
                write_json(part(step, folder), took)
                raise Interrupted
            if code:
                raise cli.CommandError(failure(step, folder, code))
            marker = {"seconds": took, "command": list(step.arguments())}
            write_json(folder / "done" / f"{step.name}.json", marker)
            part(step, folder).unlink(missing_ok=True)
            progress.end(step, took)
            show(progress)
            if asked():
                raise Interrupted


def attempt(step, folder, asked, progress, show, runner) -> int:
    """Runs a step; one that says "try again later" of its own is tried again."""

    def on_line(line: str) -> None:
        progress.read(line)
        show(progress)

    for _ in range(ATTEMPTS):
        code = runner(
            step, list(step.arguments()), folder / "logs" / f"{step.name}.log", asked, on_line
        )
        if code != signals.EXIT_TO_RESUME or asked():
            break
    return code


def finished(step: Step, folder: Path) -> float | None:
    """The seconds that a finished step took; None where it is not finished."""
    marker = folder / "done" / f"{step.name}.json"
    if not marker.is_file():
        return None
    found = read_json(marker)
    if found["command"] != list(step.arguments()):
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


def listen(process: subprocess.Popen, said: queue.Queue) -> None:
    for line in process.stdout:
        said.put(line)
    said.put(None)


# A driver that is killed must not leave a command behind, which the next driver would meet.
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


class Progress:
    """How far all steps and the present one are, and how long the rest will take.

    Steps to come are expected to take their usual time, times what the finished ones took of
    theirs.
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float] = time.monotonic):
        self.steps, self.took, self.clock = list(steps), {}, clock
        self.now: Step | None = None
        self.line, self._share, self._left, self._begun, self._before = "", 0.0, None, 0.0, 0.0

    def begin(self, step: Step, before: float) -> None:
        self.now, self.line, self._share, self._left = step, "", 0.0, None
        self._begun, self._before = self.clock(), before

    def end(self, step: Step, seconds: float) -> None:
        self.took[step.name], self.now = seconds, None

    def elapsed(self) -> float:
        """Seconds that the present step has taken, over all attempts."""
        return self._before + self.clock() - self._begun

    def read(self, line: str) -> None:
        """Takes what a line of the present step says of its progress."""
        if not (counted := _COUNTED.match(line)):
            return
        done, of = map(int, counted.groups())
        self.line, self._share = line.strip(), done / max(of, 1)
        self._left = None
        if left := _LEFT.search(line):
            hours, minutes, seconds = map(int, left.groups())
            self._left = (self.clock(), 3600 * hours + 60 * minutes + seconds)

    def pace(self) -> float:
        """Seconds that steps take for each that was expected."""
        done = [step for step in self.steps if step.name in self.took]
        expected = sum(step.seconds for step in done)
        return sum(self.took[step.name] for step in done) / expected if expected > 30 else 1.0

    def step_left(self) -> float:
        """Seconds that the present step has left."""
        if self.now is None:
            return 0.0
        if self._left is not None:
            at, seconds = self._left
            return max(0.0, seconds - (self.clock() - at))
        return max(
            0.0,
            self.now.seconds * self.pace() * (1 - self._share)
            - (0 if self._share else self.elapsed()),
        )

    def left(self) -> float:
        """Seconds that all has left."""
        waiting = [s for s in self.steps if s.name not in self.took and s is not self.now]
        return self.step_left() + self.pace() * sum(step.seconds for step in waiting)

    def share(self) -> float:
        """How much of all is done, in [0, 1], by time."""
        spent = sum(self.took.values()) + (self.elapsed() if self.now else 0.0)
        return spent / max(spent + self.left(), 1e-9)


def lines(progress: Progress) -> tuple[str, str]:
    """A line on the whole and one on the present step."""
    number = len(progress.took) + (progress.now is not None)
    share = progress.share()
    bar = "#" * round(24 * share)
    whole = (
        f"[{bar:<24}] {100 * share:3.0f} %  step {number} of {len(progress.steps)}  "
        f"{clock(progress.left())} left in all"
    )
    if progress.now is None:
        return whole, ""
    said = progress.line or "begins"
    if "left" not in said and (left := progress.step_left()):
        said += f"  about {clock(left)} left"
    elif "left" not in said:
        said += f"  {clock(progress.elapsed())} so far"
    return whole, f"{progress.now.title}: {said}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class Display:
    """Two lines that change where stderr is a terminal; elsewhere a line now and then."""

    def __init__(self, stream=None, every: float | None = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every = every if every is not None else (0.1 if self.live else 15.0)
        self._last, self._step, self._drawn = -1e9, None, False

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < self.every and progress.now is self._step:
            return
        self._last, self._step = now, progress.now
        whole, step = lines(progress)
        if not self.live:
            print(f"{whole}  |  {step}" if step else whole, file=self.stream, flush=True)
            return
        width = os.get_terminal_size(self.stream.fileno()).columns - 1
        up = "\x1b[1A\r" if self._drawn else "\r"
        self.stream.write(f"{up}\x1b[2K{whole[:width]}\n\x1b[2K{step[:width]}")
        self.stream.flush()
        self._drawn = True

    def close(self) -> None:
        if self._drawn:
            self.stream.write("\n")
            self._drawn = False
