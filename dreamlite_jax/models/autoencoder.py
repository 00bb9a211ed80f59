"""TAESD, the tiny autoencoder whose latents DreamLite works in (diffusers' `AutoencoderTiny`).

Shapes: B batch, H height and W width of the picture, h and w of the latent (H / 2 ** (levels - 1)).
Pictures are in [-1, 1]; both networks contain the mapping to and from TAESD's own [0, 1].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.layers import Conv, Dtype
from dreamlite_jax.models.primitives import PLAIN, Primitives

LATENT_CLAMP = 3.0  # the decoder squashes latents smoothly into (-3, 3)

# Settings that change no arithmetic here; kept so that a config survives the round trip.
_NOTES = ("block_out_channels", "force_upcast", "latent_magnitude", "latent_shift")
_ONLY = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "scaling_factor": 1.0,  # the U-Net sees the latents as the encoder gives them
    "shift_factor": 0.0,
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Hyper-parameters under the names, and with the defaults, of diffusers' `AutoencoderTiny`.

    The last encoder level, and the first decoder level, is the coarsest.

    Raises:
      ValueError: settings that no network can be built with, all in one line.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5

    def __post_init__(self):
        problems = []
        for side in ("encoder", "decoder"):
            channels = getattr(self, f"{side}_block_out_channels")
            blocks = getattr(self, f"num_{side}_blocks")
            if len(channels) != len(blocks):
                problems.append(f"{side} has {len(channels)} widths for {len(blocks)} levels")
            if len(set(channels)) != 1:
                problems.append(f"{side}_block_out_channels {channels} should all be the same")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            problems.append("encoder and decoder have different numbers of levels")
        if problems:
            raise ValueError("autoencoder config: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "AutoencoderConfig":
        """From a diffusers `config.json` (keys that begin with "_" are notes and are ignored).

        Raises:
          ValueError: settings that ask for another network, all in one line.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        settings = {k: v for k, v in settings.items() if not k.startswith("_")}
        problems = []
        for key in sorted(settings.keys() - known - set(_NOTES)):
            if key not in _ONLY:
                problems.append(f"unknown setting {key}={settings[key]!r}")
            elif settings[key] != _ONLY[key]:
                problems.append(f"{key}={settings[key]!r} is not supported, only {_ONLY[key]!r}")
        if problems:
            raise ValueError("autoencoder config: " + "; ".join(problems))
        return cls(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in settings.items()
                if k in known and v is not None
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """As a diffusers `config.json` that `AutoencoderTiny.from_pretrained` reads."""
        return {
            "_class_name": "AutoencoderTiny",
            **_ONLY,
            **dataclasses.asdict(self),
            "block_out_channels": self.decoder_block_out_channels,
            "force_upcast": False,
        }

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along each side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)


TAESDXL = AutoencoderConfig()
TINY = AutoencoderConfig(
    encoder_block_out_channels=(16, 16, 16, 16),
    decoder_block_out_channels=(16, 16, 16, 16),
    num_encoder_blocks=(1, 1, 1, 1),
    num_decoder_blocks=(1, 1, 1, 1),
)


# A quarter of the side: for the shapes world at 32 px. The encoder's blocks let a thing's shape
# make up more of the latents' variance, and so of the loss: without any, colours drown it. At half
# of the side they could reach five latents far, but hardly change what is two away once trained:
# what an edit leaves as it is keeps its latents, and can be copied (BENCHMARKS.md).
SHAPES = AutoencoderConfig(
    encoder_block_out_channels=(32, 32, 32),
    decoder_block_out_channels=(32, 32, 32),
    num_encoder_blocks=(0, 2, 0),
    num_decoder_blocks=(4, 3, 1),
)


class Block(nn.Module):
    """Three 3x3 convolutions with ReLUs around a residual: [B, H, W, features] -> the same."""

    features: int
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for i in (0, 2, 4):  # the places in diffusers' nn.Sequential; ReLUs stand between
            h = Conv(self.features, dtype=self.dtype, ops=self.ops, name=f"conv_{i}")(h)
            h = nn.relu(h) if i < 4 else h
        return nn.relu(h + x)


class Encoder(nn.Module):
    config: AutoencoderConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Pictures [B, H, W, 3] in [-1, 1] -> latents float32 [B, h, w, latent_channels]."""
        config, kw = self.config, {"dtype": self.dtype, "ops": self.ops}
        channels, blocks = config.encoder_block_out_channels, config.num_encoder_blocks
        x = (x.astype(self.dtype) + 1) / 2
        place = _Places()
        for level, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            if level == 0:
                x = Conv(width, name=place(), **kw)(x)
            else:
                x = Conv(width, stride=2, use_bias=False, name=place(), **kw)(x)
            for _ in range(count):
                x = Block(width, name=place(), **kw)(x)
        return Conv(config.latent_channels, name=place(), **kw)(x).astype(jnp.float32)


class Decoder(nn.Module):
    config: AutoencoderConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Latents [B, h, w, latent_channels] -> pictures float32 [B, H, W, 3], about [-1, 1]."""
        config, kw = self.config, {"dtype": self.dtype, "ops": self.ops}
        channels, blocks = config.decoder_block_out_channels, config.num_decoder_blocks
        last = len(blocks) - 1
        place = _Places()
        z = z.astype(jnp.float32)
        x = jnp.tanh(z / LATENT_CLAMP) * LATENT_CLAMP
        x = nn.relu(Conv(channels[0], name=place(), **kw)(x))
        place()  # the ReLU
        for level, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            for _ in range(count):
                x = Block(width, name=place(), **kw)(x)
            if level < last:
                x = self.ops.upsample_nearest(x)
                place()  # the upsampling
                x = Conv(width, use_bias=False, name=place(), **kw)(x)
        x = Conv(config.out_channels, name=place(), **kw)(x)
        return x.astype(jnp.float32) * 2 - 1


class Autoencoder(nn.Module):
    """Encoder and decoder with one set of parameters; each can be applied alone by `method=`."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32
    ops: Primitives = PLAIN

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype, self.ops)
        self.decoder = Decoder(self.config, self.dtype, self.ops)

    def encode(self, pictures: Array) -> Array:
        """[B, H, W, 3] in [-1, 1] -> float32 [B, h, w, latent_channels].

        Raises:
          ValueError: H or W is not a multiple of the config's factor, or the channels are wrong.
        """
        factor, channels = self.config.factor, self.config.in_channels
        b, h, w, c = pictures.shape
        if h % factor or w % factor or c != channels:
            raise ValueError(
                f"autoencoder input: pictures [{b}, {h}, {w}, {c}] should be "
                f"[B, H, W, {channels}] with H and W divisible by {factor}"
            )
        return self.encoder(pictures)

    def decode(self, latents: Array) -> Array:
        """[B, h, w, latent_channels] -> float32 [B, H, W, 3], about [-1, 1] (not clipped)."""
        return self.decoder(latents)

    def __call__(self, pictures: Array) -> Array:
        """Reconstruction, without diffusers' rounding of the latents to bytes."""
        return self.decode(self.encode(pictures))


class _Places:
    """Names layers by their place in diffusers' nn.Sequential: layers_0, layers_1, ..."""

    def __init__(self):
        self.next = 0

    def __call__(self) -> str:
        self.next += 1
        return f"layers_{self.next - 1}"
