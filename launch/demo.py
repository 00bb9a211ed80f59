"""The whole way on the shapes world: every stage, small, from nothing to a bundle for a phone.

    python -m launch.demo [--quick] [--seed=1] [--out=runs/demo]        (or: make demo [QUICK=1])
    python -m launch.demo --seeds=3 --compare=direct_joint [--pretraining=0.25] --out=runs/order

Autoencoder, text to image, editing, both, fine-tuning, reinforcement learning and distillation,
each by `launch.train` with the configs of configs/shapes/; `launch.evaluate` of each, beside the
training of the next, mostly on pairs of shape and colour that no lesson has shown a picture of;
then export, bundles, and pictures by the bundles. All on CPUs: two commands at once cannot share a
TPU. OUT gets metrics.json, report.html and picture.png. Ctrl-C saves and leaves with exit code 75;
the same command goes on, and what is finished is not done again. --quick takes few steps of the
smallest model: it shows that all works, and nothing of how well. --pretraining leaves a comparison
what it needs: a share of pretraining's steps, in schedules as short, and no stage behind it.
"""

import os
from pathlib import Path

from absl import flags

from dreamlite_jax import cli
from launch.demos import comparing, driver, picture, plan, report, summary
from launch.files import write_json

OUT = flags.DEFINE_string("out", "runs/demo", "folder for everything that the demo makes")
QUICK = flags.DEFINE_boolean("quick", False, "few steps of the smallest model")
SEED = flags.DEFINE_integer("seed", 0, "of all stages", lower_bound=0)
SEEDS = flags.DEFINE_integer("seeds", 1, "how many demos with seeds that count on", lower_bound=1)
COMPARE = flags.DEFINE_enum(
    "compare", None, ["direct_joint"], "what the order of the stages is compared with"
)
SHARE = flags.DEFINE_float(
    "pretraining", None, "with --compare: this share of pretraining's steps, and nothing behind it"
)
CACHE = flags.DEFINE_string("compilation_cache", "~/.cache/dreamlite_jax", "as of launch.train")


def main() -> None:
    out, made = Path(OUT.value), plans()
    os.environ.setdefault("GLIBC_TUNABLES", driver.KEEP_MEMORY)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if QUICK.value:  # programs of ten steps, shaders of four pictures: compiled fast, not well
        os.environ.setdefault("XLA_FLAGS", driver.COMPILED_FAST)
        os.environ.setdefault("GALLIVM_PERF", "nopt")  # of the Vulkan driver that runs on CPUs
    if CACHE.value:  # for the commands without that flag
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser(CACHE.value))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for one in made:
        plan.run(one, [*plan.steps(one), *(comparing.steps(one) if COMPARE.value else ())])
    if len(made) > 1 or COMPARE.value:
        tables = comparing.tables(made)
        file = summary.tables_file(out, made[0].quick, made[0].share)
        write_json(file, {"tables": tables})
        for line in comparing.said(tables):
            print(line)
    if SHARE.value is None:  # else there is nothing but the tables
        finish(made[0], out)


def plans() -> list[plan.Plan]:
    """What the flags ask for, a demo for each seed.

    Raises:
      CommandError: flags that contradict each other.
    """
    if SHARE.value is not None:
        if not 0 < SHARE.value <= 1:
            raise cli.CommandError(
                f"--pretraining is {SHARE.value:g}, should be a share of its steps, above 0 and at "
                "most 1"
            )
        if QUICK.value or not COMPARE.value:
            raise cli.CommandError(
                "--pretraining is for a comparison of the full demo's pretraining: add "
                "--compare=direct_joint, without --quick"
            )
    common = QUICK.value, CACHE.value, SHARE.value or 0.0
    seeds = range(SEED.value, SEED.value + SEEDS.value)
    return [plan.of(Path(OUT.value), seed, *common) for seed in seeds]


def finish(made: plan.Plan, out: Path) -> None:
    """metrics.json, report.html and picture.png, and a few lines of the first."""
    found = summary.collect(made.folder, made.quick, made.seed)
    write_json(out / "metrics.json", found)
    report.write(out / "report.html", made.folder, found)
    picture.write(out / "picture.png", made.folder)
    for line in summary.said(found):
        print(line)
    print(f"{out / 'report.html'}: all of it, with pictures")


if __name__ == "__main__":
    cli.run(main)
