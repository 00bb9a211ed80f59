"""The rewards that a config's `rl.rewards` can name, opened.

rewards = [
    {"reward": "shapes", "weight": 1.0},
    {"reward": "http://localhost:8001", "task": "edit", "weight": 0.5},
    {"reward": "saturation", "weight": 0.0},  # watched, not learnt from
]

A server's entry can have the fields of `remote.Settings`, too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dreamlite_jax.rewards import remote, shapes, statistics
from dreamlite_jax.rewards.base import TASKS, Requests, Reward, RewardError, scored

BUILT_IN = {
    reward.name: reward
    for reward in (shapes.JUDGE, shapes.EXACT, statistics.SATURATION, statistics.SHARPNESS)
}
_KEYS = {"reward": str, "weight": float, "task": str, "name": str}
_REMOTE = {name: type(value) for name, value in remote.Settings._field_defaults.items()}
_HTTP = ("http://", "https://")


class Weighted(NamedTuple):
    reward: Reward
    weight: float  # 0: watched, not learnt from
    tasks: tuple[str, ...]  # that it is asked about


def check(entries: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """What is wrong with a config's entries for data of some tasks, a line each; asks no server."""
    found, taught = [], set()
    for number, entry in enumerate(entries):
        where = f"rl.rewards[{number}]"
        if not isinstance(entry, Mapping):
            found.append(f"{where}: {entry!r} should be a dict, such as {{'reward': 'shapes'}}")
            continue
        wrong = list(_wrong_keys(entry))
        found += [f"{where}: {problem}" for problem in wrong]
        if not wrong and entry.get("weight", 1.0) > 0:
            taught |= {entry["task"]} if "task" in entry else set(TASKS)
    if missing := [task for task in tasks if task not in taught]:
        found.append(f"rl.rewards: none with a weight for the task {', '.join(missing)}")
    names = [entry.get("name", entry.get("reward")) for entry in entries if type(entry) is not str]
    found += [
        f"rl.rewards: the name {n!r} stands for several" for n in {*names} if names.count(n) > 1
    ]
    return found


def _wrong_keys(entry: Mapping[str, Any]):
    if "reward" not in entry:
        yield f"`reward` is missing: a server's address, or one of {', '.join(BUILT_IN)}"
        return
    known = {**_KEYS, **_REMOTE} if is_remote(entry) else _KEYS
    if unknown := sorted(set(entry) - set(known)):
        yield f"unknown keys {', '.join(unknown)}; known are {', '.join(known)}"
    for key in set(entry) & set(known):
        value, wanted = entry[key], known[key]
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            yield f"{key} is {value!r}, should be {wanted.__name__}"
        elif wanted in (int, float) and not 0 <= value < math.inf:
            yield f"{key} is {value}, should be 0 or more"
        elif key in ("batch_size", "concurrency", "attempts", "timeout") and value == 0:
            yield f"{key} is 0, should be positive"
    if not is_remote(entry) and entry["reward"] not in BUILT_IN:
        yield (
            f"unknown reward {entry['reward']!r}; known are {', '.join(BUILT_IN)}, and a server's "
            "http://HOST:PORT"
        )
    if entry.get("task", TASKS[0]) not in TASKS:
        yield f"unknown task {entry['task']!r}; known are {', '.join(TASKS)}"


def is_remote(entry: Mapping[str, Any]) -> bool:
    """Whether an entry names a server."""
    return str(entry["reward"]).startswith(_HTTP)


def open_rewards(
    entries: Sequence[Mapping[str, Any]],
    interrupted: Callable[[], bool] = lambda: False,
    processes: int = 1,
) -> tuple[Weighted, ...]:
    """The rewards of entries without problems.

    Args:
      interrupted: as in `remote.open_remote`.
      processes: of the run, which share each server's `concurrency`.

    Raises:
      RewardError: servers that do not answer, or a reward that cannot be asked about its task.
    """
    opened, problems = [], []
    for number, entry in enumerate(entries):
        try:
            opened.append(_opened(entry, interrupted, processes))
        except RewardError as error:
            problems.append(f"rl.rewards[{number}]: {error}")
    if problems:
        raise RewardError("; ".join(problems))
    return tuple(opened)


def _opened(entry: Mapping[str, Any], interrupted: Callable[[], bool], processes: int) -> Weighted:
    given = {key: kind(entry[key]) for key, kind in _REMOTE.items() if key in entry}
    if is_remote(entry):
        settings = remote.Settings(**given)
        settings = settings._replace(concurrency=max(1, settings.concurrency // processes))
        reward = remote.open_remote(entry["reward"], settings, interrupted)
    else:
        reward = BUILT_IN[entry["reward"]]
    if "name" in entry:
        reward = reward._replace(name=entry["name"])
    tasks = (entry["task"],) if "task" in entry else reward.tasks
    if set(tasks) - set(reward.tasks):
        raise RewardError(f"{reward.name} cannot be asked about {', '.join(tasks)}")
    return Weighted(reward, float(entry.get("weight", 1.0)), tasks)


def score_all(rewards: Sequence[Weighted], requests: Requests, tasks: Sequence[str]) -> np.ndarray:
    """float32 [N, R]: every reward's score of the pictures whose task it is asked about, else 0.

    The rewards are asked at the same time. Raises RewardError.
    """
    out = np.zeros((len(tasks), len(rewards)), np.float32)
    asked = [[i for i, task in enumerate(tasks) if task in one.tasks] for one in rewards]
    with ThreadPoolExecutor(max(len(rewards), 1)) as pool:
        waiting = [
            pool.submit(scored, one.reward, requests.take(rows))
            for one, rows in zip(rewards, asked, strict=True)
        ]
        for k, (one, rows) in enumerate(zip(waiting, asked, strict=True)):
            out[rows, k] = one.result()
    return out
