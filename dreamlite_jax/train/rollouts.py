"""Reinforcement learning on the devices: rollouts of a policy, their rewards, updates from them.

A rollout draws a group of pictures for every prompt of a batch by the current policy, all in one
compiled function; rewards are asked on the host (`reinforcement.py`); `learnt_from` turns them into
advantages; the step then makes one or more updates from the rollout.

Shapes: P prompts, G pictures a group, B = P G rows in the order of their prompts, W random steps
or noises of each picture, R rewards; h and w latent pixels, c latent channels, C context tokens, F
text feature width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding

from dreamlite_jax import system
from dreamlite_jax.data.mixture import TASKS
from dreamlite_jax.diffusion import flow, sampling, sde
from dreamlite_jax.objectives import grpo, nft
from dreamlite_jax.train import sharding, stages
from dreamlite_jax.train.optim import once
from dreamlite_jax.train.state import Params, TrainState
from dreamlite_jax.train.update import LossFn, Mean, StepFn, joined_rows, make_update, split_rows

REFERENCE = "reference"  # the U-Net that the policy started from, beside the frozen networks


class Rollouts(NamedTuple):
    """How a rollout is made and used."""

    group: int = 16  # pictures of each prompt: G
    updates: int = 1  # from every rollout, each of a part of its rows
    parts: int = 1  # a rollout's rows are drawn in so many parts, one after the other
    guidance: float = 1.0  # inside the policy; 1: none
    # A group's pictures begin at the same noise, as in DanceGRPO (Xue et al. 2025,
    # arXiv 2505.07818): what their rewards differ by is then the random steps' doing.
    shared_noise: bool = False
    process: grpo.Process = grpo.Process()


# --- The policy -----------------------------------------------------------------------------------


def policy(config: system.Config, unet: Params, given: Any, guidance: float) -> sampling.VelocityFn:
    """The velocity function of a U-Net under `stages.conditions`: sigma may be a scalar or
    [rows]."""
    velocity = functools.partial(system.velocity, config, unet)
    if guidance == 1:
        return sampling.plain(velocity, stages.condition(given))
    # The source stays: guidance is by the text alone.
    both = stages.condition(given, null=True), stages.condition(given)
    return sampling.single_guidance(velocity, *both, guidance)


# --- Rollouts -------------------------------------------------------------------------------------


def make_rollout(
    config: system.Config,
    settings: Rollouts,
    loss: grpo.Settings | nft.Settings,
    context_length: int,
    mesh: Mesh,
) -> Callable[..., tuple[dict[str, Any], Array, Array]]:
    """`(params, frozen, batch, key, number) -> (rows, pictures, diversity)`, compiled.

    Args of it:
      params: of the policy, {"unet": ...}; frozen: the other networks, and `REFERENCE`.
      batch: P prompts, of `data.pipeline`.
      number: of the rollout, from 0; a sliding window follows it.

    `rows` has what an update needs, [B, ...]: `given`, `stages.conditions`, and the fields of
    `grpo.Old` or `nft.Old`, by the loss, [B, W, ...]; pictures uint8 [B, H, W, 3]; diversity
    float32 [P].
    """
    process = settings.process
    spread = NamedSharding(mesh, sharding.ROWS)

    def repeated(x: Array) -> Array:
        return lax.with_sharding_constraint(jnp.repeat(x, settings.group, axis=0), spread)

    def rollout(params: Params, frozen: Params, batch: Any, key: Array, number: Array):
        networks, (for_window, for_rows) = {**frozen, **params}, jax.random.split(key)
        given, x0 = stages.conditions(config, networks, batch, context_length)
        given, shape = jax.tree.map(repeated, given), x0.shape[1:]
        rows = given["time_ids"].shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(for_rows, jnp.arange(rows))
        firsts = repeated(keys[:: settings.group]) if settings.shared_noise else keys
        mu = flow.resolution_mu(*shape[:2], config.shift)
        if isinstance(loss, nft.Settings):
            way = functools.partial(_by_noise, loss, mu)
        else:
            start = grpo.window_start(process, number, for_window)
            way = functools.partial(_by_steps, process, start)
        sigmas = flow.sigma_list(process.steps, mu)
        draw = functools.partial(_draw, config, settings, networks, sigmas, shape, way)
        if settings.parts == 1:
            made, pictures = draw((given, firsts, keys))
        else:
            parts = split_rows((given, firsts, keys), settings.parts)
            made, pictures = joined_rows(lax.map(draw, parts))
        pictures = by_rows(pictures, mesh)  # every process asks about its own
        grouped = pictures.reshape(-1, settings.group, *pictures.shape[1:])
        return {**made, "given": given}, pictures, grpo.diversity(grouped / 127.5 - 1)

    return jax.jit(rollout)


def _draw(
    config: system.Config,
    settings: Rollouts,
    networks: Params,
    sigmas: Array,
    shape: tuple[int, ...],
    way: Callable[..., tuple[Array, dict[str, Array]]],
    rows: Any,
) -> tuple[dict[str, Array], Array]:
    """Pictures of some rows, and what an update needs of them.

    Args:
      way: `_by_steps` or `_by_noise`.
      rows: conditions, and keys of the first noise and of all other.
    """
    given, firsts, keys = rows

    def first(key: Array) -> Array:  # steps and levels have the numbers before this one
        return jax.random.normal(
            jax.random.fold_in(key, settings.process.steps), shape, jnp.float32
        )

    policies = (
        policy(config, networks[name], given, settings.guidance) for name in ("unet", REFERENCE)
    )
    x0, made = way(*policies, jax.vmap(first)(firsts), sigmas, keys)
    return made, to_bytes(system.decode_latents(config, networks["vae"], x0))


def _by_steps(
    process: grpo.Process,
    start: Array,
    velocity_fn: sampling.VelocityFn,
    reference_fn: sampling.VelocityFn,
    noise: Array,
    sigmas: Array,
    keys: Array,
) -> tuple[Array, dict[str, Array]]:
    """x0 [B, ...] by random steps, and these: `grpo.Old`'s fields [B, W, ...]."""
    how = process.form, process.level
    x0, steps = sde.sample(velocity_fn, noise, sigmas, *how, start, process.size, keys)

    def reference(at: Any) -> Array:
        xt, sigma, after = at
        vt = reference_fn(xt, sigma)
        return sde.gaussian(process.form, xt, vt, sigma, after, process.level)[0]

    by_step = steps.xt.swapaxes(0, 1), steps.sigma, steps.after
    return x0, {
        **steps._asdict(),
        "mean_reference": lax.map(reference, by_step).swapaxes(0, 1),
        "sigma": jnp.broadcast_to(steps.sigma, steps.logp.shape),
        "after": jnp.broadcast_to(steps.after, steps.logp.shape),
    }


def _by_noise(
    loss: nft.Settings,
    mu: float,
    velocity_fn: sampling.VelocityFn,
    reference_fn: sampling.VelocityFn,
    noise: Array,
    sigmas: Array,
    keys: Array,
) -> tuple[Array, dict[str, Array]]:
    """x0 [B, ...] by the sampler, noised at each of the levels W: `nft.Old`'s fields
    [B, W, ...]. Level k's sigma is uniform in [k, k + 1) / W, so that every picture is learnt
    with little noise and with much; then it is shifted, if that is asked for."""
    x0 = sampling.sample(velocity_fn, noise, sigmas)

    def noised(level: Array) -> dict[str, Array]:
        def drawn(key: Array) -> tuple[Array, Array]:
            for_sigma, for_noise = jax.random.split(jax.random.fold_in(key, level))
            share = jax.random.uniform(for_sigma, (), jnp.float32)
            return share, jax.random.normal(for_noise, x0.shape[1:], jnp.float32)

        share, fresh = jax.vmap(drawn)(keys)
        sigma = (level + share) / loss.levels
        sigma = flow.shift_sigma(sigma, mu) if loss.shift else sigma
        xt = flow.path(x0, fresh, sigma)
        seen = {"vt": velocity_fn(xt, sigma), "vt_reference": reference_fn(xt, sigma)}
        return {"x0": x0, "noise": fresh, "sigma": sigma, **seen}

    found = lax.map(noised, jnp.arange(loss.levels))
    return x0, jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def by_rows(x: Array, mesh: Mesh) -> Array:
    """`x` [B, ...] with its rows spread over the devices, which XLA may else decide otherwise."""
    if mesh.size == 1:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.ROWS))


def to_bytes(values: Array) -> Array:
    """`data.pictures.to_bytes` on the devices: float32 in [-1, 1] (clipped) -> uint8."""
    return jnp.round(jnp.clip(values * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


# --- Rewards --------------------------------------------------------------------------------------


class Table(NamedTuple):
    """The rewards as the devices know them, in the order of their columns."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    tasks: tuple[tuple[str, ...], ...]  # that each is asked about


def asked_of(table: Table, task: Array) -> Array:
    """bool [..., R]: which rewards are asked about rows of these tasks, int [...]."""
    known = jnp.array([[name in tasks for tasks in table.tasks] for name in TASKS])
    return known[task]


def reward_metrics(
    table: Table, scores: Array, task: Array, tasks: Sequence[str]
) -> dict[str, Array]:
    """Of scores [n, R]: `reward`, the weighted sum's mean, and of every reward and task the mean,
    deviation and quartiles."""
    asked = asked_of(table, task)
    total = jnp.where(asked, scores * jnp.array(table.weights), 0).sum(-1)
    found = {"reward": total.mean()}
    for k, (name, own) in enumerate(zip(table.names, table.tasks, strict=True)):
        for one in [one for one in tasks if one in own]:
            values = jnp.where(task == TASKS.index(one), scores[:, k], jnp.nan)
            where = f"reward/{name}/{one}"
            found |= {f"{where}/mean": jnp.nanmean(values), f"{where}/std": jnp.nanstd(values)}
            quartiles = jnp.nanquantile(values, jnp.array([0.25, 0.5, 0.75]))
            found |= {f"{where}/q{q}": quartiles[i] for i, q in enumerate((25, 50, 75))}
    return found


def learnt_from(
    table: Table,
    settings: grpo.Settings | nft.Settings,
    tasks: Sequence[str],
    rows: Any,
    scores: Array,
    task: Array,
    diversity: Array,
) -> dict[str, Any]:
    """The batch of a step: a rollout's rows with their advantages and weights, and metrics.

    Args:
      scores: float32 [B, R]; task: int32 [P]; diversity: float32 [P].
      tasks: those that there are.
    """
    prompts = task.shape[0]
    grouped = scores.reshape(prompts, -1, scores.shape[-1])
    group, weights = grouped.shape[1], jnp.array(table.weights)
    asked = asked_of(table, task)
    advantage, kept = grpo.advantages(grouped, asked, weights, settings)
    total = jnp.where(asked[:, None], grouped * weights, 0).sum(-1)
    metrics = {
        **reward_metrics(table, scores, jnp.repeat(task, group), tasks),
        "spread": total.std(1).mean(),
        "dropped": 1 - kept.mean(),
        "diversity": diversity.mean(),
        **{
            f"diversity/{one}": jnp.nanmean(jnp.where(task == TASKS.index(one), diversity, jnp.nan))
            for one in tasks
        },
    }
    learnt = {"advantage": advantage.reshape(-1), "weight": grpo.row_weights(kept, group)}
    return {"rows": {**rows, **learnt}, "metrics": metrics}


# --- Updates --------------------------------------------------------------------------------------


def policy_loss(
    config: system.Config, settings: Rollouts, loss: grpo.Settings | nft.Settings
) -> LossFn:
    """The loss's objective on rows of `learnt_from`: all random steps, or all noises, of a row at
    once."""
    process, forward = settings.process, isinstance(loss, nft.Settings)
    fields = (nft if forward else grpo).Old._fields

    def loss_fn(trained: Params, frozen: Params, rows: Any, keys: Array):
        del frozen, keys  # what the frozen networks gave lies in the rows; nothing is random
        b, steps = rows["sigma"].shape

        def flat(x: Array) -> Array:
            return x.reshape(b * steps, *x.shape[2:])

        old = [flat(rows[name]) for name in fields]
        given, advantage = jax.tree.map(
            lambda x: jnp.repeat(x, steps, axis=0), (rows["given"], rows["advantage"])
        )
        velocity_fn = policy(config, trained["unet"], given, settings.guidance)
        if forward:
            found = nft.losses(velocity_fn, nft.Old(*old), advantage, loss)
        else:
            how = process.form, process.level, loss
            found = grpo.losses(velocity_fn, grpo.Old(*old), advantage, *how)
        found = jax.tree.map(lambda x: x.reshape(b, steps).mean(1), found)
        metrics = {"kl": Mean.of(found.kl)}
        if not forward:
            kept = rows["weight"] > 0
            metrics["ratio_deviation"] = Mean.of(jnp.abs(found.ratio - 1), kept)
            metrics["clipped"] = Mean.of(found.clipped, kept)
        return (rows["weight"] * found.total).mean(), metrics

    return loss_fn


def make_step(loss_fn: LossFn, optimisation: stages.Optimisation, updates: int) -> StepFn:
    """A step: so many updates, each from a part of the rollout's rows.

    An update whose groups were all dropped changes nothing: neither would Adam's momentum, weight
    decay nor the average stand still by themselves. Metrics are means over the updates, but
    `ratio_deviation`, the first's: there it is what rounding leaves of 1.
    """
    update = make_update(loss_fn, *optimisation)

    def step_fn(state: TrainState, frozen: Any, batch: Any, key: Array):
        def one(state: TrainState, at: Any):
            rows, number = at
            learns = once((rows["weight"] > 0).any())
            return update(state, frozen, rows, jax.random.fold_in(key, number), learns)

        rows = split_rows(batch["rows"], updates)
        state, found = lax.scan(one, state, (rows, jnp.arange(updates)))
        means = {name: jnp.nanmean(values) for name, values in found.items()}
        means["loss"] = found["loss"].mean()
        if "ratio_deviation" in found:
            means["ratio_deviation"] = found["ratio_deviation"][0]
        means |= {"skipped": found["skipped"][-1], "streak": found["streak"].max()}
        return state, {**batch["metrics"], **means}

    return step_fn
