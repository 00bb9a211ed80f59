"""The configuration of Qwen3-VL, as transformers keeps it in a model's `config.json`.

Both forms on disk are read: the released one (transformers 4.57: `rope_scaling` and `rope_theta`)
and the one that transformers 5 writes (`rope_parameters`). A key that is absent takes transformers'
own default. Only what changes the numbers is kept; what this implementation would compute
differently is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class TextConfig:
    """The text tower; defaults are those of transformers' Qwen3VLTextConfig."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    rope_theta: float = 500000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)  # rotary frequencies of time, row, column
    max_position_embeddings: int = 128000
    initializer_range: float = 0.02


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; defaults are those of transformers' Qwen3VLVisionConfig."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16  # pixels
    temporal_patch_size: int = 2  # frames; a still image is repeated to fill it
    spatial_merge_size: int = 2  # patches a side that become one token of the text
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304  # a square table, interpolated to each image's grid
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch [in_channels, temporal_patch_size, patch_size, patch_size]."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_area(self) -> int:
        """Patches that become one token of the text."""
        return self.spatial_merge_size**2

    @property
    def grid_side(self) -> int:
        """Side of the square table of position embeddings."""
        return math.isqrt(self.num_position_embeddings)


@dataclass(frozen=True)
class Qwen3VLConfig:
    """Both towers and the token ids that tie them together."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Qwen3VLConfig":
        """Reads the content of a `config.json`; unknown keys are ignored, as by transformers.

        Raises ValueError, one line with all findings, where a setting is unsupported or contradicts
        another.
        """
        text, vision = settings.get("text_config") or {}, settings.get("vision_config") or {}
        if settings.get("model_type", "qwen3_vl") != "qwen3_vl":  # nothing else would make sense
            raise ValueError(f"model_type is {settings['model_type']!r}, supported is 'qwen3_vl'")
        config = cls(
            text=TextConfig(**_text_fields(text)),
            vision=VisionConfig(**_vision_fields(vision)),
            **_known(settings, cls, but=("text", "vision")),
        )
        findings = _unsupported(settings, text, vision) + _contradictions(config)
        if findings:
            raise ValueError("this Qwen3-VL config is not supported: " + "; ".join(findings))
        return config

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` in the released form, which every transformers since 4.57 reads."""
        text, vision = dict(vars(self.text)), dict(vars(self.vision))
        text["rope_scaling"] = {
            "mrope_interleaved": True,
            "mrope_section": list(text.pop("mrope_section")),
            "rope_type": "default",
        }
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.pop("rope_theta")}
        vision["deepstack_visual_indexes"] = list(self.vision.deepstack_visual_indexes)
        tied = {"tie_word_embeddings": self.tie_word_embeddings}
        text |= {"model_type": "qwen3_vl_text", "hidden_act": "silu", **tied}
        vision |= {"model_type": "qwen3_vl", "hidden_act": _TANH}
        top = {key: value for key, value in vars(self).items() if key not in ("text", "vision")}
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": text,
            "vision_config": vision,
            **top,
        }

    @property
    def input_numbers(self) -> dict[str, int]:
        """Keyword arguments of `data.qwen_inputs.qwen_inputs`: what it must know of the model."""
        return {
            "image_token_id": self.image_token_id,
            "spatial_merge_size": self.vision.spatial_merge_size,
            "grid_side": self.vision.grid_side,
            "patch_dim": self.vision.patch_dim,
        }


def _known(settings: Mapping[str, Any], cls: type, but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {k: settings[k] for k in cls.__dataclass_fields__ if k in settings and k not in but}


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings under their transformers 5 names, whichever form they come in."""
    rope = dict(settings.get("rope_scaling") or settings.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    if "rope_theta" in settings:
        rope.setdefault("rope_theta", settings["rope_theta"])
    return rope


def _text_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    fields, rope = _known(text, TextConfig, but=("rope_theta", "mrope_section")), _rope(text)
    if fields.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 32)
    if "rope_theta" in rope:
        fields["rope_theta"] = float(rope["rope_theta"])
    if "mrope_section" in rope:
        fields["mrope_section"] = tuple(rope["mrope_section"])
    return fields


def _vision_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    fields = _known(vision, VisionConfig, but=("rope_theta", "deepstack_visual_indexes"))
    if "num_attention_heads" in vision:  # transformers' aliases
        fields["num_heads"] = vision["num_attention_heads"]
    if "num_hidden_layers" in vision:
        fields["depth"] = vision["num_hidden_layers"]
    if "rope_theta" in _rope(vision):
        fields["rope_theta"] = float(_rope(vision)["rope_theta"])
    if "deepstack_visual_indexes" in vision:
        fields["deepstack_visual_indexes"] = tuple(vision["deepstack_visual_indexes"])
    return fields


def _unsupported(
    top: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]
) -> list[str]:
    """Settings with which transformers would compute something else than this implementation."""
    checks = [  # name, value, values that are supported
        ("quantization_config", top.get("quantization_config"), (None,)),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("text_config.attention_dropout", text.get("attention_dropout", 0), (0,)),
        ("text_config.tie_last_hidden_states", text.get("tie_last_hidden_states"), (None, True)),
        ("text_config rope_type", _rope(text)["rope_type"], ("default",)),
        ("text_config mrope_interleaved", _rope(text).get("mrope_interleaved", True), (True,)),
        ("vision_config.hidden_act", vision.get("hidden_act", _TANH), (_TANH,)),
        ("vision_config rope_type", _rope(vision)["rope_type"], ("axial", "default")),
    ]
    found = [
        f"{name} is {value!r}, supported is {' or '.join(repr(v) for v in supported)}"
        for name, value, supported in checks
        if value not in supported
    ]
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(vision.get(key, 1), int):
            found.append(f"vision_config.{key} is {vision[key]!r}, supported is one integer")
    section = _rope(text).get("mrope_section", (24, 20, 20))
    if len(section) != 3:
        found.append(f"text_config mrope_section is {section!r}, expected three numbers")
    return found


def _contradictions(config: Qwen3VLConfig) -> list[str]:
    text, vision, found = config.text, config.vision, []
    if text.num_attention_heads % text.num_key_value_heads:
        found.append(
            f"num_attention_heads {text.num_attention_heads} is no multiple of "
            f"num_key_value_heads {text.num_key_value_heads}"
        )
    if text.head_dim % 2:
        found.append(f"text head_dim {text.head_dim} is odd")
    if vision.hidden_size % (4 * vision.num_heads):  # two axes, each with pairs
        found.append(
            f"vision hidden_size {vision.hidden_size} is no multiple of four times "
            f"num_heads {vision.num_heads}"
        )
    if vision.grid_side**2 != vision.num_position_embeddings:
        found.append(f"num_position_embeddings {vision.num_position_embeddings} is no square")
    if vision.out_hidden_size != text.hidden_size:
        found.append(
            f"vision out_hidden_size {vision.out_hidden_size} differs from "
            f"text hidden_size {text.hidden_size}"
        )
    taps = vision.deepstack_visual_indexes
    if len(set(taps)) != len(taps) or any(not 0 <= tap < vision.depth for tap in taps):
        found.append(
            f"deepstack_visual_indexes {list(taps)} must differ and be below depth {vision.depth}"
        )
    if len(taps) > text.num_hidden_layers:
        found.append(
            f"{len(taps)} deepstack_visual_indexes exceed the {text.num_hidden_layers} text layers"
        )
    return found


# Qwen/Qwen3-VL-2B-Instruct: 625 tensors, 2,127,532,032 parameters.
QWEN3_VL_2B = Qwen3VLConfig(
    text=TextConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        rope_theta=5e6,
        max_position_embeddings=262144,
    ),
    vision=VisionConfig(
        depth=24,
        hidden_size=1024,
        intermediate_size=4096,
        out_hidden_size=2048,
        deepstack_visual_indexes=(5, 11, 17),
    ),
    tie_word_embeddings=True,
)

# For demonstrations and tests: a byte-sized vocabulary with the special tokens behind it.
TINY = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=5e6,
        mrope_section=(4, 2, 2),
        max_position_embeddings=4096,
    ),
    vision=VisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=(0, 1),
    ),
    image_token_id=259,
    video_token_id=260,
    vision_start_token_id=257,
    vision_end_token_id=258,
    tie_word_embeddings=True,
)

# For the shapes world, whose captions are made of few words.
SHAPES = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, vocab_size=1024, num_hidden_layers=2),
    vision=dataclasses.replace(TINY.vision, depth=1, deepstack_visual_indexes=(0,)),
)
