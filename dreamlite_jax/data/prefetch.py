"""Elements of a random-access source made ahead, in order, by threads or by processes.

The prefetching is Grain's. A worker process gets the source once, and then only numbers.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

Element = dict[str, np.ndarray]


def prefetched(
    source: Any, start: int, *, workers: int = 0, threads: int = 1, ahead: int = 2
) -> Iterator[Element]:
    """source[start], source[start + 1], ...: the same ones whatever makes them.

    Worker processes end with the iterator (`close`, or when it is forgotten) or with Python, after
    what they have begun. Grain unlinks memory that it shared with them in the background: Python
    may warn of "leaked shared_memory objects" as it ends, and removes them.

    Args:
      source: has `__len__` and `__getitem__`; picklable where there are workers.
      workers: processes; 0: threads of this one, which are better up to a dozen or so, as Pillow
        decodes and resizes without Python's lock. Processes take seconds to start and to end, and
        each holds a few elements more.
      threads: elements that a process makes at a time.
      ahead: finished elements that a process keeps ready.
    """
    data = grain.MapDataset.source(source)
    if not workers:
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + ahead)
        return iter(data[start:].to_iter_dataset(reading))
    if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which notebooks lack
        flags.FLAGS.mark_as_parsed()
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    # Grain keeps as many on this side of each worker's queue as on that.
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=-(-ahead // 2))
    later = data[start + 1 :].to_iter_dataset(reading).mp_prefetch(options, _begin_worker)
    elements = _and_then(lambda: source[start], iter(later))
    next(elements)  # starts the workers
    atexit.register(_close, weakref.ref(elements))
    return elements


def _and_then(first: Callable[[], Element], later: Any) -> Iterator[Element | None]:
    """None, once the workers start, and the elements, of which the first is made here meanwhile.

    Theirs are copied: what lies in memory shared with them must be gone before Python ends.
    """
    try:
        later.start_prefetch()
        yield
        yield first()
        for element in later:
            yield {name: np.array(array) for name, array in element.items()}
    finally:
        later.close()  # lest the workers outlive whoever stops early


def _close(elements: weakref.ref) -> None:
    """While Python is whole: what Grain does by itself, a moment later, is a page of tracebacks."""
    if (alive := elements()) is not None:
        alive.close()


def _begin_worker(index: int, count: int) -> None:
    """A terminal interrupts all processes; what becomes of the workers, their parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers whose parent was killed would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
