"""Every config's quick variant runs, and leaves what a run leaves."""

import pytest
import training
from commands import ROOT

from dreamlite_jax.train import checkpoint, metrics
from launch.demos import plan

pytestmark = pytest.mark.e2e

CONFIGS = ROOT / "configs"
# Others run these: test_own_photographs.py, and the quick demo of test_demo_e2e.py.
ELSEWHERE = {
    *(CONFIGS / "photographs").glob("*.py"),
    *(CONFIGS / "shapes" / f"{stage.config}.py" for stage in plan.STAGES),
}
FILES = sorted(
    file
    for file in CONFIGS.rglob("*.py")
    if "def get_config" in file.read_text("utf-8") and file not in ELSEWHERE
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_quick(file, cache, tmp_path):
    name = file.relative_to(CONFIGS).with_suffix("")
    training.run(str(name), tmp_path, cache)
    assert checkpoint.latest_step(tmp_path) == 2
    assert [line["step"] for line in metrics.read_metrics(tmp_path) if "loss" in line] == [1, 2]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
