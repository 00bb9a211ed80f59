"""The DreamLite U-Net's configuration, as diffusers keeps it in a model's `config.json`, and the
presets: the released network and smaller ones.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

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

    def canonical(self) -> "UNetConfig":
        """The same network in one spelling: today's block names, and a value for each level."""
        return dataclasses.replace(
            self,
            down_block_types=_named_today(DOWN_BLOCKS, self.down_block_types),
            mid_block_type=_named_today(MID_BLOCKS, (self.mid_block_type,))[0],
            up_block_types=_named_today(UP_BLOCKS, self.up_block_types),
            **{name: self.per_level(name) for name in _PER_LEVEL},
        )


def _named_today(
    blocks: Mapping[str, tuple[bool, bool]], names: tuple[str, ...]
) -> tuple[str, ...]:
    """Block names, each by the first one in `blocks` that means the same."""
    return tuple(next(new for new in blocks if blocks[new] == blocks[old]) for old in names)


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

# For the shapes world at 32 px, whose latents are as small as a released model's at its lowest
# level. The top level is wide and has no transformer, which learns most in a second of two CPU
# cores; all others have self-attention: an edit copies across the seam.
SHAPES = dataclasses.replace(
    TINY,
    down_block_types=("DreamLiteDownBlock2D", *("DreamLiteCrossAttnDownBlock2D",) * 2),
    up_block_types=(*("DreamLiteCrossAttnUpBlock2D",) * 2, "DreamLiteUpBlock2D"),
    block_out_channels=(64, 96, 128),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(4, 4, 4),
)

PRESETS = {"dreamlite": DREAMLITE, "tiny": TINY, "nano": NANO, "shapes": SHAPES}
