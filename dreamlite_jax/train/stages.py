"""The stages: what is trained, on which objective, and what is shown of it.

Diffusion (text to image, editing, both, fine-tuning) and the autoencoder. A stage's parameters are
a dict of networks, `{"unet": ...}`; those that are not trained lie in `frozen`.

Shapes: B rows, H and W pixels, h and w latent pixels, c latent channels, C context tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from dreamlite_jax import system
from dreamlite_jax.data import pictures
from dreamlite_jax.data.mixture import EDIT, TASKS
from dreamlite_jax.data.qwen_inputs import QwenInputs
from dreamlite_jax.diffusion import flow, sampling
from dreamlite_jax.models.primitives import PLAIN
from dreamlite_jax.objectives import autoencoding, flow_matching
from dreamlite_jax.system import Condition, Texts
from dreamlite_jax.train import sharding
from dreamlite_jax.train.loop import Predictions, Stage
from dreamlite_jax.train.state import Params, TrainState, new_state
from dreamlite_jax.train.update import LossFn, Mean, make_update


class Optimisation(NamedTuple):
    """How parameters move: see `update.make_update`."""

    tx: optax.GradientTransformation
    ema_decay: float
    accumulation: int = 1
    clip: float = 0.0
    trained: str = ""


def make_stage(
    loss_fn: LossFn,
    trained: Params,
    frozen: Params,
    optimisation: Optimisation,
    mesh: Mesh,
    rules: Sequence[sharding.Rule] = sharding.RULES,
    predict_fns: Mapping[str, Callable] | None = None,
) -> Stage:
    """A stage that trains one dict of networks.

    Args:
      trained, frozen: host arrays, the same on every process.
      mesh, rules: where arrays live.
    """
    where = functools.partial(sharding.shardings, rules=rules, mesh=mesh)

    def init_fn(key: Array) -> tuple[Any, Any]:
        del key  # nothing but the parameters is random, and they are given
        state = placed_state(trained, optimisation.tx, where)
        return state, sharding.place(frozen, where(frozen))

    step_fn = make_update(loss_fn, *optimisation)
    return Stage(init_fn, step_fn, predict_fns=predict_fns or {})


def placed_state(
    trained: Params, tx: optax.GradientTransformation, where: Callable[[Any], Any]
) -> TrainState:
    """The state at step 0 of host arrays, each part where it belongs: never whole on a device."""
    params = sharding.place(trained, where(trained))
    start = functools.partial(new_state, tx=tx)
    return jax.jit(start, out_shardings=where(jax.eval_shape(start, params)))(params)


# --- Diffusion ------------------------------------------------------------------------------------


def diffusion_loss(
    config: system.Config, context_length: int, settings: flow_matching.Settings
) -> LossFn:
    """Flow matching on batches of `data.pipeline`; metrics by task and by quarter of sigma."""

    def loss_fn(trained: Params, frozen: Params, batch: Any, keys: Array):
        params = {**frozen, **trained}
        x0, at = conditioned(config, params, batch, context_length)
        mu = flow.resolution_mu(*x0.shape[1:3], config.shift)
        sigma, noise = flow_matching.draw(settings, keys, x0, mu, edits(batch["task"]))

        def velocity_fn(xt: Array, sigma: Array) -> Array:
            return system.velocity(config, params["unet"], xt, sigma, at)

        losses = flow_matching.losses(velocity_fn, x0, sigma, noise, settings, batch["changed"])
        return losses.mean(), loss_metrics(losses, batch["task"], sigma)

    return loss_fn


def as_written(config: system.Config) -> system.Config:
    """The networks without what devices and memory ask for: their arithmetic is the model's."""
    return config._replace(remat="none", ops=PLAIN)


def edits(task: Array) -> Array:
    """Which rows are edits, bool [B], of their tasks, int [B]."""
    return task == TASKS.index(EDIT)


def loss_metrics(losses: Array, task: Array, sigma: Array) -> dict[str, Mean]:
    """Means of losses [B] by task, int [B], and by quarter of sigma [B]."""
    metrics = {f"loss/{name}": Mean.of(losses, task == k) for k, name in enumerate(TASKS)}
    quarter = jnp.minimum((4 * sigma).astype(jnp.int32), 3)
    return metrics | {f"loss/sigma_{k}": Mean.of(losses, quarter == k) for k in range(4)}


def conditioned(
    config: system.Config, params: Params, batch: Any, context_length: int
) -> tuple[Array, Condition]:
    """Clean target latents [B, h, w, c] and what the U-Net sees beside them, of a batch with or
    without precomputed parts."""
    if "target_latents" in batch:
        x0, source = batch["target_latents"], batch.get("source_latents")
    else:
        encode = functools.partial(system.encode_pictures, config, params["vae"])
        x0 = encode(batch["target"])
        source = encode(batch["source"]) if "source" in batch else None
    if source is None:
        source = system.no_source(config, x0)
    source = jnp.where(batch["has_source"][:, None, None, None], source, 0)
    if "context" in batch:
        texts = Texts(batch["context"], batch["context_mask"])
    else:
        inputs = {key: batch[key] for key in QwenInputs.__annotations__ if key in batch}
        texts = system.encode_rows(
            config, params["text_encoder"], inputs, batch["drop"], context_length
        )
    return x0, Condition(texts, source, batch["time_ids"])


def drawing(networks: Params, batch: Any) -> Params:
    """Those of the networks that pictures for a batch take: where its texts are encoded already,
    not the text encoder, which is by far the largest."""
    return {k: v for k, v in networks.items() if k != "text_encoder" or "context" not in batch}


def conditions(
    config: system.Config, params: Params, batch: Any, context_length: int
) -> tuple[dict[str, Array], Array]:
    """What the U-Net is told of a batch's rows as plain arrays, which can be repeated and split,
    and clean target latents [B, h, w, c].

    `context` [B, C, F], `mask` [B, C], `source` [B, h, w, c], `time_ids` [B, 2], and where the
    batch has null texts, `null_context` and `null_mask`.
    """
    x0, at = conditioned(config, params, batch, context_length)
    given = {**at.texts._asdict(), "source": at.source, "time_ids": at.time_ids}
    null = {k.removeprefix("null_"): v for k, v in batch.items() if k.startswith("null_")}
    if null:
        texts = conditioned(config, params, {**batch, **null}, context_length)[1].texts
        given |= {f"null_{name}": array for name, array in texts._asdict().items()}
    return given, x0


def condition(given: Mapping[str, Array], null: bool = False) -> Condition:
    """One of `conditions`: with the texts, or with the null texts."""
    texts = Texts(*(given[f"null_{name}" if null else name] for name in Texts._fields))
    return Condition(texts, given["source"], given["time_ids"])


@functools.partial(jax.jit, static_argnames=("config", "context_length"))
def sampled(
    config: system.Config,
    params: Params,
    batch: Any,
    null: Any,
    noise: Array,
    sigmas: Array,
    context_length: int,
    guidance: Array | float,
) -> tuple[Array, Array]:
    """Pictures for a batch's conditions, and its targets as the autoencoder shows them: both
    float32 [B, H, W, 3], about [-1, 1].

    Args:
      null: the same batch with every text dropped (and no source), for guidance; None: without.
      noise: float32 [B, h, w, c].
      sigmas: of `flow.sigma_list`.
    """
    x0, at = conditioned(config, params, batch, context_length)
    model = functools.partial(system.velocity, config, params["unet"])
    if null is None:
        velocity_fn = sampling.plain(model, at)
    else:
        nothing = conditioned(config, params, null, context_length)[1]
        # The source stays: guidance is by the text alone.
        nothing = nothing._replace(source=at.source)
        velocity_fn = sampling.single_guidance(model, nothing, at, guidance)
    latents = sampling.sample(velocity_fn, noise, sigmas)
    decode = functools.partial(system.decode_latents, config, params["vae"])
    return decode(latents), decode(x0)


def sample_fn(
    config: system.Config,
    mesh: Mesh,
    batch: Any,
    null: Any,
    captions: Sequence[str],
    context_length: int,
    steps: int,
    guidance: float,
    seed: int = 0,
    scored: Callable[[np.ndarray], Sequence[str]] | None = None,
) -> Callable[[Any, Any, int], Predictions]:
    """A predict_fn: a sheet of what the averaged network makes of the batch's conditions, always
    from the same noise: source (of edits) | sample | target as the autoencoder shows it | target
    (where the batch has pictures); `scored` says something of every sample, uint8 [B, H, W, 3].

    The few rows are not spread: every device makes all of them.
    """
    config = config._replace(ops=PLAIN)
    b = len(captions)

    def predict(state: Any, frozen: Any, step: int) -> Predictions:
        params = sharding.gathered(drawing({**frozen, **state.ema}, batch), mesh)
        h, w = batch["changed"].shape[1:]
        shape = (b, h, w, config.vae.latent_channels)
        noise = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        sigmas = flow.sigma_list(steps, flow.resolution_mu(h, w, config.shift))
        made, target = sampled(config, params, batch, null, noise, sigmas, context_length, guidance)
        made, target = (pictures.to_bytes(np.asarray(x)) for x in (made, target))
        rows = [[made[k], target[k]] for k in range(b)]
        if "target" in batch:
            targets = pictures.to_bytes(np.asarray(batch["target"]))
            rows = [[*row, original] for row, original in zip(rows, targets, strict=True)]
        said = captions
        if scored is not None:
            said = [f"{a}: {b}" for a, b in zip(scored(made), captions, strict=True)]
        if "source" in batch:
            sources = pictures.to_bytes(np.asarray(batch["source"]))
            rows = [
                [sources[k], *row] if batch["has_source"][k] else row for k, row in enumerate(rows)
            ]
        return Predictions(pictures={"sample": pictures.contact_sheet(rows, said, 128)})

    return predict


def validation_fn(
    loss_fn: LossFn, batches: Sequence[Any], seed: int = 0
) -> Callable[[Any, Any, int], Predictions]:
    """A predict_fn: the averaged network's loss on fixed batches, spread over the devices, with
    fixed noise."""

    @jax.jit
    def losses(params: Params, frozen: Params, batch: Any, key: Array):
        rows = batch["task"].shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        loss, metrics = loss_fn(params, frozen, batch, keys)
        return {"loss": Mean(loss * rows, jnp.float32(rows)), **metrics}

    def predict(state: Any, frozen: Any, step: int) -> Predictions:
        key = jax.random.key(seed)
        found = [
            losses(state.ema, frozen, batch, jax.random.fold_in(key, k))
            for k, batch in enumerate(batches)
        ]
        totals = jax.device_get(functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), found))
        means = {
            f"val/{name}": float(mean.total / mean.count)
            for name, mean in totals.items()
            if mean.count
        }
        return Predictions(metrics=means)

    return predict


# --- Autoencoder ----------------------------------------------------------------------------------


def autoencoder_loss(config: system.Config, settings: autoencoding.Settings) -> LossFn:
    """Reconstruction of a batch's targets."""

    def loss_fn(trained: Params, frozen: Params, batch: Any, keys: Array):
        parts = autoencoding.losses(
            functools.partial(system.encode_pictures, config, trained["vae"]),
            functools.partial(system.decode_latents, config, trained["vae"]),
            batch["target"],
            keys,
            settings,
        )
        one = jnp.ones((), jnp.float32)
        metrics = {
            "absolute": Mean.of(parts.absolute),
            "psnr": Mean.of(autoencoding.psnr(parts.square)),
            "moments": Mean(parts.moments, one),
        }
        return autoencoding.total(parts, settings), metrics

    return loss_fn


def reconstruction_fn(
    config: system.Config, mesh: Mesh, batch: Any
) -> Callable[[Any, Any, int], Predictions]:
    """A predict_fn: a sheet of picture | reconstruction by the averaged network, and its PSNR."""

    config = config._replace(ops=PLAIN)

    @jax.jit
    def reconstructed(params: Params, values: Array) -> Array:
        latents = system.encode_pictures(config, params["vae"], values)
        return system.decode_latents(config, params["vae"], latents)

    def predict(state: Any, frozen: Any, step: int) -> Predictions:
        made = np.asarray(reconstructed(sharding.gathered(state.ema, mesh), batch["target"]))
        square = np.square(np.clip(made, -1, 1) - batch["target"]).mean((1, 2, 3))
        quality = np.asarray(autoencoding.psnr(square))
        pairs = zip(*(pictures.to_bytes(x) for x in (batch["target"], made)), strict=True)
        captions = [f"{db:.1f} dB" for db in quality]
        sheet = pictures.contact_sheet([list(pair) for pair in pairs], captions, 128)
        return Predictions({"val/psnr": float(quality.mean())}, {"reconstruction": sheet})

    return predict
