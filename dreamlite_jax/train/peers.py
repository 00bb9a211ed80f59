"""A run of several processes: whether all can begin, and one that is gone or must go alone."""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from dreamlite_jax.errors import UserError
from dreamlite_jax.train import signals

# How collectives and barriers between hosts say it: by the connection, or by missing heartbeats.
_LOST = re.compile(
    "Connection (reset|closed|refused)|Socket closed|Read error|Broken pipe|heartbeat timeout"
)


T = TypeVar("T")


class AloneError(UserError):
    """What only this one of several processes met, while the others are in a step already."""


def elsewhere(problems: Sequence[str]) -> list[str]:
    """A line where another process has problems and this one has none, so that all leave: one that
    left alone would be waited for. To be called by all processes at the same place."""
    if jax.process_count() == 1:
        return []
    found = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(problems))))
    if problems or not len(found):
        return []
    return [f"process {found[0]} of {jax.process_count()} cannot begin: its log says why"]


def together(
    do: Callable[[], T], others: str = "another process cannot begin: its log says why"
) -> T:
    """What `do` gives on this process; raises on all of them where it raises on any.

    Raises:
      UserError: what `do` raises, or on the others one that says `others`: all can save and
        leave.
      Exception: what `do` raises that is none; AloneError on the others, which leave without saving
        either: they would wait for this one to save with them. That another process is gone, at
        once.
    """
    value = failure = None
    try:
        value = do()
    except Exception as error:
        if is_lost(error):  # with whom nothing can be exchanged any more
            raise
        failure = error
    if signals.on_any_process(failure is not None):
        unforeseen = failure is not None and not isinstance(failure, UserError)
        if unforeseen and jax.process_count() > 1:
            logging.error("%s", failure, exc_info=failure)  # before the others' end is this one's
        if signals.on_any_process(unforeseen) and not unforeseen:
            raise AloneError(f"{failure or others}; nothing was saved for it") from failure
        raise failure or UserError(others)
    return value


def unlike(**facts: Any) -> list[str]:
    """A line for each fact (a JSON value) in which the processes differ, as `elsewhere`."""
    if jax.process_count() == 1:
        return []
    digests = [
        int.from_bytes(hashlib.sha256(json.dumps(fact, default=str).encode()).digest()[:4])
        for fact in facts.values()
    ]
    found = multihost_utils.process_allgather(np.array(digests, np.uint32))
    return [
        f"{name} of process {other[0]} is not that of process 0: start all with the same files and "
        "flags"
        for name, column in zip(facts, found.T, strict=True)
        if len(other := np.flatnonzero(column != column[0]))
    ]


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
    (Where that was process 0, JAX may notice first, and aborts this one.) One that must go alone
    leaves as fast, with exit code 2."""
    try:
        yield
    except AloneError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(2)
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
