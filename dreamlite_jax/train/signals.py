"""SIGTERM and SIGINT ask a run to save and leave; a second one makes it leave at once."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

# What a run exits with that was asked to leave and has saved, or that noticed that another of its
# processes is lost: EX_TEMPFAIL of sysexits.h, "try again later"; the same command goes on from the
# latest checkpoint. A run that is done exits with 0.
EXIT_TO_RESUME = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


_came: list[int] = []  # signals, of which the operating system knows no owner but the process


def asked() -> bool:
    """Whether a signal has come since `asked_to_leave` was entered."""
    return bool(_came)


@contextlib.contextmanager
def asked_to_leave() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a signal has come; to be entered in the main thread.

    The second signal ends the process with 128 + its number (143 or 130), nothing is saved. On
    leaving, signals do again what they did before.
    """
    _came.clear()

    def handle(number: int, _) -> None:
        if _came:
            os._exit(128 + number)  # threads that still save would keep sys.exit waiting
        _came.append(number)
        name = signal.Signals(number).name
        os.write(2, f"{name}: saves and leaves; once more to leave at once\n".encode())

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield asked
    finally:
        _came.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def on_any_process(flag: bool) -> bool:
    """Whether the flag is set on any of the run's processes, so that all leave at the same step.

    On several hosts every process has to call this at the same steps, as it communicates.
    """
    import jax  # here: commands without JAX are asked to leave, too
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
