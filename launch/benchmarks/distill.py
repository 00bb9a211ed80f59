"""Suite `distill`: a step of distillation beside one of pretraining, on stored latents and texts.

`fake` updates the fake score alone, as most steps do: the student draws without a gradient, on the
average 1.5 of its 4 steps and the one that counts. `both` updates the student, too: its gradient,
and the fake score's and the guided teacher's opinion (two branches). `pretraining` is flow matching
on the same rows. The tiny networks with random weights, 16x32 latents, both tasks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launch.benchmarks.compare import Contender, Timing

BATCH, SIDE, TOKENS = 16, 16, 32
CASE = f"tiny, {SIDE}x{2 * SIDE} latents, batch {BATCH}, float32"


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the tables: a name and its contenders, ours first."""
    yield (
        CASE,
        [
            Contender("fake", distillation_step, {"student": False}),
            Contender("both", distillation_step, {"student": True}),
            Contender("pretraining", pretraining_step, {}),
        ],
    )


def summary(found: Mapping[str, list[Timing]]) -> str:
    """Costs in units of a pretraining step, turn by turn."""
    fake, both, pretraining = found[CASE]
    student = [b - f for b, f in zip(both.seconds, fake.seconds, strict=True)]
    alone = Timing("student", student, 0.0, both.peak_mib)
    return (
        f"in pretraining steps: an update of the fake score {fake.ratio(pretraining):.2f}, of the "
        f"student {alone.ratio(pretraining):.2f} more; peak memory "
        f"{both.peak_mib / pretraining.peak_mib:.2f} of pretraining's"
    )


def batch(channels: int, width: int) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    latents, texts = (BATCH, SIDE, SIDE, channels), (BATCH, TOKENS, width)
    normal = {"target_latents": latents, "source_latents": latents, "context": texts}
    normal |= {"null_context": texts}
    mask = np.ones((BATCH, TOKENS), bool)
    return {
        "task": np.arange(BATCH, dtype=np.int32) % 2,
        "time_ids": np.full((BATCH, 2), 8 * SIDE, np.float32),
        "has_source": np.arange(BATCH) % 2 == 1,
        "changed": np.ones(latents[:3], bool),
        "context_mask": mask,
        "null_context_mask": mask,
        **{name: rng.standard_normal(s).astype(np.float32) for name, s in normal.items()},
    }


def optimisation() -> Any:
    from dreamlite_jax.train import optim, stages

    return stages.Optimisation(optim.make_tx(optim.Settings(), 1000), 0.99, clip=1.0)


def repeated(step_fn: Callable, state: Any, frozen: Any, rows: Any) -> Callable[[], Any]:
    """A step that goes on from where the last one ended; the key is another each time, so that all
    lengths of the student's way come by."""
    import itertools

    import jax

    step, numbers = jax.jit(step_fn, donate_argnums=0), itertools.count()

    def once() -> None:
        nonlocal state
        state, found = step(state, frozen, rows, jax.random.key(next(numbers)))
        jax.block_until_ready(found)

    return once


def made() -> tuple[Any, Any, Any]:
    """System config, the U-Net's parameters, a batch."""
    from dreamlite_jax import pretrained, tiny

    config = tiny.config()
    params = {"unet": tiny.random_params(pretrained.UNET, config.unet)}
    return config, params, batch(config.vae.latent_channels, config.unet.context_dim)


def distillation_step(student: bool) -> Callable[[], Any]:
    import jax

    from dreamlite_jax.objectives import dmd2
    from dreamlite_jax.train import distillation
    from dreamlite_jax.train.state import new_state

    config, params, rows = made()
    settings = distillation.Settings(ratio=1, warmup=0 if student else 10**6)
    how = optimisation()
    step_fn = distillation.make_step(config, settings, dmd2.Settings(), TOKENS, how, how)
    start = jax.jit(lambda: {name: new_state(params, how.tx) for name in ("student", "fake")})
    return repeated(step_fn, start(), {distillation.TEACHER: params["unet"]}, rows)


def pretraining_step() -> Callable[[], Any]:
    import jax

    from dreamlite_jax.objectives import flow_matching
    from dreamlite_jax.train import stages
    from dreamlite_jax.train.state import new_state
    from dreamlite_jax.train.update import make_update

    config, params, rows = made()
    how = optimisation()
    loss_fn = stages.diffusion_loss(config, TOKENS, flow_matching.Settings())
    start = jax.jit(lambda: new_state(params, how.tx))
    return repeated(make_update(loss_fn, *how), start(), {}, rows)
