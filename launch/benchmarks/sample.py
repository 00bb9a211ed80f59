"""Suite `sample`: seconds for one picture, encoder, denoiser and decoder apart, beside diffusers.

Text to image with guidance in 4 steps on random weights: the encoder takes the null prompt and a
prompt, the denoiser both branches as a batch of two. Networks of the released sizes compute in
float32, but for the 2B text encoder, of which two float32 copies would not fit a small machine.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from launch.benchmarks.compare import Contender

STEPS, GUIDANCE = 4, 3.5
PROMPT_TOKENS = 64  # with the template's; a short prompt
# name, presets of (U-Net, autoencoder, encoder), dtype of the encoder, sides in pixels
SIZES = (("tiny", "TINY", "float32", (64,)), ("released", "RELEASED", "bfloat16", (256, 512)))


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the table: a name and its contenders, ours first."""
    for name, preset, dtype, sides in SIZES:
        arguments = {"preset": preset, "dtype": dtype}
        yield _row(f"{name}, encoder, {dtype}", jax_encoder, torch_encoder, arguments)
        for side in sides:
            arguments = {"preset": preset, "side": side}
            yield _row(f"{name}, denoiser, {side} px", jax_denoiser, torch_denoiser, arguments)
            yield _row(f"{name}, decoder, {side} px", jax_decoder, torch_decoder, arguments)


def _row(name: str, ours: Callable, theirs: Callable, arguments: dict) -> tuple:
    return name, [Contender("jax", ours, arguments), Contender("diffusers", theirs, arguments)]


def _configs(preset: str) -> tuple[Any, Any, Any]:
    from dreamlite_jax.models import autoencoder, unet_config
    from dreamlite_jax.models.qwen3_vl import config as qwen3_vl

    if preset == "TINY":
        return unet_config.TINY, autoencoder.TINY, qwen3_vl.TINY
    return unet_config.DREAMLITE, autoencoder.TAESDXL, qwen3_vl.QWEN3_VL_2B


def _tokens(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, min(vocabulary, 200), (2, PROMPT_TOKENS))


def _latents(unet: Any, side: int, factor: int) -> np.ndarray:
    shape = (1, side // factor, side // factor, unet.in_channels)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _context(unet: Any) -> tuple[np.ndarray, np.ndarray]:
    shape = (2, PROMPT_TOKENS, unet.context_dim)
    return np.random.default_rng(0).standard_normal(shape, np.float32), np.ones(shape[:2], bool)


def jax_encoder(preset: str, dtype: str) -> Callable[[], Any]:
    import jax

    from dreamlite_jax import pretrained, system
    from dreamlite_jax.data.qwen_inputs import qwen_inputs
    from launch.benchmarks.weights import random_params

    unet, vae, encoder = _configs(preset)
    config = system.Config(unet, vae, encoder, dtype=np.dtype(dtype))
    params = random_params(pretrained.TEXT_ENCODER, encoder, dtype)
    ids = _tokens(encoder.text.vocab_size)
    inputs = qwen_inputs(
        {"input_ids": ids, "attention_mask": np.ones_like(ids)}, **encoder.input_numbers
    )
    return lambda: jax.block_until_ready(system.encode_texts(config, params, inputs, 34))


def torch_encoder(preset: str, dtype: str) -> Callable[[], Any]:
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    encoder = _configs(preset)[2]
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(encoder.to_dict()))
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.nn.init.normal_(tensor, std=0.02)
    ids = torch.as_tensor(_tokens(encoder.text.vocab_size))

    def step():
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)

    return step


def jax_denoiser(preset: str, side: int) -> Callable[[], Any]:
    import jax

    from dreamlite_jax import pretrained, system
    from dreamlite_jax.diffusion import flow
    from launch.benchmarks.weights import random_params

    unet, vae, encoder = _configs(preset)
    config = system.Config(unet, vae, encoder)
    params = random_params(pretrained.UNET, unet, "float32")
    noise, (context, mask) = _latents(unet, side, vae.factor), _context(unet)
    null, texts = (system.Texts(context[i : i + 1], mask[i : i + 1]) for i in (0, 1))
    sigmas = flow.sigma_list(STEPS, flow.resolution_mu(*noise.shape[1:3], config.shift))
    return lambda: jax.block_until_ready(
        system.sample_latents(config, params, noise, sigmas, texts, null, guidance=GUIDANCE)
    )


def torch_denoiser(preset: str, side: int) -> Callable[[], Any]:
    """The loop of diffusers' DreamLitePipeline, with its U-Net and its scheduler."""
    import torch
    from diffusers import DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.dreamlite.pipeline_dreamlite import calculate_shift

    unet, vae, _ = _configs(preset)
    model = DreamLiteUNetModel.from_config(unet.to_dict()).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    noise = torch.as_tensor(_latents(unet, side, vae.factor)).permute(0, 3, 1, 2).contiguous()
    context, mask = map(torch.as_tensor, _context(unet))
    sizes = torch.full((2, 2), float(side))

    @torch.no_grad()
    def step():
        mu = calculate_shift(noise.shape[2] * noise.shape[3] // 4)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=mu)
        latents = noise
        for t in scheduler.timesteps:
            both = torch.cat(
                [torch.cat([latents] * 2), torch.zeros_like(torch.cat([noise] * 2))], 3
            )
            v = model(
                both,
                t.expand(2),
                context,
                encoder_attention_mask=mask,
                added_cond_kwargs={"time_ids": sizes},
                return_dict=False,
            )[0]
            v0, v1 = v[..., : latents.shape[-1]].chunk(2)
            v = v0 + GUIDANCE * (v1 - v0)
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
        return latents

    return step


def jax_decoder(preset: str, side: int) -> Callable[[], Any]:
    import jax

    from dreamlite_jax import pretrained, system
    from launch.benchmarks.weights import random_params

    unet, vae, encoder = _configs(preset)
    config = system.Config(unet, vae, encoder)
    params = random_params(pretrained.AUTOENCODER, vae, "float32")
    latents = _latents(unet, side, vae.factor)
    return lambda: jax.block_until_ready(system.decode_latents(config, params, latents))


def torch_decoder(preset: str, side: int) -> Callable[[], Any]:
    import torch
    from diffusers import AutoencoderTiny

    unet, vae, _ = _configs(preset)
    model = AutoencoderTiny.from_config(vae.to_dict()).eval()
    latents = torch.as_tensor(_latents(unet, side, vae.factor)).permute(0, 3, 1, 2).contiguous()

    def step():
        with torch.no_grad():
            return model.decode(latents, return_dict=False)[0]

    return step
