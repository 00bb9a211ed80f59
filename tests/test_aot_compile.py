"""`launch.aot_compile`: a small step compiled for a TPU slice that is not there."""

import importlib
import importlib.util
import json
import re
import textwrap
from types import SimpleNamespace

import commands
import foreign
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from dreamlite_jax import cli, pretrained, system
from dreamlite_jax.data import pipeline
from dreamlite_jax.models.autoencoder import TAESDXL
from dreamlite_jax.models.unet_config import NANO
from dreamlite_jax.objectives import grpo, nft
from dreamlite_jax.train import abstract, costs, loop, rollouts, sharding
from dreamlite_jax.train import config as train_config

pytestmark = pytest.mark.e2e

# One level, so that it compiles in seconds; spread over four chips, with kernels of our own.
CONFIG = """
    from configs import phase3_joint

    def get_config():
        config = phase3_joint.get_config().unlock()
        config.unet = "nano"
        config.overrides = {
            "down_block_types": ("DreamLiteCrossAttnDownBlock2D",),
            "up_block_types": ("DreamLiteUpBlock2D",),
            "block_out_channels": (128,),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1,),
            "attention_head_dim": (2,),
        }
        config.image_size, config.batch_size, config.remat = 64, 8, "none"
        return config.lock()
"""


@pytest.fixture(scope="module", autouse=True)
def one_matmul():
    """The calibration of a kind of chip is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        aot_compile = importlib.import_module("launch.aot_compile")
        found, share = {}, aot_compile.matmul_share

        def once(mesh, kind):
            if kind not in found:
                found[kind] = share(mesh, kind)
            return found[kind]

        patch.setattr(aot_compile, "matmul_share", once)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(textwrap.dedent(CONFIG))
    return f"--config={file}"


def opened(config):
    """The config of a flag, unlocked."""
    spec = importlib.util.spec_from_file_location("small", config.removeprefix("--config="))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().unlock()


def compile_for(config, *flags):
    return commands.run("aot_compile", config, *flags)


def test_a_step_for_four_chips(config, tmp_path, capfd):
    given = config, "--topology=v5e:2x2", f"--json={tmp_path / 'a.json'}"
    assert compile_for(*given) == 0
    said = capfd.readouterr().out
    assert "4 x TPU v5 lite, data 1 x fsdp 4, 2 rows each" in said
    assert "all-gather" in said and "% of peak for the model's arithmetic" in said
    figures = json.loads((tmp_path / "a.json").read_text())
    assert 0 < figures["arguments"] < figures["arguments"] + figures["temporary"] < 2**30
    # What is compiled does the model's arithmetic, here without doing any of it again.
    assert figures["flops"] == pytest.approx(figures["model_flops"], rel=0.1)
    assert len(figures["kernels"]) >= 8  # attention, norms and convolutions, there and back
    assert 0 < figures["cycles_model_share"] < 1 and 0 < figures["roofline_model_share"] < 1
    # Parameters are gathered in half precision, no more often than forward and backward need them.
    parameters = int(said.split("parameters")[1].split()[0].replace(",", ""))
    assert 0 < figures["collectives"]["all-gather"][1] < 2 * 2 * parameters


def test_an_upsampling_and_its_gradients():
    """Rows stay where they are, and of 36 multiplications 16 are left, each way."""
    aot_compile = importlib.import_module("launch.aot_compile")
    mesh = sharding.make_mesh(1, 4, aot_compile.topology("v5e:2x2"))
    (b, h, w, c), spread = (4, 16, 32, 128), jax.sharding.NamedSharding
    rows, whole = (spread(mesh, spec) for spec in (sharding.ROWS, jax.sharding.PartitionSpec()))
    given = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
        for shape, where in (
            ((b, h, w, c), rows),
            ((3, 3, c, c), whole),
            ((b, 2 * h, 2 * w, c), rows),
        )
    ]

    def both_ways(x, kernel, g):
        y, pull = jax.vjp(sharding.pinned(mesh).upsample_conv, x, kernel)
        return y, pull(g)

    found = costs.of(jax.jit(both_ways).lower(*given).compile())
    # A tenth more at the edges of so small a picture.
    assert found.flops == pytest.approx(3 * 2 * (b // 4) * h * w * 16 * c * c, rel=0.2)
    assert set(found.collectives) == {"all-reduce"}  # of the kernel's gradient


def test_it_is_the_step_of_a_run(config, cache, tmp_path):
    """On stored latents and embeddings, up to the encoders' parameters, which it does not use."""
    photos, prepared = tmp_path / "photos", tmp_path / "set"
    foreign.write_folder(photos, foreign.triplets())
    assert commands.run("prepare_data", f"--source={photos}", f"--out={prepared}") == 0
    model, size = cache / "model", ("--image_size=64", "--max_ratio=1", "--least=1")
    given = f"--data={prepared}", f"--model={model}", "--batch_size=2", *size
    assert commands.run("precompute", *given) == 0
    raw = opened(config)
    raw.model, raw.init_from, raw.max_ratio = str(model), "", 1.0
    raw.data = ({"source": str(prepared), "task": "edit"},)
    raw.unet = "tiny"
    raw.overrides = {"layers_per_block": 1, "transformer_layers_per_block": (1, 1, 1)}
    raw.accumulation, raw.remat = 2, "full"
    run = train_config.opened(raw, tmp_path / "run")
    assert run.recipe.precomputed
    stage = train_config.make_stage(run)
    state, frozen = stage.init_fn(jax.random.key(0))
    batch = pipeline.batch(run.recipe, pipeline.check(run.recipe), range(raw.batch_size), 0)
    batch = sharding.spread(batch, run.mesh, raw.batch_size)
    step_fn, arguments, *_ = abstract.step_of(raw, run.mesh)
    used = {name: batch[name] for name in arguments[2]}  # not: which samples they are
    assert loop.abstract(used) == arguments[2]
    # Of its loop over two micro-batches one turn is counted.
    raw.remat = "none"
    once = abstract.step_of(raw, run.mesh)
    assert costs.flops_of(once.fn, *once.arguments) == pytest.approx(once.flops / 2, rel=0.15)
    trained = jax.jit(stage.step_fn).lower(state, frozen, batch, jax.random.key(1))
    compiled = jax.jit(step_fn).lower(*arguments)
    assert compiled.as_text() == trained.as_text()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "distilled.py"
    file.write_text(textwrap.dedent(CONFIG).replace("phase3_joint", "distill_dmd2"))
    return f"--config={file}"


def test_the_fake_scores_update_and_the_students_arithmetic(distilled, tmp_path):
    """The student's update by the account alone, which takes no compiler."""
    file = tmp_path / "fake.json"
    given = distilled, "--topology=v5e:2x2", f"--json={file}", "--update=fake"
    assert compile_for(*given, "--hbm_gib=1") == 0
    fake = json.loads(file.read_text())
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    student = abstract.step_of(opened(distilled), mesh, "student")
    # A forward pass is a third of a gradient. The student's loss has one of the fake score and two
    # (with and without the text) of the teacher beside its own; what the fake score learns from is
    # drawn by the student, which is no part of its loss.
    assert student.flops / (4 * fake["model_flops"]) == pytest.approx(2, rel=0.1)
    both = abstract.step_of(opened(distilled), mesh).flops
    assert both == pytest.approx(student.flops + 4 * fake["model_flops"], rel=1e-6)
    done = costs.flops_of(student.fn, *student.arguments)
    assert done / student.flops == pytest.approx(1, rel=0.1)
    assert fake["flops"] / fake["model_flops"] == pytest.approx(4 / 3, rel=0.1)


def test_a_students_update_in_parts_that_save_their_products(distilled, tmp_path):
    file = tmp_path / "student.json"
    given = distilled, "--topology=v5e:2x2", f"--json={file}", "--update=student"
    assert compile_for(*given, "--config.accumulation=2", "--config.remat=products") == 0
    assert json.loads(file.read_text())["looped"]


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "reinforced.py"
    smaller = "config.rl.group, config.rl.parts, config.rl.process.steps = 2, 1, 4"
    text = textwrap.dedent(CONFIG).replace("phase3_joint", "rl_nft")
    file.write_text(text.replace("return", f"{smaller}\n    config.accumulation = 1\n    return"))
    return f"--config={file}"


@pytest.mark.parametrize("kind", ["nft", "grpo"])
def test_the_arithmetic_of_a_rollout(kind):
    """Where each of its loops has one turn, that of the rollout as written."""
    config = system.Config(NANO, TAESDXL, None)
    process = grpo.Process(steps=1, window=1)
    settings = rollouts.Rollouts(group=2, guidance=2.0, process=process)
    loss = nft.Settings(levels=1) if kind == "nft" else grpo.Settings()
    raw = SimpleNamespace(batch_size=2, image_size=64, text_length=80, stage=kind, pane=True)
    rl = SimpleNamespace(rollouts=settings)
    trained = {"unet": pretrained.param_shapes(pretrained.UNET, NANO)}
    frozen = {
        "vae": pretrained.param_shapes(pretrained.AUTOENCODER, TAESDXL),
        rollouts.REFERENCE: trained["unet"],
    }
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    batch = abstract.batch_of(raw, config, ("edit",), rl)
    rollout = rollouts.make_rollout(config, settings, loss, batch["context"].shape[1], mesh)
    key, number = jax.eval_shape(lambda: (jax.random.key(0), 0))
    given = trained, frozen, batch, key, number
    rows, _, _ = jax.eval_shape(rollout, *given)
    found = abstract.rollout_flops(config, settings, loss, rows["given"], trained, frozen)
    assert 2 * found == pytest.approx(costs.flops_of(rollout, *given), rel=0.02)


def test_a_bucket_has_its_own_program(config):
    raw = opened(config)
    raw.max_ratio = 2.0
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    system_config = abstract.system_of(raw, mesh)
    for bucket, latents in ((None, (8, 8)), ((48, 80), (6, 10))):
        batch = abstract.batch_of(raw, system_config, ("edit",), None, bucket)
        assert batch["source_latents"].shape == (8, *latents, 4)


def test_a_rollout_that_does_not_fit_and_its_updates(reinforced, tmp_path, capfd):
    """No share of the peak is made of what loops repeat. Of the updates the account alone, which
    takes no compiler."""
    file = tmp_path / "a.json"
    given = reinforced, "--topology=v5e:2x2", f"--json={file}", "--update=rollout"
    assert compile_for(*given, "--hbm_gib=0.001") == 3
    said, error = capfd.readouterr()
    assert re.search("arithmetic +at least .* TFLOP, of every loop one turn; the model's", said)
    assert re.search("roofline +at least .* ms, of loops one turn", said)
    error = error.splitlines()[-1]
    assert re.match(r"error: does not fit: 0\.\d GiB a device of 0.0; lower batch_size", error)
    rollout = json.loads(file.read_text())
    assert rollout["looped"] and not rollout["unknown"] and "roofline_seconds" not in rollout
    assert "roofline_model_share" not in rollout
    assert 0 < rollout["cycles_model_share"] < 1 and rollout["beside"] == 0
    step = abstract.step_of(opened(reinforced), sharding.make_mesh(1, 1, jax.devices()[:1]))
    # Eight velocities of a picture and its decoding; gradients at two noises of it.
    assert 4 * rollout["model_flops"] / step.flops > 8 / 6
    # It makes no use of these.
    assert step.beside.keys() == {"vae", rollouts.REFERENCE, "before"}


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--update=fake"],
            "--update=fake is of another stage, the stage 'diffusion' has only step",
        ),
        (
            ["--topology=v5e:3x"],
            "--topology v5e:3x: .*; expected a kind and a shape such as v5e:4x4",
        ),
        (
            ["--topology=h100:8"],
            "--topology h100:8: .*; expected a kind and a shape such as v5e:4x4",
        ),
        (["--config.batch_size=6"], "batch_size 6 is no multiple of 16 devices x accumulation 1"),
        (["--config.stage=autoencoder"], "the stage 'autoencoder' is not compiled here"),
        (
            ["--config.train=('text_encoder',)", "--config.batch_size=16"],
            "only the U-Net's step is compiled here",
        ),
        (
            ["--topology=v5e:2x2", "--config.unet=huge"],
            "unet is 'huge', known are dreamlite, tiny, nano",
        ),
        (["--topology=v5e:2x2", "--config.pane=False"], "pane is False, but there are edits"),
        (
            ["--topology=v5e:2x2", "--config.data=({'source': 'data/edit'},)"],
            "data\\[0\\] names no task, which is t2i or edit",
        ),
        (
            ["--topology=v5e:2x2", "--bucket=32"],
            "--bucket=32: expected HEIGHTxWIDTH, such as 832x1216",
        ),
        (
            ["--topology=v5e:2x2", "--bucket=64x32", "--config.max_ratio=2.0"],
            "64x32 is no bucket of the config: .*64x64",
        ),
        (["--slices=2", "--topology=v5e:2x2"], r"mesh\.data is 1 on 2 slices, should be"),
        (["--config.mesh.data=3"], "mesh.data=3 x mesh.fsdp=-1 does not fit 16 devices"),
    ],
)
def test_wrong_use_ends_in_one_line(config, flags, said, capfd):
    assert compile_for(config, *flags) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error")]
    assert re.search(said, line), line


def test_without_libtpu_the_readme_s_command_is_said(monkeypatch):
    def missing(*_, **kw):
        raise RuntimeError("Failed to open libtpu.so")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    aot_compile = importlib.import_module("launch.aot_compile")
    with pytest.raises(cli.CommandError) as refused:
        aot_compile.topology("v5e:4x4")
    said = str(refused.value).removeprefix("libtpu is not installed: ")
    assert said in " ".join((commands.ROOT / "README.md").read_text().split())
    assert said in aot_compile.__doc__
