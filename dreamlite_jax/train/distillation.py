"""The stage of step distillation: a student of a few steps, a fake score, a frozen teacher.

The state is {"student", "fake"}, two networks in training that both begin as the teacher. Each step
updates the fake score; every so many steps, after a warm-up, the student is updated, too, from the
same rows. The average of the student is the result, a *mobile* model: `convert.export` writes one.

Config keys are those of `Settings` under `distill`, and of `dmd2.Settings` under `loss`. What the
student's loss and the fake score's are is told in `objectives/dmd2.py`.

Shapes: B rows, h and w latent pixels, c latent channels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from dreamlite_jax import system
from dreamlite_jax.data import pictures, transforms
from dreamlite_jax.data.pipeline import Recipe
from dreamlite_jax.diffusion import flow, sampling
from dreamlite_jax.models.discriminator import Discriminator
from dreamlite_jax.models.primitives import PLAIN
from dreamlite_jax.objectives import dmd2, flow_matching
from dreamlite_jax.rewards import statistics
from dreamlite_jax.train import optim, origins, sharding, stages
from dreamlite_jax.train.loop import Predictions, Stage
from dreamlite_jax.train.origins import Origin
from dreamlite_jax.train.state import Params, TrainState
from dreamlite_jax.train.update import LossFn, Mean, StepFn, make_update

STUDENT, FAKE, TEACHER, HEAD = "student", "fake", "teacher", "head"


class Settings(NamedTuple):
    """The config's section `distill`; its `steps` are the student's."""

    steps: int = 4
    ratio: int = 5  # updates of the fake score for one of the student
    warmup: int = 100  # updates of the fake score alone, at first
    score_lr: float = 0.0  # the fake score's learning rate; 0: the student's
    score: flow_matching.Settings = flow_matching.Settings()  # and its objective


class Losses(NamedTuple):
    """Both networks' losses, by the settings of a run."""

    student: LossFn
    fake: LossFn


# --- Checking -------------------------------------------------------------------------------------


def settings_of(section: Mapping[str, Any], read: Callable[[type, Mapping, str], Any]) -> Settings:
    """A config's section `distill`; `read` makes a NamedTuple of a dict, or raises."""
    section = dict(section)
    score = read(flow_matching.Settings, section.pop("score", {}), "distill.score")
    return read(Settings, section, "distill")._replace(score=score)


def problems(settings: Settings, steps: int) -> list[str]:
    """What is wrong with them in a run of so many steps, a line each."""
    found = [f"distill.score.{problem}" for problem in settings.score.problems()]
    for name, least in (("steps", 1), ("ratio", 1), ("warmup", 0)):
        if getattr(settings, name) < least:
            found.append(f"distill.{name} is {getattr(settings, name)}, should be at least {least}")
    if settings.score_lr < 0:
        found.append(f"distill.score_lr is {settings.score_lr}, should be 0 or more")
    if not found and student_updates(settings, steps) < 1:
        found.append(
            f"steps is {steps}, but the student's first update is after {settings.warmup} + "
            f"{settings.ratio} (distill.warmup + distill.ratio); raise steps"
        )
    return found


def student_updates(settings: Settings, steps: int) -> int:
    """How often the student is updated in so many steps."""
    return max(steps - settings.warmup, 0) // settings.ratio


def score_optimisation(settings: Settings, student: optim.Settings, steps: int) -> dict[str, Any]:
    """What differs in how the fake score moves, of `stages.Optimisation`: its own rate over all
    steps, and no average, for which nobody asks."""
    rate = settings.score_lr or student.lr
    return {"tx": optim.make_tx(student._replace(lr=rate), steps), "ema_decay": 0.0}


def teacher_problems(teacher: Origin, random: bool) -> list[str]:
    """What is wrong with where the teacher comes from; `random`: whether it may be from scratch."""
    if teacher.kind == "scratch" and not random:
        return ["init_from is empty, but distillation needs a teacher: a run or a model directory"]
    if origins.is_mobile(teacher):
        return [
            f"the teacher would be {teacher}, a mobile model, which guidance means nothing to; set "
            "init_from to the model that is to be distilled"
        ]
    return []


def conditions_of(recipe: Recipe, loss: dmd2.Settings) -> Recipe:
    """The recipe of what is distilled, from that of a pretraining: nothing is left out, and null
    texts are there for the teacher's guidance."""
    return recipe._replace(dropout=transforms.NEVER, with_null=loss.guided)


# --- Velocities -----------------------------------------------------------------------------------


def plain(config: system.Config, unet: Params, given: Any) -> sampling.VelocityFn:
    """Of the student and the fake score, which know no guidance."""
    velocity = functools.partial(system.velocity, config, unet)
    return sampling.plain(velocity, stages.condition(given))


def guided(
    config: system.Config, unet: Params, given: Any, loss: dmd2.Settings, scale: Array
) -> sampling.VelocityFn:
    """Of the teacher. Text to image has no source, so that dual guidance is single there."""
    if not loss.guided:
        return plain(config, unet, given)
    velocity = functools.partial(system.velocity, config, unet)
    text, image = stages.condition(given), stages.condition(given, null=True)
    nothing = image._replace(source=jnp.zeros_like(image.source))
    return sampling.dual_guidance(velocity, nothing, image, text, scale, loss.image_guidance)


def logits(
    config: system.Config, score: Params, head: Params, given: Any, xt: Array, sigma: Array
) -> Array:
    """The discriminator's, float32 [B], from the features of the fake score."""
    found = system.features(config, score, xt, sigma, stages.condition(given))
    return discriminator(config).apply({"params": head}, found)


def discriminator(config: system.Config) -> Discriminator:
    """Deep enough to end at about 4 x 4 places for pictures of the model's own size."""
    unet = config.unet
    side = (unet.sample_size or 128) // 2 ** (unet.levels - 1)
    depth = max(side // 4, 1).bit_length() - 1
    return Discriminator(depth, unet.block_out_channels[-1], unet.norm_num_groups)


# --- Losses ---------------------------------------------------------------------------------------


def make_losses(config: system.Config, settings: Settings, loss: dmd2.Settings) -> Losses:
    """The losses on rows of `prepared`. Frozen, the student's has {TEACHER, FAKE}, the fake
    score's nothing."""

    def score_draw(keys: Array, x0: Array, mu: float, rows: Any) -> tuple[Array, Array]:
        edits = stages.edits(rows["task"])
        sigma, noise = flow_matching.draw(settings.score, keys, x0, mu, edits)
        return dmd2.within(loss, sigma, rows["sigma"], rows["after"]), noise

    def student_loss(trained: Params, frozen: Params, rows: Any, keys: Array):
        given, fake = rows["given"], frozen[FAKE]
        for_place, for_scale, for_gan = split_keys(keys, 3)
        student_fn = plain(config, trained["unet"], given)
        edits = stages.edits(rows["task"])
        scale = dmd2.draw_guidance(loss, edits, for_scale)
        teacher_fn = guided(config, frozen[TEACHER], given, loss, scale)
        x0 = dmd2.sample_from(student_fn, rows["xt"], rows["sigma"])
        mu = flow.resolution_mu(*x0.shape[1:3], config.shift)
        sigma, noise = dmd2.draw(loss, for_place, x0, mu, rows["sigma"], rows["after"])
        fake_fn = plain(config, fake["unet"], given)
        total = dmd2.matching_losses(x0, sigma, noise, fake_fn, teacher_fn)
        metrics = {"student/matching": Mean.of(total)}
        if loss.gan:
            sigma, noise = score_draw(for_gan, x0, mu, rows)
            logit_fn = functools.partial(logits, config, fake["unet"], fake[HEAD], given)
            fooling = dmd2.fooling_losses(x0, sigma, noise, logit_fn)
            total = total + loss.gan * fooling
            metrics["student/fooling"] = Mean.of(fooling)
        if loss.trajectory:
            sigmas = jnp.asarray(flow.sigma_list(settings.steps, mu))
            scale = dmd2.guidance_of(loss, edits)
            teacher_fn = guided(config, frozen[TEACHER], given, loss, scale)
            given_to = student_fn, teacher_fn, rows["noise"], sigmas, loss.trajectory_steps
            apart = dmd2.trajectory_losses(*given_to)
            total = total + loss.trajectory * apart
            metrics["student/trajectory"] = Mean.of(apart)
        return total.mean(), metrics

    def fake_loss(trained: Params, frozen: Params, rows: Any, keys: Array):
        given, score, x0 = rows["given"], settings.score, rows["sample"]
        for_flow, for_gan = split_keys(keys, 2)
        mu = flow.resolution_mu(*x0.shape[1:3], config.shift)
        sigma, noise = score_draw(for_flow, x0, mu, rows)
        fake_fn = plain(config, trained["unet"], given)
        losses = flow_matching.losses(fake_fn, x0, sigma, noise, score)
        total, metrics = losses.mean(), stages.loss_metrics(losses, rows["task"], sigma)
        if loss.gan:
            sigma, noise = score_draw(for_gan, x0, mu, rows)
            logit_fn = functools.partial(logits, config, trained["unet"], trained[HEAD], given)
            telling = dmd2.telling_losses(x0, rows["x0"], sigma, noise, logit_fn)
            total = total + loss.gan_score * telling.mean()
            metrics["fake/telling"] = Mean.of(telling)
        return total, metrics

    return Losses(student_loss, fake_loss)


def split_keys(keys: Array, parts: int) -> Array:
    """Keys [B] as [parts, B]."""
    return jax.vmap(lambda key: jax.random.split(key, parts), out_axes=1)(keys)


# --- The step -------------------------------------------------------------------------------------


def prepared(
    config: system.Config,
    settings: Settings,
    context_length: int,
    networks: Params,
    batch: Any,
    key: Array,
) -> dict[str, Any]:
    """What both losses need of a batch, [B, ...]: `given` (`stages.conditions`), `task`, latents
    `x0` of its targets, `noise`, and where the student is on its way from there: `xt` at `sigma`,
    one of its steps, the same for all rows, which leads to `after`, and its `sample`, what it takes
    for x0 there.

    Args:
      networks: {"unet": the student's, "vae", "text_encoder"}.
    """
    given, x0 = stages.conditions(config, networks, batch, context_length)
    for_stop, for_rows = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(for_rows, jnp.arange(x0.shape[0]))
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], jnp.float32))(keys)
    sigmas = flow.sigma_list(settings.steps, flow.resolution_mu(*x0.shape[1:3], config.shift))
    stop = jax.random.randint(for_stop, (), 0, settings.steps)
    xt, sample = dmd2.simulated(plain(config, networks["unet"], given), noise, sigmas, stop)
    sigma, after = (jnp.full(x0.shape[:1], jnp.asarray(sigmas)[k]) for k in (stop, stop + 1))
    rows = {"given": given, "task": batch["task"], "x0": x0, "noise": noise}
    return {**rows, "xt": xt, "sample": sample, "sigma": sigma, "after": after}


def make_step(
    config: system.Config,
    settings: Settings,
    loss: dmd2.Settings,
    context_length: int,
    student: stages.Optimisation,
    fake: stages.Optimisation,
) -> StepFn:
    """`({"student", "fake"}, frozen, batch, key) -> (state, metrics)`; frozen has TEACHER beside
    the encoders.

    `loss` and its parts are the fake score's; `student/...` are NaN where the student was not
    updated, `student/updates` counts.
    """
    losses = make_losses(config, settings, loss)
    update_student = make_update(losses.student, *student)
    update_fake = make_update(losses.fake, *fake)

    @functools.partial(jax.jit, inline=True)  # traced once, for its metrics' shapes and to be used
    def learn(student: TrainState, scores: Params, rows: Any, key: Array):
        student, found = update_student(student, scores, rows, key)
        return student, {
            name if name.startswith(STUDENT) else f"{STUDENT}/{name}": value
            for name, value in found.items()
        }

    def step_fn(state: Any, frozen: Params, batch: Any, key: Array):
        for_rows, for_student, for_fake = jax.random.split(key, 3)
        before, score = state[STUDENT], state[FAKE]
        networks = {**frozen, "unet": before.params["unet"]}
        rows = prepared(config, settings, context_length, networks, batch, for_rows)
        given = {TEACHER: frozen[TEACHER], FAKE: score.params}, rows, for_student

        shapes = jax.eval_shape(learn, before, *given)[1]
        nothing = {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in shapes.items()}
        done = score.step + 1 - settings.warmup
        due = (done > 0) & (done % settings.ratio == 0)
        after, found = lax.cond(due, learn, lambda student, *_: (student, nothing), before, *given)

        score, of_score = update_fake(score, {}, rows, for_fake)
        own = ("grad_norm", "param_norm")
        metrics = {f"{FAKE}/{name}" if name in own else name: of_score[name] for name in of_score}
        metrics |= {name: x for name, x in found.items() if name not in _COUNTS}
        metrics |= {
            "student/updates": after.step.astype(jnp.float32),
            "skipped": (after.skipped + score.skipped).astype(jnp.float32),
            "streak": jnp.maximum(after.streak, score.streak).astype(jnp.float32),
        }
        return {STUDENT: after, FAKE: score}, metrics

    return step_fn


_COUNTS = ("student/skipped", "student/streak")


# --- The stage ------------------------------------------------------------------------------------


def make_stage(
    config: system.Config,
    step_fn: StepFn,
    teacher: Params,
    trained: Params,
    frozen: Params,
    student: stages.Optimisation,
    fake: stages.Optimisation,
    adversarial: bool,
    mesh: Mesh,
    rules: Sequence[sharding.Rule],
    predict_fns: Mapping[str, Callable],
) -> Stage:
    """The stage; teacher, trained ({"unet": the student's}) and frozen are host arrays."""
    where = functools.partial(sharding.shardings, rules=rules, mesh=mesh)

    def init_fn(key: Array) -> tuple[Any, Any]:
        score = {"unet": teacher}
        if adversarial:
            score[HEAD] = jax.tree.map(np.asarray, head_params(config, key))
        state = {
            STUDENT: stages.placed_state(trained, student.tx, where),
            FAKE: stages.placed_state(score, fake.tx, where),
        }
        rest = {**frozen, TEACHER: teacher}
        return state, sharding.place(rest, where(rest))

    return Stage(init_fn, step_fn, predict_fns=predict_fns)


def head_params(config: system.Config, key: Array) -> Params:
    """Fresh ones of the discriminator."""
    side = (1, 8, 8, config.unet.block_out_channels[-1])
    made = jax.jit(discriminator(config).init)(key, jnp.zeros(side, jnp.float32))
    return made["params"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def drawn(
    config: system.Config,
    loss: dmd2.Settings,
    steps: int,
    teacher_steps: int,
    context_length: int,
    networks: Params,
    batch: Any,
    noise: Array,
) -> dict[str, Array]:
    """What student, fake score and teacher make of a batch's conditions from the same noise: by
    name, float32 [B, H, W, 3], about [-1, 1]."""
    given, x0 = stages.conditions(config, networks, batch, context_length)
    mu = flow.resolution_mu(*x0.shape[1:3], config.shift)
    scale = dmd2.guidance_of(loss, stages.edits(batch["task"]))
    ways = {
        STUDENT: (plain(config, networks[STUDENT], given), steps),
        FAKE: (plain(config, networks[FAKE], given), teacher_steps),
        TEACHER: (guided(config, networks[TEACHER], given, loss, scale), teacher_steps),
    }
    return {
        name: system.decode_latents(
            config, networks["vae"], sampling.sample(fn, noise, flow.sigma_list(n, mu))
        )
        for name, (fn, n) in ways.items()
    }


def comparison_fn(
    config: system.Config,
    mesh: Mesh,
    settings: Settings,
    loss: dmd2.Settings,
    batch: Any,
    captions: Sequence[str],
    context_length: int,
    teacher_steps: int,
    seed: int = 0,
) -> Callable[[Any, Any, int], Predictions]:
    """A predict_fn: source (of edits) | student | fake score | teacher, always from the same noise,
    and how far the averaged student's pictures are from the teacher's: their root mean square
    difference in [0, 1], and both ones' saturation and contrast (an over-baked student has more of
    both)."""
    config = config._replace(ops=PLAIN)

    def predict(state: Any, frozen: Any, step: int) -> Predictions:
        unets = {STUDENT: state[STUDENT].ema["unet"], FAKE: state[FAKE].params["unet"]}
        networks = sharding.gathered(stages.drawing({**frozen, **unets}, batch), mesh)
        h, w = batch["changed"].shape[1:]
        shape = (len(captions), h, w, config.vae.latent_channels)
        noise = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        static = config, loss, settings.steps, teacher_steps, context_length
        found = drawn(*static, networks, batch, noise)
        made = {name: pictures.to_bytes(np.asarray(x)) for name, x in found.items()}
        columns = [made[STUDENT], made[FAKE], made[TEACHER]]
        rows = [list(row) for row in zip(*columns, strict=True)]
        if "source" in batch:
            sources = pictures.to_bytes(np.asarray(batch["source"]))
            edits = batch["has_source"]
            rows = [[sources[k], *row] if edits[k] else row for k, row in enumerate(rows)]
        sheet = pictures.contact_sheet(rows, captions, 128)
        return Predictions(compared(made[STUDENT], made[TEACHER]), {"distillation": sheet})

    return predict


def compared(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Of pictures uint8 [B, H, W, 3] from the same noise."""
    apart = (student.astype(np.float32) - teacher.astype(np.float32)) / 255
    found = {"val/distance": float(np.sqrt(np.square(apart).mean((1, 2, 3))).mean())}
    for name, made in ((STUDENT, student), (TEACHER, teacher)):
        grey = made.astype(np.float32).mean(-1) / 255
        found[f"val/saturation/{name}"] = float(np.mean([*map(statistics.saturation, made)]))
        found[f"val/contrast/{name}"] = float(grey.std((1, 2)).mean())
    return found
