"""From a config to a run: all that is wrong comes in one line, before anything is trained."""

import importlib
import json
import os
import subprocess
import sys

import commands
import foreign
import jax.numpy as jnp
import pytest
import stored
import training
from commands import ROOT

from configs import base
from configs.shapes import autoencoder, phase1_t2i
from dreamlite_jax import precompute, system, tiny
from dreamlite_jax.data import transforms
from dreamlite_jax.data.mixture import MixtureError
from dreamlite_jax.models import unet_config
from dreamlite_jax.train import checkpoint, optim, origins, stages
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train.config import ConfigError, settings_of
from dreamlite_jax.train.rollouts import REFERENCE

CONFIGS = sorted(
    file.relative_to(ROOT)
    for file in (ROOT / "configs").rglob("*.py")
    if "def get_config" in file.read_text("utf-8")
)
NAN, INF = float("nan"), float("inf")


def config_of(file, variant=None):
    name = ".".join(file.with_suffix("").parts)
    return importlib.import_module(name).get_config(variant)


def error_of(config, workdir) -> str:
    with pytest.raises(ConfigError) as error:
        train_config.opened(config, workdir)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- The command ----------------------------------------------------------------------------------

SFT = "--config=configs/sft.py:quick"


def said(capsys, *flags: str) -> str:
    """What `launch.train` says on stderr: it ends with code 2 and one line."""
    assert commands.run("train", "--workdir=runs/none", "--compilation_cache=", *flags) == 2
    assert not (ROOT / "runs" / "none").exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "WARNING" not in line]
    (line,) = lines
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "flags, message",
    [
        ([SFT, "--config.optim.lrr=1"], "--config has no key lrr; did you mean lr? (see configs"),
        ([SFT, "--config.quux=1"], "--config has no key quux (see configs/base.py"),
        ([SFT, "--config.optim.lr.quux=1"], "--config has no key optim.lr.quux ("),
        (
            [SFT, "--config.quux=1", "--config.steps=3", "--config.seed=abc", "--config.optim.b=2"],
            "no key quux (see configs/base.py); flag --config.seed=abc: invalid literal",
        ),
        ([SFT, "--config.seed=abc", "--config.optim.b=2"], "; --config has no key b"),
        (
            [SFT, "--config.steps", "3", "--config.seed", "abc", "--config.b=2", "--config.b=2"],
            "error: flag --config.seed=abc: invalid literal for int() with base 10: 'abc' (--help "
            "lists the flags); --config has no key b (see configs/base.py)",
        ),
        (
            ["--config.steps=1", SFT, "--config.quux=1"],
            "Found --config.steps=1 in argv before a value for --config was specified",
        ),
        ([SFT, "--config.steps=abc"], "--config.steps=abc: invalid literal for int"),
        ([SFT, "--config.ema_decay=much"], "--config.ema_decay=much: "),
        ([SFT, "--config.model=no", "--config.train=0"], "train is (0,), should name some of unet"),
        ([SFT, "--stpes=3"], "Unknown command line flag 'stpes'"),
        ([SFT, "--coordinator=localhost:1"], "--processes and --process go together"),
        ([SFT, "--workdir=gs://bucket/run"], "gs://bucket/run is an address, expected a folder"),
        ([], "--config is missing"),
        (["--config=configs/nope.py"], "No such file or directory: 'configs/nope.py'"),
        (["--config=configs/nope.py", "--config.steps=1"], "No such file or directory"),
        (["--config=configs/sft.py:nope"], "unknown variant 'nope'; known is quick"),
    ],
)
def test_wrong_use_ends_in_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in said(capsys, *flags)


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.stpes = 10", "no key stpes; did you mean steps?"),
        ("config.optim.lrr = 10", "no key lrr; did you mean lr?"),
        ("config.steps = 'many'", "many"),
    ],
)
def test_a_slip_in_a_config_s_file_is_found(line, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs.base import base, finished\n\n"
        f"def get_config(variant=None):\n    config = base()\n    {line}\n"
        "    return finished(config, variant)\n"
    )
    assert message in said(capsys, f"--config={file}")


def test_a_fault_of_a_config_s_file_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "mine.py"
    file.write_text("def get_config(variant=None):\n    return [].colour\n")
    with pytest.raises(AttributeError, match="colour"):
        commands.run("train", f"--config={file}", f"--workdir={tmp_path}")


@pytest.mark.e2e
def test_as_a_process_of_its_own():
    found = subprocess.run(
        [sys.executable, "-m", "launch.train", "--config=configs/sft.py", "--workdir=runs/none"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: models/dreamlite: no such directory; ")


# --- What stands in configs/ ----------------------------------------------------------------------


def missing_of(config) -> list[str]:
    """The folders that a config names, once for each place."""
    entries = (*config.data, *config.validation)
    named = [entry["source"] for entry in entries if not entry["source"].startswith("shapes:")]
    places = [*named, config.init_from, config.model]
    return [place for place in places if place not in ("", *tiny.PRESETS)]


@pytest.fixture(scope="module")
def presets(cache, tmp_path_factory):
    """The presets' model directories, made once."""
    shapes = tmp_path_factory.mktemp("presets") / "shapes"
    return {"tiny": cache / "model", "shapes": tiny.tiny_model_dir(shapes, preset="shapes")}


@pytest.mark.parametrize("file", CONFIGS, ids=str)
def test_every_folder_that_is_missing_is_named_at_once(file, presets, monkeypatch, tmp_path):
    """Of every config as it stands; all else about it is fine. Those of the shapes world miss at
    most the run before."""
    monkeypatch.chdir(tmp_path)
    config = config_of(file)
    missing = missing_of(config)
    if config.model in presets:
        config.model = str(presets[config.model])
    if missing:
        problems = error_of(config, tmp_path / "run").split("; ")
        assert len(problems) == len(missing), problems
        for folder in missing:
            assert any(folder in problem for problem in problems), folder
    else:
        assert train_config.opened(config, tmp_path / "run").schedule.steps == config.steps
    assert ("shapes" in file.parts) == (len(missing) < 2)


@pytest.mark.parametrize("file", CONFIGS, ids=str)
def test_every_quick_variant_opens(file, cache, tmp_path):
    config = config_of(file, "quick")
    config.model = str(cache / "model")
    run = train_config.opened(config, tmp_path)
    assert run.schedule.steps == 2 and run.schedule.batch_size == 8
    assert run.mesh.shape == {"data": 1, "fsdp": 1}
    trained, frozen = train_config.load_params(run)
    assert tuple(trained) == tuple(config.train)
    reference = {REFERENCE} if run.reference else set()
    assert {*trained, *frozen} == {*train_config.networks_of(config), *reference}
    assert not trained.keys() & frozen.keys()
    assert run.loss == train_config.STAGES[config.stage](**config.loss)


def test_quick_asks_for_tasks_that_prepared_sets_know():
    config = base.base()
    config.data = ({"source": "data/t2i", "task": "t2i"}, {"source": "data/mine", "task": "edit"})
    assert [entry["task"] for entry in base.finished(config, "quick").data] == ["t2i", "edit"]
    config = base.base()
    config.data = ({"source": "data/t2i", "task": "t2i"}, {"source": "data/mine"})
    assert base.finished(config, None).data[1] == {"source": "data/mine"}
    with pytest.raises(ValueError, match=r'data\[1\] \(data/mine\) says no task, .*add "task"'):
        base.finished(config, "quick")


def test_a_tiny_model_of_the_run_s_seed_is_made_in_the_workdir(quick, cache, tmp_path):
    config = quick(seed=1)
    config.model = "tiny"
    run = train_config.opened(config, tmp_path / "run")
    assert run.model_dir == tmp_path / "run" / "tiny_model" and run.model_dir.is_dir()
    own, shared = (
        (folder / "text_encoder" / "model.safetensors").read_bytes()
        for folder in (run.model_dir, cache / "model")
    )
    assert own != shared
    assert run.config.unet == unet_config.NANO  # the config's own preset, not the model's


# --- What is wrong --------------------------------------------------------------------------------

T2I = {"source": "shapes:quick:train", "task": "t2i"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps is 0, should be at least 1"),
        ({"batch_size": 0}, "batch_size is 0, should be at least 1"),
        ({"accumulation": 0}, "accumulation is 0, should be at least 1"),
        ({"accumulation": 3}, "batch_size 8 is no multiple of 1 devices x accumulation 3"),
        ({"threads": 0}, "threads is 0, should be at least 1"),
        ({"workers": -1}, "workers is -1, should not be negative"),
        ({"seed": -1}, "seed is -1, should not be negative"),
        ({"seed": 2**32}, "seed is 4294967296, should be below 4294967296"),
        ({"patience": -1}, "patience is -1"),
        ({"sample__rows": 0}, "sample.rows is 0, should be at least 1"),
        ({"sample__steps": 0}, "sample.steps is 0, should be at least 1"),
        ({"sample__guidance": NAN}, "sample.guidance is nan, should be finite"),
        ({"checkpoint__keep": 0}, "checkpoint.keep is 0"),
        ({"checkpoint__keep_every": -1}, "checkpoint.keep_every is -1"),
        ({"log__every": -1}, "log.every is -1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, should be in [0, 1)"),
        ({"dtype": "float16"}, "dtype is 'float16', known are float32, bfloat16"),
        ({"stage": "rl"}, "stage is 'rl', known are diffusion, autoencoder"),
        ({"train": ()}, "train is (), should name some of unet, text_encoder"),
        ({"train": ("vae",)}, "train is ('vae',), should name some of unet, text_encoder"),
        ({"remat": "some"}, 'remat: unknown policy "some"'),
        ({"unet": "giant"}, "unet is 'giant', known are dreamlite, tiny, nano"),
        ({"overrides": {"ff_mlut": 4}}, "U-Net config: unknown setting ff_mlut=4"),
        ({"overrides": {"encoder_hid_dim": 48}}, "takes texts of width 48, but the text encoder"),
        ({"overrides": {"in_channels": 8}}, "takes latents of 8 channels and gives 4"),
        ({"unet": "dreamlite"}, "takes texts of width 2048, but the text encoder"),
        ({"image_size": 100}, "image size 100 is not a positive multiple of 16"),
        ({"max_ratio": 0.5}, "the largest aspect ratio is 0.5, should be at least 1"),
        ({"text_length": 70}, "a text length of 70 cannot hold the template and the image"),
        ({"text_length": 20, "data": (T2I,)}, "a text length of 20 cannot hold the template"),
        ({"mesh__fsdp": 3}, "mesh.data=1 x mesh.fsdp=3 does not fit 1 devices"),
        ({"sharding": (("kernel", "model,-"),)}, "names model; known are data, fsdp, -"),
        ({"sharding": (("kernel",),)}, "sharding: ('kernel',) is no pair of strings"),
        ({"sharding": ("kernel",)}, "sharding: 'kernel' is no pair of strings"),
        ({"dropout__t2i_text": 1.5}, "dropout.t2i_text is 1.5, should be in [0, 1]"),
        ({"dropout__edit_text": 0.95}, "the rates dropout.edit_* add up to 1.05"),
        ({"loss__std": 0.0}, "loss.std is 0.0, should be positive"),
        ({"loss": {"densty": "uniform"}}, "loss.densty is unknown; known are density, mean"),
        ({"loss": {"std": "1"}}, "loss.std is '1', should be float"),
        ({"optim__lr": NAN}, "optim.lr is nan, should be positive"),
        ({"optim__warmup": 3}, "optim.warmup is 3, should be from 0 to the 2 steps"),
        ({"optim__trained": "conv_inn"}, "'conv_inn' matches no parameter of the unet"),
        ({"data": ()}, "data is empty; give at least one source"),
        ({"data": ("shapes:quick:train",)}, "data[0]: 'shapes:quick:train' should be a dict"),
        ({"data": (T2I, {"source": "/no/where"})}, "data[1]: /no/where: no such folder"),
        ({"data": ({**T2I, "weight": "2"},)}, "data[0]: weight is '2', should be float"),
        ({"data": ({**T2I, "count": -3},)}, "data[0]: count is -3, should be positive"),
        ({"data": ({**T2I, "weight": 0.0},)}, "the weight of shapes:quick:train:t2i is 0.0"),
        ({"data": (T2I, T2I)}, "the name 'shapes:quick:train:t2i' stands for several"),
        ({"validation": ({"source": "/no/where"},)}, "validation[0]: /no/where: no such folder"),
        ({"model": "/no/model"}, "/no/model: no such directory"),
        ({"init_from": "/no/run"}, "init_from /no/run is neither a run"),
    ],
)
def test_each_problem_is_named(changes, message, quick, tmp_path):
    assert message in error_of(quick(**changes), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": ("unet",)}, "train is ('unet',), should name some of vae"),
        ({"loss": {"density": "uniform"}}, "loss.density is unknown; known are moments, noise"),
        ({"loss": {"noise": -0.1}}, "loss.noise is -0.1, should be 0 or more"),
        ({"autoencoder": {"latent_chanels": 8}}, "unknown setting latent_chanels=8"),
    ],
)
def test_problems_of_the_autoencoder_s_stage(changes, message, quick, tmp_path):
    assert message in error_of(quick(autoencoder, **changes), tmp_path)


def test_all_that_is_wrong_comes_at_once(quick, tmp_path):
    config = quick(
        steps=0, accumulation=0, dtype="int8", max_ratio=0.1, remat="no", train=("decoder",),
        loss={"a": 1}, dropout={"b": 1}, optim={"c": 1}, mesh__data=7, sharding=(("(", "x"),),
        init_from="/no/run", data=({"source": "/no/data"},), validation=({"source": "/no/other"},),
    )  # fmt: skip
    message = error_of(config, tmp_path)
    for part in (
        *("steps is 0", "accumulation is 0", "dtype is 'int8'", "loss.a", "dropout.b", "optim.c"),
        *("mesh.data=7", "'(' is no regex", "'x' names x", "/no/run", "/no/data", "/no/other"),
        *("train is ('decoder',)", "remat"),
    ):
        assert part in message, part
    assert message.count("; ") >= 13


def test_defaults_are_filled_and_types_kept():
    found = settings_of(optim.Settings, {"lr": 1, "warmup": 5}, "optim")
    assert found == optim.Settings(lr=1.0, warmup=5) and type(found.lr) is float
    wrong = {"lr": "1e-4", "warmup": 1.5, "clip": True, "beta3": 0.9}
    with pytest.raises(ConfigError) as error:
        settings_of(optim.Settings, wrong, "optim")
    for part in (
        *("optim.beta3 is unknown; known are lr, ", "optim.lr is '1e-4', should be float"),
        *("optim.warmup is 1.5, should be int", "optim.clip is True, should be float"),
    ):
        assert part in str(error.value)


# --- Where a run starts from ----------------------------------------------------------------------


def test_a_model_to_start_from_that_is_another_network(quick, cache, tmp_path):
    model = str(cache / "model")  # its U-Net is "tiny", the quick one "nano"
    message = error_of(quick(init_from=model), tmp_path)
    assert f"the model {model} has another unet" in message
    assert "block_out_channels is (32, 64, 96) there, (16, 32) here" in message
    run = train_config.opened(quick(init_from=model, unet="tiny"), tmp_path)
    assert str(run.origins["unet"]) == f"the model {model}"
    assert train_config.opened(quick(), tmp_path).origins["unet"].kind == "scratch"

    config = quick(unet="tiny", init_from=model)
    config.model = "tiny"
    assert 'model is "tiny", whose encoders are random' in error_of(config, tmp_path)


def test_a_run_to_start_from_that_is_another_network(quick, tmp_path):
    earlier = tmp_path / "earlier"
    before = train_config.opened(quick(overrides={"layers_per_block": 2}), earlier)
    with checkpoint.open_manager(earlier) as manager:
        checkpoint.save(manager, 1, {"x": jnp.ones(1)}, train_config.meta_of(before))
    message = error_of(quick(init_from=str(earlier)), tmp_path / "run")
    assert "has another unet: layers_per_block is 2 there, 1 here" in message
    fitting = quick(init_from=str(earlier), overrides={"layers_per_block": 2})
    run = train_config.opened(fitting, tmp_path / "run")
    kinds = {name: origin.kind for name, origin in run.origins.items()}
    assert kinds == {"unet": "run", "text_encoder": "run", "vae": "model"}


@pytest.fixture
def stored_set(quick, cache, tmp_path):
    """An entry: a prepared set with outputs of the shared model's encoders."""
    config = train_config.opened(quick(), tmp_path).config
    made_with = precompute.made_with(cache / "model", config, image_size=64, max_ratio=1.0)
    folder = stored.write_set(tmp_path / "set", [(64, 64)] * 9, 64, made_with)
    return {"source": str(folder), "task": "t2i"}


@pytest.fixture
def runs(quick, tmp_path):
    """One that trained the autoencoder, and one that began with it and trained the U-Net."""
    vae, unet = (str(tmp_path / name) for name in ("vae", "unet"))
    training.begun(quick(autoencoder), vae)
    training.begun(quick(phase1_t2i, train=("unet",), init_from=vae), unet)
    return vae, unet


@pytest.mark.parametrize("where", ["data", "validation"])
def test_outputs_of_other_encoders_than_the_run_s(where, stored_set, runs, quick, cache, tmp_path):
    """Of training and of validation alike; what the line says to do mends it."""
    vae, unet = runs
    model, workdir = str(cache / "model"), tmp_path / "run"
    shapes = {"train": ("unet",), "data": (T2I,)}
    for init_from, then in ((vae, '""'), (unet, "it")):
        given = {**shapes, "init_from": init_from}
        message = error_of(quick(phase1_t2i, **given | {where: (stored_set,)}), workdir)
        assert message == (
            f"{where} holds what the vae of {model} gave, but this run takes its vae from the run "
            f'{vae}: set "precomputed" to False in {where}, or export the run {init_from} (python '
            "-m convert.export), precompute with the result, and set model to it and init_from to "
            f"{then}"
        )
        off = {where: ({**stored_set, "precomputed": False},)}
        assert train_config.opened(quick(phase1_t2i, **given | off), workdir).recipe.prompter
    # The shared model stands in for the export.
    for init_from, unet in (("", "scratch"), (model, f"the model {model}")):
        found = origins.choose(system.NETWORKS, ("unet",), "unet", workdir, init_from, model)
        assert (str(found["unet"]), str(found["vae"])) == (unet, f"the model {model}")


def test_a_run_that_goes_on_keeps_its_encoders(stored_set, runs, quick):
    """Its checkpoint says whence they are, not its config."""
    message = error_of(quick(phase1_t2i, train=("unet",), data=(stored_set,)), runs[1])
    assert message.endswith(f'from the run {runs[0]}: set "precomputed" to False in data')


def test_going_on_with_other_data_is_refused(quick, tmp_path, caplog):
    saved = json.loads(json.dumps(train_config.meta_of(train_config.opened(quick(), tmp_path))))
    train_config.check_resumed(train_config.opened(quick(), tmp_path), saved)
    assert "going on with" not in caplog.text
    other = {"optim__lr": 0.5, "dropout__t2i_text": 0.3}
    with pytest.raises(MixtureError, match=r"dropout.t2i_text was 0.1, is 0.3"):
        train_config.check_resumed(train_config.opened(quick(**other), tmp_path), saved)
    config = quick(**other, allow_changed_data=True)
    train_config.check_resumed(train_config.opened(config, tmp_path), saved)
    assert "optim.lr was 0.001, is 0.5" in caplog.text and "t2i_text was 0.1" in caplog.text


# --- What becomes of a config ---------------------------------------------------------------------


def test_a_run_s_parts_are_what_the_config_says(quick, tmp_path):
    config = quick(
        accumulation=2, ema_decay=0.5, optim__clip=0.25, optim__trained="unet/conv_out",
        train=("unet",), sharding=[("conv_in/kernel", "-,fsdp")], patience=7, random_crop=False,
        log__every=3, checkpoint__every=4, checkpoint__keep=5, sample__every=6, seed=11,
    )  # fmt: skip
    run = train_config.opened(config, tmp_path)
    assert run.optimisation[1:] == (0.5, 2, 0.25, "unet/conv_out")
    assert run.rules[0] == ("conv_in/kernel", "-,fsdp") and len(run.rules) > 1
    schedule = run.schedule
    assert (schedule.log_every, schedule.checkpoint_every, schedule.keep) == (3, 4, 5)
    assert (schedule.sample_every, schedule.patience, schedule.seed) == (6, 7, 11)
    assert run.recipe.seed == 11 and not run.recipe.random_crop
    assert run.recipe.dropout == transforms.Dropout()


def test_validation_s_texts_have_room_of_their_own(quick, monkeypatch, tmp_path):
    """Edits, with their image, take 512 tokens; prompts alone 256. Less the template's."""
    lengths = []
    monkeypatch.setattr(stages, "diffusion_loss", lambda config, length, _: lengths.append(length))
    edits = {"source": "shapes:quick:held_out", "task": "edit"}
    given = {"data": (T2I,), "validation": (edits,), "batch_size": 1, "text_length": 0}
    config = quick(phase1_t2i, pane=True, **given)
    train_config.make_stage(train_config.opened(config, tmp_path))
    assert lengths == [256 - 34, 512 - 64]


@pytest.mark.e2e
def test_sizes_that_were_not_precomputed(quick, tmp_path):
    foreign.write_folder(tmp_path / "photos", foreign.pairs()[:2])
    prepared = str(tmp_path / "set")
    flags = f"--source={tmp_path / 'photos'}", f"--out={prepared}"
    assert commands.run("prepare_data", *flags) == 0
    entry = {"source": prepared, "precomputed": True}
    message = error_of(quick(data=(entry,)), tmp_path)
    assert prepared in message and "64" in message and "run launch.precompute" in message
    found = train_config.opened(quick(data=({**entry, "precomputed": False},)), tmp_path)
    assert not found.recipe.precomputed and found.recipe.prompter
