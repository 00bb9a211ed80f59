"""What the parity tests share: networks of the reference with weights that hide nothing."""

import numpy as np
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel

torch.set_num_threads(1)  # more of them fight with JAX for the cores, at a hundred times the cost


def reference_model(config, seed: int = 0) -> torch.nn.Module:
    """diffusers' network of one of our configs, every parameter random.

    Biases and norms start at 0 and 1 in PyTorch, which would let a misplaced one pass.
    """
    kind = {"DreamLiteUNetModel": DreamLiteUNetModel, "AutoencoderTiny": AutoencoderTiny}
    torch.manual_seed(seed)
    model = kind[config.to_dict()["_class_name"]].from_config(config.to_dict()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def unet_inputs(config, batch: int, height: int, width: int, length: int, seed: int = 1) -> dict:
    """Random inputs of our U-Net as NumPy, the last prompts padded."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int32)
    mask[batch // 2 :, length // 2 :] = 0
    return {
        "latents": rng.standard_normal((batch, height, width, config.in_channels), np.float32),
        "timesteps": rng.uniform(0, 1000, batch).astype(np.float32),
        "context": rng.standard_normal((batch, length, config.context_dim), np.float32),
        "mask": mask,
        "time_ids": rng.integers(64, 2048, (batch, 2)).astype(np.float32),
    }


def run_unet(model, inputs: dict, dtype=torch.float32) -> torch.Tensor:
    """diffusers' U-Net on our inputs; [B, H, W, C], differentiable."""
    latents = torch.as_tensor(inputs["latents"]).to(dtype).permute(0, 3, 1, 2)
    added = {"time_ids": torch.as_tensor(inputs["time_ids"]).to(dtype)}
    output = model.to(dtype)(
        latents,
        torch.as_tensor(inputs["timesteps"]),
        torch.as_tensor(inputs["context"]).to(dtype),
        encoder_attention_mask=torch.as_tensor(inputs["mask"]),
        added_cond_kwargs=added,
    )
    return output.sample.permute(0, 2, 3, 1)


def largest_error(ours, theirs) -> float:
    """Largest absolute difference, in units of the reference's largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
