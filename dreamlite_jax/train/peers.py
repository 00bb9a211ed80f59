"""A run of several processes, one of which is gone: killed, or its host lost."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import jax

from dreamlite_jax.train import signals

# How collectives and barriers between hosts say it: by the connection, or by missing heartbeats.
_LOST = re.compile(
    "Connection (reset|closed|refused)|Socket closed|Read error|Broken pipe|heartbeat timeout"
)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it came from or came after, says that another process is gone."""
    while error is not None:
        # JAX's own; a server of rewards that refuses connections is no process of the run.
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            return jax.process_count() > 1
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def leaving_with_the_lost() -> Iterator[None]:
    """Where another process is gone, this one leaves at once with one line and the exit code that
    says to go on. Nothing is saved or closed: all of that would wait for the one that is gone.
    (Where that was process 0, JAX may notice first, and aborts this one.)"""
    try:
        yield
    except Exception as error:
        if not is_lost(error):
            raise
        print(
            f"error: process {jax.process_index()} of {jax.process_count()}: another one has ended "
            f"or cannot be reached, its log says why ({' '.join(str(error).split())}); started "
            "again, all go on from the latest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(signals.EXIT_TO_RESUME)
