"""A reward that lives in another process, on another machine: `protocol` over HTTP.

A server that does not answer is waited for; one that answers wrongly is asked again a few times.
Either then raises, and never gives a score that the reward did not. One that is busy (a request
took too long, but its status page answers and others' requests get their scores) is waited for as
long as it is.
"""

import http.client
import math
import random
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import logging

from dreamlite_jax.rewards import protocol
from dreamlite_jax.rewards.base import EDIT, T2I, Requests, Reward, RewardError, checked
from dreamlite_jax.rewards.shapes import examples

# Statuses of a server, or of what stands before it, that is not there or overrun for now.
_AWAY = (408, 429, 502, 503, 504)
# Not by a proxy of the environment: reward servers are near.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Settings(NamedTuple):
    batch_size: int = 16  # pictures of a request
    concurrency: int = 4  # requests at a time, of all the run's processes, but at least one of each
    timeout: float = 120.0  # seconds that an answer may take to begin, and about as many to end
    attempts: int = 4  # wrong answers to a request until that is an error
    patience: float = 600.0  # seconds that the server may be away; being busy is not
    pause: float = 1.0  # seconds before asking again, doubled each time up to `longest_pause`
    longest_pause: float = 30.0


_STATUS_TIMEOUT = 20.0  # seconds for a description, which no request keeps waiting
_BUSY_SAID_EVERY = 60.0  # seconds


class _AwayError(Exception):
    """Nobody answered, or not in time."""


class _LateError(_AwayError):
    """Not in time: away, stuck or busy."""


class _WrongError(Exception):
    """An answer that is none."""


def open_remote(
    url: str, settings: Settings, interrupted: Callable[[], bool] = lambda: False
) -> Reward:
    """The reward of a server.

    Args:
      interrupted: whether waiting should end, as when the run was asked to leave.

    Raises:
      RewardError: nobody answers there (it is not waited for), or something that is no reward.
    """
    try:
        body = _status(url, settings)
        about = protocol.read_description(body)
    except (_AwayError, _WrongError, RewardError) as error:
        raise RewardError(
            f"{url}: {error}; start the server first: python -m launch.serve_reward"
        ) from error
    # Where it has none it has to know a good picture of shapes from noise.
    shown = about.pop("examples") or [
        e for e in examples() if (T2I if e.source is None else EDIT) in about["tasks"]
    ]
    reward = Reward(**about, score=None, examples=lambda: shown)
    busy_is_news = _at_most_every(_BUSY_SAID_EVERY)

    def score(images, prompts, sources, metadata) -> np.ndarray:
        requests = Requests(images, prompts, sources, metadata)
        n, size = len(images), settings.batch_size
        batches = [requests.take(range(start, min(start + size, n))) for start in range(0, n, size)]

        def ask(batch: Requests) -> np.ndarray:
            return _asked(url, reward, batch, settings, interrupted, busy_is_news)

        with ThreadPoolExecutor(settings.concurrency) as pool:
            waiting = [pool.submit(ask, batch) for batch in batches]
            try:
                return np.concatenate([one.result() for one in waiting])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return reward._replace(score=score)


def _asked(
    url: str,
    reward: Reward,
    batch: Requests,
    settings: Settings,
    interrupted: Callable[[], bool],
    busy_is_news: Callable[[], bool],
) -> np.ndarray:
    """The scores of one request, however often it has to be sent.

    Args:
      busy_is_news: whether it is time to say that the server is busy.
    """
    wrong, tries, n, away_since = 0, 0, len(batch.images), None
    answered = None  # requests of anyone, when this one was late
    while True:
        name = uuid.uuid4().hex  # a new one each time: a late reply to an earlier try is none
        body = protocol.request(name, batch)
        header = {"Content-Type": "application/json"}
        asked_at = time.monotonic()
        try:
            answer = _fetched(urllib.request.Request(url, body, header), settings.timeout)
            try:
                scores = checked(reward, protocol.read_reply(answer, name, n), n)
            except ValueError as error:
                raise _WrongError(str(error)) from error
            if away_since is not None:
                logging.info("%s is back", url)
            return scores
        except _WrongError as error:
            wrong, away_since = wrong + 1, None
            if wrong >= settings.attempts:
                raise RewardError(
                    f"reward {reward.name}: {url} answered wrongly {wrong} times: {error}"
                ) from error
            logging.warning("reward %s: %s: %s; asked again", reward.name, url, error)
        except _AwayError as error:
            busy = False
            if isinstance(error, _LateError):
                busy, answered = _is_busy(url, settings, answered)
            away_since = asked_at if away_since is None else away_since
            away = time.monotonic() - away_since
            if busy:
                away_since = None
                if busy_is_news():
                    logging.warning("reward %s: %s is busy (%s): waiting", reward.name, url, error)
            elif away >= settings.patience:
                raise RewardError(
                    f"reward {reward.name}: {url} has been away for {away:.0f} s ({error}); start "
                    "it, then run the same command again"
                ) from error
            else:
                logging.warning("reward %s: %s is away (%s): waiting", reward.name, url, error)
        pause = min(settings.pause * 2 ** min(tries, 30), settings.longest_pause)
        tries += 1
        _sleep(pause * random.uniform(0.75, 1.25), interrupted, reward)


def _sleep(seconds: float, interrupted: Callable[[], bool], reward: Reward) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if interrupted():
            raise RewardError(f"reward {reward.name}: asked to leave while its server was away")
        time.sleep(min(left, 0.5))


def _at_most_every(seconds: float) -> Callable[[], bool]:
    """A function that is true when it is first called, and again after so many seconds."""
    last = -math.inf

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due


def _is_busy(url: str, settings: Settings, before: int | None) -> tuple[bool, int | None]:
    """Whether a server that was late works, and how many requests it has answered, if it says so.

    It works if its status page answers and others got scores since it had answered `before`, None
    where that is unknown: a model that hangs leaves the page as it is. One that does not say counts
    as away.
    """
    try:
        answered = protocol.read_answered(_status(url, settings))
    except (_AwayError, _WrongError, ValueError):  # RewardError is one, too
        return False, before
    return answered is not None and answered != before, answered


def _status(url: str, settings: Settings) -> bytes:
    """What a server says of itself; raises as `_fetched`."""
    return _fetched(urllib.request.Request(url), min(settings.timeout, _STATUS_TIMEOUT))


def _fetched(request: urllib.request.Request, timeout: float) -> bytes:
    try:
        status, body = _exchanged(request, timeout)
    except urllib.error.URLError as error:
        kind = _LateError if isinstance(error.reason, TimeoutError) else _AwayError
        raise kind(str(error.reason)) from error
    except TimeoutError as error:
        raise _LateError(str(error) or "timed out") from error
    except (OSError, http.client.HTTPException) as error:  # cut off within the answer
        raise _AwayError(str(error) or type(error).__name__) from error
    except ValueError as error:
        raise RewardError(f"{request.full_url}: {error}") from error
    if status < 300:
        return body
    text = f"status {status}: {protocol.read_failure(body)}"
    if status in _AWAY:
        raise _AwayError(text)
    if status < 500:
        raise RewardError(f"{request.full_url}: {text}")
    raise _WrongError(text)


def _exchanged(request: urllib.request.Request, timeout: float) -> tuple[int, bytes]:
    """Status and body of the answer, whatever the status."""
    end = time.monotonic() + timeout
    try:
        with _OPENER.open(request, timeout=timeout) as answer:
            return answer.status, _body(answer, end)
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, _body(answer, end)


def _body(answer: http.client.HTTPResponse, end: float) -> bytes:
    """All of it, no piece of which began to be waited for later than that: urllib's own timeout is
    of every piece that a server sends."""
    parts = []
    while part := answer.read1(2**16):
        parts.append(part)
        if answer.length != 0 and time.monotonic() > end:
            raise TimeoutError("timed out within its answer")
    if answer.length:
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)
