"""The step of a config by the shapes of its arguments alone: neither data nor weights are needed.

What it is compiled for need not be there. Batches hold stored latents and embeddings; a rollout is
taken without the encoders, which run in it, too.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dreamlite_jax import pretrained, system
from dreamlite_jax.data import pipeline, transforms
from dreamlite_jax.data.mixture import EDIT, TASKS
from dreamlite_jax.data.prompts import DropCounts
from dreamlite_jax.data.transforms import Size
from dreamlite_jax.models import autoencoder, unet_config
from dreamlite_jax.models.qwen3_vl.config import QWEN3_VL_2B
from dreamlite_jax.objectives import dmd2, grpo, nft
from dreamlite_jax.train import (
    checks,
    costs,
    distillation,
    optim,
    reinforcement,
    rollouts,
    sharding,
    stages,
)
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train.state import networks, new_state
from dreamlite_jax.train.update import StepFn, make_update

STEP, ROLLOUT = "step", "rollout"
# By stage, what there is to choose from.
STAGES = {
    checks.DIFFUSION: (STEP,),
    checks.DMD2: (STEP, distillation.STUDENT, distillation.FAKE),
    checks.GRPO: (STEP, ROLLOUT),
    checks.NFT: (STEP, ROLLOUT),
}


class Step(NamedTuple):
    """What is compiled, shapes of its arguments, and FLOPs of the model's arithmetic for a row."""

    fn: StepFn
    state: Any
    frozen: Any
    batch: Any
    flops: float
    beside: Any = None  # parameters that it makes no use of, and a run holds


class Abstract(NamedTuple):
    """A step on a mesh."""

    fn: StepFn
    arguments: tuple
    beside: Any
    flops: float  # of the whole batch


def step_of(
    raw: ConfigDict, mesh: Mesh, update: str = STEP, bucket: Size | None = None
) -> Abstract:
    """The step of a config or what `update` says of it, shapes of its arguments on the mesh and of
    what a run holds beside them (networks, and the parameters before a step that is logged), and
    the FLOPs of the model's arithmetic.

    Args:
      bucket: (height, width) in pixels, one of the config's; None: the square one.

    Raises:
      ConfigError: there is no such step, or no such bucket.
    """
    if tuple(raw.train) != ("unet",):
        raise checks.ConfigError(
            f"train is {tuple(raw.train)}, only the U-Net's step is compiled here"
        )
    loss = train_config.settings_of(train_config.STAGES[raw.stage], raw.loss, "loss")
    config = system_of(raw, mesh)
    rl, tasks = None, tasks_of(raw)
    if raw.stage in checks.REWARDED:
        rl = reinforcement.settings_of(raw.rl, train_config.settings_of)
        numbers = raw.batch_size, raw.accumulation, mesh.size
        if wrong := reinforcement.problems(rl, loss, *numbers, tasks):
            raise checks.ConfigError("; ".join(wrong))
    batch = batch_of(raw, config, tasks, rl, bucket)
    context_length = batch["context"].shape[1]
    optimisation = train_config.optimisation_of(raw)
    trained = {"unet": pretrained.param_shapes(pretrained.UNET, config.unet)}
    start = functools.partial(new_state, tx=optimisation.tx)
    state = jax.eval_shape(start, trained)
    encoders = {"vae": pretrained.param_shapes(pretrained.AUTOENCODER, config.vae)}
    if config.unet.context_dim == QWEN3_VL_2B.text.hidden_size:
        given = pretrained.TEXT_ENCODER, QWEN3_VL_2B
        encoders["text_encoder"] = pretrained.param_shapes(*given)
    common = optimisation, trained, state, batch
    if raw.stage == checks.DMD2:
        step = distilled_step(raw, config, loss, update, *common)
    elif rl:
        step = reinforced_step(config, rl.rollouts, loss, update, mesh, encoders, *common)
    else:
        loss_fn = stages.diffusion_loss(config, context_length, loss)
        plain_loss = stages.diffusion_loss(stages.as_written(config), context_length, loss)
        flops = costs.gradient_flops(plain_loss, trained, {}, one_row(batch))
        step = Step(make_update(loss_fn, *optimisation), state, {}, batch, flops)

    rules, rows = train_config.rules_of(raw), NamedSharding(mesh, sharding.ROWS)
    # Compiled without what the step makes no use of, but held by a run all the same.
    unused = {name: net for name, net in encoders.items() if name not in step.frozen}
    if update == STEP:  # one that is logged; the others have none
        unused["before"] = {name: one.params for name, one in networks(step.state).items()}
    state, frozen, beside = (
        placed(x, sharding.shardings(x, rules, mesh))
        for x in (step.state, step.frozen, {**unused, **(step.beside or {})})
    )
    spread = placed(step.batch, jax.tree.map(lambda _: rows, step.batch))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Abstract(step.fn, (state, frozen, spread, key), beside, raw.batch_size * step.flops)


def system_of(raw: ConfigDict, mesh: Mesh) -> system.Config:
    """The networks of a config, with the released autoencoder, and without a text encoder: texts
    come encoded.

    Raises:
      ConfigError: no such U-Net.
    """
    network = unet_config.PRESETS.get(raw.unet or "dreamlite")
    if network is None:
        raise checks.ConfigError(
            f"unet is {raw.unet!r}, known are {', '.join(unet_config.PRESETS)}"
        )
    return system.Config(
        unet=train_config.unet_of(raw, network, autoencoder.TAESDXL.factor),
        vae=autoencoder.TAESDXL,
        text_encoder=None,
        dtype=checks.DTYPES[raw.dtype],
        remat=raw.remat,
        pane=raw.pane,
        ops=sharding.pinned(mesh),
    )


def one_row(batch: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)


def distilled_step(
    raw: ConfigDict,
    config: system.Config,
    loss: dmd2.Settings,
    update: str,
    optimisation: stages.Optimisation,
    trained: Any,
    state: Any,
    batch: Any,
) -> Step:
    """Distillation's, or one of its updates. The arithmetic of the step is both networks': the
    compiler counts a branch of `lax.cond` as always taken, and a loop of unknown length, which
    draws the samples, once.

    Args:
      trained, state: of one network.
    """
    settings = distillation.settings_of(raw.distill, train_config.settings_of)
    own = train_config.settings_of(optim.Settings, raw.optim, "optim")
    score = distillation.score_optimisation(settings, own, raw.steps)
    student, fake = optimisation, optimisation._replace(**score)
    length = batch["context"].shape[1]

    def prepared(networks: Any, batch: Any, key: Any, config: system.Config = config) -> Any:
        return distillation.prepared(config, settings, length, networks, batch, key)

    def shapes_of(batch: Any) -> Any:
        shown = functools.partial(prepared, config=stages.as_written(config))
        return jax.eval_shape(shown, trained, batch, jax.random.key(0))

    losses = distillation.make_losses(config, settings, loss)
    networks = {distillation.TEACHER: trained["unet"], distillation.FAKE: trained}
    row = shapes_of(one_row(batch))
    as_written = distillation.make_losses(stages.as_written(config), settings, loss)

    def flops(*names: str) -> float:
        found = (getattr(as_written, name) for name in names)
        return sum(costs.gradient_flops(loss_fn, trained, networks, row) for loss_fn in found)

    if update == distillation.STUDENT:
        learn = make_update(losses.student, *student)
        return Step(learn, state, networks, shapes_of(batch), flops(update))
    if update == distillation.FAKE:
        learn = make_update(losses.fake, *fake)

        def drawn_and_learnt(state: Any, networks: Any, batch: Any, key: Any) -> Any:
            for_rows, for_fake = jax.random.split(key)
            return learn(state, {}, prepared(networks, batch, for_rows), for_fake)

        return Step(drawn_and_learnt, state, trained, batch, flops(update))
    step_fn = distillation.make_step(config, settings, loss, length, student, fake)
    states = {distillation.STUDENT: state, distillation.FAKE: state}
    teacher = {distillation.TEACHER: trained["unet"]}
    return Step(step_fn, states, teacher, batch, flops(*losses._fields))


def reinforced_step(
    config: system.Config,
    settings: rollouts.Rollouts,
    loss: grpo.Settings | nft.Settings,
    update: str,
    mesh: Mesh,
    encoders: Any,
    optimisation: stages.Optimisation,
    trained: Any,
    state: Any,
    batch: Any,
) -> Step:
    """The updates from a rollout, or what the devices do of the rollout: pictures are drawn,
    decoded and made ready to be learnt from; their rewards are asked elsewhere.

    Args:
      batch: of prompts.
    """
    frozen = {"vae": encoders["vae"], rollouts.REFERENCE: trained["unet"]}
    length = batch["context"].shape[1]
    rollout = rollouts.make_rollout(config, settings, loss, length, mesh)
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    rows, pictures, _ = jax.eval_shape(rollout, trained, frozen, batch, key, number)
    if update == ROLLOUT:

        def drawn(state: Any, frozen: Any, batch: Any, key: Any) -> Any:
            # With the state, which lies in the memory meanwhile.
            return state, rollout(state.params, frozen, batch, key, 0)

        flops = rollout_flops(
            stages.as_written(config), settings, loss, rows["given"], trained, frozen
        )
        return Step(drawn, state, frozen, batch, flops)
    scalars = jax.ShapeDtypeStruct(pictures.shape[:1], jnp.float32)
    rows |= {"advantage": scalars, "weight": scalars}
    policy_loss = rollouts.policy_loss(config, settings, loss)
    as_written = rollouts.policy_loss(stages.as_written(config), settings, loss)
    flops = costs.gradient_flops(as_written, trained, {}, one_row(rows))
    step_fn = rollouts.make_step(policy_loss, optimisation, settings.updates)
    beside = {rollouts.REFERENCE: trained["unet"]}
    return Step(step_fn, state, {}, {"rows": rows, "metrics": {}}, flops, beside)


def rollout_flops(
    config: system.Config,
    settings: rollouts.Rollouts,
    loss: grpo.Settings | nft.Settings,
    given: Any,
    trained: Any,
    frozen: Any,
) -> float:
    """Of a picture: a velocity for each of the sampler's steps; at each random step the
    reference's, or at each noise that is learnt from the policy's and the reference's; decoding.

    Args:
      given: `stages.conditions` of pictures.
    """
    forward = isinstance(loss, nft.Settings)
    more = 2 * loss.levels if forward else settings.process.size
    given = one_row(given)

    def velocity(params: Any, given: Any) -> Any:
        velocity_fn = rollouts.policy(config, params["unet"], given, settings.guidance)
        return velocity_fn(given["source"], jnp.float32(0.5))

    def decoded(params: Any, latents: Any) -> Any:
        return system.decode_latents(config, params["vae"], latents)

    once = costs.flops_of(velocity, trained, given)
    decoding = costs.flops_of(decoded, frozen, given["source"])
    return (settings.process.steps + more) * once + decoding


def tasks_of(raw: ConfigDict) -> tuple[str, ...]:
    """The tasks of a config's data, which is not opened here, each once."""
    for k, entry in enumerate(raw.data):
        if entry.get("task") not in TASKS:
            raise checks.ConfigError(f"data[{k}] names no task, which is {' or '.join(TASKS)}")
    return tuple(dict.fromkeys(entry["task"] for entry in raw.data))


def batch_of(
    raw: ConfigDict,
    config: system.Config,
    tasks: Sequence[str],
    rl: reinforcement.Settings | None,
    bucket: Size | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of stored latents and embeddings; `bucket` as in `step_of`."""
    if bucket is None:
        bucket = raw.image_size, raw.image_size
    else:
        known = transforms.aspect_buckets(raw.image_size, config.pixel_multiple, raw.max_ratio)
        if bucket not in known:
            said = ", ".join(f"{height}x{width}" for height, width in known)
            raise checks.ConfigError(f"{bucket[0]}x{bucket[1]} is no bucket of the config: {said}")
    edits = EDIT in tasks
    if problems := checks.without_pane(raw, edits):
        raise checks.ConfigError("; ".join(problems))
    b, (height, width) = raw.batch_size, (side // config.vae.factor for side in bucket)
    if rl:
        b //= rl.rollouts.group  # prompts
    drops = (getattr(DropCounts(), pipeline.MODES[task]) for task in tasks)
    tokens = (raw.text_length or pipeline.default_text_length(edits)) - min(drops)
    latents = (b, height, width, config.vae.latent_channels)
    shapes = {
        "task": ((b,), jnp.int32),
        "time_ids": ((b, 2), jnp.float32),
        "has_source": ((b,), bool),
        "changed": (latents[:3], bool),
        "target_latents": (latents, jnp.float32),
        "context": ((b, tokens, config.unet.context_dim), jnp.float32),
        "context_mask": ((b, tokens), bool),
    }
    if edits:
        shapes["source_latents"] = (latents, jnp.float32)
    if raw.stage == checks.DMD2 or (rl and rl.rollouts.guidance != 1):
        texts = {name: shapes[name] for name in ("context", "context_mask")}
        shapes |= {f"null_{name}": shape for name, shape in texts.items()}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def placed(tree: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )
