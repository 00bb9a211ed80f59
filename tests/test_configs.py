"""Every config's quick variant runs, and leaves what a run leaves."""

import pytest
import training
from commands import ROOT

from dreamlite_jax.train import checkpoint, metrics

pytestmark = pytest.mark.e2e

FILES = sorted(
    file
    for file in (ROOT / "configs").rglob("*.py")
    if "def get_config" in file.read_text("utf-8")
    and file.parent.name != "photographs"  # test_own_photographs.py runs those
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_quick(file, cache, tmp_path):
    name = file.relative_to(ROOT / "configs").with_suffix("")
    training.run(str(name), tmp_path, cache)
    assert checkpoint.latest_step(tmp_path) == 2
    assert [line["step"] for line in metrics.read_metrics(tmp_path) if "loss" in line] == [1, 2]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
