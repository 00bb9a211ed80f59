"""Where arrays live, on eight virtual devices: the same training, in an eighth of the memory."""

import json
import subprocess
import sys
import textwrap

import jax
import pytest
import training
from commands import ROOT
from jax.sharding import AbstractMesh, PartitionSpec

from dreamlite_jax import pretrained
from dreamlite_jax.models import autoencoder, unet_config
from dreamlite_jax.models.primitives import PLAIN
from dreamlite_jax.train import sharding
from dreamlite_jax.train.sharding import RULES, ShardingError
from launch import aot_compile

MESH = AbstractMesh((4, 2), sharding.AXES)


# --- Rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("params/unet/conv_in/kernel", (3, 3, 4, 16), (None, None, "fsdp", None)),
        ("opt_state/0/mu/unet/to_q/kernel", (16, 8), ("fsdp", None)),
        ("ema/unet/depthwise/kernel", (3, 3, 1, 16), (None, None, None, "fsdp")),
        ("params/text_encoder/embed/embedding", (512, 64), ("fsdp", None)),
        ("params/unet/conv_in/kernel", (3, 3, 3, 16), (None, None, None, None)),  # 3 is odd
        ("params/unet/conv_in/bias", (16,), ()),
        ("step", (), ()),
        ("params/a/kernel", (16,), (None,)),  # of "fsdp,-" the last
        ("params/kernel_norm/scale", (16,), ()),
    ],
)
def test_the_usual_rules(path, shape, spec):
    assert sharding.spec_of(path, shape, RULES, MESH) == PartitionSpec(*spec)


@pytest.mark.parametrize(
    "spec, shape, expected",
    [
        ("fsdp", (6, 6), (None, "fsdp")),
        ("fsdp,-,-", (6, 6, 6), ("fsdp", None, None)),
        ("data, fsdp", (8, 6), ("data", "fsdp")),
        ("data,fsdp", (6, 6), (None, "fsdp")),  # 6 rows cannot be divided by 4
        ("fsdp,-", (6, 6, 6, 6), (None, None, "fsdp", None)),
        ("data,-,fsdp", (8, 6), (None, "fsdp")),  # what the array lacks is cut from the front
        ("-", (8,), (None,)),
        ("", (8,), (None,)),
    ],
)
def test_specs_count_from_the_last_axis(spec, shape, expected):
    assert sharding.spec_of("a/kernel", shape, [("kernel", spec)], MESH) == PartitionSpec(*expected)


def test_the_first_rule_decides():
    rules = [("to_q", "-,fsdp"), *RULES]
    assert sharding.spec_of("to_q/kernel", (8, 8), rules, MESH) == PartitionSpec(None, "fsdp")
    assert sharding.spec_of("to_k/kernel", (8, 8), rules, MESH) == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    "component, config",
    [(pretrained.UNET, unet_config.DREAMLITE), (pretrained.AUTOENCODER, autoencoder.TAESDXL)],
)
def test_released_networks_are_spread_nearly_whole(component, config):
    """On 32 devices: all but biases, norms, and kernels with few input channels."""
    shapes = pretrained.param_shapes(component, config)
    assert sharding.unspread(shapes, RULES, AbstractMesh((1, 32), sharding.AXES)) < 0.01


def test_an_axis_of_the_mesh_that_divides_too_few_parameters_is_told():
    """The released U-Net's inner width is 7 x 128."""
    shapes = {"unet": pretrained.param_shapes(pretrained.UNET, unet_config.DREAMLITE)}
    (line,) = sharding.advice(shapes, RULES, AbstractMesh((1, 256), sharding.AXES))
    assert "holds 72 %, as mesh.fsdp=256" in line and "mesh.fsdp=128 and" in line
    (line,) = sharding.advice(shapes, RULES, AbstractMesh((1, 192), sharding.AXES))
    assert "mesh.fsdp=64 and" in line
    assert sharding.advice(shapes, RULES, AbstractMesh((2, 128), sharding.AXES)) == []
    assert sharding.advice(shapes, RULES, AbstractMesh((8, 1), sharding.AXES)) == []


def test_problems_of_rules():
    assert sharding.rule_problems([*RULES, ("x", "data,-,fsdp"), ("y", "")]) == []
    found = sharding.rule_problems(
        [("(", "fsdp"), ("a", "model,-,tensor"), ("b", "fsdp,fsdp"), ("c", "-,-")]
    )
    assert len(found) == 3 and not any("\n" in problem for problem in found)
    assert "'(' is no regex" in found[0]
    assert "names model, tensor; known are data, fsdp, -" in found[1]
    assert "'fsdp,fsdp' names an axis of the mesh more than once" in found[2]


@pytest.mark.parametrize("sizes", [(4, 16), (16, 4), (1, -1)])
def test_axes_of_the_mesh_may_split_those_of_the_chips(sizes):
    mesh = sharding.make_mesh(*sizes, devices=aot_compile.topology("v6e:8x8"))
    assert len({device.id for device in mesh.devices.flat}) == mesh.size == 64


def test_data_goes_across_slices():
    devices = aot_compile.topology("v5e:2x2", slices=2)
    for sizes in ((2, -1), (4, 2)):
        mesh = sharding.make_mesh(*sizes, devices=devices)
        for row in mesh.devices:
            assert len({device.slice_index for device in row}) == 1
    with pytest.raises(ShardingError, match=r"mesh\.data is 1 on 2 slices, should be a mult"):
        sharding.make_mesh(1, -1, devices=devices)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (0, 1), (-1, -1), (1, 0), (-2, 1), (-1, 2)])
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(ShardingError, match=r"does not fit 1 devices; one may be -1") as error:
        sharding.make_mesh(*sizes, devices=jax.devices()[:1])
    assert f"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]}" in str(error.value)


def test_one_device_is_left_alone():
    mesh = sharding.make_mesh(1, -1, jax.devices()[:1])
    assert sharding.pinned(mesh) is PLAIN
    tree = {"a": jax.numpy.ones(3)}
    assert sharding.gathered(tree, mesh) is tree


# --- Eight devices --------------------------------------------------------------------------------

# The smallest U-Net that has everything. No dimension of its parameters is a multiple of 5, those
# of a batch of 40 rows all are: whatever collective moves rows shows by its shape.
#
# Adam's epsilon is large, so that gradients that are rounding alone make no steps.
TRAINED = """
    import dataclasses, json, re, sys
    import jax, numpy as np
    from dreamlite_jax import pretrained, system
    from dreamlite_jax.models import autoencoder, unet_config
    from dreamlite_jax.models.qwen3_vl import config as qwen3_vl
    from dreamlite_jax.objectives import flow_matching
    from dreamlite_jax.train import loop, optim, sharding, stages

    ROWS, rng = 40, np.random.default_rng(0)
    SMALL = dataclasses.replace(
        unet_config.NANO, down_block_types=("DreamLiteDownBlock2D",), attention_head_dim=(2,),
        up_block_types=("DreamLiteCrossAttnUpBlock2D",), transformer_layers_per_block=(1,),
        block_out_channels=(16,))

    def normal(*shape):
        return rng.standard_normal((ROWS, *shape), np.float32)

    BATCH = {
        "target_latents": normal(4, 4, 4), "source_latents": normal(4, 4, 4),
        "has_source": np.arange(ROWS) % 3 > 0, "task": np.arange(ROWS, dtype=np.int32) % 2,
        "changed": np.ones((ROWS, 4, 4), bool), "time_ids": np.full((ROWS, 2), 32, np.float32),
        "context": normal(6, 64), "context_mask": np.arange(6) < rng.integers(1, 7, (ROWS, 1))}
    PARAMS = {"unet": pretrained.init_params(pretrained.UNET, SMALL, 0)}

    def weights(tree):
        leaves = jax.tree.leaves(tree)
        return [sum(leaf.nbytes for leaf in leaves),
                max(sum(leaf.addressable_shards[k].data.nbytes for leaf in leaves)
                    for k in range(len(leaves[0].addressable_shards)))]

    def trained(data, fsdp):
        mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
        config = system.Config(SMALL, autoencoder.TINY, qwen3_vl.TINY, ops=sharding.pinned(mesh))
        tx = optim.make_tx(optim.Settings(lr=1e-3, eps=1e-3), 10)
        loss_fn = stages.diffusion_loss(config, 6, flow_matching.Settings())
        stage = stages.make_stage(loss_fn, PARAMS, {}, stages.Optimisation(tx, 0.9, 1, 1.0), mesh)
        state, frozen = stage.init_fn(jax.random.key(0))
        batch = sharding.spread(BATCH, mesh, ROWS)
        key = jax.random.key(1)
        where = jax.tree.map(lambda x: x.sharding, state)
        step = loop.compiled(stage.step_fn, state).lower(state, frozen, batch, key).compile()
        moved = re.findall(
            r"= (.+?) (all-to-all|all-gather|collective-permute|reduce-scatter|all-reduce)"
            r"(?:-start)?\\(", step.as_text())
        metrics = []
        for _ in range(3):
            state, found = step(state, frozen, batch, key)
            metrics.append({name: float(value) for name, value in found.items()})
        adam = state.opt_state[0]
        parts = {"params": state.params, "ema": state.ema, "mu": adam.mu, "nu": adam.nu}
        rows = {shard.device.id: np.asarray(shard.data)
                for shard in batch["target_latents"].addressable_shards}
        expected = np.split(BATCH["target_latents"], mesh.size)
        return {
            "metrics": metrics, "moved": moved,
            "bytes": {name: weights(tree) for name, tree in parts.items()},
            "stays": where == jax.tree.map(lambda x: x.sharding, state),
            "rows": all(np.array_equal(rows[device.id], part)
                        for device, part in zip(mesh.devices.flat, expected, strict=True)),
            "own": sharding.own_rows(mesh, ROWS),
        }
"""

REPORT = """
    from concurrent.futures import ThreadPoolExecutor
    from configs.shapes import phase3_joint
    from dreamlite_jax.train import config as train_config

    def refused(call, *args):
        try:
            call(*args)
        except ValueError as error:
            return str(error)

    meshes = (1, 1), (1, 8), (4, 2)
    with ThreadPoolExecutor() as pool:  # they are compiled side by side
        runs = dict(zip(map(str, meshes), pool.map(lambda sizes: trained(*sizes), meshes)))

    raw = phase3_joint.get_config("quick")
    raw.batch_size, raw.model = 12, "/no/model"
    whole = sharding.place({"x": np.arange(16.0).reshape(8, 2)}, {"x": jax.sharding.NamedSharding(
        sharding.make_mesh(1, 8), jax.sharding.PartitionSpec("fsdp"))})
    gathered = sharding.gathered(whole, sharding.make_mesh(1, 8))["x"]
    print(json.dumps({
        "runs": runs,
        "shapes": [dict(sharding.make_mesh(*s).shape) for s in ((1, -1), (-1, 1), (4, -1))],
        "refused": [refused(sharding.make_mesh, *s) for s in ((3, -1), (2, 2), (16, -1))],
        "config": refused(train_config.opened, raw, "/no/where"),
        "place": [[s.data.shape[0] for s in x.addressable_shards] for x in (whole["x"], gathered)],
        "same": np.asarray(gathered).tolist() == np.arange(16.0).reshape(8, 2).tolist(),
    }))
"""


@pytest.fixture(scope="module")
def report():
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINED) + textwrap.dedent(REPORT)],
        cwd=ROOT,
        env=training.environment(devices=8),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("mesh", ["(1, 8)", "(4, 2)"])
def test_the_same_training_on_other_meshes(mesh, report):
    """Sums of float32 in another order: 1e-6 of the losses, and what three steps make of it."""
    alone, spread = report["runs"]["(1, 1)"]["metrics"], report["runs"][mesh]["metrics"]
    assert alone[0]["loss"] > alone[2]["loss"] + 0.01  # it learns
    for ours, theirs in zip(spread, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


@pytest.mark.parametrize("mesh, fsdp", [("(1, 8)", 8), ("(4, 2)", 2)])
def test_state_is_spread(mesh, fsdp, report):
    """Parameters, average and both moments: a device holds its part and the few small leaves."""
    run = report["runs"][mesh]
    for name, (total, on_one) in run["bytes"].items():
        assert total == report["runs"]["(1, 1)"]["bytes"][name][1], name
        assert 1 / fsdp <= on_one / total < 1 / fsdp + 0.05, name
    assert run["stays"]  # after steps everything lies where it lay


@pytest.mark.parametrize("mesh", ["(1, 8)", "(4, 2)"])
def test_rows_stay_where_they_are(mesh, report):
    run = report["runs"][mesh]
    assert run["rows"] and run["own"] == list(range(40))
    kinds = {kind for _, kind in run["moved"]}
    assert "all-gather" in kinds and "all-reduce" in kinds and "all-to-all" not in kinds
    for result, kind in run["moved"]:
        sizes = [int(n) for dims in json.loads(f"[{_dims(result)}]") for n in dims]
        assert not any(size % 5 == 0 for size in sizes), f"{kind} {result}"


def _dims(result: str) -> str:
    """The shapes in an instruction's result, such as "f32[16,4]{1,0}" or a tuple of these."""
    parts = [part.split("]")[0] for part in result.split("[")[1:]]
    return ",".join(f"[{part}]" for part in parts)


def test_one_device_moves_nothing(report):
    assert report["runs"]["(1, 1)"]["moved"] == []


def test_meshes_and_places(report):
    assert report["shapes"] == [
        {"data": 1, "fsdp": 8},
        {"data": 8, "fsdp": 1},
        {"data": 4, "fsdp": 2},
    ]
    assert all("does not fit 8 devices; one may be -1" in said for said in report["refused"])
    assert report["place"] == [[1] * 8, [8] * 8] and report["same"]


def test_a_batch_that_devices_cannot_share_is_refused(report):
    assert "batch_size 12 is no multiple of 8 devices x accumulation 1" in report["config"]
