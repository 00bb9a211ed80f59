"""The benchmark's turns, on contenders that write down who was asked."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.benchmark import row
from launch.benchmarks import rl
from launch.benchmarks.compare import WARM_UP_STEPS, Contender, Timing, compare

ROUNDS = 3


def writes(path: str, letter: str) -> Callable[[], None]:
    return functools.partial(_append, Path(path), letter)


def _append(path: Path, letter: str) -> None:
    with path.open("a") as file:
        file.write(letter)


def fails(letter: str) -> Callable[[], None]:
    raise ValueError(f"no room for {letter}")


@pytest.mark.parametrize(("apart", "turns"), [(False, "ababab"), (True, "aaa" + "bb" + "bbb")])
def test_contenders_take_turns_or_run_one_after_the_other(tmp_path, apart, turns):
    asked = tmp_path / "asked"
    contenders = [Contender(name, writes, {"path": str(asked), "letter": name}) for name in "ab"]
    ours, theirs = compare(contenders, ROUNDS, apart)
    before = "a" * WARM_UP_STEPS if apart else "a" * WARM_UP_STEPS + "b" * WARM_UP_STEPS
    assert asked.read_text() == before + turns
    assert len(ours.seconds) == len(theirs.seconds) == ROUNDS
    assert ours.ratio(theirs) > 0 and ours.peak_mib > 1


def test_a_contender_that_fails_says_why_and_does_not_stop_the_other(tmp_path):
    working = Contender("a", writes, {"path": str(tmp_path / "asked"), "letter": "a"})
    ours, theirs = compare([working, Contender("b", fails, {"letter": "b"})], ROUNDS)
    assert len(ours.seconds) == ROUNDS and not theirs.seconds
    assert "no room for b" in theirs.error
    assert row("case", [ours, theirs]).endswith("| - |")


def test_shares_of_a_step_are_of_its_own_objective_where_all_of_it_was_measured():
    def took(ms):
        return [Timing("a", [ms / 1e3], 0.0, 0.0)]

    found = {
        rl.case("rollout", "grpo"): took(60),
        rl.case("update", "grpo"): took(30),
        rl.JUDGE: took(10),
        rl.case("rollout", "nft"): took(80),
    }
    said = rl.summary(found).splitlines()
    assert [line.split(", ")[-1] for line in said] == [
        f"{share} % of a step of grpo" for share in (60, 30, 10)
    ]
    assert "33.33 updates/s of 16 pictures" in said[1]
