"""Writes what a run has trained as a model directory, which `launch.sample` and diffusers open.

    python -m convert.export --workdir=runs/phase3_joint --out=models/joint
    python -m convert.export --workdir=runs/sft --out=models/sft --dtype=bfloat16

Networks that the run did not train come from the run before it that did, or from its model
directory.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from dreamlite_jax import cli, system
from dreamlite_jax.train import origins

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
OUT = flags.DEFINE_string("out", None, "model directory to write", required=True)
STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the latest")
PART = flags.DEFINE_enum(
    "part", "ema", ["ema", "params"], "the average, or the parameters of the last step"
)
DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "of the tensors in the files")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a model directory at --out")


def main() -> None:
    out = Path(OUT.value)
    if out.exists() and not out.is_dir():
        raise cli.CommandError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not OVERWRITE.value:
        raise cli.CommandError(f"--out {out} is not empty; name another, or give --overwrite")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    made = origins.load_run(WORKDIR.value, STEP.value, PART.value)
    if out.resolve() == made.folder.resolve():
        raise cli.CommandError(f"--out {out} is the run's own model directory; name another")
    if not made.config.pane:
        raise cli.CommandError(
            f"{WORKDIR.value}: its network does without the source's pane (config.pane was False), "
            "which no pipeline does; train on with the pane, if only for some hundred steps"
        )
    system.save(made, out, DTYPES[DTYPE.value])
    total = sum(x.size for x in jax.tree.leaves(made.params))
    steps = f" of {made.config.mobile_steps} steps" if made.config.mobile else ""
    print(f"{out}: {system.PIPELINES[made.config.mobile]}{steps}, {total:,} parameters")


if __name__ == "__main__":
    cli.run(main)
