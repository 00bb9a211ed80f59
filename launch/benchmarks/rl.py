"""Suite `rl`: rollouts beside `launch.sample` on the same pictures, updates, and the judge.

A rollout of 4 prompts x 4 pictures in 10 steps without guidance, 2 of them random, on the tiny
networks with random weights: it encodes, draws and decodes as sampling does, and besides asks the
reference where it would have gone in the random steps. `bare` leaves the reference out. An update
is forward and backward through the random steps of all 16. The judge is the shapes world's.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks.compare import Contender, Timing

PROMPTS, GROUP, STEPS, WINDOW, SIDE = 4, 4, 10, 2, 64
PICTURES = PROMPTS * GROUP
ROLLOUT, UPDATE, JUDGE = (f"{what}, tiny, {SIDE} px" for what in ("rollout", "update", "judge"))


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the tables: a name and its contenders, ours first."""
    from dreamlite_jax import tiny

    with tempfile.TemporaryDirectory() as folder:
        model = {"model_dir": str(tiny.tiny_model_dir(Path(folder) / "model", mobile=True))}
        yield (
            ROLLOUT,
            [
                Contender("rollout", rollout_step, model),
                Contender("bare", rollout_step, {**model, "reference": False}),
                Contender("sample", sample_step, model),
            ],
        )
        yield UPDATE, [Contender("update", update_step, model)]
        yield JUDGE, [Contender("judge", judge_step, {})]


def summary(found: Mapping[str, list[Timing]]) -> str:
    """Rates, and what share of a step each part takes."""
    parts = {name: timings[0].median_ms for name, timings in found.items() if not timings[0].error}
    total, lines = sum(parts.values()), []
    for name, ms in parts.items():
        rate = f"{PICTURES / ms * 1e3:.1f} images/s"
        if name == UPDATE:
            rate = f"{1e3 / ms:.2f} updates/s of {PICTURES} pictures"
        lines.append(f"{name}: {rate}, {100 * ms / total:.0f} % of a step")
    return "\n".join(lines)


def captions() -> list[str]:
    from dreamlite_jax.data import shapes

    return [shapes.sample_t2i(shapes.DEMO, "train", 0, k).caption for k in range(PROMPTS)]


def _made(model_dir: str) -> tuple[Any, ...]:
    """System, settings, prompts as a batch, and the compiled rollout."""
    import jax

    from dreamlite_jax import system
    from dreamlite_jax.data import pipeline, prompts
    from dreamlite_jax.objectives import grpo
    from dreamlite_jax.train import rollouts, sharding

    model = system.load(model_dir)
    # As long as sampling would have them.
    tagged = [prompts.tagged(prompts.GENERATE, text) for text in captions()]
    length = prompts.prompt_inputs(model.prompter, prompts.GENERATE, tagged)["input_ids"].shape[1]
    process = grpo.Process(steps=STEPS, window=WINDOW)
    settings = rollouts.Rollouts(group=GROUP, process=process)
    batch = {
        "target": np.zeros((PROMPTS, SIDE, SIDE, 3), np.float32),
        "has_source": np.zeros(PROMPTS, bool),
        "time_ids": np.full((PROMPTS, 2), SIDE, np.float32),
        **pipeline.text_inputs(model.prompter, captions(), [None] * PROMPTS, length),
    }
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    context = length - model.config.drop.generate
    return (
        model,
        settings,
        batch,
        rollouts.make_rollout(model.config, settings, grpo.Settings(), context, mesh),
    )


def rollout_step(model_dir: str, reference: bool = True) -> Callable[[], Any]:
    import jax

    from dreamlite_jax.train import rollouts

    model, _, batch, rollout = _made(model_dir)
    params = {"unet": model.params["unet"]}
    frozen = {**model.params, rollouts.REFERENCE: model.params["unet"]}
    if not reference:
        # What nobody looks at is not computed.
        whole = rollout
        rollout = jax.jit(lambda *given: whole(*given)[1])
    return lambda: jax.block_until_ready(rollout(params, frozen, batch, jax.random.key(0), 0))


def sample_step(model_dir: str) -> Callable[[], Any]:
    """What `launch.sample` does once it has read the model."""
    from dreamlite_jax import generation, system

    model = system.load(model_dir)
    settings = generation.Settings(height=SIDE, width=SIDE, steps=STEPS, batch_size=PICTURES)
    settings = generation.resolve(settings, model.config)
    requests = [text for text in captions() for _ in range(GROUP)]
    noise = np.stack(
        [generation.initial_noise(model.config, k, SIDE, SIDE) for k in range(PICTURES)]
    )
    return lambda: list(generation.generate(model, requests, noise, settings))


def update_step(model_dir: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    from dreamlite_jax.objectives import grpo
    from dreamlite_jax.train import optim, rollouts, stages
    from dreamlite_jax.train.state import new_state

    model, settings, batch, rollout = _made(model_dir)
    params = {"unet": model.params["unet"]}
    frozen = {**model.params, rollouts.REFERENCE: model.params["unet"]}
    rows, _, _ = rollout(params, frozen, batch, jax.random.key(0), 0)
    learnt = {"advantage": jnp.linspace(-1, 1, PICTURES), "weight": jnp.ones(PICTURES)}
    given = {"rows": {**rows, **learnt}, "metrics": {}}
    how = stages.Optimisation(optim.make_tx(optim.Settings(), 1000), 0.99, clip=1.0)
    loss_fn = rollouts.policy_loss(model.config, settings, grpo.Settings())
    step = jax.jit(rollouts.make_step(loss_fn, how, 1), donate_argnums=0)
    state = jax.jit(lambda: new_state(params, how.tx))()

    def once() -> None:
        nonlocal state
        state, found = step(state, {}, given, jax.random.key(0))
        jax.block_until_ready(found)

    return once


def judge_step() -> Callable[[], Any]:
    from dreamlite_jax.rewards.base import Requests, scored
    from dreamlite_jax.rewards.shapes import JUDGE, examples

    shown = [e for e in examples() if e.source is None]
    rows = [shown[k % len(shown)] for k in range(PICTURES)]
    requests = Requests(*([e[k] for e in rows] for k in (0, 2, 3, 4)))
    return lambda: scored(JUDGE, requests)
