"""What can be said of pictures without knowing their prompts: guards against what rewards overlook.

A policy that pleases a reward by loud colours or by texture shows here first. As rewards of weight
0 they are watched and not learnt from.
"""

from collections.abc import Sequence

import numpy as np

from dreamlite_jax.data import shapes
from dreamlite_jax.rewards.base import Example, Picture, Reward
from dreamlite_jax.rewards.shapes import examples


def _saturation(images: Sequence[Picture], prompts, sources, metadata) -> list[float]:
    return [saturation(image) for image in images]


def saturation(image: Picture) -> float:
    """The mean saturation of a picture, uint8 [H, W, 3], in [0, 1] (HSV; 0 for black)."""
    high, low = image.max(-1).astype(np.float32), image.min(-1).astype(np.float32)
    return float(((high - low) / np.maximum(high, 1)).mean())


def _sharpness(images: Sequence[Picture], prompts, sources, metadata) -> list[float]:
    return [shapes.sharpness(image) for image in images]


def _grey() -> list[Example]:
    found = examples()
    return [
        e._replace(bad=np.repeat(e.good.mean(-1, keepdims=True), 3, -1).astype(np.uint8))
        for e in found
    ]


def _blurred() -> list[Example]:
    def blur(image: Picture) -> Picture:
        values = image.astype(np.float32)
        for axis in (0, 1):
            values = sum(np.roll(values, k, axis) for k in range(-2, 3)) / 5
        return values.astype(np.uint8)

    return [e._replace(bad=blur(e.good)) for e in examples()]


SATURATION = Reward("saturation", _saturation, 0.0, 1.0, examples=_grey)
SHARPNESS = Reward("sharpness", _sharpness, 0.0, 1.0, examples=_blurred)
