"""One run on other numbers of devices and processes, one after the other: the same losses."""

import signal

import pytest
import training

from dreamlite_jax.train import checkpoint, signals

pytestmark = pytest.mark.e2e

STAGE = "shapes/autoencoder"  # the quickest to compile; what is tested here is the same for all


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """Four steps on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    training.run_here(STAGE, workdir, cache, training.SMOOTH, "--config.steps=4")
    return workdir


def test_8_devices_then_4(alone, cache, tmp_path):
    given = STAGE, tmp_path / "run", cache, training.SMOOTH
    said = training.run(*given, devices=8)
    assert "mesh data 1 x fsdp 8" in said
    expected = training.result(alone)[2]
    training.assert_close(training.result(tmp_path / "run")[2], training.until(expected, 2))
    said = training.run(*given, "--config.steps=4", devices=4)
    assert "going on from step 2" in said
    training.assert_close(training.result(tmp_path / "run")[2], expected)
    training.assert_parameters_close(tmp_path / "run", alone, 4)


def test_2_processes_of_4_devices_then_1(alone, cache, tmp_path):
    """Two start from another's run. One is asked to leave: both save the same step, and a third
    goes on from there."""
    run, expected = tmp_path / "run", tmp_path / "alone"
    given = cache, training.SMOOTH, f"--config.init_from={alone}"
    flags = "--config.steps=100000", "--config.mesh.data=4", "--config.mesh.fsdp=2"
    with training.together(STAGE, run, *given, *flags, processes=2, devices=4) as started:
        training.after_steps(started[0], tmp_path / "run.0.log", 2)
        started[1].send_signal(signal.SIGTERM)
        codes = [process.wait(180) for process in started]
    said, step = training.sayings(run, 2), checkpoint.latest_step(run)
    assert codes == [signals.EXIT_TO_RESUME] * 2, said
    assert "mesh data 4 x fsdp 2, 2 processes" in said[0]
    assert f"vae: trained, from the run {alone}" in said[0]
    assert all(f"asked to leave: saved step {step} of 100000" in one for one in said)

    more = f"--config.steps={step + 2}"
    assert f"going on from step {step}" in training.run(STAGE, run, *given, more)
    training.run_here(STAGE, expected, *given, more)
    training.assert_close(training.result(run)[2], training.result(expected)[2])
    training.assert_parameters_close(run, expected, step + 2)


def test_each_of_2_processes_is_killed(cache, tmp_path):
    """The other leaves at once, in one line, and all go on with what was saved."""
    run = tmp_path / "run"
    given = STAGE, run, cache, "--config.sample.every=0", "--config.checkpoint.every=10"
    for lost, left in ((1, 0), (0, 1)):  # process 0 is the one by which they find each other
        log, before = tmp_path / f"run.{left}.log", checkpoint.latest_step(run) or 0
        with training.together(*given, "--config.steps=100000", processes=2) as started:
            training.after_saving(started[lost], run, before)
            shown = training.steps_said(tmp_path / "run.0.log")
            training.after_steps(started[lost], tmp_path / "run.0.log", shown + 2)  # in no save
            started[lost].kill()
            code = started[left].wait(60)
        said = log.read_text()
        assert not before or f"going on from step {before}" in said
        # JAX watches over process 0 itself; where it is faster, it ends the other in its own way.
        assert code == signals.EXIT_TO_RESUME or (lost == 0 and code == -signal.SIGABRT), said
        if code == signals.EXIT_TO_RESUME:
            (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert f"process {left} of 2: another one has ended" in error
    step = checkpoint.latest_step(run)
    assert step >= 20
    said = training.run(*given, f"--config.steps={step + 2}")
    assert f"going on from step {step}" in said


def test_rollouts_on_2_processes(cache, tmp_path):
    """Of the networks themselves, spread: each process asks about its own pictures."""
    flags = (
        *(training.SMOOTH, "--config.batch_size=16", "--config.rl.updates=1"),
        *("--config.sample.every=0", "--config.steps=2"),
    )
    one, several = tmp_path / "one", tmp_path / "several"
    training.run_here("shapes/rl_nft", one, cache, *flags)
    said = training.run_together("shapes/rl_nft", several, cache, *flags, processes=2)
    assert "16 pictures = 4 prompts x 4 a group = 2 devices x 8 at a time" in said[0]
    found, expected = (training.result(run)[2] for run in (several, one))
    training.assert_close(found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs:  # a level of 255 more or less in some pixels
            if name.startswith(("reward", "spread", "diversity", "dropped")):
                wanted = pytest.approx(float(theirs[name]), abs=1e-3, nan_ok=True)
                assert float(ours[name]) == wanted, name
