"""Whether .tflite files compute what the JAX networks compute: on the CPU, and on the GPU
accelerator with every operation there.

Files run in processes of their own: what an accelerator cannot take may end its process. It runs on
a software Vulkan driver (`make gpu-driver`) unless another one is set (`convert.vulkan`); its
verdicts are on semantics and half precision, not on a phone's speed or memory.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from convert import process
from convert.graphs import Layers
from convert.lowering import Graph
from convert.phone import sinusoids
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.autoencoder import Autoencoder
from dreamlite_jax.models.primitives import PLAIN
from dreamlite_jax.models.qwen3_vl.text import causal_bias, mrope_angles
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.pretrained import Params
from dreamlite_jax.system import Config
from dreamlite_jax.train import signals

# dB of `psnr` that an output must reach, by (accelerator, precision). The CPU is always float32.
# Of files with float32 weights: those reach 127 dB and more on the CPU, random or trained. Weights
# rounded to half floats leave 80 to 88 of a small network, however exactly it is computed.
DEMANDS = {("cpu", "fp32"): 90.0, ("gpu", "fp32"): 90.0, ("gpu", "fp16"): 45.0}
_ATTEMPTS = 8  # of a process whose shaders are not compiled yet


class VerifyError(UserError):
    """A file that does not run, or not as it should: one line."""


class Case(NamedTuple):
    """Inputs by name, and the output that the plain float32 network gives for them."""

    inputs: dict[str, np.ndarray]
    expected: np.ndarray


def ssim(ours: np.ndarray, expected: np.ndarray) -> float:
    """Structural similarity of pictures uint8 [H, W, 3], over 8x8 windows that do not overlap (Wang
    et al. 2004, eq. 13, with flat windows)."""

    def windows(x):
        h, w = (side // 8 * 8 for side in x.shape[:2])
        tiles = x[:h, :w].astype(np.float64).reshape(h // 8, 8, w // 8, 8, -1)
        return tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 64)

    a, b = windows(ours), windows(expected)
    ma, mb = a.mean(1), b.mean(1)
    covariance = ((a - ma[:, None]) * (b - mb[:, None])).mean(1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    shape = (2 * covariance + c2) / (a.var(1) + b.var(1) + c2)
    return float(np.mean(shape * (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)))


# --- What to compare with -------------------------------------------------------------------------


def case(
    name: str,
    graph: Graph,
    config: Config,
    params: Params,
    seed: int = 0,
    layers: range | None = None,
    entering: np.ndarray | None = None,
) -> Case:
    """A random case of a component ("unet", "vae_decoder", ...); params of its network.

    Expected is what the plain network computes in float32: the one that trains, none of the phone's
    forms.

    Args:
      layers: of the text tower; None: all.
      entering: what comes out of the layers before, [1, L, F]. The first layer takes the embeddings
        of random tokens.
    """
    rng = np.random.default_rng(seed)
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
    if name == "unet":
        return _unet_case(rng, graph, shapes, config, params)
    if name == "text_encoder":
        return _text_case(rng, graph, config, params, layers, entering)
    network = Autoencoder(config.vae)
    if name == "vae_decoder":
        x, method, entry = rng.standard_normal(shapes["latent"], np.float32), "decode", "latent"
    else:
        x = rng.uniform(-1, 1, shapes["image"]).astype(np.float32)
        method, entry = "encode", "image"
    y = _applied(network, params, x.transpose(0, 2, 3, 1), method=method)
    return Case({entry: x}, np.asarray(y).transpose(0, 3, 1, 2))


@functools.partial(jax.jit, static_argnames=("network", "method"))
def _applied(network: nn.Module, params: Params, *inputs: Any, method: str | None = None) -> Array:
    return network.apply({"params": params}, *inputs, method=method)


def _unet_case(rng, graph: Graph, shapes: dict, config: Config, params: Params) -> Case:
    sample = rng.standard_normal(shapes["sample"], np.float32)
    context = rng.standard_normal(shapes["encoder_hidden_states"], np.float32)
    mask = np.ones(shapes["encoder_attention_mask"], np.float32)
    mask[:, rng.integers(1, mask.shape[1]) :] = 0  # padded
    timestep = rng.uniform(0, 1000, 1).astype(np.float32)
    factor = config.vae.factor
    size = [sample.shape[3] // 2 * factor, sample.shape[2] * factor]
    time_ids = np.array([size], np.float32)
    y = _applied(
        UNet(config.unet), params, sample.transpose(0, 2, 3, 1), timestep, context, mask, time_ids
    )
    inputs = {"sample": sample, "encoder_hidden_states": context, "encoder_attention_mask": mask}
    inputs |= {"timestep": timestep, "time_ids": time_ids}
    for raw, values in (("timestep", timestep), ("time_ids", time_ids[0])):
        if (embedded := f"{raw}_sinusoids") in shapes:
            width = shapes[embedded][1] // len(values)
            inputs[embedded] = sinusoids(
                values, width, config.unet.flip_sin_to_cos, config.unet.freq_shift
            )
    inputs = {tensor.name: inputs[tensor.name] for tensor in graph.inputs}
    return Case(inputs, np.asarray(y).transpose(0, 3, 1, 2))


def _text_case(
    rng, graph: Graph, config: Config, params: Params, layers: range | None, entering: Any
) -> Case:
    tower, weights = config.text_encoder.text, params["model"]["language_model"]
    layers = layers or range(tower.num_hidden_layers)
    length = graph.inputs[0].shape[1]
    if layers.start == 0:
        ids = rng.integers(0, min(tower.vocab_size, config.text_encoder.image_token_id), length)
        entering = np.asarray(weights["embed_tokens"]["embedding"])[None, ids].astype(np.float32)
    angles = mrope_angles(np.broadcast_to(np.arange(length), (1, 3, length)), tower)
    bias = causal_bias(np.ones((1, length), bool))
    hidden = _applied(Layers(tower, layers, PLAIN), weights, entering, angles, bias)
    return Case({"inputs_embeds": entering}, np.asarray(hidden)[:, -graph.output.shape[1] :])


# --- Running --------------------------------------------------------------------------------------


def run(
    file: str | os.PathLike,
    signature: str,
    inputs: Sequence[dict[str, np.ndarray]],
    accelerator: str = "cpu",
    precision: str = "fp32",
) -> list[np.ndarray]:
    """The output for each of several inputs, computed by LiteRT in a process of its own.

    Raises:
      VerifyError: LiteRT refuses the file there (names the operation where LiteRT does), or the
        process died.
    """
    with tempfile.TemporaryDirectory() as folder:
        arrays = {f"{i}/{k}": v for i, one in enumerate(inputs) for k, v in one.items()}
        np.savez(Path(folder) / process.INPUTS, **arrays)
        task = [os.fspath(file), signature, accelerator, precision, folder, os.getpid()]
        command = [sys.executable, "-m", "convert.process", json.dumps(task)]
        root = Path(__file__).parent.parent
        for _ in range(_ATTEMPTS):
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=root, errors="replace"
            )
            if done.returncode != signals.EXIT_TO_RESUME:
                break
        if done.returncode:
            raise VerifyError(f"{file} on the {accelerator} in {precision}: {_reason(done)}")
        with np.load(Path(folder) / process.OUTPUTS) as outputs:
            return [outputs[str(i)] for i in range(len(inputs))]


def _reason(done: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in done.stderr.splitlines()]
    named = [line for line in lines if "not supported" in line or line.startswith("ERROR")]
    if done.returncode < 0:
        named.append(f"the process was ended by signal {-done.returncode}")
    return "; ".join(dict.fromkeys([*named[:3], *lines[-1:]])) or f"exit code {done.returncode}"
