"""Suite `tflite`: one step of the released U-Net, and the decoder, on the CPU with 2 threads:
LiteRT (XNNPACK) beside ONNX Runtime and PyTorch.

ONNX Runtime gets what PyTorch exports of diffusers' networks, all run float32 on random weights.
Files are lowered once, into runs/tflite, because the U-Net's take a minute each.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks.compare import Contender

FOLDER = Path("runs/tflite")
PRESET = "dreamlite"
TEXT_LENGTH, THREADS = 128, 2


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the table: a name and its contenders, ours first."""
    for name in ("vae_decoder", "unet"):
        for side in (256, 512):
            arguments = {"name": name, "side": side}
            makers = {"litert": litert_step, "onnxruntime": onnx_step, "eager": torch_step}
            yield (
                f"released {name}, {side} px",
                [Contender(contender, make, arguments) for contender, make in makers.items()],
            )


def _inputs(name: str, side: int, config: Any) -> dict[str, np.ndarray]:
    """As PyTorch takes them."""
    rng, latent = np.random.default_rng(0), side // 8
    if name == "vae_decoder":
        return {"latent": rng.standard_normal((1, 4, latent, latent), np.float32)}
    shape = (1, TEXT_LENGTH, config.context_dim)
    return {
        "sample": rng.standard_normal((1, 4, latent, 2 * latent), np.float32),
        "timestep": np.full(1, 760.0, np.float32),
        "encoder_hidden_states": rng.standard_normal(shape, np.float32),
        "encoder_attention_mask": np.ones((1, TEXT_LENGTH), np.float32),
        "time_ids": np.full((1, 2), side, np.float32),
    }


def litert_step(name: str, side: int) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    file = FOLDER / f"{PRESET}-{side}" / "fp32" / f"{name}.tflite"
    if not file.is_file():  # in a process of its own, whose memory is not ours
        command = [sys.executable, "-m", "convert.tflite", f"--random={PRESET}", "--weights=fp32"]
        sizes = [f"--height={side}", f"--width={side}", f"--text_lengths={TEXT_LENGTH}"]
        out = f"--out={file.parent.parent}"
        subprocess.run([*command, *sizes, out, f"--parts={name}"], check=True)
    model = Interpreter(str(file), num_threads=THREADS)
    run = model.get_signature_runner()
    rng = np.random.default_rng(0)
    inputs = {
        key: rng.standard_normal(tuple(tensor["shape"]), np.float32)
        for key, tensor in run.get_input_details().items()
    }
    return lambda: run(**inputs)


def _network(name: str) -> tuple[Any, Any]:
    """diffusers' network as a module of positional inputs, and our config of the U-Net."""
    import torch
    from diffusers import AutoencoderTiny, DreamLiteUNetModel
    from diffusers.utils import logging

    from dreamlite_jax.models.autoencoder import TAESDXL
    from dreamlite_jax.models.unet_config import PRESETS

    logging.set_verbosity_error()
    torch.set_num_threads(THREADS)
    config = PRESETS[PRESET]

    class Denoise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = DreamLiteUNetModel.from_config(config.to_dict())

        def forward(self, sample, timestep, context, mask, time_ids):
            added = {"time_ids": time_ids}
            return self.unet(
                sample, timestep, context, encoder_attention_mask=mask, added_cond_kwargs=added
            ).sample

    if name == "unet":
        return Denoise().eval(), config
    return AutoencoderTiny.from_config(TAESDXL.to_dict()).eval().decoder, config


def torch_step(name: str, side: int) -> Callable[[], Any]:
    import torch

    network, config = _network(name)
    inputs = [torch.from_numpy(x) for x in _inputs(name, side, config).values()]

    def step():
        with torch.no_grad():
            return network(*inputs)

    return step


def onnx_step(name: str, side: int) -> Callable[[], Any]:
    import onnxruntime
    import torch

    network, config = _network(name)
    inputs = _inputs(name, side, config)
    file = FOLDER / f"{PRESET}-{side}" / "onnx" / f"{name}.onnx"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = tuple(map(torch.from_numpy, inputs.values()))
        with torch.no_grad():
            torch.onnx.export(network, arrays, file, input_names=list(inputs), dynamo=False)
    del network
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)
