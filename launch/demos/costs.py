"""What the mathematics of one training step of a config takes, for comparisons at equal compute.

    python -m launch.demos.costs --config=configs/shapes/sft.py --workdir=DIR --out=FILE.json

Writes {"flops": of a step}.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dreamlite_jax import cli
from dreamlite_jax.train import config as train_config
from launch.files import write_json

CONFIG = config_flags.DEFINE_config_file("config", None, "file of configs/", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "of a run of this config", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file to write", required=True)


def main() -> None:
    run = train_config.opened(CONFIG.value, WORKDIR.value)
    flops = train_config.flops_of_step(run)
    write_json(Path(OUT.value), {"flops": flops})
    print(f"{flops / 1e9:.2f} GFLOP a step")


if __name__ == "__main__":
    cli.run(main)
