"""From a config to a run: everything is checked first, and all that is wrong is said at once."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dreamlite_jax import precompute, pretrained, system, tiny
from dreamlite_jax.data import pipeline, streams, transforms
from dreamlite_jax.data.pipeline import Recipe
from dreamlite_jax.models import blocks, unet_config
from dreamlite_jax.models.unet_config import UNetConfig
from dreamlite_jax.objectives import autoencoding, dmd2, flow_matching, grpo, nft
from dreamlite_jax.rewards import opening
from dreamlite_jax.train import (
    checks,
    costs,
    distillation,
    optim,
    origins,
    peers,
    reinforcement,
    rollouts,
    sharding,
    stages,
)
from dreamlite_jax.train.checks import (
    AUTOENCODER,
    DIFFUSION,
    DMD2,
    ConfigError,
    settings_of,
)
from dreamlite_jax.train.loop import Schedule, Stage
from dreamlite_jax.train.rollouts import REFERENCE
from dreamlite_jax.train.state import Params

STAGES = {
    DIFFUSION: flow_matching.Settings,
    AUTOENCODER: autoencoding.Settings,
    checks.GRPO: grpo.Settings,
    checks.NFT: nft.Settings,
    DMD2: dmd2.Settings,
}


class Run(NamedTuple):
    """A config, checked and opened, before any parameter is read."""

    config: system.Config
    recipe: Recipe
    validation: Recipe | None
    mesh: Mesh
    rules: tuple[sharding.Rule, ...]
    schedule: Schedule
    optimisation: stages.Optimisation
    loss: Any  # the objective's settings
    raw: ConfigDict
    model_dir: Path
    origins: dict[str, origins.Origin]  # of every network
    rl: reinforcement.Settings | None = None  # of reinforcement learning, as what follows
    rewards: tuple[opening.Weighted, ...] = ()
    distill: distillation.Settings | None = None  # of the stage "dmd2"
    reference: origins.Origin | None = None  # of both: the U-Net that the run began with


# --- Checking -------------------------------------------------------------------------------------


def opened(raw: ConfigDict, workdir: str | os.PathLike) -> Run:
    """Checks a config and opens what it names; no parameter is read yet.

    Raises:
      ConfigError: all that is wrong.
    """
    problems: list[str] = []
    for unlike in peers.unlike(config=raw.to_dict()):  # before anything that it decides
        raise ConfigError(unlike)

    def attempt(make, *args, **kw):
        """The value, or None and a problem more."""
        try:
            return make(*args, **kw)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return None

    problems += checks.wrong_numbers(raw)
    kind = STAGES.get(raw.stage)
    if kind is None:
        problems.append(f"stage is {raw.stage!r}, known are {', '.join(STAGES)}")
    loss = kind and attempt(settings_of, kind, raw.loss, "loss")
    if loss:
        problems += [f"loss.{problem}" for problem in loss.problems()]
    dropout = attempt(settings_of, transforms.Dropout, raw.dropout, "dropout")
    if dropout:
        problems += checks.wrong_rates(dropout)
    optimiser = attempt(settings_of, optim.Settings, raw.optim, "optim")
    wrong_optimiser = optimiser.problems(raw.steps) if optimiser else []
    problems += [f"optim.{problem}" for problem in wrong_optimiser]
    rules = attempt(rules_of, raw)
    problems += sharding.rule_problems(rules or ())
    mesh = attempt(sharding.make_mesh, raw.mesh.data, raw.mesh.fsdp)
    if mesh and raw.batch_size % (mesh.size * max(raw.accumulation, 1)):
        problems.append(
            f"batch_size {raw.batch_size} is no multiple of {mesh.size} devices x accumulation "
            f"{raw.accumulation}"
        )
    model_dir = model_dir_of(raw, workdir)
    config = attempt(_system_config, raw, model_dir)
    if config and optimiser and not wrong_optimiser:
        problems += checks.nothing_trained(raw, config, optimiser)
    recipe = validation = None
    if not config:  # what the data lacks does not wait until the model is there
        for where in ("data", "validation"):
            attempt(streams.open_streams, raw[where], raw.image_size, where=where)
    elif dropout:
        if mesh:
            config = config._replace(ops=sharding.pinned(mesh))
        recipe = attempt(_recipe, raw, "data", config, dropout, model_dir)
        if recipe:
            attempt(pipeline.check, recipe)
        if raw.validation:
            given = "validation", config, transforms.NEVER, model_dir
            validation = attempt(_recipe, raw, *given)
            if validation:
                validation = validation._replace(random_crop=False)
                attempt(pipeline.check, validation)
    rewarded = raw.stage in checks.REWARDED
    rl = attempt(reinforcement.settings_of, raw.rl, settings_of) if rewarded else None
    if rl and mesh:
        numbers = raw.batch_size, raw.accumulation, mesh.size
        problems += reinforcement.problems(rl, loss, *numbers, reinforcement.tasks_of(recipe))
    distill = (
        attempt(distillation.settings_of, raw.distill, settings_of) if raw.stage == DMD2 else None
    )
    problems += distillation.problems(distill, raw.steps) if distill else []

    def begin_together():
        """Before what is read together: a process that may not get there would be waited for."""
        problems.extend(peers.elsewhere(problems))
        if problems and jax.process_count() > 1:
            raise ConfigError("; ".join(dict.fromkeys(problems)))

    begin_together()
    found = attempt(_origins, raw, workdir, model_dir)
    begin_together()
    problems += attempt(origins.stage_problems, found or {}, raw.stage) or []
    problems += checks.without_pane(raw, any(r and r.edits for r in (recipe, validation)))
    if (rewarded or raw.stage == DMD2) and found:
        problems += attempt(origins.pane_problems, found["unet"]) or []
    if config and found:
        used = {name: found[name] for name in networks_of(raw)}
        problems += attempt(origins.problems, used, config) or []
        for where, made in (("data", recipe), ("validation", validation)):
            if made and made.precomputed:
                given = where, used, raw.train, raw.init_from, model_dir
                problems += origins.precomputed_problems(*given)
    teacher = attempt(origins.reference, raw.init_from, model_dir) if distill and found else None
    if teacher and config:
        random = raw.model in tiny.PRESETS or raw.unet == "nano"  # nothing is learnt there
        problems += attempt(distillation.teacher_problems, teacher, random) or []
        problems += attempt(origins.problems, {"unet": teacher}, config) or []
    begin_together()
    problems += peers.unlike(data=recipe and pipeline.description(recipe))
    if problems:
        raise ConfigError("; ".join(dict.fromkeys(problems)))
    if distill:
        recipe = distillation.conditions_of(recipe, loss)
        validation = validation and distillation.conditions_of(validation, loss)
    for_rl = reinforcement.opened(rl, recipe, raw.init_from, model_dir) if rl else {}
    schedule = Schedule(
        steps=raw.steps,
        batch_size=raw.batch_size,
        seed=raw.seed,
        log_every=raw.log.every,
        checkpoint_every=raw.checkpoint.every,
        keep=raw.checkpoint.keep,
        keep_every=raw.checkpoint.keep_every,
        sample_every=raw.sample.every,
        patience=raw.patience,
        profile_at=raw.profile_at,
        limits=rl.limits.of_metrics() if rl else (),
    )
    return Run(
        config=config,
        recipe=for_rl.pop("recipe", recipe),
        validation=validation,
        mesh=mesh,
        rules=rules,
        schedule=schedule,
        optimisation=optimisation_of(raw),
        loss=loss,
        raw=raw,
        model_dir=model_dir,
        origins=found,
        rl=rl,
        distill=distill,
        **({"reference": teacher} if teacher else for_rl),
    )


def optimisation_of(raw: ConfigDict) -> stages.Optimisation:
    """How a config's parameters move: a student's of the stage "dmd2"."""
    settings = settings_of(optim.Settings, raw.optim, "optim")
    steps = raw.steps * raw.rl.get("updates", 1)
    if raw.stage == DMD2:
        made = distillation.settings_of(raw.distill, settings_of)
        steps = max(distillation.student_updates(made, raw.steps), 1)
    tx = optim.make_tx(settings, steps)
    return stages.Optimisation(tx, raw.ema_decay, raw.accumulation, settings.clip, settings.trained)


def rules_of(raw: ConfigDict) -> tuple[sharding.Rule, ...]:
    """The config's own rules, then the usual ones.

    Raises:
      ConfigError: one that is no pair of strings.
    """
    for rule in raw.sharding:
        if not (isinstance(rule, tuple | list) and [type(part) for part in rule] == [str, str]):
            raise ConfigError(f"sharding: {rule!r} is no pair of strings (regex, spec)")
    return tuple((regex, spec) for regex, spec in raw.sharding) + sharding.RULES


def model_dir_of(raw: ConfigDict, workdir: str | os.PathLike) -> Path:
    """The model directory of a run; a small random one is made in its workdir."""
    return Path(workdir) / f"{raw.model}_model" if raw.model in tiny.PRESETS else Path(raw.model)


def _system_config(raw: ConfigDict, model_dir: Path) -> system.Config:
    if raw.model in tiny.PRESETS:
        try:
            if jax.process_index() == 0 and not (model_dir / "model_index.json").is_file():
                tiny.tiny_model_dir(model_dir, raw.seed, preset=raw.model)
        finally:
            if jax.process_count() > 1:  # all of them, whether they see it already or not
                multihost_utils.sync_global_devices("tiny model")
    config = system.read_config(model_dir, checks.DTYPES.get(raw.dtype, jnp.float32))
    if raw.unet and raw.unet not in unet_config.PRESETS:
        raise ConfigError(
            f"unet is {raw.unet!r}, known are {', '.join(unet_config.PRESETS)}; or leave it empty"
        )
    vae = type(config.vae).from_dict({**config.vae.to_dict(), **raw.autoencoder.to_dict()})
    network = unet_of(raw, unet_config.PRESETS[raw.unet] if raw.unet else config.unet, vae.factor)
    width, channels = config.text_encoder.text.hidden_size, vae.latent_channels
    problems = []
    if network.context_dim != width:
        problems.append(
            f"the U-Net takes texts of width {network.context_dim}, but the text encoder of "
            f"{model_dir} gives {width}"
        )
    if {network.in_channels, network.out_channels} != {channels}:
        problems.append(
            f"the U-Net takes latents of {network.in_channels} channels and gives "
            f"{network.out_channels}, but the autoencoder of {model_dir} has {channels}"
        )
    if raw.stage != AUTOENCODER and problems:
        raise ConfigError("; ".join(problems))
    blocks.split_remat(raw.remat)
    return config._replace(unet=network, vae=vae, remat=raw.remat, pane=raw.pane)


def unet_of(raw: ConfigDict, unet: UNetConfig, factor: int) -> UNetConfig:
    """A U-Net with the config's overrides, for pictures of the size that it is trained at; `factor`
    is the autoencoder's, whose own training says nothing of that."""
    own = {} if raw.stage == AUTOENCODER else {"sample_size": raw.image_size // factor}
    return UNetConfig.from_dict({**unet.to_dict(), **own, **raw.overrides.to_dict()})


def _origins(
    raw: ConfigDict, workdir: str | os.PathLike, model_dir: Path
) -> dict[str, origins.Origin]:
    fresh = "vae" if raw.stage == AUTOENCODER else "unet"
    found = origins.choose(system.NETWORKS, raw.train, fresh, workdir, raw.init_from, model_dir)
    given = [name for name, origin in found.items() if origin == ("model", raw.init_from)]
    if given and raw.model in tiny.PRESETS:
        raise ConfigError(
            f'init_from {raw.init_from} is a model directory, but model is "{raw.model}", whose '
            f"encoders are random; set model to {raw.init_from}, too"
        )
    return found


def _recipe(
    raw: ConfigDict,
    where: str,
    config: system.Config,
    dropout: transforms.Dropout,
    model_dir: Path,
) -> Recipe:
    """Of the data under the key `where`."""
    made_with, with_text = None, raw.stage != AUTOENCODER
    folders = [streams.precomputed_folder(entry, raw.image_size) for entry in raw[where]]
    used = [
        folder is not None and (entry.get("precomputed") or folder.is_dir())
        for entry, folder in zip(raw[where], folders, strict=True)
    ]
    # Rewards need the prompts and sources themselves.
    if raw.stage in (DIFFUSION, DMD2) and any(used):
        made_with = precompute.made_with(
            model_dir, config, image_size=raw.image_size, max_ratio=raw.max_ratio
        )
    found = streams.open_streams(raw[where], raw.image_size, made_with, where)
    recipe = Recipe(
        streams=found,
        batch_size=raw.batch_size,
        image_size=raw.image_size,
        seed=raw.seed,
        max_ratio=raw.max_ratio,
        pixel_multiple=config.pixel_multiple,
        latent_factor=config.vae.factor,
        random_crop=raw.random_crop,
        dropout=dropout,
        text_length=raw.text_length,
    )
    if with_text and not recipe.precomputed:
        prompter = system.load_prompter(model_dir, config.text_encoder)
        recipe = recipe._replace(prompter=prompter)
    return recipe


# --- Opening --------------------------------------------------------------------------------------


def networks_of(raw: ConfigDict) -> tuple[str, ...]:
    """The networks that a stage computes with."""
    return ("vae",) if raw.stage == AUTOENCODER else tuple(system.NETWORKS)


def load_params(run: Run) -> tuple[Params, Params]:
    """The parameters that are trained and those that are not, as host arrays by network; among the
    latter the reference of a run that has one."""
    raw, params = run.raw, {}
    wanted = {name: (name, run.origins[name]) for name in networks_of(raw)}
    for name, (_, origin) in wanted.items():
        if jax.process_index() == 0:
            doing = "trained" if name in raw.train else "frozen"
            logging.info("%s: %s, from %s", name, doing, origin)
    if run.reference:
        wanted[REFERENCE] = "unet", run.reference
    # Runs first, which processes read together: none then waits for one that lacks a directory.
    for key, (name, origin) in sorted(wanted.items(), key=lambda one: one[1][1].kind != "run"):
        params[key] = origins.load(name, origin, getattr(run.config, name), raw.seed)
    trained = {name: params[name] for name in raw.train}
    return trained, {name: tree for name, tree in params.items() if name not in trained}


def make_loss(run: Run):
    """The loss function of a run's stage."""
    if run.raw.stage == AUTOENCODER:
        return stages.autoencoder_loss(run.config, run.loss)
    if run.rl:
        return rollouts.policy_loss(run.config, run.rl.rollouts, run.loss)
    return stages.diffusion_loss(run.config, run.recipe.context_length, run.loss)


def flops_of_step(run: Run) -> float | None:
    """What the mathematics of a step takes, without what is computed again; None where a step is
    more than the gradient of one loss on the data's rows."""
    if run.rl or run.distill:
        return None
    plain = run._replace(config=stages.as_written(run.config))
    shapes = {
        name: pretrained.param_shapes(system.NETWORKS[name], getattr(run.config, name))
        for name in networks_of(run.raw)
    }
    trained = {name: shapes.pop(name) for name in run.raw.train}
    row = pipeline.batch(run.recipe, pipeline.check(run.recipe), range(1), 0)
    return run.raw.batch_size * costs.gradient_flops(make_loss(plain), trained, shapes, row)


def make_stage(run: Run) -> Stage:
    """The stage, with its parameters read and its evaluators ready."""
    trained, frozen = load_params(run)
    if run.distill:
        return _distillation_stage(run, frozen.pop(REFERENCE), trained, frozen)
    loss_fn, how = make_loss(run), run.optimisation
    stage = stages.make_stage(loss_fn, trained, frozen, how, run.mesh, run.rules, _predict_fns(run))
    if not run.rl:
        return stage
    given = run.config, run.rl.rollouts, run.loss, run.rewards, run.recipe, run.mesh
    return stage._replace(
        step_fn=rollouts.make_step(loss_fn, how, run.rl.rollouts.updates),
        batch_fn=reinforcement.make_batch_fn(*given),
    )


def _distillation_stage(run: Run, teacher: Params, trained: Params, frozen: Params) -> Stage:
    score = distillation.score_optimisation(
        run.distill, settings_of(optim.Settings, run.raw.optim, "optim"), run.raw.steps
    )
    both = run.optimisation, run.optimisation._replace(**score)
    step_fn = distillation.make_step(
        run.config, run.distill, run.loss, run.recipe.context_length, *both
    )
    networks = teacher, trained, frozen
    rest = run.loss.gan > 0, run.mesh, run.rules, _predict_fns(run)
    return distillation.make_stage(run.config, step_fn, *networks, *both, *rest)


def _predict_fns(run: Run) -> dict[str, Any]:
    raw, found = run.raw, {}
    shown = (run.validation or run.recipe)._replace(dropout=transforms.NEVER)
    rows = range(min(raw.sample.rows, raw.batch_size))
    plan = pipeline.check(shown)
    batch = pipeline.batch(shown, plan, rows, 0)
    if raw.stage == AUTOENCODER:
        found["reconstruction"] = stages.reconstruction_fn(run.config, run.mesh, batch)
    elif run.distill:
        with_null = distillation.conditions_of(shown, run.loss)
        found["comparison"] = distillation.comparison_fn(
            run.config,
            run.mesh,
            run.distill,
            run.loss,
            pipeline.batch(with_null, plan, rows, 0),
            pipeline.captions(shown, plan, rows, 0),
            shown.context_length,
            raw.sample.steps,
        )
    else:
        null = None
        if raw.sample.guidance != 1:
            without = shown._replace(dropout=transforms.EVERY_TEXT)
            null = pipeline.batch(without, plan, rows, 0)
        asked = pipeline.asked(shown, plan, rows, 0) if run.rl else ()
        found["sample"] = stages.sample_fn(
            run.config,
            run.mesh,
            batch,
            null,
            pipeline.captions(shown, plan, rows, 0),
            shown.context_length,
            raw.sample.steps,
            raw.sample.guidance,
            scored=reinforcement.scores_shown(run.rewards, asked) if run.rl else None,
        )
    if run.distill:
        return found  # a loss on fixed batches would tell nothing of a moving aim
    if run.validation and run.rl:
        given = run.config, run.mesh, shown, run.rewards, raw.sample.steps, raw.sample.guidance
        found["validation"] = reinforcement.validation_fn(*given)
    elif run.validation:
        rows = sharding.own_rows(run.mesh, raw.batch_size)
        batches = [
            sharding.spread(pipeline.batch(shown, plan, rows, k), run.mesh, raw.batch_size)
            for k in range(2)
        ]
        # Its texts may be longer than those that are trained on.
        found["validation"] = stages.validation_fn(make_loss(run._replace(recipe=shown)), batches)
    return found


def meta_of(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps beside the state: enough to go on, to start from it, to export it."""
    return {
        "config": run.raw.to_dict(),
        "data": pipeline.description(run.recipe),
        **origins.meta_of(run.config, run.origins, run.raw.train, run.model_dir),
        **({"reference": origins.described(run.reference)} if run.reference else {}),
        **(student_of(run.distill) if run.distill else {}),
    }


def student_of(settings: distillation.Settings) -> dict[str, Any]:
    """What the checkpoint of a distillation says of the model that it is."""
    inside = f"{distillation.STUDENT}/"
    return {"inside": inside, "mobile": True, "mobile_steps": settings.steps}


def check_resumed(run: Run, saved: Mapping[str, Any]) -> None:
    """Whether a run may go on from a checkpoint with this meta; what else changed is logged.

    Raises:
      mixture.MixtureError: the data changed and that is not allowed.
      ConfigError: the policy's reference, or the student's teacher, is another.
    """
    now = run.reference and origins.described(run.reference)
    if saved.get("reference", now) != now and now:
        raise ConfigError(
            f"the run began with {saved['reference']}, now init_from gives {now}; restore it, "
            "or begin in another workdir"
        )
    found = pipeline.check_unchanged(saved["data"], run.recipe, run.raw.allow_changed_data)
    for line in found:
        logging.warning("going on with changed data: %s", line)
    before, now = (flatten_dict(config, sep=".") for config in (saved["config"], run.raw.to_dict()))
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if key != "data" and origins.plain(old) != origins.plain(new):
            logging.warning("going on with another config: %s was %r, is %r", key, old, new)
