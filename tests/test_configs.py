"""Every config's quick variant runs, and leaves what a run leaves: here, or where it is said."""

import importlib

import pytest
import training
from commands import ROOT

from dreamlite_jax.train import checkpoint, metrics
from launch.demos import plan

pytestmark = pytest.mark.e2e

CONFIGS = ROOT / "configs"
# Others run these: test_own_photographs.py, the quick demo of test_demo_e2e.py,
# test_distillation.py and test_reinforcement.py.
ELSEWHERE = {
    *(CONFIGS / "photographs").glob("*.py"),
    *(CONFIGS / "shapes" / f"{stage.config}.py" for stage in plan.STAGES),
    CONFIGS / "distill_dmd2.py",
    CONFIGS / "shapes" / "rl_grpo.py",
}


def variants() -> dict[str, list[str]]:
    """Names of the configs whose quick variants are the same, key by key."""
    found = {}
    for file in sorted(CONFIGS.rglob("*.py")):
        name = file.relative_to(CONFIGS).with_suffix("").as_posix()
        if "def get_config" in file.read_text("utf-8") and file not in ELSEWHERE:
            module = importlib.import_module(f"configs.{name.replace('/', '.')}")
            found.setdefault(module.get_config("quick").to_json(), []).append(name)
    return found


@pytest.mark.parametrize("names", variants().values(), ids="+".join)
def test_quick(names, cache, tmp_path):
    training.run_here(names[0], tmp_path, cache)
    assert checkpoint.latest_step(tmp_path) == 2
    assert [line["step"] for line in metrics.read_metrics(tmp_path) if "loss" in line] == [1, 2]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
