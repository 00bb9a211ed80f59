"""Student, fake score and teacher together: what learns from what, when, and how a run is
configured. Most tests have toy networks of a few numbers in the places of the real ones."""

import functools
import json
import types

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from PIL import Image

from configs.shapes import distill_dmd2
from dreamlite_jax import system, tiny
from dreamlite_jax.data import transforms
from dreamlite_jax.diffusion import flow, sampling
from dreamlite_jax.models.unet_config import NANO
from dreamlite_jax.objectives import dmd2, flow_matching
from dreamlite_jax.system import Condition, Texts
from dreamlite_jax.train import checkpoint, distillation, loop, sharding, stages
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train.config import ConfigError
from dreamlite_jax.train.distillation import FAKE, HEAD, STUDENT, TEACHER, Settings
from dreamlite_jax.train.origins import Origin

KEY, B = jax.random.key(3), 8
MESH = sharding.make_mesh(1, 1, jax.devices()[:1])
CONFIG = types.SimpleNamespace(
    shift=flow.ResolutionShift(), unet=types.SimpleNamespace(block_out_channels=(16,))
)
PARAMS = {"scale": jnp.float32(0.4), "shift": jnp.float32(0.1)}
SETTINGS = Settings(steps=4, ratio=3, warmup=2, score=flow_matching.Settings(edit_offset=0.5))
LOSS = dmd2.Settings(guidance=2.0, edit_guidance=2.0)


def toy_velocity(config, params, xt, sigma, at):
    told = (at.texts.context[:, 0] + at.source.mean((1, 2, 3)))[:, None, None, None]
    sigma = jnp.broadcast_to(sigma, xt.shape[:1])[:, None, None, None]
    return params["scale"] * xt + params["shift"] * (1 + sigma) + told


def toy_conditioned(config, params, batch, context_length):
    b = batch["context"].shape[0]
    texts = Texts(batch["context"], jnp.ones((b, 1), bool))
    return batch["x0"], Condition(texts, batch["source"], jnp.zeros((b, 2)))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(stages, "conditioned", toy_conditioned)
    monkeypatch.setattr(system, "velocity", toy_velocity)
    monkeypatch.setattr(
        system, "features", lambda *given: jnp.tile(toy_velocity(*given), (1, 1, 1, 8))
    )
    monkeypatch.setattr(distillation, "discriminator", lambda config: HEADS)


HEADS = distillation.Discriminator(depth=0, features=8, groups=4)


def batch():
    """Half of it edits, by their sources."""
    edits = jnp.arange(B) % 2
    return {
        "context": jnp.arange(B, dtype=jnp.float32)[:, None] / 10,
        "null_context": jnp.full((B, 1), -0.2),
        "source": 0.5 * jax.random.normal(KEY, (B, 4, 4, 2)) * edits[:, None, None, None],
        "x0": jax.random.normal(jax.random.fold_in(KEY, 1), (B, 4, 4, 2)),
        "task": edits,
    }


def optimisation(lr=1e-2):
    return stages.Optimisation(optax.sgd(lr), ema_decay=0.5)


def made(loss=LOSS, settings=SETTINGS):
    how = optimisation(), optimisation()
    step_fn = distillation.make_step(CONFIG, settings, loss, 1, *how)
    unets = {"unet": PARAMS}
    given = PARAMS, unets, {"vae": {}, "text_encoder": {}}
    return distillation.make_stage(
        CONFIG, step_fn, *given, *how, loss.gan > 0, MESH, sharding.RULES, {}
    )


def rows_of(key=KEY, unet=PARAMS):
    networks = {"unet": unet, "vae": {}, "text_encoder": {}}
    return distillation.prepared(CONFIG, SETTINGS, 1, networks, batch(), key)


# --- What is computed -----------------------------------------------------------------------------


def test_rows_lie_on_the_deployed_way_from_their_noise(toy):
    sigmas, seen = flow.sigma_list(4, flow.resolution_mu(4, 4, CONFIG.shift)), set()
    for k in range(12):
        rows = rows_of(key=jax.random.key(k))
        (sigma,), (after,) = np.unique(rows["sigma"]), np.unique(rows["after"])
        stop = int(np.flatnonzero(sigmas == sigma)[0])
        assert after == sigmas[stop + 1]
        seen.add(stop)
        velocity_fn = distillation.plain(CONFIG, PARAMS, rows["given"])
        if stop:
            wanted = sampling.sample(velocity_fn, rows["noise"], sigmas[: stop + 1])
            np.testing.assert_allclose(rows["xt"], wanted, atol=1e-5)
        else:
            np.testing.assert_array_equal(rows["xt"], rows["noise"])
    assert seen == {0, 1, 2, 3}


def test_the_source_is_clean_at_every_step_and_carries_no_loss(toy, monkeypatch):
    clean, calls = np.asarray(batch()["source"]), []

    def watching(config, params, xt, sigma, at):
        source = np.asarray(at.source).reshape(-1, *clean.shape)
        blank = not source[0].any()  # of the teacher's branch that knows no source
        for part in source[1:] if blank else source:
            np.testing.assert_array_equal(part, clean)
        assert xt.shape[1:] == clean.shape[1:]  # the target's half alone is predicted
        calls.append(blank)
        return toy_velocity(config, params, xt, sigma, at)

    monkeypatch.setattr(system, "velocity", watching)
    loss = LOSS._replace(image_guidance=1.5)
    with jax.disable_jit():
        rows = rows_of()
        keys = jax.random.split(KEY, B)
        frozen = {TEACHER: PARAMS, FAKE: {"unet": PARAMS}}
        for loss_fn in distillation.make_losses(CONFIG, SETTINGS, loss):
            value, _ = loss_fn({"unet": PARAMS}, frozen, rows, keys)
            assert value.shape == ()
    assert sum(calls) == 1 and len(calls) >= 5


def test_guidance_is_single_without_a_source_and_dual_with_one(toy):
    loss = LOSS._replace(guidance=3.0, edit_guidance=2.5, image_guidance=1.5)
    given, _ = stages.conditions(CONFIG, {}, batch(), 1)
    xt, sigma = batch()["x0"], jnp.full(B, 0.5)
    scale = dmd2.guidance_of(loss, stages.edits(batch()["task"]))
    found = distillation.guided(CONFIG, PARAMS, given, loss, scale)(xt, sigma)

    def of(context, source):
        at = Condition(Texts(context, None), source, None)
        return toy_velocity(CONFIG, PARAMS, xt, sigma, at)

    b, none = batch(), jnp.zeros_like(batch()["source"])
    text, image = of(b["context"], b["source"]), of(b["null_context"], b["source"])
    nothing = of(b["null_context"], none)
    dual = nothing + 2.5 * (text - image) + 1.5 * (image - nothing)
    np.testing.assert_allclose(found[1::2], dual[1::2], atol=1e-5)
    single = nothing + 3 * (of(b["context"], none) - nothing)
    np.testing.assert_allclose(found[::2], single[::2], atol=1e-5)
    unguided = dmd2.Settings(guidance=1.0, edit_guidance=1.0)
    plain = distillation.guided(CONFIG, PARAMS, given, unguided, jnp.ones((B, 1, 1, 1)))
    np.testing.assert_allclose(plain(xt, sigma), text, atol=1e-6)


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_teacher_and_fake_score_have_no_gradient_from_the_student(gan, toy):
    loss, rows = LOSS._replace(gan=gan, trajectory=0.1, jitter=0.2), rows_of()
    head = HEADS.init(KEY, jnp.zeros((1, 4, 4, 16)))["params"]
    score = {"unet": PARAMS, HEAD: head}
    losses, keys = distillation.make_losses(CONFIG, SETTINGS, loss), jax.random.split(KEY, B)

    def student(trained, frozen):
        return losses.student(trained, frozen, rows, keys)[0]

    frozen = {TEACHER: PARAMS, FAKE: score}
    own = jax.grad(student)({"unet": PARAMS}, frozen)
    assert all(np.asarray(g).all() for g in jax.tree.leaves(own))
    # Of make_update's gradient by its first argument alone nothing else moves; nor would it, but
    # by the discriminator's features, if it were asked.
    others = jax.grad(student, 1)({"unet": PARAMS}, frozen | {FAKE: score}) if not gan else {}
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(others))
    of_fake = jax.grad(lambda unet: losses.fake(score, {}, rows_of(unet=unet), keys)[0])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(of_fake(PARAMS)))


@pytest.mark.parametrize("within", [False, True])
def test_the_fake_scores_loss_is_that_of_pretraining(within, toy):
    rows, keys = rows_of(), jax.random.split(KEY, B)
    loss = LOSS._replace(within=within)
    fake = {"scale": jnp.float32(-0.3), "shift": jnp.float32(0.2)}
    loss_fn = distillation.make_losses(CONFIG, SETTINGS, loss).fake
    found, metrics = loss_fn({"unet": fake}, {}, rows, keys)
    x0 = dmd2.sample_from(
        distillation.plain(CONFIG, PARAMS, rows["given"]), rows["xt"], rows["sigma"]
    )
    np.testing.assert_allclose(rows["sample"], x0, atol=1e-5)
    for_flow = distillation.split_keys(keys, 2)[0]
    mu = flow.resolution_mu(4, 4, CONFIG.shift)
    sigma, noise = flow_matching.draw(SETTINGS.score, for_flow, x0, mu, rows["task"] == 1)
    sigma = rows["after"] + (rows["sigma"] - rows["after"]) * sigma if within else sigma
    velocity_fn = distillation.plain(CONFIG, fake, rows["given"])
    wanted = flow_matching.losses(velocity_fn, x0, sigma, noise, SETTINGS.score)
    np.testing.assert_allclose(found, wanted.mean(), rtol=1e-5)
    assert {"loss/t2i", "loss/edit", "loss/sigma_0", "loss/sigma_3"} <= metrics.keys()


# --- The step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_the_student_waits_and_then_takes_its_turns_in_one_program(gan, toy):
    stage = made(LOSS._replace(gan=gan))
    state, frozen = stage.init_fn(KEY)
    assert (HEAD in state[FAKE].params) == (gan > 0)
    step, moved, counted = loop.compiled(stage.step_fn, state), [], []
    for k in range(9):
        before = jax.device_get(state)
        state, found = step(state, frozen, batch(), jax.random.fold_in(KEY, k))
        after = jax.device_get(state)
        moved.append(scale_of(after[STUDENT].params) != scale_of(before[STUDENT].params))
        counted.append(int(found["student/updates"]))
        assert np.isnan(found["student/loss"]) != moved[-1]
        assert scale_of(after[FAKE].params) != scale_of(before[FAKE].params)
        assert {"fake/grad_norm", "student/grad_norm", "skipped", "streak"} <= found.keys()
    assert [k for k, yes in enumerate(moved) if yes] == [4, 7]  # 2 of warm-up, then every third
    assert counted[-1] == 2 == distillation.student_updates(SETTINGS, 9)
    assert step._cache_size() == 1
    assert scale_of(state[STUDENT].ema) != scale_of(state[STUDENT].params)


def scale_of(params):
    return float(params["unet"]["scale"])


def test_the_fake_score_learns_where_the_student_is(toy):
    """With a student that stands still, it becomes the student's own flow; from the same start, the
    teacher's stays where it was."""
    settings = Settings(steps=1, ratio=1, warmup=10**6)
    stage = made(LOSS, settings)
    state, frozen = stage.init_fn(KEY)
    step, losses = loop.compiled(stage.step_fn, state), []
    for k in range(200):
        state, found = step(state, frozen, batch(), jax.random.fold_in(KEY, k))
        losses.append(float(found["loss"]))
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    np.testing.assert_array_equal(frozen[TEACHER]["scale"], PARAMS["scale"])


# --- Configs --------------------------------------------------------------------------------------


@pytest.fixture
def quick(cache):
    def make(**changes):
        config = distill_dmd2.get_config("quick")
        config.model = str(cache / "model")
        config.init_from = str(cache / "model")
        config.unet = "tiny"
        for key, value in changes.items():
            *path, last = key.split("__")
            functools.reduce(lambda at, part: at[part], path, config)[last] = value
        return config

    return make


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distill__ratio": 0}, "distill.ratio is 0, should be at least 1"),
        ({"distill__steps": 0}, "distill.steps is 0, should be at least 1"),
        ({"distill__warmup": -1}, "distill.warmup is -1, should be at least 0"),
        ({"distill__score_lr": -1.0}, "distill.score_lr is -1.0, should be 0 or more"),
        ({"distill__warmup": 7}, "the student's first update is after 7 + 1 (distill.warmup"),
        ({"distill__score__density": "x"}, "distill.score.density is 'x', known are"),
        ({"distill": {"ration": 3}}, "distill.ration is unknown; known are steps, ratio"),
        ({"distill": {"score": {"mear": 0.0}}}, "distill.score.mear is unknown"),
        ({"loss__least": 0.99}, "loss.least and most are 0.99 and 0.98, should be rising"),
        ({"loss": {"guidence": 2.0}}, "loss.guidence is unknown; known are guidance"),
        ({"train": ("unet", "text_encoder")}, "should name some of unet"),
        ({"init_from": ""}, "init_from is empty, but distillation needs a teacher"),
        ({"init_from": "runs/nowhere"}, "neither a run with a checkpoint nor a model directory"),
        ({"unet": "nano"}, "has another unet: "),
    ],
)
def test_each_problem_is_named(changes, message, quick, tmp_path):
    with pytest.raises(ConfigError) as error:
        train_config.opened(quick(**changes), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mobile_model_is_no_teacher(quick, tmp_path):
    mobile = tiny.tiny_model_dir(tmp_path / "mobile", mobile=True)
    with pytest.raises(ConfigError, match=r"the teacher would be the model .*, a mobile model"):
        train_config.opened(quick(init_from=str(mobile)), tmp_path / "run")


def test_what_a_run_is_made_of(quick, tmp_path):
    run = train_config.opened(quick(), tmp_path)
    assert run.recipe.with_null and run.recipe.dropout == transforms.NEVER
    assert run.reference == Origin("model", quick().init_from)
    meta = train_config.meta_of(run)
    assert meta["mobile"] and meta["inside"] == "student/"
    train_config.check_resumed(run, meta)
    with pytest.raises(ConfigError, match="the run began with the run x, now init_from gives the"):
        train_config.check_resumed(run, {**meta, "reference": "the run x"})
    alone = quick(loss__guidance=1.0, loss__edit_guidance=1.0)
    assert not train_config.opened(alone, tmp_path).recipe.with_null


def test_over_baking_is_told_apart():
    rng = np.random.default_rng(0)
    teacher = rng.integers(80, 160, (4, 8, 8, 3)).astype(np.uint8)
    student = np.clip((teacher.astype(float) - 120) * 2 + 120, 0, 255).astype(np.uint8)
    found = distillation.compared(student, teacher)
    assert found["val/contrast/student"] > 1.8 * found["val/contrast/teacher"]
    assert found["val/saturation/student"] > found["val/saturation/teacher"]
    assert found["val/distance"] > 0.05
    assert distillation.compared(teacher, teacher)["val/distance"] == 0


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_student_becomes_a_mobile_model_and_no_teacher(cache, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "model"
    training.run("distill_dmd2", run, cache)
    step, arrays, lines = training.result(run)
    assert step == 2 and {"student", "fake"} == {name.split("/")[0] for name in arrays}
    assert {"val/distance", "val/saturation/student"} <= lines[-1].keys()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert len([*(run / "samples").glob("*distillation.png")]) == 2
    assert commands.run("convert.export", f"--workdir={run}", f"--out={out}") == 0
    assert "DreamLiteMobilePipeline of 2 steps, " in capsys.readouterr().out
    model = system.load(out)
    assert model.config.mobile and model.config.mobile_steps == 2
    assert model.config.unet == NANO
    flags = f"--model={out}", "--prompt=a red circle", f"--out={tmp_path / 'out.png'}"
    assert commands.run("sample", *flags, "--height=64", "--width=64") == 0
    note = json.loads(Image.open(tmp_path / "out.png").info["dreamlite_jax"])
    assert note["steps"] == 2

    again = tmp_path / "again"
    said = training.run("distill_dmd2", again, cache, f"--config.init_from={run}", code=2)
    assert f"the teacher would be the run {run}, a mobile model" in said.splitlines()[-1]
    assert not again.exists() or checkpoint.latest_step(again) is None


def on_devices(count):
    """Run by a process that has them: five steps on one device and on all, with rows and a kernel
    spread over these, are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "velocity", mixing_velocity)
        patch.setattr(stages, "conditioned", toy_conditioned)
        kernel = np.random.default_rng(0).standard_normal((count, 2)).astype(np.float32)
        found, unets = [], {"unet": {"kernel": kernel}}
        for devices in (jax.devices()[:1], jax.devices()):
            mesh = sharding.make_mesh(1, -1, devices)
            how = optimisation(1.0), optimisation(1.0)
            step_fn = distillation.make_step(CONFIG, SETTINGS, LOSS, 1, *how)
            given = unets["unet"], unets, {"vae": {}, "text_encoder": {}}
            stage = distillation.make_stage(
                CONFIG, step_fn, *given, *how, False, mesh, sharding.RULES, {}
            )
            state, frozen = stage.init_fn(KEY)
            spread = len(state[STUDENT].params["unet"]["kernel"].sharding.device_set)
            assert spread == len(devices)
            rows = sharding.spread(jax.device_get(batch()), mesh, count)
            step = loop.compiled(stage.step_fn, state)
            for k in range(5):
                state, metrics = step(state, frozen, rows, jax.random.fold_in(KEY, k))
            found.append(jax.device_get((state, metrics)))
        (one, metrics), (spread, others) = found
        for name in (STUDENT, FAKE):
            ours, theirs = (s[name].params["unet"]["kernel"] for s in (spread, one))
            assert np.abs(theirs - kernel).max() > 1e-3
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        for name in ("loss", "student/loss", "student/grad_norm", "fake/grad_norm"):
            np.testing.assert_allclose(others[name], metrics[name], rtol=1e-4, err_msg=name)


def mixing_velocity(config, params, xt, sigma, at):
    """With a kernel whose first axis is spread over the devices."""
    kernel = params["kernel"]
    mixed = jnp.tanh(xt @ kernel.T + at.texts.context[:, None, None]) @ kernel
    return mixed / kernel.shape[0] + 0.1 * xt + at.source


def test_8_devices_as_one():
    training.on_devices("test_distillation")
