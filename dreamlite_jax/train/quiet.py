"""Keeps Orbax from talking over a run, and says what it raises in a few words."""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def hush_orbax() -> None:
    """Keeps off stderr what Orbax writes there of its progress and of errors, which we report."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)
    with contextlib.suppress(ImportError):  # it is private; without it there is only more to read
        from orbax.checkpoint._src import asyncio_utils

        asyncio_utils._run_sync_via_new_loop = _run_to_the_end


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _run_to_the_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in an event loop of its own, and what it has started if it fails.

    Orbax closes the loop over the reads and writes of all other arrays when one fails, and each of
    them leaves a traceback: thousands for a full disk or a damaged file.
    """
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # of those that have failed, too, unasked
    try:
        return loop.run_until_complete(coroutine)
    except Exception:
        if others := asyncio.all_tasks(loop):
            loop.run_until_complete(asyncio.gather(*others, return_exceptions=True))
        raise
    finally:
        loop.close()


def brief(error: BaseException) -> str:
    """An exception in a few words of one line; TensorStore's say why at the end."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.sub(r" \[\w+='.*", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-110:]}"


def first(names: list[str], limit: int = 3) -> str:
    """A few of many findings in one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(names[:limit]) + more
