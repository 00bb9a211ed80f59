"""Suite `unet`: one forward, and one forward and backward, beside PyTorch's, on random weights.

Forward in bfloat16 has bfloat16 parameters on both sides; forward and backward has float32 ones and
computes in bfloat16 (PyTorch by autocast), as in training. The gradient is by all parameters.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from launch.benchmarks.compare import Contender

TEXT_LENGTH = 128
# name, preset, batch, latent height and width
SIZES = (
    ("released 16x32", "dreamlite", 1, 16, 32),
    ("released 32x64", "dreamlite", 1, 32, 64),
    ("tiny 16x32 batch 32", "tiny", 32, 16, 32),
)


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the table: a name and its contenders, ours first."""
    for name, preset, batch, height, width in SIZES:
        for mode in ("forward", "forward+backward"):
            for dtype in ("float32", "bfloat16"):
                arguments = {
                    "preset": preset,
                    "shape": (batch, height, width),
                    "dtype": dtype,
                    "backward": mode != "forward",
                }
                compiled = {**arguments, "compiled": True}
                yield (
                    f"{name}, {mode}, {dtype}",
                    [
                        Contender("jax", jax_step, arguments),
                        Contender("eager", torch_step, arguments),
                        Contender("compile", torch_step, compiled),
                    ],
                )


def _inputs(config: Any, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    batch, height, width = shape
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((batch, height, width, config.in_channels), np.float32),
        "timesteps": rng.uniform(0, 1000, batch).astype(np.float32),
        "context": rng.standard_normal((batch, TEXT_LENGTH, config.context_dim), np.float32),
        "mask": np.ones((batch, TEXT_LENGTH), np.float32),
        "time_ids": np.full((batch, 2), 512, np.float32),
    }


def jax_step(preset: str, shape: tuple, dtype: str, backward: bool) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    from dreamlite_jax import pretrained
    from dreamlite_jax.models.unet import UNet
    from dreamlite_jax.models.unet_config import PRESETS
    from launch.benchmarks.weights import random_params

    config = PRESETS[preset]
    module, inputs = UNet(config, jnp.dtype(dtype)), _inputs(config, shape)
    params = random_params(pretrained.UNET, config, "float32" if backward else dtype)

    def forward(params, inputs):
        return module.apply({"params": params}, **inputs)

    def loss(params, inputs):
        return jnp.mean(jnp.square(forward(params, inputs)))

    compiled = jax.jit(jax.grad(loss) if backward else forward).lower(params, inputs).compile()
    return lambda: jax.block_until_ready(compiled(params, inputs))


def torch_step(
    preset: str, shape: tuple, dtype: str, backward: bool, compiled: bool = False
) -> Callable[[], Any]:
    import torch
    from diffusers import DreamLiteUNetModel
    from diffusers.utils import logging

    from dreamlite_jax.models.unet_config import PRESETS

    logging.set_verbosity_error()
    config = PRESETS[preset]
    inputs = {k: torch.tensor(v) for k, v in _inputs(config, shape).items()}
    latents, context = inputs["latents"].permute(0, 3, 1, 2).contiguous(), inputs["context"]
    model = DreamLiteUNetModel.from_config(config.to_dict()).eval()
    half = dtype == "bfloat16"
    if half and not backward:
        model, latents, context = model.bfloat16(), latents.bfloat16(), context.bfloat16()
    network = torch.compile(model) if compiled else model

    def forward():
        return network(
            latents,
            inputs["timesteps"],
            context,
            encoder_attention_mask=inputs["mask"],
            added_cond_kwargs={"time_ids": inputs["time_ids"]},
            return_dict=False,
        )[0]

    def step():
        if not backward:
            with torch.no_grad():
                return forward()
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = forward()
        return output.float().square().mean().backward()

    return step
