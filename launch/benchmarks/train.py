"""Suite `train`: a whole training step beside a plain PyTorch loop, on random weights.

Flow matching on `[target | condition]` with the loss on the target half, clipping by the global
norm, AdamW and an exponential moving average: ours is the update of `launch.train`, theirs is
diffusers' U-Net with torch's fused AdamW, autograd and `_foreach` averages. Latents and text
embeddings are given.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from launch.benchmarks.compare import Contender

TEXT_LENGTH = 128
LR, WEIGHT_DECAY, CLIP, EMA_DECAY = 1e-4, 1e-4, 1.0, 0.999
# name, preset, batch; latents of 16 x 16 beside conditions of 16 x 16
SIZES = (("released 16x32", "dreamlite", 1), ("tiny 16x32 batch 32", "tiny", 32))
SIDE = 16


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the table: a name and its contenders, ours first."""
    for name, preset, batch in SIZES:
        for dtype in ("float32", "bfloat16"):
            arguments = {"preset": preset, "batch": batch, "dtype": dtype}
            yield (
                f"{name}, train step, {dtype}",
                [Contender("jax", jax_step, arguments), Contender("eager", torch_step, arguments)],
            )


def _batch(config: Any, rows: int) -> dict[str, np.ndarray]:
    """As `data.pipeline` gives it: half of the rows are edits."""
    rng = np.random.default_rng(0)
    latents = (rows, SIDE, SIDE, config.out_channels)
    edits = np.arange(rows) % 2
    return {
        "target_latents": rng.standard_normal(latents, np.float32),
        "source_latents": rng.standard_normal(latents, np.float32),
        "has_source": edits == 1,
        "task": edits.astype(np.int32),
        "changed": np.ones(latents[:3], bool),
        "time_ids": np.full((rows, 2), 8 * SIDE, np.float32),
        "context": rng.standard_normal((rows, TEXT_LENGTH, config.context_dim), np.float32),
        "context_mask": np.ones((rows, TEXT_LENGTH), bool),
    }


def jax_step(preset: str, batch: int, dtype: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    from dreamlite_jax import pretrained, system
    from dreamlite_jax.models import autoencoder
    from dreamlite_jax.models.unet_config import PRESETS
    from dreamlite_jax.objectives import flow_matching
    from dreamlite_jax.train import loop, optim, stages
    from dreamlite_jax.train.state import new_state
    from dreamlite_jax.train.update import make_update
    from launch.benchmarks.weights import random_params

    network = PRESETS[preset]
    config = system.Config(network, autoencoder.TAESDXL, None, dtype=jnp.dtype(dtype))
    loss_fn = stages.diffusion_loss(config, TEXT_LENGTH, flow_matching.Settings())
    tx = optim.make_tx(optim.Settings(lr=LR, weight_decay=WEIGHT_DECAY), 1000)
    params = {"unet": random_params(pretrained.UNET, network, "float32")}
    state = jax.jit(lambda params: new_state(params, tx))(params)
    del params
    given, key = jax.device_put(_batch(network, batch)), jax.random.key(0)
    step_fn = loop.compiled(make_update(loss_fn, tx, EMA_DECAY, clip=CLIP), state)

    def step():
        nonlocal state
        state, metrics = step_fn(state, {}, given, key)
        return float(metrics["loss"])

    return step


def torch_step(preset: str, batch: int, dtype: str) -> Callable[[], Any]:
    import torch
    from diffusers import DreamLiteUNetModel
    from diffusers.utils import logging

    from dreamlite_jax.models.unet_config import PRESETS

    logging.set_verbosity_error()
    network = PRESETS[preset]
    model = DreamLiteUNetModel.from_config(network.to_dict()).train()
    params = list(model.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    given = {name: torch.tensor(value) for name, value in _batch(network, batch).items()}
    x0 = given["target_latents"].permute(0, 3, 1, 2).contiguous()
    source = given["source_latents"].permute(0, 3, 1, 2)
    source = torch.where(given["has_source"][:, None, None, None], source, 0).contiguous()

    def step():
        sigma = torch.sigmoid(torch.randn(batch))
        noise = torch.randn_like(x0)
        weight = sigma[:, None, None, None]
        xt = (1 - weight) * x0 + weight * noise
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            predicted = model(
                torch.cat([xt, source], dim=3),
                1000 * sigma,
                given["context"],
                encoder_attention_mask=given["context_mask"].float(),
                added_cond_kwargs={"time_ids": given["time_ids"]},
                return_dict=False,
            )[0][..., :SIDE]
        loss = (predicted.float() - (noise - x0)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - EMA_DECAY)
        return loss.item()

    return step
