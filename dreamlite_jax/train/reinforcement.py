"""The stage of reinforcement learning: what a config says, the rollouts' rewards, what is shown.

Config keys are those of `Settings` under `rl`, and of `grpo.Settings` or `nft.Settings` under
`loss`, by the stage. `batch_size` counts pictures; the data's batches hold prompts.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from dreamlite_jax import system
from dreamlite_jax.data import pipeline, transforms
from dreamlite_jax.data.pipeline import Recipe
from dreamlite_jax.diffusion import flow
from dreamlite_jax.objectives import grpo, nft
from dreamlite_jax.rewards import opening
from dreamlite_jax.rewards.base import Requests, RewardError, self_test
from dreamlite_jax.rewards.opening import Weighted
from dreamlite_jax.train import origins, peers, rollouts, sharding, signals, stages
from dreamlite_jax.train.loop import Limit, Predictions, reading
from dreamlite_jax.train.rollouts import Rollouts, Table
from dreamlite_jax.train.state import Params


class Limits(NamedTuple):
    """Where a run ends with a message and a checkpoint; means over the steps between two logs."""

    # At most: how far the policy may go from where it started, as its objective measures it.
    kl: float = 1.0
    dropped: float = 0.95  # at most: groups whose rewards are all the same
    # At least: the deviation of a group's weighted scores. Scores that are no round numbers are
    # never all the same, so that no group is dropped where there is nothing to learn any more.
    spread: float = 0.0
    # At least: the distance of two pictures of a group, over all tasks. Good edits of one picture
    # are alike, so that `diversity/edit` has no limit of its own.
    diversity: float = 0.0

    def of_metrics(self) -> tuple[Limit, ...]:
        return (
            Limit("kl", most=self.kl),
            Limit("dropped", most=self.dropped),
            Limit("spread", least=self.spread),
            Limit("diversity", least=self.diversity),
        )


class Settings(NamedTuple):
    """The config's section `rl`."""

    rollouts: Rollouts
    limits: Limits
    rewards: tuple[Mapping[str, Any], ...]  # of `rewards.opening`


# --- Checking -------------------------------------------------------------------------------------


def settings_of(section: Mapping[str, Any], read: Callable[[type, Mapping, str], Any]) -> Settings:
    """A config's section `rl`; `read` makes a NamedTuple of a dict, or raises."""
    section = dict(section)
    rewards = tuple(section.pop("rewards", ()))
    limits = read(Limits, section.pop("limits", {}), "rl.limits")
    process = read(grpo.Process, section.pop("process", {}), "rl.process")
    found = read(Rollouts, section, "rl")
    return Settings(found._replace(process=process), limits, rewards)


def problems(
    settings: Settings,
    loss: grpo.Settings | nft.Settings | None,
    batch_size: int,
    accumulation: int,
    devices: int,
    tasks: Sequence[str],
) -> list[str]:
    """What is wrong with them, a line each; loss is None where that is wrong by itself."""
    made = settings.rollouts
    found = [f"rl.process.{problem}" for problem in made.process.problems()]
    for name, least in (("group", 2), ("updates", 1), ("parts", 1)):
        if getattr(made, name) < least:
            found.append(f"rl.{name} is {getattr(made, name)}, should be at least {least}")
    if not math.isfinite(made.guidance):
        found.append(f"rl.guidance is {made.guidance}, should be finite")
    for name, value in settings.limits._asdict().items():
        if math.isnan(value):
            found.append(f"rl.limits.{name} is {value}, should be a number")
    if isinstance(loss, nft.Settings):
        if made.shared_noise:
            found.append(
                "rl.shared_noise is True, but the stage nft draws without random steps: all "
                "pictures of a group would be the same; set it to False"
            )
        if loss.levels > made.process.steps:
            found.append(
                f"loss.levels is {loss.levels}, should be at most rl.process.steps, "
                f"{made.process.steps}"
            )
    found += opening.check(settings.rewards, tasks)
    if found or accumulation < 1:
        return found
    for what, parts in (
        (f"{devices} devices x rl.group {made.group}", devices * made.group),
        (
            f"{devices} devices x rl.updates {made.updates} x accumulation {accumulation}",
            devices * made.updates * accumulation,
        ),
        (f"{devices} devices x rl.parts {made.parts}", devices * made.parts),
    ):
        if batch_size % parts:
            near = max(batch_size // parts, 1) * parts
            found.append(
                f"batch_size {batch_size} (pictures of a rollout) is no multiple of {what}; "
                f"nearest are {near} and {near + parts}"
            )
    return found


def prompts_of(recipe: Recipe, settings: Rollouts) -> Recipe:
    """The recipe of a rollout's prompts, from that of its pictures: nothing is left out of them."""
    return recipe._replace(
        batch_size=recipe.batch_size // settings.group,
        dropout=transforms.NEVER,
        with_null=settings.guidance != 1,
    )


def opened(
    settings: Settings, recipe: Recipe, init_from: str, model_dir: str | Path
) -> dict[str, Any]:
    """What a run of this stage has besides others: its recipe of prompts, the rewards, and where
    the reference comes from, which is where the policy came from before its first checkpoint.

    Raises as `open_rewards`.
    """
    recipe = prompts_of(recipe, settings.rollouts)
    return {
        "recipe": recipe,
        "rewards": open_rewards(settings, recipe),
        "reference": origins.reference(init_from, model_dir),
    }


def open_rewards(settings: Settings, recipe: Recipe) -> tuple[Weighted, ...]:
    """The rewards, each tested; servers by process 0 alone, for which the others wait.

    Raises:
      UserError: on every process, where one of them finds a server that does not answer, a failed
        self-test, or data that lacks what a reward needs to know.
    """
    with peers.leaving_with_the_lost():
        return peers.together(
            lambda: _tested(settings, recipe), "another process cannot use its rewards"
        )


def _tested(settings: Settings, recipe: Recipe) -> tuple[Weighted, ...]:
    """`open_rewards` as far as one process goes."""
    found = opening.open_rewards(settings.rewards, signals.asked, jax.process_count())
    wrong = []
    for entry, (reward, _, tasks) in zip(settings.rewards, found, strict=True):
        for name, source, _ in recipe.streams:
            lacks = set(reward.needs) - set(source.metadata(0))
            if source.task in tasks and lacks:
                wrong.append(
                    f"reward {reward.name} needs {', '.join(sorted(lacks))} of every sample, which "
                    f"{name} does not know"
                )
        if opening.is_remote(entry) and jax.process_index():
            continue  # all at once would be a queue before the first step
        try:
            self_test(reward)
        except RewardError as error:
            wrong.append(str(error))
    if wrong:
        raise RewardError("; ".join(wrong))
    return found


def arithmetic(
    settings: Rollouts,
    loss: grpo.Settings | nft.Settings,
    batch_size: int,
    accumulation: int,
    devices: int,
) -> str:
    """Where a rollout's pictures come from and go to, in a few lines."""
    g, updates, process = settings.group, settings.updates, settings.process
    prompts, rows = batch_size // g, batch_size // (devices * updates * accumulation)
    drawn = batch_size // devices // settings.parts
    if isinstance(loss, nft.Settings):
        random, weighed = "", f"{rows * loss.levels} noised pictures"
    else:
        random, weighed = f", {process.size} of them random", f"{rows * process.size} steps"
    return (
        f"rollout: {batch_size} pictures = {prompts} prompts x {g} a group = {devices} devices x "
        f"{drawn} at a time x {settings.parts} parts, {process.steps} steps each{random}\n"
        f"learning: {updates} updates of {batch_size // updates} pictures = {devices} devices x "
        f"{rows} x accumulation {accumulation}; a device weighs {weighed} at a time"
    )


# --- Rewards --------------------------------------------------------------------------------------


def table_of(rewards: Sequence[Weighted]) -> Table:
    names, weights, tasks = zip(
        *((one.reward.name, one.weight, one.tasks) for one in rewards), strict=True
    )
    return Table(names, weights, tasks)


def own_pictures(made: Array) -> np.ndarray:
    """This process's rows of a global array of pictures [B, H, W, 3], in order."""
    shards = {shard.index[0].start or 0: shard.data for shard in made.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def ask(
    rewards: Sequence[Weighted],
    made: Array,
    asked: Sequence[pipeline.Asked],
    mesh: Mesh,
) -> Array:
    """Scores, float32 [B, R] over the devices, of pictures uint8 [B, H, W, 3] that are.

    Args:
      asked: of this process's rows.

    Raises:
      UserError: on every process, where one of them gets no scores (`peers.together`).
    """
    return sharding.spread(_scored(rewards, own_pictures(made), asked), mesh, made.shape[0])


def _scored(
    rewards: Sequence[Weighted], made: np.ndarray, asked: Sequence[pipeline.Asked]
) -> np.ndarray:
    """Scores, float32 [n, R], of pictures uint8 [n, H, W, 3]; raises as `ask`."""
    requests = Requests(
        list(made),
        [one.caption for one in asked],
        [one.source for one in asked],
        [one.metadata for one in asked],
    )

    def score() -> np.ndarray:
        if len(made) != len(asked):  # the pictures do not lie as the prompts' rows do
            raise RuntimeError(f"{len(made)} pictures of this process for {len(asked)} prompts")
        return opening.score_all(rewards, requests, [one.task for one in asked])

    return peers.together(score, "another process got no scores from its rewards")


# --- The stage ------------------------------------------------------------------------------------


def make_batch_fn(
    config: system.Config,
    settings: Rollouts,
    loss: grpo.Settings | nft.Settings,
    rewards: Sequence[Weighted],
    recipe: Recipe,
    mesh: Mesh,
) -> Callable[[Any, Any, Any, Array, int], Any]:
    """A batch of prompts and its number -> a rollout with its advantages, see
    `rollouts.learnt_from`."""
    rollout = rollouts.make_rollout(config, settings, loss, recipe.context_length, mesh)
    table, tasks = table_of(rewards), tasks_of(recipe)
    learn = jax.jit(functools.partial(rollouts.learnt_from, table, loss, tasks))
    plan, own = pipeline.check(recipe), sharding.own_rows(mesh, recipe.batch_size)

    def batch_fn(state: Any, frozen: Any, batch: Any, key: Array, number: int) -> Any:
        rows, made, diversity = rollout(state.params, frozen, batch, key, number)
        with reading():
            asked = pipeline.asked(recipe, plan, own, number)
        asked = [one for one in asked for _ in range(settings.group)]
        scores = ask(rewards, made, asked, mesh)
        return learn(rows, scores, batch["task"], diversity)

    return batch_fn


def tasks_of(recipe: Recipe | None) -> tuple[str, ...]:
    """The tasks of a recipe's streams, each once; of none there are none."""
    streams = recipe.streams if recipe else ()
    return tuple(dict.fromkeys(stream.source.task for stream in streams))


def scores_shown(
    rewards: Sequence[Weighted], asked: Sequence[pipeline.Asked]
) -> Callable[[np.ndarray], list[str]]:
    """What the rewards say of a sheet's pictures, uint8 [n, H, W, 3], a text for each; raises as
    `ask`."""

    def shown(made: np.ndarray) -> list[str]:
        scores = _scored(rewards, made, asked)
        return [
            ", ".join(
                f"{weighted.reward.name} {scores[i, k]:.3g}"
                for k, weighted in enumerate(rewards)
                if one.task in weighted.tasks
            )
            for i, one in enumerate(asked)
        ]

    return shown


def validation_fn(
    config: system.Config,
    mesh: Mesh,
    recipe: Recipe,
    rewards: Sequence[Weighted],
    steps: int,
    guidance: float,
    batches: int = 2,
    seed: int = 0,
) -> Callable[[Any, Any, int], Predictions]:
    """A predict_fn: what the rewards say of the averaged network's pictures for fixed prompts, one
    each, always from the same noise and by the ODE."""
    table, tasks = table_of(rewards), tasks_of(recipe)
    own, size = sharding.own_rows(mesh, recipe.batch_size), recipe.batch_size
    plan = pipeline.check(recipe)

    @jax.jit
    def measured(scores: list[Array], task: list[Array]) -> dict[str, Array]:
        both = jnp.concatenate(scores), jnp.concatenate(task)
        return rollouts.reward_metrics(table, *both, tasks)

    def spread(k: int, recipe: Recipe) -> Any:
        return sharding.spread(pipeline.batch(recipe, plan, own, k), mesh, size)

    given = [
        (
            spread(k, recipe),
            None if guidance == 1 else spread(k, recipe._replace(dropout=transforms.EVERY_TEXT)),
            pipeline.asked(recipe, plan, own, k),
        )
        for k in range(batches)
    ]

    @jax.jit
    def drawn(params: Params, batch: Any, null: Any, key: Array) -> Array:
        h, w = batch["changed"].shape[1:]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size))
        shape = (h, w, config.vae.latent_channels)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
        sigmas = flow.sigma_list(steps, flow.resolution_mu(h, w, config.shift))
        given = params, batch, null, noise, sigmas, recipe.context_length, guidance
        return rollouts.by_rows(rollouts.to_bytes(stages.sampled(config, *given)[0]), mesh)

    def predict(state: Any, frozen: Any, step: int) -> Predictions:
        params, key = {**frozen, **state.ema}, jax.random.key(seed)
        scores, task = [], [batch["task"] for batch, _, _ in given]
        for k, (batch, null, asked) in enumerate(given):
            made = drawn(params, batch, null, jax.random.fold_in(key, k))
            scores.append(ask(rewards, made, asked, mesh))
        found = jax.device_get(measured(scores, task))
        return Predictions(metrics={f"val/{name}": float(value) for name, value in found.items()})

    return predict
