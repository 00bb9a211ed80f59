"""Where a run's networks are from, and what its checkpoints say of them to those that follow."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
import training

from configs import distill_dmd2, phase1_t2i_256, rl_grpo
from configs.photographs import phase1_t2i as photographs
from configs.shapes import autoencoder, phase3_joint, rl_nft
from dreamlite_jax import pretrained, system, tiny
from dreamlite_jax.models.unet_config import DREAMLITE, NANO, TINY, UNetConfig
from dreamlite_jax.train import checkpoint, distillation, origins
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train.checks import ConfigError
from dreamlite_jax.train.origins import Origin

OLD_NAMES = {
    "down_block_types": [
        "CrossAttnDownRemoveSelfAttnBlock2D",
        "CrossAttnDownRemoveSelfAttnBlock2D",
        "CrossAttnDownBlock2D",
    ],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpRemoveSelfAttnBlock2DV1", "UpBlock2D"],
    "layers_per_block": [2, 2, 2],
}


# --- The same network, spelled otherwise ----------------------------------------------------------


def test_old_block_names_and_scalars_are_the_same_network(tmp_path):
    old = UNetConfig.from_dict({**TINY.to_dict(), **OLD_NAMES})
    assert old != TINY and old.canonical() == TINY.canonical()
    assert old.to_dict()["mid_block_type"] == "UNetMidBlock2DCrossAttn"  # written as it was read
    assert UNetConfig.from_dict(old.to_dict()) == old
    (tmp_path / "unet").mkdir()
    pretrained.write_json(tmp_path / "unet" / "config.json", old.to_dict())
    config = tiny.config()
    model = {"unet": Origin("model", str(tmp_path))}
    assert origins.problems(model, config._replace(unet=TINY)) == []
    with checkpoint.open_manager(tmp_path / "run") as manager:
        meta = {"configs": {"unet": old.to_dict()}}
        checkpoint.save(manager, 1, {"x": jnp.ones(1)}, meta)
    run = {"unet": Origin("run", str(tmp_path / "run"))}
    assert origins.problems(run, config._replace(unet=TINY)) == []
    other = dataclasses.replace(TINY, layers_per_block=1, up_block_types=("UpBlock2D",) * 3)
    for origin in (model, run):
        (line,) = origins.problems(origin, config._replace(unet=other))
        assert "layers_per_block is (2, 2, 2) there, 1 here" in line
        assert "up_block_types" in line and "down_block_types" not in line


def test_presets_are_spelled_as_today():
    for preset in (DREAMLITE, NANO):
        same = preset.canonical()
        for name in ("down_block_types", "mid_block_type", "up_block_types"):
            assert getattr(same, name) == getattr(preset, name)


# --- Models for few steps -------------------------------------------------------------------------


def distilled(cache, tmp_path):
    """The workdir of a distillation."""
    config = distill_dmd2.get_config("quick")
    config.model = config.init_from = str(cache / "model")
    config.unet = "tiny"
    training.begun(config, tmp_path / "distilled")
    return str(tmp_path / "distilled")


@pytest.mark.parametrize("module", [phase3_joint, rl_nft])
def test_what_starts_from_a_distilled_model_makes_one(module, quick, cache, tmp_path):
    student = distilled(cache, tmp_path)
    config = quick(module, init_from=student, unet="tiny")
    began = training.begun(config, tmp_path / "run")
    assert began.origins["unet"] == Origin("run", student)
    later = Origin("run", str(tmp_path / "run"))
    assert origins.is_mobile(later) and origins.mobile_steps(later) == 2
    (line,) = distillation.teacher_problems(later, False)
    assert "a mobile model" in line
    resumed = train_config.opened(config, tmp_path / "run")
    assert resumed.origins["unet"].kind == "own" and train_config.meta_of(resumed)["mobile"]
    assert train_config.meta_of(resumed)["mobile_steps"] == 2


def test_what_starts_elsewhere_makes_none(quick, tmp_path):
    training.begun(quick(), tmp_path / "run")
    assert not origins.is_mobile(Origin("run", str(tmp_path / "run")))
    folder = tiny.tiny_model_dir(tmp_path / "mobile", mobile=True)
    system.write_settings(folder, tiny.config(mobile=True)._replace(mobile_steps=8))
    mobile = str(folder)
    from_it = quick(init_from=mobile, unet="tiny", model=mobile)
    meta = train_config.meta_of(train_config.opened(from_it, tmp_path / "a"))
    assert meta["mobile"] and meta["mobile_steps"] == 8
    scratch = quick(unet="tiny", model=mobile)
    assert not train_config.meta_of(train_config.opened(scratch, tmp_path / "b"))["mobile"]


def test_checkpoints_that_do_not_say_it_are_as_the_model_directory(quick, tmp_path, monkeypatch):
    """Of the run that starts from them, wherever their own has gone."""
    training.begun(quick(), tmp_path / "run")
    saved = checkpoint.read_meta(tmp_path / "run")[1]
    older = {k: v for k, v in saved.items() if not k.startswith("mobile")} | {"model_dir": "/gone"}
    monkeypatch.setattr(checkpoint, "read_meta", lambda *_: (1, older))
    run = Origin("run", str(tmp_path / "run"))
    assert not origins.is_mobile(run)
    assert [origins.is_mobile(run, kind) for kind in (False, True)] == [False, True]
    assert origins.mobile_steps(run, 6) == 6
    older |= {"inside": "student/", "config": {"distill": {"steps": 8}}}
    assert origins.mobile_steps(run, 6) == 8


# --- Workdirs of other stages ---------------------------------------------------------------------


def test_a_workdir_of_another_stage_is_refused(quick, tmp_path):
    training.begun(quick(), tmp_path)
    with pytest.raises(ConfigError) as error:
        train_config.opened(quick(rl_nft), tmp_path)
    message = str(error.value)
    assert message == (
        f"{tmp_path} is the workdir of a run of the stage diffusion, which cannot go on as nft; "
        f"name another workdir, and {tmp_path} as init_from to start from it"
    )
    train_config.opened(quick(rl_nft, init_from=str(tmp_path)), tmp_path.with_suffix(".rl"))


def test_a_checkpoint_that_does_not_say_its_stage_goes_on(quick, tmp_path):
    training.begun(
        quick(rl_nft), tmp_path, lambda meta: (meta["config"].pop("stage"), meta.pop("reference"))
    )
    run = train_config.opened(quick(rl_nft), tmp_path)
    train_config.check_resumed(run, checkpoint.read_meta(tmp_path)[1])


# --- The size of pictures -------------------------------------------------------------------------


def test_a_run_draws_at_the_size_of_its_training(quick, tmp_path):
    for side in (32, 64, 128):
        run = train_config.opened(quick(image_size=side), tmp_path)
        assert run.config.default_side == side
        saved = json.loads(json.dumps(train_config.meta_of(run)))["configs"]["unet"]
        assert saved["sample_size"] == side // 8
    chosen = quick(image_size=32, overrides={"sample_size": 16})
    assert train_config.opened(chosen, tmp_path).config.default_side == 128
    other = quick(autoencoder, image_size=32)  # says nothing of the U-Net's pictures
    assert train_config.opened(other, tmp_path).config.default_side == 64


@pytest.mark.parametrize(
    "module, factor, side", [(phase1_t2i_256, 8, 256), (photographs, 4, 64), (rl_grpo, 8, 1024)]
)
def test_the_configs_sizes(module, factor, side):
    raw = module.get_config()
    assert train_config.unet_of(raw, DREAMLITE, factor).sample_size * factor == side
