"""From a picture of any size to the fixed shapes of a batch: aspect buckets, crops, random choices.

Shapes: H and W pixels, h and w latent pixels, N samples. Sizes are (height, width) here; only
`time_ids`, as the network takes them, and Pillow are (width, height).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dreamlite_jax.errors import UserError

Size = tuple[int, int]  # (height, width) in pixels


class SizeError(UserError):
    """A size or an aspect ratio that no network can have: one line."""


# --- Aspect buckets -------------------------------------------------------------------------------


def aspect_buckets(side: int, multiple: int = 32, max_ratio: float = 2.0) -> list[Size]:
    """Sizes of about side * side pixels and never more, from tall to wide.

    Each is the tallest for its width that keeps within the budget; (side, side) is one of them.

    Args:
      side: of the square one, in pixels.
      multiple: what height and width must be multiples of: the autoencoder's factor times the
        U-Net's, `Config.pixel_multiple`.
      max_ratio: of the longer to the shorter edge; 1 leaves the square alone.

    Raises:
      SizeError: side is no positive multiple of `multiple`, or max_ratio is below 1.
    """
    if side < multiple or side % multiple:
        raise SizeError(f"image size {side} is not a positive multiple of {multiple}")
    if not max_ratio >= 1:  # nor is it NaN
        raise SizeError(f"the largest aspect ratio is {max_ratio}, should be at least 1")
    units = side // multiple
    wide = {
        (units**2 // width, width)
        for width in range(units, units**2 + 1)
        if width <= max_ratio * (units**2 // width)
    }
    # Of the widths that share a height the widest wastes the fewest pixels.
    best = {height: max(w for h, w in wide if h == height) for height, _ in wide}
    sizes = {*best.items(), *((w, h) for h, w in best.items())}
    return sorted(((h * multiple, w * multiple) for h, w in sizes), key=lambda s: s[1] / s[0])


def nearest_buckets(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """The bucket whose shape is nearest, int32 [N], for samples of sizes [N, 2] (width, height)."""
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    shapes = np.log([width / height for height, width in buckets])
    return np.abs(ratios[:, None] - shapes[None]).argmin(1).astype(np.int32)


# --- Crops ----------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """What is left of a picture: edges as fractions of its width and height, in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float

    def box(self, image: Image.Image) -> tuple[float, float, float, float]:
        """The edges in pixels of a picture, as Pillow takes them."""
        w, h = image.size
        return self.left * w, self.top * h, self.right * w, self.bottom * h


def crop_to(width: int, height: int, size: Size, at: tuple[float, float] = (0.5, 0.5)) -> Crop:
    """The largest part of a width x height picture that has the aspect ratio of `size`.

    `at` in [0, 1] x [0, 1] says where it lies: (0, 0) left or top, 0.5 the middle.
    """
    shape = size[1] / size[0]
    part_x, part_y = min(1.0, height * shape / width), min(1.0, width / shape / height)
    left, top = at[0] * (1 - part_x), at[1] * (1 - part_y)
    return Crop(left, top, left + part_x, top + part_y)


def enough(width: int, height: int, size: Size) -> int:
    """The longer side, in pixels, that a width x height picture needs for a crop to `size`: a JPEG
    need not be decoded at more, as `fitted` reduces it to twice the size first anyway."""
    crop = crop_to(width, height, size)
    return math.ceil(
        2 * max(size[1] / (crop.right - crop.left), size[0] / (crop.bottom - crop.top))
    )


def fitted(image: Image.Image, size: Size, crop: Crop) -> Image.Image:
    """The crop of an RGB picture at `size`: LANCZOS, after a reduction by a whole factor where the
    picture is more than twice as large (Pillow's `reducing_gap`)."""
    box = crop.box(image)
    return image.resize(size[::-1], Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)


def changed(target: np.ndarray, source: np.ndarray, factor: int, threshold: float = 12.0):
    """Which latent pixels an edit changes: bool [h, w] from two uint8 [H, W, 3].

    A latent pixel counts where the largest difference of the three channels, averaged over its
    factor x factor pixels, exceeds `threshold` of 255 levels: above what JPEG adds, below what a
    person sees as a change.
    """
    difference = np.abs(target.astype(np.int16) - source.astype(np.int16)).max(-1)
    h, w = (side // factor for side in difference.shape)
    return difference.reshape(h, factor, w, factor).mean((1, 3)) > threshold


# --- Random choices -------------------------------------------------------------------------------


class Dropout(NamedTuple):
    """How often a condition is left out, so that guidance has something to subtract.

    Of edits either the text, or text and source latents, or the source latents alone go
    (InstructPix2Pix; Brooks et al. 2023, section 3.2.1).
    """

    t2i_text: float = 0.1
    edit_text: float = 0.05
    edit_both: float = 0.05
    edit_source: float = 0.05


NEVER, EVERY_TEXT = Dropout(0.0, 0.0, 0.0, 0.0), Dropout(1.0, 1.0, 0.0, 0.0)


class Choices(NamedTuple):
    """A row's random numbers, each uniform in [0, 1)."""

    crop: tuple[float, float]
    caption: float
    dropout: float


def choices(seed: int, step: int, row: int) -> Choices:
    """Those of a row of a step's global batch: a function of three numbers and nothing else."""
    x, y, caption, dropout = np.random.default_rng((seed, step, row)).random(4)
    return Choices((x, y), caption, dropout)


def pick(options: Sequence, u: float):
    """One of the options, by u in [0, 1)."""
    return options[int(u * len(options))]


def dropped(rates: Dropout, edit: bool, u: float) -> tuple[bool, bool]:
    """Whether the text and whether the source latents are left out, by u in [0, 1)."""
    if not edit:
        return u < rates.t2i_text, False
    text, both = rates.edit_text, rates.edit_text + rates.edit_both
    return u < both, text <= u < both + rates.edit_source
