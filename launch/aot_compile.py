"""Compiles a config's train step for a TPU slice, on a machine without one, and says what it costs.

    python -m launch.aot_compile --config=configs/phase3_joint.py --topology=v5e:4x4
    python -m launch.aot_compile --config=configs/phase3_joint.py --topology=v5p:4x4x4 \\
      --config.batch_size=512 --config.remat=none

It is the very step of `launch.train`, with stored latents and embeddings as its batch; neither
data nor weights are needed. Distillation's is two updates, of which --update compiles one alone:
both at once take more memory of the machine that compiles. Reinforcement learning's makes the
updates from a rollout, which is a program of its own: --update=rollout (here without the encoders,
which run in it, too). A config with aspect ratios has a program for each bucket, of which --bucket
names one: at sizes that the kernels for TPUs do not take, plain operations take their place, which
need more memory. Needs libtpu (pip install '.[tpu]') and, for the released network at 1024 px,
some ten minutes. Exit code 3: it does not fit the chip's memory.
"""

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
from ml_collections import config_flags

from dreamlite_jax import cli
from dreamlite_jax.train import abstract, costs, distillation, loop, sharding
from dreamlite_jax.train.abstract import ROLLOUT, STAGES, STEP
from dreamlite_jax.train.metrics import PEAK_FLOPS

DOES_NOT_FIT = 3
CONFIG = config_flags.DEFINE_config_file("config", None, "file of configs/", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "kind and shape of the slice")
SLICES = flags.DEFINE_integer("slices", 1, "so many of them, joined by `mesh.data`", lower_bound=1)
UPDATE = flags.DEFINE_enum(
    "update",
    STEP,
    [STEP, distillation.STUDENT, distillation.FAKE, ROLLOUT],
    "one of distillation's two updates alone; reinforcement learning's rollout, which its step is "
    "not part of",
)
BUCKET = flags.DEFINE_string(
    "bucket", None, "HEIGHTxWIDTH of the pictures, where max_ratio is above 1; default: square"
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
            f"the stage {raw.stage!r} is not compiled here, only {', '.join(STAGES)}"
        )
    if UPDATE.value not in STAGES[raw.stage]:
        raise cli.CommandError(
            f"--update={UPDATE.value} is of another stage, the stage {raw.stage!r} has only "
            f"{', '.join(STAGES[raw.stage])}"
        )
    devices = topology(TOPOLOGY.value, SLICES.value)
    kind = devices[0].device_kind
    mesh = sharding.make_mesh(raw.mesh.data, raw.mesh.fsdp, devices)
    if raw.batch_size % (mesh.size * raw.accumulation):
        raise cli.CommandError(
            f"batch_size {raw.batch_size} is no multiple of {mesh.size} devices x accumulation "
            f"{raw.accumulation}"
        )
    step_fn, arguments, beside, flops = abstract.step_of(raw, mesh, UPDATE.value, bucket())
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
        "slices": SLICES.value,
        "bucket": BUCKET.value,
        "rows_per_device": raw.batch_size // mesh.size,
        "compile_seconds": time.monotonic() - began,
        "model_flops": flops / mesh.size,
        "beside": on_a_device(beside),
        **found._asdict(),
    }
    times = report(found, figures, arguments[0], kind, mesh)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps({**figures, **times}, indent=1, default=str) + "\n")
    needed, room = found.memory + figures["beside"], hbm(kind)
    if needed > room:
        too_large(needed, room)


def bucket() -> tuple[int, int] | None:
    """(height, width) of --bucket."""
    if BUCKET.value is None:
        return None
    if not (found := re.fullmatch(r"(\d+)x(\d+)", BUCKET.value)):
        raise cli.CommandError(f"--bucket={BUCKET.value}: expected HEIGHTxWIDTH, such as 832x1216")
    return int(found[1]), int(found[2])


def topology(name: str, slices: int = 1) -> list[Any]:
    """The devices of slices that are not there."""
    from jax.experimental import topologies

    # Or libtpu asks a cloud's metadata server, and lets no other process load it.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    try:
        devices = topologies.get_topology_desc(name, "tpu", num_slices=slices).devices
    except Exception as error:  # the plugin has errors of its own
        if "libtpu" in str(error) and "open" in str(error):
            raise cli.CommandError("libtpu is not installed: pip install '.[tpu]'") from error
        raise cli.CommandError(
            f"--topology {name}: {' '.join(str(error).split())[:200]}; expected a kind and a shape "
            "such as v5e:4x4, v5p:4x4x4, v6e:4x4"
        ) from error
    if devices[0].device_kind not in costs.CHIPS:
        known = ", ".join(costs.CHIPS)
        raise cli.CommandError(f"--topology {name}: {devices[0].device_kind}, known are {known}")
    return list(devices)


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
    """Prints the figures; returns times, and the shares of the peak that they imply."""
    trained = state[distillation.STUDENT] if isinstance(state, dict) else state
    params = sum(x.size for x in jax.tree.leaves(trained.params))
    peak, model = PEAK_FLOPS[kind], figures["model_flops"]
    estimates = {
        "roofline": Estimate(found.roofline_seconds(kind), not found.looped),
        "cycles": Estimate(found.cycle_seconds(kind), not found.unknown),
    }
    gib, tera = costs.GIB, 1e12
    least, once = ("at least ", ", of every loop one turn") if found.looped else ("", "")
    lines = {
        "parameters": f"{params:,} trained",
        "devices": f"{mesh.size} x {kind}, data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}, "
        f"{figures['rows_per_device']} rows each",
        "memory": f"{found.memory / gib:.2f} GiB of {hbm(kind) / gib:.0f}: arguments "
        f"{found.arguments / gib:.2f} (state {on_a_device(state) / gib:.2f}), temporary "
        f"{found.temporary / gib:.2f}, outputs {found.outputs / gib:.2f}",
        "beside it": f"{figures['beside'] / gib:.2f} GiB of parameters that it makes no use of",
        "arithmetic": f"{least}{found.flops / tera:.2f} TFLOP{once}; the model's "
        f"{model / tera:.2f}",
        "traffic": f"{least}{found.bytes / gib:.1f} GiB{once}",
    }
    times = {}
    for name, (seconds, whole) in estimates.items():
        if not whole:
            lines[name] = f"at least {1e3 * seconds:.1f} ms, of loops one turn"
            continue
        share = times[f"{name}_model_share"] = model / seconds / peak
        times[f"{name}_seconds"] = seconds
        lines[name] = (
            f"{1e3 * seconds:.1f} ms, {100 * share:.0f} % of peak for the model's arithmetic"
        )
        if not found.looped:
            share = times[f"{name}_hardware_share"] = found.flops / seconds / peak
            lines[name] += f", {100 * share:.0f} % for all"
    lines["matmul"] = (
        f"the cycles of a large one imply {100 * matmul_share(mesh, kind):.0f} % of peak"
    )
    lines["compiled in"] = f"{figures['compile_seconds']:.0f} s"
    for name, (count, size) in sorted(found.collectives.items()):
        lines[name] = f"{count:.0f} of {size / 2**20:,.0f} MiB in all"
    for name, line in lines.items():
        print(f"{name:18} {line}")
    return times


class Estimate(NamedTuple):
    seconds: float
    whole: bool  # or of loops one turn alone


def on_a_device(tree: Any) -> int:
    """Bytes of the shards of a tree of placed shapes that one device holds."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def matmul_share(mesh: Mesh, kind: str, side: int = 16384) -> float:
    """What the same estimate by cycles makes of a matmul that runs near the peak."""
    square = jax.ShapeDtypeStruct(
        (side, side), jnp.bfloat16, sharding=NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    found = costs.of(jax.jit(jnp.matmul).lower(square, square).compile())
    return 2 * side**3 / found.cycle_seconds(kind) / PEAK_FLOPS[kind]


if __name__ == "__main__":
    cli.run(main)
