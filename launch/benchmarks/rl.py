"""Suite `rl`: rollouts beside `launch.sample` on the same pictures, updates, and the judge.

A rollout of 4 prompts x 4 pictures in 10 steps without guidance on the tiny networks with random
weights: it encodes, draws and decodes as sampling does. Of GRPO's, 2 steps are random, and the
reference is asked besides where it would have gone in them; of DiffusionNFT's, the pictures are
noised at 2 levels, where both policies are asked. `bare` leaves out what nothing but the update
needs. An update is forward and backward through the random steps, or the noises, of all 16. The
judge is the shapes world's.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks.compare import Contender, Timing

PROMPTS, GROUP, STEPS, WINDOW, SIDE = 4, 4, 10, 2, 64
PICTURES = PROMPTS * GROUP
OBJECTIVES = ("grpo", "nft")
JUDGE = f"judge, {SIDE} px"


def case(what: str, objective: str) -> str:
    return f"{what}, {objective}, tiny, {SIDE} px"


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the tables: a name and its contenders, ours first."""
    from dreamlite_jax import tiny

    with tempfile.TemporaryDirectory() as folder:
        model = {"model_dir": str(tiny.tiny_model_dir(Path(folder) / "model", mobile=True))}
        for objective in OBJECTIVES:
            given = {**model, "objective": objective}
            yield (
                case("rollout", objective),
                [
                    Contender("rollout", rollout_step, given),
                    Contender("bare", rollout_step, {**given, "whole": False}),
                    Contender("sample", sample_step, model),
                ],
            )
            yield case("update", objective), [Contender("update", update_step, given)]
        yield JUDGE, [Contender("judge", judge_step, {})]


def summary(found: Mapping[str, list[Timing]]) -> str:
    """Rates, and what share of an objective's step each part takes, where all were measured."""
    known = {name: timings[0].median_ms for name, timings in found.items() if not timings[0].error}
    lines = []
    for objective in OBJECTIVES:
        rollout, update = case("rollout", objective), case("update", objective)
        if not {rollout, update, JUDGE} <= known.keys():
            continue
        total = known[rollout] + known[update] + known[JUDGE]
        rates = {
            rollout: f"{PICTURES / known[rollout] * 1e3:.1f} images/s",
            update: f"{1e3 / known[update]:.2f} updates/s of {PICTURES} pictures",
            JUDGE: f"{PICTURES / known[JUDGE] * 1e3:.0f} images/s",
        }
        lines += [
            f"{name}: {rate}, {100 * known[name] / total:.0f} % of a step of {objective}"
            for name, rate in rates.items()
        ]
    return "\n".join(lines)


def captions() -> list[str]:
    from dreamlite_jax.data import shapes

    return [shapes.sample_t2i(shapes.DEMO, "train", 0, k).caption for k in range(PROMPTS)]


def _made(model_dir: str, objective: str) -> tuple[Any, ...]:
    """System, settings, loss, prompts as a batch, and the compiled rollout."""
    import jax

    from dreamlite_jax import system
    from dreamlite_jax.data import pipeline, prompts
    from dreamlite_jax.objectives import grpo, nft
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
    loss = {"grpo": grpo.Settings(), "nft": nft.Settings(levels=WINDOW)}[objective]
    rollout = rollouts.make_rollout(model.config, settings, loss, context, mesh)
    return model, settings, loss, batch, rollout


def rollout_step(model_dir: str, objective: str, whole: bool = True) -> Callable[[], Any]:
    import jax

    from dreamlite_jax.train import rollouts

    model, _, _, batch, rollout = _made(model_dir, objective)
    params = {"unet": model.params["unet"]}
    frozen = {**model.params, rollouts.REFERENCE: model.params["unet"]}
    if not whole:
        # What nobody looks at is not computed.
        made = rollout
        rollout = jax.jit(lambda *given: made(*given)[1])
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


def update_step(model_dir: str, objective: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    from dreamlite_jax.train import optim, rollouts, stages
    from dreamlite_jax.train.state import new_state

    model, settings, loss, batch, rollout = _made(model_dir, objective)
    params = {"unet": model.params["unet"]}
    frozen = {**model.params, rollouts.REFERENCE: model.params["unet"]}
    rows, _, _ = rollout(params, frozen, batch, jax.random.key(0), 0)
    learnt = {"advantage": jnp.linspace(-1, 1, PICTURES), "weight": jnp.ones(PICTURES)}
    given = {"rows": {**rows, **learnt}, "metrics": {}}
    how = stages.Optimisation(optim.make_tx(optim.Settings(), 1000), 0.99, clip=1.0)
    loss_fn = rollouts.policy_loss(model.config, settings, loss)
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
