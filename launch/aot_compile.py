"""Compiles a config's train step for a TPU slice, on a machine without one, and says what it costs.

    python -m launch.aot_compile --config=configs/phase3_joint.py --topology=v5e:4x4
    python -m launch.aot_compile --config=configs/phase3_joint.py --topology=v5p:4x4x4 \\
      --config.batch_size=512 --config.remat=none

It is the very step of `launch.train`, with stored latents and embeddings as its batch; neither
data nor weights are needed. Distillation's is two updates, of which --update compiles one alone:
both at once take more memory of the machine that compiles. Reinforcement learning's makes the
updates from a rollout, which is a program of its own: --update=rollout (here without the encoders,
which run in it, too). Needs libtpu (pip install
'dreamlite_jax[tpu]') and, for the released network at 1024 px, some ten minutes. Exit code 3: it
does not fit the chip's memory.
"""

import functools
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, config_flags

from dreamlite_jax import cli, pretrained, system
from dreamlite_jax.data import pipeline
from dreamlite_jax.data.mixture import EDIT, TASKS
from dreamlite_jax.data.prompts import DropCounts
from dreamlite_jax.models import autoencoder, unet_config
from dreamlite_jax.models.primitives import PLAIN
from dreamlite_jax.objectives import dmd2, grpo, nft
from dreamlite_jax.train import (
    checks,
    costs,
    distillation,
    loop,
    optim,
    reinforcement,
    rollouts,
    sharding,
    stages,
)
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train.metrics import PEAK_FLOPS
from dreamlite_jax.train.state import new_state
from dreamlite_jax.train.update import StepFn, make_update

DOES_NOT_FIT = 3
BOTH, ROLLOUT = "both", "rollout"
# By stage, which updates there are to choose from.
STAGES = {
    checks.DIFFUSION: (BOTH,),
    checks.DMD2: (BOTH, distillation.STUDENT, distillation.FAKE),
    checks.GRPO: (BOTH, ROLLOUT),
    checks.NFT: (BOTH, ROLLOUT),
}

CONFIG = config_flags.DEFINE_config_file("config", None, "file of configs/", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "kind and shape of the slice")
UPDATE = flags.DEFINE_enum(
    "update",
    BOTH,
    [BOTH, distillation.STUDENT, distillation.FAKE, ROLLOUT],
    "of distillation: which; of reinforcement learning: the rollout instead",
)
HBM = flags.DEFINE_float("hbm_gib", None, "memory of a device, GiB; default: the chip's")
JSON = flags.DEFINE_string("json", None, "file for the figures")
HLO = flags.DEFINE_string("hlo", None, "file for the compiled program's text")


def main() -> None:
    if CONFIG.value is None:
        raise cli.CommandError("--config is missing, such as --config=configs/phase3_joint.py")
    raw = CONFIG.value
    if raw.stage not in STAGES:
        raise cli.CommandError(
            f"the stage {raw.stage!r} is not compiled here, only {' and '.join(STAGES)}"
        )
    if UPDATE.value not in STAGES[raw.stage]:
        raise cli.CommandError(
            f"--update={UPDATE.value} is of another stage; the stage {raw.stage!r} has "
            f"{', '.join(STAGES[raw.stage])}"
        )
    devices = topology(TOPOLOGY.value)
    kind = devices[0].device_kind
    mesh = sharding.make_mesh(raw.mesh.data, raw.mesh.fsdp, devices)
    if raw.batch_size % (mesh.size * raw.accumulation):
        raise cli.CommandError(
            f"batch_size {raw.batch_size} is no multiple of {mesh.size} devices x accumulation "
            f"{raw.accumulation}"
        )
    step_fn, arguments, flops = abstract_step(raw, mesh)
    began = time.monotonic()
    lowered = loop.compiled(step_fn, arguments[0]).lower(*arguments)
    print(
        f"lowered in {time.monotonic() - began:.0f} s, compiling for {TOPOLOGY.value}", flush=True
    )
    began = time.monotonic()
    program = compiled(lowered)
    if HLO.value:
        Path(HLO.value).write_text(program.as_text())
    found = costs.of(program)
    figures = {
        "config": raw.to_dict(),
        "topology": TOPOLOGY.value,
        "rows_per_device": raw.batch_size // mesh.size,
        "compile_seconds": time.monotonic() - began,
        "model_flops": flops / mesh.size,
        **found._asdict(),
    }
    share = report(found, figures, arguments[0], kind, mesh)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps({**figures, **share}, indent=1, default=str) + "\n")
    room = hbm(kind)
    if found.memory > room:
        too_large(found.memory, room)


def topology(name: str) -> list[Any]:
    """The devices of a slice that is not there."""
    from jax.experimental import topologies

    # Or libtpu asks a cloud's metadata server, and lets no other process load it.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # the plugin has errors of its own
        if "libtpu" in str(error) and "open" in str(error):
            raise cli.CommandError(
                "libtpu is not installed: pip install 'dreamlite_jax[tpu]'"
            ) from error
        raise cli.CommandError(
            f"--topology {name}: {' '.join(str(error).split())[:200]}; expected a kind and a shape "
            "such as v5e:4x4, v5p:4x4x4, v6e:4x4"
        ) from error
    if devices[0].device_kind not in costs.CHIPS:
        known = ", ".join(costs.CHIPS)
        raise cli.CommandError(f"--topology {name}: {devices[0].device_kind}, known are {known}")
    return list(devices)


class Step(NamedTuple):
    """What is compiled, shapes of its arguments, and FLOPs of a row's gradients."""

    fn: StepFn
    state: Any
    frozen: Any
    batch: Any
    flops: float


def abstract_step(raw: ConfigDict, mesh: Mesh) -> tuple[Any, tuple, float]:
    """The step of a config, shapes of its arguments on the mesh, and the FLOPs of its gradient."""
    if tuple(raw.train) != ("unet",):
        raise cli.CommandError(
            f"train is {tuple(raw.train)}, only the U-Net's step is compiled here"
        )
    settings = train_config.settings_of(train_config.STAGES[raw.stage], raw.loss, "loss")
    network = unet_config.PRESETS.get(raw.unet or "dreamlite")
    if network is None:
        raise cli.CommandError(f"unet is {raw.unet!r}, known are {', '.join(unet_config.PRESETS)}")
    network = type(network).from_dict({**network.to_dict(), **raw.overrides.to_dict()})
    config = system.Config(
        unet=network,
        vae=autoencoder.TAESDXL,
        text_encoder=None,
        dtype=checks.DTYPES[raw.dtype],
        remat=raw.remat,
        pane=raw.pane,
        ops=sharding.pinned(mesh),
    )
    rl = None
    if raw.stage in checks.REWARDED:
        rl = reinforcement.settings_of(raw.rl, train_config.settings_of)
        numbers = raw.batch_size, raw.accumulation, mesh.size
        if wrong := reinforcement.problems(rl, settings, *numbers, tasks_of(raw)):
            raise cli.CommandError("; ".join(wrong))
    batch = abstract_batch(raw, config, rl)
    context_length = batch["context"].shape[1]
    optimisation = train_config.optimisation_of(raw)
    trained = {"unet": pretrained.param_shapes(pretrained.UNET, network)}
    start = functools.partial(new_state, tx=optimisation.tx)
    state = jax.eval_shape(start, trained)
    if raw.stage == checks.DMD2:
        step = distilled_step(raw, config, settings, optimisation, trained, state, batch)
    elif rl:
        networks = config, rl.rollouts, settings, mesh
        step = reinforced_step(*networks, optimisation, trained, state, batch)
    else:
        loss_fn = stages.diffusion_loss(config, context_length, settings)
        plain_loss = stages.diffusion_loss(plain(config), context_length, settings)
        flops = costs.gradient_flops(plain_loss, trained, {}, one_row(batch))
        step = Step(make_update(loss_fn, *optimisation), state, {}, batch, flops)

    rules, rows = train_config.rules_of(raw), NamedSharding(mesh, sharding.ROWS)
    state, frozen = (
        placed(x, sharding.shardings(x, rules, mesh)) for x in (step.state, step.frozen)
    )
    spread = placed(step.batch, jax.tree.map(lambda _: rows, step.batch))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.fn, (state, frozen, spread, key), raw.batch_size * step.flops


def plain(config: system.Config) -> system.Config:
    """As the network is written, whose arithmetic is the model's."""
    return config._replace(remat="none", ops=PLAIN)


def one_row(batch: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)


def distilled_step(
    raw: ConfigDict,
    config: system.Config,
    loss: dmd2.Settings,
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
        as_written = functools.partial(prepared, config=plain(config))
        return jax.eval_shape(as_written, trained, batch, jax.random.key(0))

    losses = distillation.make_losses(config, settings, loss)
    networks = {distillation.TEACHER: trained["unet"], distillation.FAKE: trained}
    row = shapes_of(one_row(batch))
    as_written = distillation.make_losses(plain(config), settings, loss)
    flops = distillation.Losses(
        *(costs.gradient_flops(loss_fn, trained, networks, row) for loss_fn in as_written)
    )

    if UPDATE.value == distillation.STUDENT:
        update = make_update(losses.student, *student)
        return Step(update, state, networks, shapes_of(batch), flops.student)
    if UPDATE.value == distillation.FAKE:
        update = make_update(losses.fake, *fake)

        def drawn_and_learnt(state: Any, networks: Any, batch: Any, key: Any) -> Any:
            for_rows, for_fake = jax.random.split(key)
            return update(state, {}, prepared(networks, batch, for_rows), for_fake)

        return Step(drawn_and_learnt, state, trained, batch, flops.fake)
    step_fn = distillation.make_step(config, settings, loss, length, student, fake)
    states = {distillation.STUDENT: state, distillation.FAKE: state}
    return Step(step_fn, states, {distillation.TEACHER: trained["unet"]}, batch, sum(flops))


def reinforced_step(
    config: system.Config,
    settings: rollouts.Rollouts,
    loss: grpo.Settings | nft.Settings,
    mesh: Mesh,
    optimisation: stages.Optimisation,
    trained: Any,
    state: Any,
    batch: Any,
) -> Step:
    """The updates from a rollout, or what the devices do of the rollout: pictures are drawn,
    decoded and made ready to be learnt from; their rewards are asked elsewhere. The rollout's
    arithmetic is that of the networks' velocities and of decoding. Not in the updates' memory: the
    frozen networks, of which they make no use but which stay.

    Args:
      batch: of prompts.
    """
    frozen = {
        "vae": pretrained.param_shapes(pretrained.AUTOENCODER, config.vae),
        rollouts.REFERENCE: trained["unet"],
    }
    length = batch["context"].shape[1]
    rollout = rollouts.make_rollout(config, settings, loss, length, mesh)
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    rows, pictures, _ = jax.eval_shape(rollout, trained, frozen, batch, key, number)
    if UPDATE.value == ROLLOUT:

        def drawn(state: Any, frozen: Any, batch: Any, key: Any) -> Any:
            return state, rollout(state.params, frozen, batch, key, 0)

        flops = rollout_flops(plain(config), settings, rows, trained, frozen)
        return Step(drawn, state, frozen, batch, flops)
    scalars = jax.ShapeDtypeStruct(pictures.shape[:1], jnp.float32)
    rows |= {"advantage": scalars, "weight": scalars}
    policy_loss = rollouts.policy_loss(config, settings, loss)
    as_written = rollouts.policy_loss(plain(config), settings, loss)
    flops = costs.gradient_flops(as_written, trained, {}, one_row(rows))
    step_fn = rollouts.make_step(policy_loss, optimisation, settings.updates)
    return Step(step_fn, state, frozen, {"rows": rows, "metrics": {}}, flops)


def rollout_flops(
    config: system.Config, settings: rollouts.Rollouts, rows: Any, trained: Any, frozen: Any
) -> float:
    """Of a row: a velocity for each of the sampler's steps; at each random step the reference's,
    at each noise that is learnt from the policy's and the reference's; decoding."""
    row = one_row(rows)
    seen = 1 if "logp" in row else 2
    velocities = settings.process.steps + seen * row["sigma"].shape[1]

    def velocity(params: Any, given: Any) -> Any:
        latents = given["source"]
        velocity_fn = rollouts.policy(config, params["unet"], given, settings.guidance)
        return velocity_fn(latents, jnp.float32(0.5))

    def decoded(params: Any, latents: Any) -> Any:
        return system.decode_latents(config, params["vae"], latents)

    given = row["given"]
    return velocities * costs.flops_of(velocity, trained, given) + costs.flops_of(
        decoded, frozen, given["source"]
    )


def tasks_of(raw: ConfigDict) -> tuple[str, ...]:
    """The tasks of a config's data, which is not opened here, each once."""
    for k, entry in enumerate(raw.data):
        if entry.get("task") not in TASKS:
            raise cli.CommandError(f"data[{k}] names no task, which is {' or '.join(TASKS)}")
    return tuple(dict.fromkeys(entry["task"] for entry in raw.data))


def abstract_batch(
    raw: ConfigDict, config: system.Config, rl: reinforcement.Settings | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of stored latents and embeddings, in the square bucket."""
    edits = EDIT in tasks_of(raw)
    if problems := checks.without_pane(raw, edits):
        raise cli.CommandError("; ".join(problems))
    b, side = raw.batch_size, raw.image_size // config.vae.factor
    if rl:
        b //= rl.rollouts.group  # prompts
    drops = (getattr(DropCounts(), pipeline.MODES[task]) for task in tasks_of(raw))
    tokens = (raw.text_length or pipeline.default_text_length(edits)) - min(drops)
    latents = (b, side, side, config.vae.latent_channels)
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


def compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        sizes = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm", text)
        if not sizes:
            fail(" ".join(text.split())[:300])
        scale = {"G": 2**30, "M": 2**20}
        too_large(float(sizes[1]) * scale[sizes[2]], float(sizes[3]) * scale[sizes[4]])


def hbm(kind: str) -> float:
    return costs.CHIPS[kind].hbm if HBM.value is None else HBM.value * costs.GIB


def too_large(needed: float, room: float) -> None:
    fail(
        f"does not fit: {needed / costs.GIB:.1f} GiB a device of {room / costs.GIB:.1f}; lower "
        "batch_size, raise accumulation, or rematerialise more (remat)"
    )


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(DOES_NOT_FIT)


def report(
    found: costs.Costs, figures: dict, state: Any, kind: str, mesh: Mesh
) -> dict[str, float]:
    """Prints the figures; returns the shares of the peak that they imply."""
    trained = state[distillation.STUDENT] if isinstance(state, dict) else state
    params = sum(x.size for x in jax.tree.leaves(trained.params))
    held = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
    )
    peak = PEAK_FLOPS[kind]
    seconds = {"roofline": found.roofline_seconds(kind), "cycles": found.cycle_seconds(kind)}
    known = ["cycles"] if found.looped else list(seconds)
    shares = {
        f"{name}_model_share": figures["model_flops"] / seconds[name] / peak for name in known
    }
    if not found.looped:
        shares |= {f"{name}_hardware_share": found.flops / seconds[name] / peak for name in known}
    gib, tera = costs.GIB, 1e12
    least, once = ("at least ", ", of every loop one turn") if found.looped else ("", "")
    lines = {
        "parameters": f"{params:,} trained",
        "devices": f"{mesh.size} x {kind}, data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}, "
        f"{figures['rows_per_device']} rows each",
        "memory": f"{found.memory / gib:.2f} GiB of {hbm(kind) / gib:.0f}: arguments "
        f"{found.arguments / gib:.2f} (state {held / gib:.2f}), temporary "
        f"{found.temporary / gib:.2f}, outputs {found.outputs / gib:.2f}",
        "arithmetic": f"{least}{found.flops / tera:.2f} TFLOP{once}; the model's "
        f"{figures['model_flops'] / tera:.2f}",
        "traffic": f"{least}{found.bytes / gib:.1f} GiB{once}",
        **{name: _time(seconds[name], shares, name) for name in seconds},
        "matmul": f"the cycles of a large one imply {100 * matmul_share(mesh, kind):.0f} % of peak",
        "compiled in": f"{figures['compile_seconds']:.0f} s",
    }
    for name, (count, size) in sorted(found.collectives.items()):
        lines[name] = f"{count:.0f} of {size / 2**20:,.0f} MiB in all"
    for name, line in lines.items():
        print(f"{name:18} {line}")
    return {**{f"{name}_seconds": value for name, value in seconds.items()}, **shares}


def _time(seconds: float, shares: dict[str, float], name: str) -> str:
    said = f"{1e3 * seconds:.1f} ms"
    if model := shares.get(f"{name}_model_share"):
        said += f", {100 * model:.0f} % of peak for the model's arithmetic"
    if all_ := shares.get(f"{name}_hardware_share"):
        said += f", {100 * all_:.0f} % for all"
    return said


def matmul_share(mesh: Mesh, kind: str, side: int = 16384) -> float:
    """What the same estimate by cycles makes of a matmul that runs near the peak."""
    square = jax.ShapeDtypeStruct(
        (side, side), jnp.bfloat16, sharding=NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    found = costs.of(jax.jit(jnp.matmul).lower(square, square).compile())
    return 2 * side**3 / found.cycle_seconds(kind) / PEAK_FLOPS[kind]


if __name__ == "__main__":
    cli.run(main)
