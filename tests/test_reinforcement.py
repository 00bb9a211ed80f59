"""Rollouts, what is learnt from them, and how a run of it ends and goes on.

Most tests have toy networks of a few numbers in the places of the real ones.
"""

import functools
import types

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

from configs import rl_grpo
from dreamlite_jax import system, tiny
from dreamlite_jax.diffusion import flow
from dreamlite_jax.models import unet_config
from dreamlite_jax.objectives import grpo, nft
from dreamlite_jax.pretrained import UNET
from dreamlite_jax.rewards import opening
from dreamlite_jax.rewards.base import RewardError
from dreamlite_jax.system import Condition, Texts
from dreamlite_jax.train import checkpoint, loop, optim, reinforcement, rollouts, sharding, stages
from dreamlite_jax.train.loop import Limit, Schedule, Stage, TrainingError
from dreamlite_jax.train.rollouts import REFERENCE, Rollouts, Table
from dreamlite_jax.train.state import new_state
from dreamlite_jax.train.update import gradients, make_update

KEY, P, G = jax.random.key(3), 4, 6
MESH = sharding.make_mesh(1, 1, jax.devices()[:1])
PROCESS = grpo.Process(steps=5, form="cps", level=0.8, window=2, within=1.0)
SETTINGS = Rollouts(group=G, process=PROCESS)
GUIDED = SETTINGS._replace(guidance=2.0, process=PROCESS._replace(form="flow", level=0.7))
STEPS, FORWARD = grpo.Settings(clip=0.01), nft.Settings(levels=3, shift=False)
CONFIG = types.SimpleNamespace(shift=flow.ResolutionShift())
PARAMS = {"unet": {"scale": jnp.float32(0.4), "shift": jnp.float32(0.1)}}
FROZEN = {REFERENCE: jax.tree.map(lambda x: x, PARAMS["unet"]), "vae": {}, "text_encoder": {}}


def toy_velocity(config, params, xt, sigma, at):
    told = (at.texts.context[:, 0] + at.source.mean((1, 2, 3)))[:, None, None, None]
    sigma = jnp.broadcast_to(sigma, xt.shape[:1])[:, None, None, None]
    return params["scale"] * xt + params["shift"] * (1 + sigma) + told


@pytest.fixture
def toy(monkeypatch):
    def conditioned(config, params, batch, context_length):
        b = batch["context"].shape[0]
        texts = Texts(batch["context"], jnp.ones((b, 1), bool))
        return jnp.zeros((b, 4, 4, 4)), Condition(texts, batch["source"], jnp.zeros((b, 2)))

    monkeypatch.setattr(stages, "conditioned", conditioned)
    monkeypatch.setattr(system, "velocity", toy_velocity)
    monkeypatch.setattr(system, "decode_latents", lambda config, params, x: jnp.tanh(x[..., :3]))


def prompts(with_null=False):
    told = jnp.arange(P, dtype=jnp.float32)[:, None] / 10
    batch = {"context": told, "source": jnp.zeros((P, 4, 4, 4)), "task": jnp.arange(P) % 2}
    return batch | ({"null_context": told - 0.3} if with_null else {})


@functools.cache  # what is compiled for one test serves the next
def rollout_of(settings, loss):
    return rollouts.make_rollout(CONFIG, settings, loss, 1, MESH)


def rolled_out(settings=SETTINGS, params=PARAMS, number=0, key=KEY, loss=STEPS):
    batch = prompts(settings.guidance != 1)
    return rollout_of(settings, loss)(params, FROZEN, batch, key, number)


# --- Rollouts -------------------------------------------------------------------------------------


def test_a_rollout_s_rows_are_the_groups_of_its_prompts(toy):
    rows, pictures, diversity = rolled_out()
    assert pictures.shape == (P * G, 4, 4, 3) and pictures.dtype == jnp.uint8
    told = np.repeat(prompts()["context"], G, 0)
    np.testing.assert_array_equal(rows["given"]["context"], told)
    assert rows["xt"].shape == rows["mean"].shape == (P * G, 2, 4, 4, 4)
    assert rows["logp"].shape == rows["sigma"].shape == rows["after"].shape == (P * G, 2)
    assert len(np.unique(np.asarray(rows["xt"][:, 0, 0, 0, 0]))) == P * G  # each has its own noise
    np.testing.assert_array_equal(rows["x_after"][:, 0], rows["xt"][:, 1])
    assert diversity.shape == (P,) and (diversity > 0.05).all()
    # The reference is the policy at first, and then is not.
    np.testing.assert_allclose(rows["mean_reference"], rows["mean"], atol=1e-6)
    moved = {"unet": {**PARAMS["unet"], "shift": jnp.float32(0.3)}}
    rows, _, _ = rolled_out(params=moved)
    assert np.abs(rows["mean_reference"] - rows["mean"]).min(axis=(1, 2, 3, 4)).max() > 0.01


def test_targets_are_not_looked_at(toy, monkeypatch):
    expected, plain = rolled_out(), stages.conditioned

    def other(*given):
        x0, at = plain(*given)
        return x0 + 1, at

    monkeypatch.setattr(stages, "conditioned", other)
    rollout = rollouts.make_rollout(CONFIG, SETTINGS, STEPS, 1, MESH)
    found = rollout(PARAMS, FROZEN, prompts(), KEY, 0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_pictures_noised_at_every_level(toy):
    """Drawn by the sampler, then noised little, more and much; both policies' velocities there."""
    params = {"unet": {**PARAMS["unet"], "shift": jnp.float32(0.3)}}
    rows, pictures, _ = rolled_out(params=params, loss=FORWARD)
    assert rows["noise"].shape == (P * G, 3, 4, 4, 4)
    for level in range(3):
        sigma = np.asarray(rows["sigma"][:, level])
        assert (level / 3 <= sigma).all() and (sigma < (level + 1) / 3).all()
        assert np.ptp(sigma) > 0.2
        np.testing.assert_array_equal(rows["x0"][:, level], rows["x0"][:, 0])
    shown = rollouts.to_bytes(jnp.tanh(rows["x0"][:, 0, ..., :3]))
    np.testing.assert_array_equal(pictures, shown)
    shifted = rolled_out(params=params, loss=FORWARD._replace(shift=True))[0]["sigma"]
    mu = flow.resolution_mu(4, 4, CONFIG.shift)
    np.testing.assert_allclose(shifted, flow.shift_sigma(rows["sigma"], mu), rtol=1e-6)
    assert np.abs(shifted - rows["sigma"]).max() > 0.01
    xt = flow.path(rows["x0"][:, 1], rows["noise"][:, 1], rows["sigma"][:, 1])
    for name, unet in (("vt", params["unet"]), ("vt_reference", PARAMS["unet"])):
        expected = rollouts.policy(CONFIG, unet, rows["given"], 1)(xt, rows["sigma"][:, 1])
        np.testing.assert_allclose(rows[name][:, 1], expected, atol=1e-5)


@pytest.mark.parametrize("loss", [STEPS, FORWARD])
def test_parts_change_nothing_and_the_key_does(toy, loss):
    whole, parts = rolled_out(loss=loss), rolled_out(SETTINGS._replace(parts=3), loss=loss)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    again = rolled_out(key=jax.random.key(4), loss=loss)
    assert (np.asarray(again[1]) != np.asarray(whole[1])).mean() > 0.5


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shared_noise_is_a_group_s_and_the_steps_are_every_picture_s(toy, parts):
    # A window that begins behind the first step: until then a group's pictures are the same.
    process = PROCESS._replace(window=1, order="sliding", every=1)
    rows, _, _ = rolled_out(
        SETTINGS._replace(process=process, shared_noise=True, parts=parts), number=1
    )
    start, after = (np.asarray(rows[name]).reshape(P, G, -1) for name in ("xt", "x_after"))
    np.testing.assert_array_equal(start, np.repeat(start[:, :1], G, axis=1))
    assert len(np.unique(start[:, 0, 0])) == P
    assert len(np.unique(after[..., 0])) == P * G


def test_a_sliding_window_follows_the_number_of_the_rollout(toy):
    process = PROCESS._replace(order="sliding", every=2)
    settings = SETTINGS._replace(process=process)
    sigmas = flow.sigma_list(5, flow.resolution_mu(4, 4, CONFIG.shift))
    for number, start in ((0, 0), (1, 0), (2, 1), (4, 2), (6, 0)):
        rows, _, _ = rolled_out(settings, number=number)
        np.testing.assert_array_equal(rows["sigma"][0], sigmas[start : start + 2])
        np.testing.assert_array_equal(rows["after"][3], sigmas[start + 1 : start + 3])


def test_guidance_inside_the_policy(toy):
    given = {
        "context": jnp.array([[0.1], [0.2]]),
        "mask": jnp.ones((2, 1), bool),
        "null_context": jnp.array([[-0.3], [0.4]]),
        "null_mask": jnp.ones((2, 1), bool),
        "source": jnp.ones((2, 4, 4, 4)),
        "time_ids": jnp.zeros((2, 2)),
    }
    xt = jax.random.normal(KEY, (2, 4, 4, 4))
    for sigma in (jnp.float32(0.7), jnp.array([0.7, 0.2])):
        found = rollouts.policy(CONFIG, PARAMS["unet"], given, 3.0)(xt, sigma)
        plain = rollouts.policy(CONFIG, PARAMS["unet"], given, 1)(xt, sigma)
        told = (given["context"] - given["null_context"])[:, :, None, None]
        np.testing.assert_allclose(found, plain + 2.0 * told, atol=1e-5)


# --- Learning -------------------------------------------------------------------------------------

TABLE = Table(("a", "b"), (1.0, 0.5), (("t2i", "edit"), ("edit",)))
TASK = jnp.arange(P) % 2  # t2i, edit, t2i, edit


def scores_of(seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(P * G, 2)), jnp.float32)


def learnt(rows, scores, settings=STEPS):
    both = ("t2i", "edit")
    return rollouts.learnt_from(TABLE, settings, both, rows, scores, TASK, jnp.full(P, 0.3))


def test_metrics_of_rewards_by_hand(toy):
    scores = scores_of()
    found = learnt(rolled_out()[0], scores)["metrics"]
    grouped = np.asarray(scores).reshape(P, G, 2)
    first, second = grouped[[0, 2], :, 0].ravel(), grouped[[1, 3], :, 1].ravel()
    assert found["reward/a/t2i/mean"] == pytest.approx(first.mean(), rel=1e-5)
    assert found["reward/b/edit/std"] == pytest.approx(second.std(), rel=1e-4)
    for q in (25, 50, 75):
        expected = np.quantile(second, q / 100)
        assert found[f"reward/b/edit/q{q}"] == pytest.approx(expected, rel=1e-5)
    assert "reward/b/t2i/mean" not in found  # it was not asked
    total = grouped[:, :, 0] + 0.5 * grouped[:, :, 1] * np.array([0, 1, 0, 1])[:, None]
    assert found["reward"] == pytest.approx(total.mean(), rel=1e-5)
    assert found["spread"] == pytest.approx(total.std(1).mean(), rel=1e-4)
    assert found["dropped"] == 0 and found["diversity"] == pytest.approx(0.3)
    same = scores.at[:G].set(0.25)
    assert learnt(rolled_out()[0], same)["metrics"]["dropped"] == 0.25


def optimisation(accumulation=1, **settings):
    made = {"lr": 0.01, "weight_decay": 0.1, "decayed": "", **settings}
    return stages.Optimisation(optim.make_tx(optim.Settings(**made), 10), 0.9, accumulation, 1.0)


@functools.cache
def loss_of(kl=0.0, kind=STEPS, settings=SETTINGS):
    return rollouts.policy_loss(CONFIG, settings, kind._replace(kl=kl))


def step_of(how, updates=1, kl=0.0, kind=STEPS):
    return jax.jit(rollouts.make_step(loss_of(kl, kind), how, updates))


@pytest.mark.parametrize("settings", [SETTINGS, GUIDED])
@pytest.mark.parametrize("kind", [STEPS, FORWARD])
def test_the_first_update_is_the_old_policy_s_and_micro_batches_change_nothing(toy, kind, settings):
    batch = learnt(rolled_out(settings, loss=kind)[0], scores_of())
    found, loss = {}, loss_of(0.1, kind, settings)
    for accumulation in (1, 4):
        how = jax.jit(functools.partial(gradients, loss, accumulation=accumulation))
        found[accumulation] = how(PARAMS, FROZEN, batch["rows"], KEY)
    metrics = found[1][1]
    assert metrics["kl"] < 1e-6
    if kind is STEPS:
        assert metrics["ratio_deviation"] < 1e-5 and metrics["clipped"] == 0
    for a, b in zip(*(jax.tree.leaves(found[n][0]) for n in (1, 4)), strict=True):
        assert abs(a) > 1e-3
        assert a == pytest.approx(float(b), rel=1e-4)


@pytest.mark.parametrize("scale", grpo.SCALES)
@pytest.mark.parametrize("kind", [STEPS, FORWARD])
def test_dropped_groups_weigh_nothing(toy, kind, scale):
    rows = rolled_out(loss=kind)[0]
    scores = scores_of().at[:G].set(0.25)
    both = learnt(rows, scores, kind._replace(scale=scale))["rows"]
    grads = jax.jit(functools.partial(gradients, loss_of(kind=kind)))
    found = grads(PARAMS, FROZEN, both, KEY)[0]
    # The same from the kept rows alone.
    batch = jax.tree.map(lambda x: x[G:], both)
    batch["weight"] = jnp.ones_like(batch["weight"])
    expected = grads(PARAMS, FROZEN, batch, KEY)[0]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a == pytest.approx(float(b), rel=1e-4)


@pytest.mark.parametrize("kind", [STEPS, FORWARD])
def test_a_constant_reward_changes_nothing(toy, kind):
    """Neither parameters nor moments nor average, whatever momentum and decay there are."""
    how = optimisation()
    step, rows = step_of(how, kl=0.5, kind=kind), rolled_out(loss=kind)[0]
    state = new_state(PARAMS, how.tx)
    state, _ = step(state, FROZEN, learnt(rows, scores_of()), KEY)
    for value in (0.0, 0.1, 7.0):
        found, metrics = step(state, FROZEN, learnt(rows, jnp.full((P * G, 2), value)), KEY)
        assert metrics["dropped"] == 1 and metrics["skipped"] == 0
        assert int(found.step) == int(state.step) + 1
        for a, b in zip(
            *(jax.tree.leaves(s._replace(step=0)) for s in (found, state)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [STEPS, FORWARD._replace(strength=0.3)])
def test_several_updates_of_a_rollout_are_several_updates(toy, kind):
    how = optimisation()
    batch = learnt(rolled_out(loss=kind)[0], scores_of())
    step = step_of(how, updates=3, kind=kind)
    state, metrics = step(new_state(PARAMS, how.tx), FROZEN, batch, KEY)
    assert int(state.step) == 3
    loss, expected, seen = loss_of(kind=kind), new_state(PARAMS, how.tx), []
    update = jax.jit(make_update(loss, *how))
    for k in range(3):
        part = jax.tree.map(lambda x, k=k: x[k::3], batch["rows"])
        expected, found = update(expected, FROZEN, part, KEY)
        seen.append(found)
    if kind is STEPS:
        assert metrics["ratio_deviation"] < 1e-5 < 1e-4 < seen[2]["ratio_deviation"]
    assert seen[0]["kl"] < 1e-6 < seen[2]["kl"]  # by then the policy is another
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


# Two programs round a bfloat16 network's values in different places, each by up to 2^-8 of them.
# The mean over a row's 256 latents of z dv (sigma - after) / std, with dv of that size and random
# signs, is 2e-4; four times that is the bound. (Of float32 a run of the command says it, below.)
def test_the_ratio_of_a_network_in_bfloat16_on_the_first_update(monkeypatch):
    network, dtype, bound = unet_config.NANO, jnp.bfloat16, 1e-3
    config = system.Config(network, None, None, dtype=dtype)
    width = network.context_dim

    def conditioned(config, params, batch, context_length):
        b = batch["task"].shape[0]
        texts = Texts(jax.random.normal(KEY, (b, 5, width)), jnp.ones((b, 5), bool))
        at = Condition(texts, jnp.zeros((b, 8, 8, 4)), system.time_ids(64, 64, b))
        return jnp.zeros((b, 8, 8, 4)), at

    monkeypatch.setattr(stages, "conditioned", conditioned)
    monkeypatch.setattr(system, "decode_latents", lambda config, params, x: jnp.tanh(x[..., :3]))
    process = grpo.Process(**rl_grpo.rollouts().process)._replace(order="sliding", every=1)
    settings, loss = Rollouts(group=4, process=process), grpo.Settings(**rl_grpo.loss())
    params = {"unet": tiny.random_params(UNET, network)}
    frozen = {REFERENCE: params["unet"], "vae": {}, "text_encoder": {}}
    rollout = rollouts.make_rollout(config, settings, loss, 5, MESH)
    how = jax.jit(functools.partial(gradients, rollouts.policy_loss(config, settings, loss)))
    for place in range(process.places):
        rows, _, _ = rollout(params, frozen, {"task": jnp.zeros(2, jnp.int32)}, KEY, place)
        rows |= {"advantage": jnp.linspace(-1, 1, 8), "weight": jnp.ones(8)}
        grads, metrics = how(params, {}, rows, KEY)
        assert metrics["ratio_deviation"] <= bound
        assert metrics["clipped"] == 0  # by rounding alone: the config's clip is wider
        assert sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(grads)) > 0


# --- The loop -------------------------------------------------------------------------------------


def toy_stage(batch_fn=None, metric=lambda step: step):
    how = optimisation()

    def step_fn(state, frozen, batch, key):
        state = state._replace(step=state.step + 1)
        found = {"loss": jnp.float32(1), "watched": metric(state.step).astype(jnp.float32)}
        return state, found

    def init_fn(key):  # compiled: the state is donated, so its arrays are no one else's
        return jax.jit(lambda: new_state(PARAMS, how.tx))(), {}

    return Stage(init_fn, step_fn, batch_fn)


def ones(step):
    while True:
        yield jnp.ones(2)


def test_a_metric_that_leaves_its_range_ends_the_run_and_saves(tmp_path):
    schedule = Schedule(steps=20, batch_size=1, log_every=2, checkpoint_every=0, sample_every=0)
    schedule = schedule._replace(limits=(Limit("watched", most=5.0), Limit("absent", least=1.0)))
    with pytest.raises(TrainingError, match=r"watched is 5\.5 up to step 6, should be at most 5"):
        loop.fit(toy_stage(), ones, schedule, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 6
    low = schedule._replace(limits=(Limit("watched", least=4.0),))
    with pytest.raises(TrainingError, match=r"watched is 1\.5 up to step 2, should be at least 4"):
        loop.fit(toy_stage(), ones, low, tmp_path / "low")


@pytest.mark.parametrize("asked", [False, True])
def test_a_batch_that_cannot_be_made_saves_what_there_is(asked, tmp_path, monkeypatch):
    failing = [True]

    def batch_fn(state, frozen, batch, key, number):
        assert number == int(state.step)
        if failing[0] and number == 3:
            if asked:
                loop.signals._came.append(15)
            raise RewardError("the server is away")
        return batch

    schedule = Schedule(steps=5, batch_size=1, log_every=1, checkpoint_every=0, sample_every=0)
    if asked:
        _, done = loop.fit(toy_stage(batch_fn), ones, schedule, tmp_path)
        assert not done
    else:
        with pytest.raises(RewardError, match="the server is away"):
            loop.fit(toy_stage(batch_fn), ones, schedule, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 3
    failing[0] = False
    state, done = loop.fit(toy_stage(batch_fn), ones, schedule, tmp_path)
    assert done and int(state.step) == 5
    shares = [line.get("time/batch_share") for line in training.metrics.read_metrics(tmp_path)]
    assert shares[0] is None and 0 < shares[1] <= 1  # the first step's clock has not begun


# --- The command ----------------------------------------------------------------------------------


def quick_of(config):
    return f"--config={commands.ROOT / 'configs/shapes'}/{config}.py:quick"


@pytest.mark.e2e
@pytest.mark.parametrize("config", ["rl_grpo", "rl_nft"])
def test_a_run_whose_rewards_go_away_ends_as_one_that_was_not_disturbed(
    config, cache, tmp_path, monkeypatch, capsys
):
    """Bit for bit, in the middle of it: rollouts follow from the state and the step."""
    given = quick_of(config), *training.shared(cache), "--config.sample.every=0"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert commands.run("train", *given, f"--workdir={whole}") == 0
    reward, calls = opening.BUILT_IN["shapes"], [0]

    def score(*requests):
        calls[0] += 1
        if calls[0] == 4:  # two are of the self-test, one of the first rollout
            raise RewardError("the server has been away for 600 s")
        return reward.score(*requests)

    with monkeypatch.context() as patch:
        patch.setitem(opening.BUILT_IN, "shapes", reward._replace(score=score))
        assert commands.run("train", *given, f"--workdir={parts}") == 2
    assert "the server has been away" in capsys.readouterr().err
    assert checkpoint.latest_step(parts) == 1
    assert commands.run("train", *given, f"--workdir={parts}") == 0
    assert training.result(parts) == training.result(whole)
    first = training.result(whole)[2][0]
    # Of the first of two updates, and of both: by the second the policy is another.
    assert first.get("ratio_deviation", 0) < 1e-5 < first["kl"]
    assert ("ratio_deviation" in first) == (config == "rl_grpo")


@pytest.mark.e2e
def test_a_run_beyond_its_limits_is_saved_and_ends(cache, tmp_path, capsys):
    beyond = {"kl": -1.0, "dropped": -1.0, "spread": 1e9, "diversity": 1e9}
    limits = [f"--config.rl.limits.{name}={limit}" for name, limit in beyond.items()]
    given = quick_of("rl_nft"), *training.shared(cache), "--config.sample.every=0", *limits
    assert commands.run("train", *given, f"--workdir={tmp_path}") == 2
    said = capsys.readouterr().err
    assert all(f"{name} is " in said for name in beyond) and "up to step 1, should be" in said
    assert checkpoint.latest_step(tmp_path) == 1


def on_devices(count):
    """Run by a process that has them: a rollout and two updates on one device and on all, with
    rows and a kernel spread over these, are the same, for both objectives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "decode_latents", lambda config, params, x: jnp.tanh(x[..., :3]))
        patch.setattr(system, "velocity", mixing_velocity)
        patch.setattr(stages, "conditioned", told)
        kernel = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
        for kind in (STEPS, FORWARD):
            found = [learnt_on(devices, kind, kernel) for devices in (jax.devices()[:1], None)]
            (one, seen, metrics), (all_of_them, also_seen, others) = found
            assert (np.abs(one - kernel) > 0.01).mean() > 0.9
            np.testing.assert_allclose(all_of_them, one, atol=1e-4)
            assert np.abs(seen.astype(int) - also_seen).max() <= 1
            for name in ("grad_norm", "diversity", "reward", "spread", "reward/a/t2i/q75"):
                np.testing.assert_allclose(others[name], metrics[name], rtol=1e-3, err_msg=name)


def learnt_on(devices, kind, kernel):
    """The kernel behind a rollout and two updates, the rollout's pictures, and metrics."""
    count, params = len(kernel), {"unet": {"kernel": kernel}}
    mesh = sharding.make_mesh(1, -1, devices or jax.devices())
    how, loss_fn = optimisation(lr=0.1), loss_of(0.1, kind)
    frozen = {**FROZEN, REFERENCE: params["unet"]}
    stage = stages.make_stage(loss_fn, params, frozen, how, mesh)
    state, frozen = stage.init_fn(KEY)
    settings = SETTINGS._replace(group=8, parts=2, shared_noise=kind is STEPS)
    batch = {
        "context": np.linspace(0, 1, count, dtype=np.float32)[:, None],
        "task": np.arange(count, dtype=np.int32) % 2,
    }
    batch = sharding.spread(batch, mesh, count)
    rollout = rollouts.make_rollout(CONFIG, settings, kind, 1, mesh)
    rows, pictures, diversity = rollout(state.params, frozen, batch, KEY, 0)
    assert len(pictures.addressable_shards) == mesh.size
    own = reinforcement.own_pictures(pictures)
    np.testing.assert_array_equal(own, np.asarray(pictures))
    scores = np.stack([own.mean((1, 2, 3)), own[..., 0].std((1, 2))], 1).astype(np.float32)
    scores = sharding.spread(scores, mesh, len(own))
    learn = functools.partial(rollouts.learnt_from, TABLE, kind, ("t2i", "edit"))
    batch = jax.jit(learn)(rows, scores, batch["task"], diversity)
    step = loop.compiled(rollouts.make_step(loss_fn, how, 2), state)
    state, metrics = step(state, frozen, batch, KEY)
    return jax.device_get((state.params["unet"]["kernel"], pictures, metrics))


def told(config, params, batch, context_length):
    b = batch["context"].shape[0]
    texts = Texts(batch["context"], jnp.ones((b, 1), bool))
    return jnp.zeros((b, 4, 4, 4)), Condition(texts, jnp.zeros((b, 4, 4, 4)), jnp.zeros((b, 2)))


def mixing_velocity(config, params, xt, sigma, at):
    """With a kernel whose first axis is spread over the devices."""
    kernel = params["kernel"]
    mixed = jnp.tanh(xt @ kernel.T + at.texts.context[:, None, None]) @ kernel
    return mixed / kernel.shape[0] + 0.1 * xt


def test_8_devices():
    training.on_devices("test_reinforcement")
