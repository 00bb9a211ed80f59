"""The one loop. A stage is a tuple of plain functions; `fit` runs it, saves it, goes on with it."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dreamlite_jax.errors import UserError
from dreamlite_jax.train import checkpoint, metrics, peers, signals
from dreamlite_jax.train.metrics import Interval, Writer
from dreamlite_jax.train.optim import norm
from dreamlite_jax.train.quiet import brief
from dreamlite_jax.train.state import Params, TrainState, networks


class TrainingError(UserError):
    """A run that cannot go on: one line. What has been saved stays."""


class Predictions(NamedTuple):
    """What an evaluator gives: scalars and pictures (uint8 [H, W, 3] or Pillow's) by name."""

    metrics: Mapping[str, Any] = {}
    pictures: Mapping[str, Any] = {}


class Stage(NamedTuple):
    """A kind of training.

    `init_fn(key) -> (state, frozen)` puts both where they belong on the devices; only the state, a
    `TrainState` or a dict of them, is donated and saved. `step_fn(state, frozen, batch, key) ->
    (state, metrics)` is compiled. `batch_fn`, where there is one, turns a batch into another first
    (rollouts of a policy); its last argument is the batch's number.
    `predict_fns` by name: `(state, frozen, step) -> Predictions`.
    """

    init_fn: Callable[[jax.Array], tuple[Any, Any]]
    step_fn: Callable[[Any, Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    batch_fn: Callable[[Any, Any, Any, jax.Array, int], Any] | None = None
    predict_fns: Mapping[str, Callable[[Any, Any, int], Predictions]] = {}


class Limit(NamedTuple):
    """A metric's range, of its mean over the steps between two logs."""

    metric: str
    least: float = -math.inf
    most: float = math.inf


class Schedule(NamedTuple):
    """When a run does what, in steps; 0 for never. What is done at times is done after the
    last step, too, which is logged and saved in any case."""

    steps: int
    batch_size: int
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 3  # of the latest checkpoints
    keep_every: int = 0  # those of multiples stay for good
    sample_every: int = 1000
    patience: int = 20  # updates in a row that may be skipped because they are not finite
    profile_at: int = 0  # the step from which on a few are traced by JAX's profiler
    limits: tuple[Limit, ...] = ()  # metrics that leave their range end the run


SHOWN = ("loss", "reward", "grad_norm")  # on the console
PROFILED = 5  # steps of a trace
_ASK_EVERY = 10  # steps between questions whether another host was asked to leave


def fit(
    stage: Stage,
    batches_from: Callable[[int], Iterator[Any]],
    schedule: Schedule,
    workdir: str | Path,
    meta: Mapping[str, Any] | None = None,
    check: Callable[[Mapping[str, Any]], None] = lambda saved: None,
    flops_per_step: float | None = None,
) -> tuple[Any, bool]:
    """Trains from the latest checkpoint in `workdir`, or from the start, to the last step.

    Args:
      batches_from: step -> the batches of that step and all later ones, on the devices.
      meta: a JSON object saved with every checkpoint.
      check: is given the restored checkpoint's meta, and raises where it does not fit.
      flops_per_step: of the model; where it is known, and the devices' peak, the share of it that
        is used is logged.

    Returns:
      The state, and whether the last step was reached (False: asked to leave, and saved).

    Raises:
      TrainingError: too many updates in a row were not finite, or a metric left its range. What was
        reached is saved.
      UserError: of the data or the stage, likewise. What only one of several processes meets ends
        that one at once (`peers.leaving_with_the_lost`).
      checkpoint.CheckpointError: nothing can be saved or restored.
    """
    seed = jax.random.key(schedule.seed)
    stream = jax.random.fold_in(seed, 1)  # of the steps; 0 is of the start
    keeping = {"keep": schedule.keep, "keep_every": schedule.keep_every or None}
    with (
        signals.asked_to_leave() as asked,
        checkpoint.open_manager(workdir, **keeping) as manager,
        peers.leaving_with_the_lost(),
    ):
        state, frozen = stage.init_fn(jax.random.fold_in(seed, 0))
        start, window = 0, []
        if checkpoint.latest_step(workdir) is not None:
            start, state, saved = checkpoint.restore(manager, abstract(state))
            logging.info("going on from step %d of %s", start, workdir)
            check(saved)
            window = saved["window"]

        def save(step: int, state: Any) -> None:
            rest = {**(meta or {}), "window": _fetched(window)}
            checkpoint.save(manager, step, state, rest)

        step_fn = compiled(stage.step_fn, state)
        clock, done = None, start
        with (
            Writer(workdir, resumed_at=start or None) as writer,
            kept(lambda: save(done, state), asked),
            traced(schedule, workdir) as trace,
        ):
            batches = batches_from(start) if start < schedule.steps else iter(())
            while done < schedule.steps:
                trace(done)
                with reading():
                    batch = next(batches)
                key = jax.random.fold_in(stream, done)
                if stage.batch_fn is not None:
                    jax.block_until_ready(state)  # its own time is no rollout's
                    began = time.monotonic()
                    batch = stage.batch_fn(state, frozen, batch, key, done)
                    if clock is not None:
                        clock = clock.plus_making(time.monotonic() - began)
                logged = due(done + 1, schedule.log_every) or done + 1 == schedule.steps
                # The first, too, so that all is compiled, and fits, before the clock starts.
                before = _held(networks(state)) if logged or clock is None else None
                state, found = step_fn(state, frozen, batch, key)
                window.append(found)
                done += 1
                moved = _moved(before, networks(state)) if before else {}
                before = None
                # One step ahead of the devices and no more: batches must not pile up.
                jax.block_until_ready(window[-2:][0])
                if clock is None:
                    jax.block_until_ready((found, moved))
                    clock = Interval(done, time.monotonic())  # the first step was compiled
                if logged:
                    found = _log(writer, schedule, done, window, moved, clock, flops_per_step)
                    window, clock = [], Interval(done, time.monotonic())
                    _check(found, schedule, done)
                pause = time.monotonic()
                last = done == schedule.steps and schedule.sample_every > 0
                if due(done, schedule.sample_every) or last:
                    _predict(stage, state, frozen, done, writer)
                # Batches that are made take long, and the processes wait for each other anyway.
                leaving = _leaving(asked, done, 1 if stage.batch_fn else _ASK_EVERY)
                if due(done, schedule.checkpoint_every) or done == schedule.steps or leaving:
                    save(done, state)
                clock = clock.without(time.monotonic() - pause)
                if leaving and done < schedule.steps:
                    logging.info("asked to leave: saved step %d of %d", done, schedule.steps)
                    break
    return state, done == schedule.steps


@contextlib.contextmanager
def kept(save: Callable[[], None], asked: Callable[[], bool]) -> Iterator[None]:
    """What ends a run from outside (a reward's server that stays away, data that cannot be read, a
    metric beyond its range) comes after its state was saved, by all processes. Where one of them
    was asked to leave meanwhile, the run just ends."""
    try:
        yield
    except (checkpoint.CheckpointError, peers.AloneError):  # no state can be saved
        raise
    except UserError:
        save()
        if not signals.on_any_process(asked()):
            raise


@contextlib.contextmanager
def traced(schedule: Schedule, workdir: str | Path) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told every step before it is made: it traces a few from
    `profile_at` on, as many of them as there are."""
    first = schedule.profile_at or None
    with contextlib.ExitStack() as stack:

        def before(step: int) -> None:
            if step == first:
                stack.enter_context(jax.profiler.trace(str(Path(workdir) / "profile")))
            elif first is not None and step == first + PROFILED:
                stack.close()

        yield before


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Where each process reads rows of its own: one that cannot does not wait for the others to
    save, which wait for it in a step."""
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        where = f"process {jax.process_index()} of {jax.process_count()}"
        raise peers.AloneError(f"{where}: {error}; nothing was saved for it") from error


def compiled(step_fn: Callable, state: Any) -> Callable:
    """The step, donating its state, which stays where it is on the devices."""
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(where, None))


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@jax.jit
def _held(states: Mapping[str, TrainState]) -> dict[str, tuple[jax.Array, Params]]:
    """What `_moved` needs of the states before a step, which takes these for its own."""
    return {name: jax.tree.map(jnp.copy, (one.step, one.params)) for name, one in states.items()}


@jax.jit
def _moved(
    before: Mapping[str, tuple[jax.Array, Params]], states: Mapping[str, TrainState]
) -> dict[str, jax.Array]:
    """How far a step has moved the parameters of each network in all its updates, `update_norm`:
    the norm of the difference. 0 where they were skipped, NaN of a network whose turn it was not.
    Of the logged step alone, where other metrics are means over all steps since the last log."""
    found = {}
    for name, one in states.items():
        step, params = before[name]
        change = norm(jax.tree.map(jnp.subtract, one.params, params))
        found[f"{name}update_norm"] = jnp.where(one.step > step, change, jnp.nan)
    return found


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after `step`."""
    return every > 0 and step % every == 0


def _log(
    writer: Writer,
    schedule: Schedule,
    step: int,
    window: list,
    moved: Mapping[str, jax.Array],
    clock: Interval,
    flops_per_step: float | None,
) -> dict[str, float]:
    """Writes the means over the steps since the last time, how far the last one `moved`, and a
    line to the console."""
    steps = _fetched(window)
    # Of a restored window, which another version may have begun, what it has.
    found = {name: _mean([one.get(name, math.nan) for one in steps]) for name in steps[-1]}
    if "streak" in found:  # the longest, which may have ended before the last step
        found |= {"skipped": steps[-1]["skipped"], "streak": max(s["streak"] for s in steps)}
    found |= {name: float(value) for name, value in moved.items()}
    now, peak = time.monotonic(), metrics.peak_flops()
    rates = clock.rates(step, now, schedule.steps, schedule.batch_size, flops_per_step, peak)
    times = rates.metrics()
    if clock.making:
        times[f"{metrics.TIME_PREFIX}batch_share"] = clock.making_share(now)
    writer.write(step, {**found, **times})
    if jax.process_index() == 0:
        shown = {name: found[name] for name in SHOWN if name in found}
        print(metrics.progress_line(step, schedule.steps, shown, rates), flush=True)
    return found


def _check(found: Mapping[str, float], schedule: Schedule, step: int) -> None:
    """Raises TrainingError where a run with these means cannot go on."""
    if found.get("streak", 0) > schedule.patience:
        raise TrainingError(
            f"{found['streak']:.0f} updates in a row up to step {step} had a loss or gradient that "
            "is not finite; lower optim.lr, or look at the data of these steps"
        )
    beyond = [
        f"{name} is {found[name]:.4g} up to step {step}, should be "
        + (f"at least {least:g}" if found[name] < least else f"at most {most:g}")
        for name, least, most in schedule.limits
        if found.get(name, math.nan) < least or found.get(name, math.nan) > most
    ]
    if beyond:
        raise TrainingError("; ".join(beyond))


def _fetched(window: list) -> list[dict[str, float]]:
    """Metrics of steps as numbers; those of a restored window are numbers already."""
    return [{k: float(v) for k, v in one.items()} for one in jax.device_get(window)]


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _predict(stage: Stage, state: Any, frozen: Any, step: int, writer: Writer) -> None:
    for name, predict in stage.predict_fns.items():
        found = peers.together(
            functools.partial(_predicted, name, predict, state, frozen, step),
            f"{name} after step {step} failed on another process",
        )
        if found.metrics:
            writer.write(step, found.metrics)
            logging.info("%s after step %d: %s", name, step, dict(found.metrics))
        for title, picture in found.pictures.items():
            writer.write_images(step, title, picture)


def _predicted(name: str, predict: Callable, state: Any, frozen: Any, step: int) -> Predictions:
    try:
        return predict(state, frozen, step)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"{name} after step {step} does not fit the devices' memory beside the training: draw "
            f"less (sample.rows) or never (sample.every=0): {brief(error)}"
        ) from error


def _leaving(asked: Callable[[], bool], step: int, every: int) -> bool:
    """Whether any process was asked to leave; several exchange it every so many steps."""
    if jax.process_count() > 1 and step % every:
        return False
    return signals.on_any_process(asked())
