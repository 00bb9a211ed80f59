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


def test_rollouts_on_2_processes_of_4_devices(cache, tmp_path):
    """Of the networks themselves, spread: each process asks about its own pictures."""
    flags = (
        *(training.SMOOTH, "--config.batch_size=32", "--config.rl.updates=1"),
        *("--config.sample.every=0", "--config.steps=3"),
    )
    one, several = tmp_path / "one", tmp_path / "several"
    training.run("shapes/rl_nft", one, cache, *flags)
    said = training.run_together("shapes/rl_nft", several, cache, *flags, processes=2, devices=4)
    assert "32 pictures = 8 prompts x 4 a group = 8 devices x 4 at a time" in said[0]
    found, expected = (training.result(run)[2] for run in (several, one))
    training.assert_close(found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs:  # a level of 255 more or less in some pixels
            if name.startswith(("reward", "spread", "diversity", "dropped")):
                wanted = pytest.approx(float(theirs[name]), abs=1e-3, nan_ok=True)
                assert float(ours[name]) == wanted, name


def until(lines: list[dict], step: int) -> list[dict]:
    return [line for line in lines if line["step"] <= step]
