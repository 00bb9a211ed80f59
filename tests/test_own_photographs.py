"""The README's way from a folder of photographs to a model that draws them, with few steps."""

import csv
import shutil

import commands
import pytest
import training
from commands import ROOT
from foreign import PHOTOGRAPHS
from PIL import Image

from dreamlite_jax.data import records
from dreamlite_jax.train import checkpoint

pytestmark = pytest.mark.e2e

TABLE = ROOT / "configs" / "photographs" / "metadata.csv"
# As the configs have it; their quick variants are of the shapes world.
DATA = "--config.data=({'source': 'runs/photographs/set'},)"


def captions() -> dict[str, str]:
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return {row["file_name"]: row["text"] for row in csv.DictReader(stream)}


def train(name: str, cache, *flags: str) -> None:
    config = f"--config={ROOT / 'configs' / 'photographs' / name}.py:quick"
    assert commands.run("train", config, *training.shared(cache), DATA, *flags) == 0


def test_from_a_folder_to_pictures(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PHOTOGRAPHS, "runs/photographs/files")
    shutil.copy(TABLE, "runs/photographs/files")
    given = "--source=runs/photographs/files", "--out=runs/photographs/set"
    assert commands.run("prepare_data", *given, "--workers=1") == 0
    prepared = records.PreparedSet("runs/photographs/set")
    assert [list(record["captions"]) for record in prepared] == [[t] for t in captions().values()]

    autoencoder, phase1 = "runs/photographs/autoencoder", "runs/photographs/phase1"
    train("autoencoder", cache, f"--workdir={autoencoder}")
    train("phase1_t2i", cache, f"--workdir={phase1}", f"--config.init_from={autoencoder}")
    assert checkpoint.latest_step(phase1) == 2
    # Drawn, as the autoencoder shows it, and the photograph itself.
    with Image.open(f"{phase1}/samples/0000002_sample.png") as sheet:
        assert sheet.width == 3 * 128 + 4 * 8

    model = "--out=runs/photographs/model"
    assert commands.run("convert.export", f"--workdir={phase1}", model) == 0
    said = "--prompt=a cup of coffee on a red saucer with a spoon"
    size = "--height=64", "--width=64", "--steps=2"
    flags = "--model=runs/photographs/model", said, *size, "--out=runs/photographs/coffee.png"
    assert commands.run("sample", *flags) == 0
    with Image.open("runs/photographs/coffee.png") as drawn:
        assert drawn.size == (64, 64)


@pytest.mark.parametrize("name", ["autoencoder", "phase1_t2i"])
def test_the_configs_look_where_the_readme_puts_things(name):
    source = (ROOT / "configs" / "photographs" / f"{name}.py").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for place in ("runs/photographs/set", f"configs/photographs/{name}.py"):
        assert place in source and place in readme
