"""Whatever happens to a run, the same command takes it to the same end."""

import shutil
import signal
import time

import commands
import jax
import numpy as np
import pytest
import training
from flax.traverse_util import flatten_dict

from dreamlite_jax import system
from dreamlite_jax.train import checkpoint, origins

pytestmark = pytest.mark.e2e

STEPS, SAVED, LOGGED = 9, 3, 2  # a checkpoint between two logs: it keeps the metrics of a step
# Without phase2_edit, which is phase3_joint with its data in another order.
STAGES = ("autoencoder", "phase1_t2i", "phase3_joint", "distill_dmd2")
OPTIMISED = "sft"  # as users run it: the others are compiled fast
SPREAD = "phase3_joint"  # also run by two processes
AGAIN = "autoencoder"  # also killed when it goes on
DRAWN = ("autoencoder",)  # the others draw no pictures on the way: less to compile


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """The run of a stage from start to end, which saves nothing on the way."""
    made = {}

    def get(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(stage) / "run"
            flags = *flags_of(stage), "--config.checkpoint.every=0"
            training.run_here(f"shapes/{stage}", made[stage], cache, *flags)
        return made[stage]

    return get


def flags_of(stage):
    return (
        f"--config.steps={STEPS}",
        f"--config.checkpoint.every={SAVED}",
        f"--config.log.every={LOGGED}",
        *(() if stage in DRAWN else ("--config.sample.every=0",)),
        *((training.SMOOTH,) if stage == SPREAD else ()),
    )


@pytest.mark.parametrize(
    "stage", [*STAGES, pytest.param(OPTIMISED, marks=pytest.mark.optimised, id="optimised")]
)
def test_a_killed_run_ends_as_an_undisturbed_one(stage, undisturbed, cache, tmp_path, caplog):
    expected = training.result(undisturbed(stage))
    run = tmp_path / "run"
    given = f"shapes/{stage}", run, cache, *flags_of(stage)
    process = training.start(*given)
    training.after_saving(process, run)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    saved = checkpoint.latest_step(run)
    assert SAVED <= saved < STEPS
    if stage == AGAIN:  # in its start, restored and not yet compiled
        process, log = training.start(*given), tmp_path / "run.0.log"
        while process.poll() is None and "going on from step" not in log.read_text():
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    caplog.clear()
    training.run_here(*given)
    assert f"going on from step {saved} of" in caplog.text
    assert training.result(run) == expected


@pytest.mark.parametrize("stage", DRAWN)
def test_what_is_drawn_on_the_way_changes_nothing(stage, undisturbed, cache, tmp_path):
    flags = *flags_of(stage), "--config.sample.every=0"
    training.run_here(f"shapes/{stage}", tmp_path, cache, *flags)
    assert training.result(tmp_path)[:2] == training.result(undisturbed(stage))[:2]


def test_asked_to_leave_a_run_saves_and_says_so(cache, tmp_path, caplog):
    given = "shapes/autoencoder", tmp_path / "run", cache
    process = training.start(*given, "--config.steps=100000")
    training.after_steps(process, tmp_path / "run.0.log", 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 75
    said = (tmp_path / "run.0.log").read_text()
    step = checkpoint.latest_step(tmp_path / "run")
    assert f"asked to leave: saved step {step} of 100000" in said

    training.run_here(*given, f"--config.steps={step + 1}")
    assert f"going on from step {step}" in caplog.text
    assert "going on with another config: steps was 100000" in caplog.text
    assert checkpoint.latest_step(tmp_path / "run") == step + 1


def test_a_full_disk_is_told_in_one_line_and_takes_nothing(tiny_disk, cache, tmp_path, caplog):
    flags = "--config.checkpoint.every=1", "--config.checkpoint.keep=99", "--config.sample.every=0"
    given = cache, *flags
    said = training.run("shapes/autoencoder", tiny_disk, *given, "--config.steps=99", code=2)
    assert "the disk is full" in said.splitlines()[-1], said
    assert "Traceback" not in said
    step = checkpoint.latest_step(tiny_disk)
    shutil.copytree(tiny_disk, tmp_path / "elsewhere")
    more = f"--config.steps={step + 1}"
    training.run_here("shapes/autoencoder", tmp_path / "elsewhere", *given, more)
    assert f"going on from step {step} of" in caplog.text


def test_a_run_that_diverges_ends_in_one_line_and_keeps_what_it_had(cache, tmp_path):
    given = "shapes/autoencoder", tmp_path / "run", cache, "--config.steps=30"
    said = training.run(*given, "--config.optim.lr=1e30", "--config.patience=2", code=2)
    assert "3 updates in a row up to step" in said.splitlines()[-1]
    assert "Traceback" not in said
    step, arrays, _ = training.result(tmp_path / "run")
    assert step > 1 and arrays


def test_runs_start_from_runs(undisturbed, cache, tmp_path, capsys, caplog):
    """The autoencoder of the first, the encoder of the second, the U-Net of the last. The second
    has no pane, and so is no model yet, and no teacher."""
    first, second = undisturbed("autoencoder"), tmp_path / "phase1"
    flags = "--config.steps=2", "--config.sample.every=0"
    training.run_here("shapes/phase1_t2i", second, cache, *flags, f"--config.init_from={first}")
    assert f"vae: frozen, from the run {first}" in caplog.text
    assert "unet: trained, from scratch" in caplog.text
    out = tmp_path / "model"
    assert commands.run("convert.export", f"--workdir={second}", f"--out={out}") == 2
    assert "does without the source's pane" in capsys.readouterr().err and not out.exists()
    student = "distill_dmd2", tmp_path / "student", cache, f"--config.init_from={second}"
    training.run_here(*student, code=2)
    assert "has never seen the source's pane" in capsys.readouterr().err.splitlines()[-1]
    third = tmp_path / "sft"
    caplog.clear()
    training.run_here("shapes/sft", third, cache, *flags, f"--config.init_from={second}")
    assert f"vae: frozen, from the run {first}" in caplog.text
    assert f"text_encoder: frozen, from the run {second}" in caplog.text
    assert f"unet: trained, from the run {second}" in caplog.text

    assert commands.run("convert.export", f"--workdir={third}", f"--out={out}") == 0
    exported = system.load(out)
    for name, workdir in (("vae", first), ("text_encoder", second), ("unet", third)):
        origin = origins.Origin("run", str(workdir))
        wanted = flatten_dict(origins.load(name, origin, getattr(exported.config, name)))
        found = flatten_dict(exported.params[name])
        for path, leaf in wanted.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=f"{name} {path}")
    # What is exported is neither the start of the last run nor its last step.
    unet = exported.config.unet
    start = origins.load("unet", origins.Origin("run", str(second)), unet)
    last = origins.load("unet", origins.Origin("run", str(third)), unet, part="params")
    for other in (start, last):
        same = jax.tree.map(np.array_equal, other, exported.params["unet"])
        assert not any(jax.tree.leaves(same))


def test_2_processes(undisturbed, cache, tmp_path):
    given = f"shapes/{SPREAD}", tmp_path / "run", cache, *flags_of(SPREAD), "--config.steps=2"
    said = training.run_together(*given, processes=2)
    assert "2 processes" in said[0]
    assert "step 2/2" in said[0] and "step 2/2" not in said[1]
    found, expected = (training.result(run)[2] for run in (tmp_path / "run", undisturbed(SPREAD)))
    training.assert_close(found, training.until(expected, 2))
