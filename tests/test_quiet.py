"""What Orbax would say at length is not said."""

import asyncio
import gc
import logging

import pytest

from dreamlite_jax.train import quiet


def test_only_the_first_of_many_failures_is_heard_of(caplog):
    """Those that failed before and those that fail behind it, which nobody asks any more."""

    async def failing(number, after):
        await asyncio.sleep(after)
        raise OSError(f"no space for {number}")

    async def writes():
        tasks = [asyncio.ensure_future(failing(k, 0.01 * (k // 3))) for k in range(9)]
        await asyncio.sleep(0.005)  # the first three have failed
        for task in tasks:
            await task

    with caplog.at_level(logging.ERROR, logger="asyncio"):
        with pytest.raises(OSError, match="no space for 0"):
            quiet._run_to_the_end(writes())
        gc.collect()
    assert not caplog.records


def test_an_error_in_a_few_words():
    assert quiet.brief(OSError(28, "No space left on device")) == "No space left on device"
    assert quiet.brief(ValueError("a  b\n c [source='x']")) == "a b c"
    assert quiet.brief(KeyError()) == "KeyError"
    long = quiet.brief(ValueError("x" * 500))
    assert len(long) < 210 and " ... " in long
    assert quiet.first(["a", "b", "c", "d"], 3) == "a; b; c and 1 more"
