"""The loop: what it shows changes nothing, and what it says of its speed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamlite_jax import pretrained, system
from dreamlite_jax.errors import UserError
from dreamlite_jax.models import autoencoder, unet_config
from dreamlite_jax.objectives import flow_matching
from dreamlite_jax.train import checkpoint, loop, metrics, optim, peers, stages
from dreamlite_jax.train.state import new_state
from dreamlite_jax.train.update import Mean, make_update

TX = optax.adam(0.1)


TWO = ("first", "second")


def loss_fn(params, frozen, batch, keys):
    made = (batch["x"] * params["a"]).sum(-1) + jax.vmap(jax.random.normal)(keys)
    losses = jnp.square(made - 1)
    return losses.mean(), {"loss/all": Mean.of(losses)}


def stage(predict_fns):
    def init_fn(key):
        return jax.jit(lambda: new_state({"a": jnp.zeros(2)}, TX))(), {}

    return loop.Stage(init_fn, make_update(loss_fn, TX, 0.9), predict_fns=predict_fns)


def batches_from(step):
    while True:
        yield {"x": jnp.float32(np.random.default_rng(step).standard_normal((4, 2)))}
        step += 1


def schedule(**kw):
    return loop.Schedule(**{"steps": 6, "batch_size": 4, "log_every": 1, "sample_every": 2, **kw})


def test_how_far_a_logged_step_goes(tmp_path):
    """Of two networks; the second is updated in every third step."""
    update = make_update(loss_fn, TX, 0.9)

    def step_fn(state, frozen, batch, key):
        first, found = update(state["first"], frozen, batch, key)
        turn = first.step % 3 == 0
        second = jax.lax.cond(
            turn, lambda s: update(s, {}, batch, key)[0], lambda s: s, state["second"]
        )
        return {"first": first, "second": second}, found

    def predict(state, frozen, step):
        seen.append(jax.device_get({name: one.params["a"] for name, one in state.items()}))
        return loop.Predictions()

    def init_fn(key):
        states = {name: new_state({"a": jnp.ones(2) * k}, TX) for k, name in enumerate(TWO)}
        return jax.tree.map(jnp.copy, states), {}

    seen = []
    both = loop.Stage(init_fn, step_fn, predict_fns={"a": predict})
    loop.fit(both, batches_from, schedule(sample_every=1, log_every=2, steps=7), tmp_path)
    lines = {one["step"]: one for one in metrics.read_metrics(tmp_path) if "loss" in one}
    assert lines.keys() == {2, 4, 6, 7}
    for step, line in lines.items():
        for name in TWO:
            went = np.linalg.norm(seen[step - 1][name] - seen[step - 2][name])
            its_turn = name == "first" or step == 6
            assert (went > 0) == its_turn
            found = float(line[f"{name}/update_norm"])
            assert found == pytest.approx(went, rel=1e-4) if its_turn else np.isnan(found)


def test_what_is_shown_changes_nothing(tmp_path):
    """Evaluators see the state, at the steps that were asked for, and leave it as it is."""
    seen = []

    def predict(state, frozen, step):
        seen.append((step, np.asarray(state.ema["a"]).tolist()))
        made = jax.jit(lambda x: 2 * x)(state.params["a"])
        return loop.Predictions({"val/a": made.sum()}, {"a": np.zeros((8, 8, 3), np.uint8)})

    ends = []
    for name, predict_fns in (("shown", {"a": predict}), ("not", {})):
        state, done = loop.fit(stage(predict_fns), batches_from, schedule(), tmp_path / name)
        assert done
        lines = metrics.read_metrics(tmp_path / name, times=False)
        ends.append((jax.device_get(state), [line for line in lines if "loss" in line]))
    assert [step for step, _ in seen] == [2, 4, 6]
    assert seen[-1][1] == np.asarray(state.ema["a"]).tolist()
    assert ends[0][1] == ends[1][1]
    jax.tree.map(np.testing.assert_array_equal, ends[0][0], ends[1][0])


@pytest.mark.parametrize("steps", [3, 9])
def test_a_trace_ends_with_the_run(steps, tmp_path):
    """Which may have fewer steps than a trace; a second can be made then."""
    for name in ("first", "second"):
        loop.fit(stage({}), batches_from, schedule(steps=steps, profile_at=2), tmp_path / name)
        assert len(list((tmp_path / name / "profile").rglob("*.xplane.pb"))) == 1


def test_what_one_of_several_processes_cannot_read_is_not_saved_together(tmp_path, monkeypatch):
    """The others are in a step, and would wait for this one as this one for them."""

    def batches(step):
        yield from ({"x": jnp.ones((4, 2))} for _ in range(2))
        raise UserError("shard 3 is damaged")

    with pytest.raises(UserError, match="shard 3 is damaged"):
        loop.fit(stage({}), batches, schedule(), tmp_path / "alone")
    assert checkpoint.latest_step(tmp_path / "alone") == 2
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    where = "process 0 of 2: shard 3 is damaged; nothing was saved"
    with pytest.raises(peers.AloneError, match=where), loop.reading():
        list(batches(0))
    saved = []
    with pytest.raises(peers.AloneError), loop.kept(lambda: saved.append(1), lambda: False):
        raise peers.AloneError("")
    assert not saved


@pytest.mark.parametrize("every, expected", [(1, [1, 2, 3, 4]), (2, [2, 4])])
def test_several_processes_ask_each_other_whether_to_leave_at_times(every, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.signals, "on_any_process", lambda flag: flag)
    for step in range(1, 5):
        if loop._leaving(lambda: True, step, every):
            asked.append(step)
    assert asked == expected


def test_samples_that_do_not_fit_end_a_run_that_is_saved(tmp_path):
    def predict(state, frozen, step):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB of 2")

    drawing = stage({})._replace(predict_fns={"sample": predict})
    with pytest.raises(loop.TrainingError, match=r"after step 4 does not fit .*sample\.rows"):
        loop.fit(drawing, batches_from, schedule(sample_every=4), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 4


@pytest.mark.parametrize("every, expected", [(4, [4, 6]), (0, [])])
def test_what_is_shown_last_is_the_end_and_what_never_is_never(every, expected, tmp_path):
    seen = []

    def predict(state, frozen, step):
        seen.append(step)
        return loop.Predictions()

    loop.fit(stage({"a": predict}), batches_from, schedule(sample_every=every), tmp_path)
    assert seen == expected


def test_the_share_of_the_peak_is_told_where_it_is_known(tmp_path, monkeypatch, capsys):
    loop.fit(stage({}), batches_from, schedule(), tmp_path / "a", flops_per_step=1e9)
    assert "mfu" not in capsys.readouterr().out  # of a CPU nothing is known
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(metrics.PEAK_FLOPS, kind, 1e12)
    loop.fit(stage({}), batches_from, schedule(), tmp_path / "b", flops_per_step=1e9)
    assert "mfu" in capsys.readouterr().out.splitlines()[-1]
    for line in metrics.read_metrics(tmp_path / "b")[1:]:
        peak = 1e12 * jax.device_count()
        assert line["time/mfu"] == pytest.approx(1e9 * line["time/steps_per_second"] / peak)


@pytest.mark.optimised
def test_a_network_learns_one_batch_by_heart():
    """A U-Net of one level, generation and editing, always the same noise: it has to copy from what
    it sees, and to tell the rows apart."""
    rng, rows, side = np.random.default_rng(0), 4, 8
    network = dataclasses.replace(
        unet_config.NANO,
        down_block_types=("DreamLiteCrossAttnDownBlock2D",),
        up_block_types=("DreamLiteUpBlock2D",),
        block_out_channels=(32,),
        transformer_layers_per_block=(1,),
        attention_head_dim=(2,),
    )
    config = system.Config(network, autoencoder.TINY, None)
    batch = {
        "target_latents": rng.standard_normal((rows, side, side, 4), np.float32),
        "source_latents": rng.standard_normal((rows, side, side, 4), np.float32),
        "has_source": np.array([False, False, True, True]),
        "task": np.array([0, 0, 1, 1], np.int32),
        "changed": np.ones((rows, side, side), bool),
        "time_ids": np.full((rows, 2), 8 * side, np.float32),
        "context": rng.standard_normal((rows, 3, network.context_dim), np.float32),
        "context_mask": np.ones((rows, 3), bool),
    }
    steps = 400
    tx = optim.make_tx(optim.Settings(lr=1e-2, schedule="cosine"), steps)
    loss = stages.diffusion_loss(config, 3, flow_matching.Settings())
    params = {"unet": pretrained.init_params(pretrained.UNET, network, 0)}
    state = jax.jit(lambda params: new_state(params, tx))(params)
    update, key = jax.jit(make_update(loss, tx, 0.9, clip=1.0)), jax.random.key(0)
    losses = []
    for _ in range(steps):
        state, found = update(state, {}, batch, key)
        losses.append(float(found["loss"]))
    assert losses[0] > 1 and losses[-1] < 0.02, losses[:: steps // 10]
