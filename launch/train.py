"""Trains a stage: one command on a CPU, on a chip, on a pod.

    python -m launch.train --config=configs/shapes/phase1_t2i.py --workdir=runs/t2i
    python -m launch.train --config=configs/sft.py:quick --workdir=/tmp/try
    python -m launch.train --config=configs/phase1_t2i_256.py --workdir=/mnt/runs/256 \\
      --config.optim.lr=2e-4 --config.model=DIR

Run again, it goes on from its latest checkpoint. SIGTERM and Ctrl-C save and leave with exit code
75, which is also that of a process that lost another one (or 134, by JAX's abort, where that
noticed first); the same command goes on. On a TPU pod, start it on every host; elsewhere several
processes find each other by --coordinator=HOST:PORT --processes=N --process=I. All of them need to
see the workdir at the same path.
"""

import sys
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import config_flags

from dreamlite_jax import cli, pretrained, system
from dreamlite_jax.data import pipeline
from dreamlite_jax.train import config as train_config
from dreamlite_jax.train import loop, metrics, peers, reinforcement, sharding, signals
from launch import compilation, processes

CONFIG = config_flags.DEFINE_config_file("config", None, "file of configs/", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
connect = processes.define()
use_cache = compilation.define()


def main() -> None:
    if CONFIG.value is None:
        raise cli.CommandError("--config is missing, such as --config=configs/sft.py")
    if "://" in WORKDIR.value:
        raise cli.CommandError(
            f"--workdir {WORKDIR.value} is an address, expected a folder that all processes see"
        )
    use_cache()
    connect()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(None)
    with peers.leaving_with_the_lost():
        run = train_config.opened(CONFIG.value, WORKDIR.value)
        report(run)
        stage = peers.together(lambda: train_config.make_stage(run))
    rows = sharding.own_rows(run.mesh, run.recipe.batch_size)

    def batches_from(step: int):
        raw = run.raw
        batches = pipeline.batches_from(
            run.recipe, step, rows=rows, workers=raw.workers, threads=raw.threads
        )
        return (sharding.spread(batch, run.mesh, run.recipe.batch_size) for batch in batches)

    _, done = loop.fit(
        stage,
        batches_from,
        run.schedule,
        Path(WORKDIR.value),
        train_config.meta_of(run),
        lambda saved: train_config.check_resumed(run, saved),
        train_config.flops_of_step(run) if metrics.peak_flops() else None,
    )
    if not done:
        sys.exit(signals.EXIT_TO_RESUME)


def report(run: train_config.Run) -> None:
    """A few lines on what is about to happen."""
    if jax.process_index():
        return
    mesh, raw = run.mesh, run.raw
    devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
    print(
        f"{devices}, mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}, "
        f"{jax.process_count()} processes"
    )
    numbers = raw.batch_size, raw.accumulation, mesh.size
    if run.rl:
        print(reinforcement.arithmetic(run.rl.rollouts, run.loss, *numbers))
    else:
        print(
            f"batch {raw.batch_size} = {mesh.size} devices x "
            f"{raw.batch_size // mesh.size // raw.accumulation} rows x "
            f"accumulation {raw.accumulation}"
        )
    if mesh.size > 1:
        shapes = {
            name: pretrained.param_shapes(system.NETWORKS[name], getattr(run.config, name))
            for name in raw.train
        }
        for line in sharding.advice(shapes, run.rules, mesh):
            cli.warn(line)
    for name, source, weight in run.recipe.streams:
        print(f"{name}: {len(source)} samples of {source.task}, weight {weight:g}")


if __name__ == "__main__":
    cli.run(main)
