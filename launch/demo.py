"""The whole way on the shapes world: every stage, small, from nothing to a bundle for a phone.

    python -m launch.demo [--quick] [--seed=1] [--out=runs/demo]        (or: make demo [QUICK=1])
    python -m launch.demo --seeds=3 --compare=direct_joint [--share=0.25] [--until=phase3_joint]

Autoencoder, text to image, editing, both, fine-tuning, reinforcement learning and distillation,
each by `launch.train` with the configs of configs/shapes/; `launch.evaluate` after them, on prompts
that training never saw; then the export, the bundles, and pictures by the bundles. OUT gets
metrics.json, report.html and picture.png. Ctrl-C saves and leaves with exit code 75; the same
command goes on, and what is finished is not done again. --quick takes few steps of the smallest
model: it shows that all works, and nothing of how well. --share and --until leave a comparison of
pretraining what it needs: the first steps of nothing but pretraining, in schedules as short.
"""

import os
from pathlib import Path

from absl import flags

from dreamlite_jax import cli
from launch.demos import comparing, picture, plan, report, summary
from launch.files import write_json

OUT = flags.DEFINE_string("out", "runs/demo", "folder for everything that the demo makes")
QUICK = flags.DEFINE_boolean("quick", False, "few steps of the smallest model")
SEED = flags.DEFINE_integer("seed", 0, "of all stages", lower_bound=0)
SEEDS = flags.DEFINE_integer("seeds", 1, "how many demos with seeds that count on", lower_bound=1)
COMPARE = flags.DEFINE_enum(
    "compare", None, ["direct_joint"], "what the order of the stages is compared with"
)
SHARE = flags.DEFINE_float(
    "share", 1.0, "of the steps of every stage but the autoencoder's", 0.001, 1.0
)
UNTIL = flags.DEFINE_enum(
    "until", None, [stage.config for stage in plan.STAGES], "the last stage; no bundles then"
)
CACHE = flags.DEFINE_string("compilation_cache", "~/.cache/dreamlite_jax", "as of launch.train")


def main() -> None:
    out, made = Path(OUT.value), plans()
    # Its memory comes and goes with every step of a training: huge pages spare most page faults.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if QUICK.value:  # programs of ten steps, shaders of four pictures: compiled fast, not well
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
        os.environ.setdefault("GALLIVM_PERF", "nopt")  # of the Vulkan driver that runs on CPUs
    if CACHE.value:  # for the commands without that flag
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser(CACHE.value))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for one in made:
        plan.run(one, [*plan.steps(one), *(comparing.steps(one) if COMPARE.value else ())])
    if len(made) > 1 or COMPARE.value:
        tables = comparing.tables(made)
        write_json(out / comparing.NAME, {"tables": tables})
        for line in comparing.said(tables):
            print(line)
    finish(made[0], out)


def plans() -> list[plan.Plan]:
    """What the flags ask for, a demo for each seed.

    Raises:
      CommandError: flags that contradict each other.
    """
    if QUICK.value and SHARE.value != 1:
        raise cli.CommandError("--share is of the full demo's steps, --quick has its own: drop one")
    if COMPARE.value and UNTIL.value in comparing.TOO_EARLY:
        raise cli.CommandError(
            f"--compare={COMPARE.value} needs all of pretraining, which ends with "
            f"{comparing.JOINT}: set --until to that or a later stage"
        )
    common = QUICK.value, CACHE.value, SHARE.value, UNTIL.value or ""
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
