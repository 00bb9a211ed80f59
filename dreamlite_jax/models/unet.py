"""The DreamLite U-Net: predicts the flow velocity of `[target | condition]` latents side by side.

Shapes: B batch, H height and W width of the latent (W counts both halves), C channels, E width of
the time embedding, L text length, F text feature width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.blocks import (
    DownBlock,
    Dtype,
    Level,
    MidBlock,
    TimestepEmbedding,
    UpBlock,
    sinusoids,
    split_remat,
)
from dreamlite_jax.models.layers import Conv, GroupNorm, Linear, RMSNorm
from dreamlite_jax.models.primitives import PLAIN, Primitives

MASKED = -10000.0  # added to the score of a masked token, as diffusers does (not -inf: fp16-safe)
TEXT_NORM_EPS = 1e-5

# Block names as diffusers writes them today and as older checkpoints have them, with what they
# mean: (has transformers, has self-attention).
DOWN_BLOCKS = {
    "DreamLiteCrossAttnDownBlock2D": (True, True),
    "CrossAttnDownBlock2D": (True, True),
    "DreamLiteCrossAttnNoSelfAttnDownBlock2D": (True, False),
    "CrossAttnDownRemoveSelfAttnBlock2D": (True, False),
    "DreamLiteDownBlock2D": (False, False),
    "DownBlock2D": (False, False),
}
MID_BLOCKS = {
    "DreamLiteUNetMidBlock2DCrossAttn": (True, True),
    "UNetMidBlock2DCrossAttn": (True, True),
}
UP_BLOCKS = {
    "DreamLiteCrossAttnUpBlock2D": (True, True),
    "CrossAttnUpBlock2D": (True, True),
    "DreamLiteCrossAttnNoSelfAttnUpBlock2D": (True, False),
    "CrossAttnUpRemoveSelfAttnBlock2D": (True, False),
    "CrossAttnUpRemoveSelfAttnBlock2DV1": (True, False),
    "DreamLiteUpBlock2D": (False, False),
    "UpBlock2D": (False, False),
}

# Settings of diffusers' U-Nets that DreamLite leaves alone, with the values that mean "leave
# alone". Any other value asks for a different network, and is refused.
_LEFT_ALONE: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "upcast_attention": (False, True, None),  # our softmax is float32 either way
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Hyper-parameters under the names, and with the defaults, of diffusers' `DreamLiteUNetModel`.

    attention_head_dim is the *number* of heads of each level (diffusers' misnomer). num_kv_heads
    None means as many as query heads. sample_size is information only (latent side of the target).
    A number for a per-level setting means the same for every level.

    Raises:
      ValueError: settings that contradict each other, all of them in one line.
    """

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (
        "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
        "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
        "DreamLiteCrossAttnDownBlock2D",
    )
    mid_block_type: str = "DreamLiteUNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "DreamLiteCrossAttnUpBlock2D",
        "DreamLiteCrossAttnNoSelfAttnUpBlock2D",
        "DreamLiteUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 2048
    transformer_layers_per_block: int | tuple[int, ...] = 1
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 64
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_embedding_dim: int | None = None
    qk_norm: str | None = "rms_norm"
    use_sep_conv: bool = True
    ff_mult: int = 6
    num_kv_heads: int | None = 1
    num_mid_layers: int = 1

    def __post_init__(self):
        if problems := list(_problems(self)):
            raise ValueError("U-Net config: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "UNetConfig":
        """From a diffusers `config.json` (keys that begin with "_" are notes and are ignored).

        Raises:
          ValueError: settings that ask for another network or contradict each other, all in one
          line.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        settings = {k: v for k, v in settings.items() if not k.startswith("_")}
        problems = []
        for key in sorted(settings.keys() - known):
            allowed = _LEFT_ALONE.get(key)
            if allowed is None:
                problems.append(f"unknown setting {key}={settings[key]!r}")
            elif settings[key] not in allowed:
                problems.append(f"{key}={settings[key]!r} is not supported, only {allowed[0]!r}")
        if problems:
            raise ValueError("U-Net config: " + "; ".join(problems))
        values = {
            k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in known
        }
        if values.get("encoder_hid_dim") is not None:
            # diffusers' own default: a width without a type means a plain projection
            values["encoder_hid_dim_type"] = values.get("encoder_hid_dim_type") or "text_proj"
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As a diffusers `config.json` that `DreamLiteUNetModel.from_pretrained` reads."""
        left_alone = {key: allowed[0] for key, allowed in _LEFT_ALONE.items()}
        return {"_class_name": "DreamLiteUNetModel", **left_alone, **dataclasses.asdict(self)}

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def time_embed_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def context_dim(self) -> int:
        """F: the width of the text features that the network takes."""
        return self.encoder_hid_dim or self.cross_attention_dim

    def per_level(self, name: str) -> tuple[int, ...]:
        """The per-level setting `name`, one value for each level from the finest to the
        coarsest."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.levels


_PER_LEVEL = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")


_POSITIVE = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
    *("cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "ff_mult"),
    *("encoder_hid_dim", "num_kv_heads", "time_embedding_dim", "addition_time_embed_dim"),
)
_OPTIONAL = ("encoder_hid_dim", "num_kv_heads", "time_embedding_dim", "addition_time_embed_dim")


def _not_positive(config: UNetConfig):
    """Yields the settings that are not positive whole numbers but should be."""
    for name in _POSITIVE:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) and value else (value,)
        if value is None and name in _OPTIONAL:
            continue
        if not all(type(v) is int and v > 0 for v in values):
            yield f"{name}={value!r} should be positive whole numbers"
    if not isinstance(config.norm_eps, int | float) or not 0 < config.norm_eps < 1:
        yield f"norm_eps={config.norm_eps!r} should be a small positive number"


def _problems(config: UNetConfig):
    """Yields, in words, every setting that the network cannot be built with."""
    if wrong := list(_not_positive(config)):
        yield from wrong  # the rest divides by them
        return
    if not isinstance(config.block_out_channels, tuple):
        yield f"block_out_channels={config.block_out_channels!r} should be a list, one a level"
        return
    for names, table, kind in (
        (config.down_block_types, DOWN_BLOCKS, "down_block_types"),
        ((config.mid_block_type,), MID_BLOCKS, "mid_block_type"),
        (config.up_block_types, UP_BLOCKS, "up_block_types"),
    ):
        for name in names:
            if name not in table:
                yield f"{kind} has {name!r}, supported are {', '.join(table)}"
    for name in ("down_block_types", "up_block_types", *_PER_LEVEL):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != config.levels:
            yield f"{name} has {len(value)} values, block_out_channels {config.levels}"
    if isinstance(config.cross_attention_dim, tuple):
        yield f"cross_attention_dim={config.cross_attention_dim!r} should be one number"
    if config.qk_norm not in (None, "rms_norm"):
        yield f"qk_norm={config.qk_norm!r} is not supported, only 'rms_norm' or none"
    if config.encoder_hid_dim_type not in (None, "text_proj", "text_proj_rms"):
        yield (
            f"encoder_hid_dim_type={config.encoder_hid_dim_type!r} is not supported, only "
            "'text_proj_rms', 'text_proj' or none"
        )
    elif (config.encoder_hid_dim_type is None) != (config.encoder_hid_dim is None):
        yield "encoder_hid_dim and encoder_hid_dim_type go together, only one is set"
    if config.addition_embed_type not in (None, "time"):
        yield (
            f"addition_embed_type={config.addition_embed_type!r} is not supported, "
            "only 'time' or none"
        )
    elif config.addition_embed_type == "time":
        width, total = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        if not width or total != 2 * width:
            yield (
                "addition_embed_type 'time' needs projection_class_embeddings_input_dim = "
                f"2 * addition_time_embed_dim, got {total} and {width}"
            )
    for channels in config.block_out_channels:
        if channels % config.norm_num_groups:
            yield (
                f"block_out_channels {channels} is not a multiple of norm_num_groups "
                f"{config.norm_num_groups}"
            )
    heads = config.per_level("attention_head_dim")
    for channels, n in zip(config.block_out_channels, heads, strict=False):
        if channels % n or n % (config.num_kv_heads or n):
            yield (
                f"attention_head_dim (number of heads) {n} does not divide block_out_channels "
                f"{channels} or is not a multiple of num_kv_heads {config.num_kv_heads}"
            )


# The released network, 389,968,388 parameters (DreamLite-base and DreamLite-mobile alike).
DREAMLITE = UNetConfig(
    sample_size=128,
    block_out_channels=(256, 512, 896),
    cross_attention_dim=2304,
    transformer_layers_per_block=(1, 2, 4),
    encoder_hid_dim=2048,
    encoder_hid_dim_type="text_proj_rms",
    attention_head_dim=(4, 8, 14),
    use_linear_projection=True,
    addition_embed_type="time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=512,
    ff_mult=3,
)

# The same network with every kind of block in it, small enough for tests and first steps.
TINY = dataclasses.replace(
    DREAMLITE,
    sample_size=8,
    block_out_channels=(32, 64, 96),
    cross_attention_dim=96,
    transformer_layers_per_block=(1, 1, 2),
    encoder_hid_dim=64,
    attention_head_dim=(2, 4, 6),
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=64,
    norm_num_groups=8,
)

# The smallest that has every kind of block: for trying a pipeline, not for learning anything.
NANO = dataclasses.replace(
    TINY,
    down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
    up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    block_out_channels=(16, 32),
    cross_attention_dim=32,
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(2, 2),
)

# For the shapes world at 32 px. Its latents are as small as the lowest level of a released model's,
# so that every level on the way down has self-attention: an edit copies across the seam.
SHAPES = dataclasses.replace(
    TINY,
    down_block_types=("DreamLiteCrossAttnDownBlock2D",) * 3,
    up_block_types=(*("DreamLiteCrossAttnUpBlock2D",) * 2, "DreamLiteUpBlock2D"),
    block_out_channels=(32, 96, 160),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(2, 4, 5),
)

PRESETS = {"dreamlite": DREAMLITE, "tiny": TINY, "nano": NANO, "shapes": SHAPES}


class UNet(nn.Module):
    """Velocity of the flow at `[target | condition]` latents.

    dtype is the compute dtype (bfloat16 on TPU); parameters, the statistics of the norms and the
    softmax stay float32. remat: see `blocks.rematerialised`. ops: see `primitives`.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    remat: str = "none"
    ops: Primitives = PLAIN

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        mask: Array | None = None,
        time_ids: Array | None = None,
    ) -> Array:
        """Predicts v = noise - x0, float32 [B, H, W, out_channels].

        Args:
          latents: [B, H, W, in_channels], `[noisy target | condition]` joined along W. H and W are
            divisible by 2 ** (levels - 1).
          timesteps: [B], 1000 * sigma, in [0, 1000].
          context: text features [B, L, F] (F = config.context_dim).
          mask: [B, L], 1 for a token to attend to, 0 for padding; None: attend to all.
          time_ids: [B, 2], width and height of the picture in pixels; only where the config has
            addition_embed_type "time".

        Raises:
          ValueError: an argument of another shape, or time_ids missing.
        """
        self._check(latents, timesteps, context, mask, time_ids)
        return self.denoise(latents, self.embed_time(timesteps, time_ids), context, mask)

    def setup(self):
        config = self.config
        self._check_remat()
        embed = config.time_embed_dim
        kw = {"dtype": self.dtype, "ops": self.ops}
        self.time_embedding = TimestepEmbedding(embed, **kw)
        if config.addition_embed_type == "time":
            self.add_embedding = TimestepEmbedding(embed, **kw)
        if config.encoder_hid_dim_type == "text_proj_rms":
            self.encoder_hid_proj_0 = Linear(config.cross_attention_dim, True, **kw)
            self.encoder_hid_proj_1 = RMSNorm(TEXT_NORM_EPS, self.ops)
        elif config.encoder_hid_dim_type == "text_proj":
            self.encoder_hid_proj = Linear(config.cross_attention_dim, True, **kw)
        self.conv_in = Conv(config.block_out_channels[0], 3, **kw)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, config.norm_eps, self.ops)
        self.conv_out = Conv(config.out_channels, 3, **kw)

        last = config.levels - 1
        layers = config.per_level("layers_per_block")
        self.down_blocks = [
            self._level(DownBlock, i, DOWN_BLOCKS[name], layers[i], i < last)
            for i, name in enumerate(config.down_block_types)
        ]
        mid = MID_BLOCKS[config.mid_block_type]
        self.mid_block = self._level(MidBlock, last, mid, config.num_mid_layers, False)
        self.up_blocks = [
            self._level(UpBlock, last - i, UP_BLOCKS[name], layers[last - i] + 1, i < last)
            for i, name in enumerate(config.up_block_types)
        ]

    def embed_time(self, timesteps: Array, time_ids: Array | None = None) -> Array:
        """timesteps [B] and time_ids [B, 2] -> time embedding [B, E]. The sinusoids are float32."""
        config = self.config
        kind = {"cos_first": config.flip_sin_to_cos, "shift": config.freq_shift}
        time, sizes = sinusoids(timesteps, config.block_out_channels[0], **kind), None
        if config.addition_embed_type == "time":
            sizes = sinusoids(time_ids, config.addition_time_embed_dim, **kind)
            sizes = sizes.reshape(sizes.shape[0], -1)
        return self.embed_sinusoids(time, sizes)

    def embed_sinusoids(self, time: Array, sizes: Array | None = None) -> Array:
        """The sinusoids of the timestep [B, block_out_channels[0]] and of width and height [B, 2
        addition_time_embed_dim] -> time embedding [B, E]."""
        embedding = self.time_embedding(time)
        return embedding if sizes is None else embedding + self.add_embedding(sizes)

    def embed_context(self, context: Array) -> Array:
        """Text features [B, L, F] -> [B, L, cross_attention_dim], what the cross-attentions
        read."""
        if self.config.encoder_hid_dim_type == "text_proj_rms":
            return self.encoder_hid_proj_1(self.encoder_hid_proj_0(context))
        if self.config.encoder_hid_dim_type == "text_proj":
            return self.encoder_hid_proj(context)
        return context.astype(self.dtype)

    def denoise(self, latents: Array, temb: Array, context: Array, mask: Array | None) -> Array:
        """The network behind the time embedding temb [B, E]; otherwise as `__call__`, unchecked.

        A target whose half precision would ruin the sinusoids computes them elsewhere and starts
        here, behind `embed_sinusoids`.
        """
        context = self.embed_context(context)
        bias = None
        if mask is not None:
            bias = (1.0 - mask.astype(jnp.float32)[:, None, None, :]) * MASKED

        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, states = block(x, temb, context, bias)
            skips += states
        x = self.mid_block(x, temb, context, bias)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in range(block.layers)]
            x = block(x, taken, temb, context, bias)
        return self.conv_out(self.ops.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def _level(
        self, block: type[Level], level: int, kind: tuple[bool, bool], layers: int, resample: bool
    ) -> Level:
        config = self.config
        has_transformers, self_attention = kind
        heads = config.per_level("attention_head_dim")[level]
        depth = config.per_level("transformer_layers_per_block")[level]
        return block(
            features=config.block_out_channels[level],
            layers=layers,
            transformer_layers=depth if has_transformers else 0,
            heads=heads,
            kv_heads=config.num_kv_heads or heads,
            qk_norm=config.qk_norm == "rms_norm",
            ff_mult=config.ff_mult,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            separable=config.use_sep_conv,
            self_attention=self_attention,
            linear_projection=config.use_linear_projection,
            resample=resample,
            dtype=self.dtype,
            ops=self.ops,
            remat=self.remat,
        )

    def _check_remat(self):
        """A misspelt place would not be noticed before a pod runs out of memory."""
        _, where = split_remat(self.remat)
        levels = range(self.config.levels)
        blocks = ["mid_block", *(f"{side}_blocks_{i}" for side in ("down", "up") for i in levels)]
        parts = ("resnets_0", "attentions_0/transformer_blocks_0")
        if not any(where.search("/".join((*self.path, b, part))) for b in blocks for part in parts):
            raise ValueError(f'remat: "{self.remat}" matches no block, e.g. {blocks[1]}/{parts[0]}')

    def _check(self, latents, timesteps, context, mask, time_ids):
        config = self.config
        factor = 2 ** (config.levels - 1)
        b, h, w, c = latents.shape if latents.ndim == 4 else (0, 0, 0, 0)
        problems = []
        if latents.ndim != 4 or c != config.in_channels:
            raise ValueError(
                f"U-Net input: latents {latents.shape} should be [B, H, W, {config.in_channels}]"
            )
        if h % factor or w % factor:
            problems.append(
                f"latent height {h} and width {w} should be divisible by {factor} "
                f"({config.levels} levels)"
            )
        expected = {
            "timesteps": (timesteps, (b,)),
            "context": (context, (b, None, config.context_dim)),
        }
        if mask is not None:
            expected["mask"] = (mask, context.shape[:2])
        if config.addition_embed_type == "time":
            if time_ids is None:
                problems.append("time_ids (width and height in pixels) are missing")
            else:
                expected["time_ids"] = (time_ids, (b, 2))
        for name, (value, shape) in expected.items():
            fits = len(value.shape) == len(shape) and all(
                want in (None, got) for got, want in zip(value.shape, shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("L" if want is None else str(want) for want in shape)
                problems.append(f"{name} {tuple(value.shape)} should be [{wanted}]")
        if problems:
            raise ValueError("U-Net input: " + "; ".join(problems))
