"""One run on other numbers of devices and processes, one after the other: the same losses."""

import pytest
import training

pytestmark = pytest.mark.e2e

STAGE = "shapes/autoencoder"  # the quickest to compile; what is tested here is the same for all


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The metrics of four steps on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    training.run(STAGE, workdir, cache, training.SMOOTH, "--config.steps=4")
    return training.result(workdir)[2]


def test_8_devices_then_4(alone, cache, tmp_path):
    given = STAGE, tmp_path / "run", cache, training.SMOOTH
    said = training.run(*given, devices=8)
    assert "mesh data 1 x fsdp 8" in said
    training.assert_close(training.result(tmp_path / "run")[2], until(alone, 2))
    said = training.run(*given, "--config.steps=4", devices=4)
    assert "going on from step 2" in said
    training.assert_close(training.result(tmp_path / "run")[2], alone)


def test_2_processes_of_4_devices_then_1(alone, cache, tmp_path):
    given = STAGE, tmp_path / "run", cache, training.SMOOTH
    mesh = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
    said = training.run_together(*given, *mesh, processes=2, devices=4)
    assert "mesh data 4 x fsdp 2, 2 processes" in said[0]
    training.assert_close(training.result(tmp_path / "run")[2], until(alone, 2))
    training.run(*given, "--config.steps=4")
    training.assert_close(training.result(tmp_path / "run")[2], alone)


def until(lines: list[dict], step: int) -> list[dict]:
    return [line for line in lines if line["step"] <= step]
