"""The judge of the shapes world: what is seen in a picture, and whether it is what was asked for.

`perceive` reads a picture back into a scene: the ground from the border; things as connected
regions off the ground; a thing's colour from the palette, its coverage of each pixel from where the
pixel lies between ground and colour, its shape as the outline that fits this coverage best at its
centroid and area. What does not look like a picture of this world (soft, faded, mixed, merged, cut
off) raises doubts, and with doubts a picture is never an exact match. Beside the judge: `sharpness`
and `diversity`.

Shapes of arrays: H W an image's height and width, h w those of the window around a thing, S shapes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dreamlite_jax.data.shapes.world import (
    COLOURS,
    GROUNDS,
    SHAPES,
    SIZE_SPLIT,
    Scene,
    Spec,
    Thing,
    grade,
    signed_distance,
)

# Colours are compared by luma and, at half weight, chroma: JPEG halves the resolution of chroma.
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YCC = np.stack(
    [
        _LUMA,
        0.5 * 0.564 * (np.array([0, 0, 1]) - _LUMA),
        0.5 * 0.713 * (np.array([1, 0, 0]) - _LUMA),
    ],
    -1,
).astype(np.float32)
_COLOURS = np.array(list(COLOURS.values()), np.float32) @ _TO_YCC
_GROUNDS = np.array(list(GROUNDS.values()), np.float32) @ _TO_YCC

# The limits leave room for renders at 32 px and more, for JPEG at quality 90, for noise of 2 % and
# for a blur of about a sixth of a thing's radius, at two to three times the largest values seen.
# Distances are between colours as above; areas are shares of the shorter side squared.
_MAX_SIDE = 128  # of the shorter side; larger pictures are reduced to less than twice this
_OFF_GROUND = 30.0  # pixels this far from the ground are things'
_GROUND_LIMIT = 10.0  # of the ground's colour from the palette's
_UNEVEN_GROUND = 8.0  # no more than 1 % of the ground, averaged over 3 x 3 px, may be this far off
_STRAY = 24.0  # a thing's pixels this far from what they should be are stray
_SPECK = 0.006  # regions up to this area are no things
_SPECKS_LIMIT = 0.004
_RADII = (0.09, 0.28)
_BETWEEN_SIZES = 0.03  # relative distance to SIZE_SPLIT
_BETWEEN_SHAPES = 0.4  # how far the coverage is from the best outline's towards another's
_MANY = 8  # things; from here on a picture is none of this world


# The fewer pixels a thing has, the more of it the blur of its edges reaches.
def _colour_limits(radius: float) -> tuple[float, float]:
    """How far luma and chroma may be from the palette's, by the radius in pixels."""
    return max(5.0, 58 / radius), max(8.0, 110 / radius)


def _stray_limit(radius: float) -> float:
    """Stray pixels per area, by the radius in pixels."""
    return max(0.01, 0.24 / radius)


@dataclass(frozen=True)
class Percept:
    """What is seen: the best guess at the scene, and reasons why it may be wrong.

    `doubtful` in [0, 1] is the share of the scene that the doubts concern; 0 without any.
    """

    scene: Scene
    doubts: tuple[str, ...]
    doubtful: float


@dataclass(frozen=True)
class Judgement:
    exact: bool  # all that the spec fixes is there, and no doubt about it
    uncertain: bool  # the picture cannot be read with confidence: see percept.doubts
    score: float  # in [0, 1], and 1 only where exact
    scores: dict[str, float]  # in [0, 1] by attribute, for the best guess; keys as `world.grade`
    percept: Percept


def judge(image: np.ndarray, spec: Spec) -> Judgement:
    """Whether a picture, uint8 [H, W, 3] RGB, is what a spec asks for; sides of 16 px or more.

    The score is the mean of the attributes' scores, less up to half of it for doubts: it rises with
    every demand that comes to hold, and with every thing that becomes clear. A picture's size need
    not be that of the edit's source. Raises ValueError for another type or shape of array.
    """
    percept = perceive(image)
    scores = grade(percept.scene, spec)
    mean = sum(scores.values()) / len(scores)
    score = mean * (1 - 0.5 * percept.doubtful)
    uncertain = bool(percept.doubts)
    exact = not uncertain and all(value == 1 for value in scores.values())
    return Judgement(exact, uncertain, score, scores, percept)


def judge_batch(images: Sequence[np.ndarray], specs: Sequence[Spec]) -> list[Judgement]:
    """`judge` for each picture, uint8 [N, H, W, 3] or N of any sizes, and its own spec."""
    if len(images) != len(specs):
        raise ValueError(f"got {len(images)} images but {len(specs)} specs")
    return [judge(image, spec) for image, spec in zip(images, specs, strict=True)]


def perceive(image: np.ndarray) -> Percept:
    """What is seen in a picture, uint8 [H, W, 3] RGB; raises as `judge`."""
    image = _reduce(_checked(image))
    height, width = image.shape[:2]
    side = min(height, width)
    ycc = image @ _TO_YCC
    base = np.median(np.concatenate([ycc[0], ycc[-1], ycc[:, 0], ycc[:, -1]]), 0)
    to_grounds = np.linalg.norm(_GROUNDS - base, axis=-1)
    ground = list(GROUNDS)[int(to_grounds.argmin())]
    off = np.linalg.norm(ycc - base, axis=-1)
    mask = off > _OFF_GROUND
    labels = _components(mask)
    numbers, sizes = np.unique(labels[mask], return_counts=True)
    is_thing = sizes > _SPECK * side * side

    doubts = []
    if to_grounds.min() > _GROUND_LIMIT:
        doubts.append("the ground's colour is none of the palette")
    clear = np.linalg.norm(_mean3(ycc - base)[~_grow(_grow(mask))], axis=-1)
    if not clear.size or np.percentile(clear, 99) > _UNEVEN_GROUND:
        doubts.append("the ground is not even")
    if sizes[~is_thing].sum() > _SPECKS_LIMIT * side * side:
        doubts.append("there are specks")
    if is_thing.sum() >= _MANY:
        doubts.append("there are too many things to tell")
        return Percept(Scene((), ground), tuple(doubts), 1.0)
    whole_picture = bool(doubts)

    things, doubtful = [], 0
    for number in numbers[is_thing]:
        thing, why = _thing(ycc, base, off, labels == number, mask)
        things.append(
            replace(thing, radius=thing.radius / side, x=thing.x / width, y=thing.y / height)
        )
        if not _RADII[0] <= things[-1].radius <= _RADII[1]:
            why.append("a thing is too small or too large")
        if abs(things[-1].radius / SIZE_SPLIT - 1) < _BETWEEN_SIZES:
            why.append("a thing is between small and large")
        doubts += why
        doubtful += bool(why)
    share = 1.0 if whole_picture else doubtful / max(1, len(things))
    return Percept(Scene(tuple(things), ground), tuple(doubts), share)


def _thing(
    ycc: np.ndarray, base: np.ndarray, off: np.ndarray, region: np.ndarray, mask: np.ndarray
) -> tuple[Thing, list[str]]:
    """The thing of one region, its lengths in pixels, and the doubts about it.

    ycc [H, W, 3] is the picture, base [3] its ground, off [H, W] the distance from it, region
    [H, W] the thing's pixels and mask [H, W] those of all things.
    """
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, left = max(0, rows[0] - 2), max(0, columns[0] - 2)
    window = (slice(top, rows[-1] + 3), slice(left, columns[-1] + 3))
    doubts = []
    bottom, right = (side - 1 for side in region.shape)
    if rows[0] == 0 or columns[0] == 0 or rows[-1] == bottom or columns[-1] == right:
        doubts.append("a thing touches the border")

    foreign = (_grow(mask & ~region) & ~region)[window]  # other things with their faint rims
    region, off, delta = region[window], off[window], ycc[window] - base
    core = region & (off > 0.85 * np.percentile(off[region], 85))
    colour = np.median(delta[core], 0)
    # Where a thing is of several colours, their median may even be the ground's.
    cover = delta @ colour / max(float(colour @ colour), 1.0)
    cover[foreign] = 0
    y, x = np.indices(cover.shape) + 0.5
    area = max(float(cover.sum()), 1.0)
    cx, cy = float((cover * x).sum() / area), float((cover * y).sum() / area)
    shape, radius, depth, why = _fit((x - cx).ravel(), (y - cy).ravel(), cover.ravel(), area)
    doubts += why

    # Well inside and well outside of the outline there should be the thing's colour and the ground.
    depth = depth.reshape(region.shape)
    off_model = np.linalg.norm(delta - (depth > 0)[..., None] * colour, axis=-1)
    stray = (off_model > _STRAY) & (abs(depth) > 1.5) & ~foreign
    if stray.sum() > _stray_limit(radius) * area:
        doubts.append("a thing is not of one colour on the ground's")
    to_colours = _COLOURS - base - colour
    nearest = int(np.linalg.norm(to_colours, axis=-1).argmin())
    luma, chroma = abs(to_colours[nearest, 0]), np.hypot(*to_colours[nearest, 1:])
    luma_limit, chroma_limit = _colour_limits(radius)
    if luma > luma_limit or chroma > chroma_limit:
        doubts.append("a thing's colour is none of the palette")
    return Thing(shape, list(COLOURS)[nearest], radius, cx + float(left), cy + float(top)), doubts


def _fit(
    x: np.ndarray, y: np.ndarray, cover: np.ndarray, area: float
) -> tuple[str, float, np.ndarray, list[str]]:
    """The shape and radius likest to `cover` [n] at (x, y) [n] from its centre.

    Also how deep inside the points are in pixels, [n], and the doubts.
    """
    _, areas, perimeters = _outlines()
    radii = np.sqrt(area / areas)
    depths = _depths(x, y, radii)
    templates = np.clip(depths + 0.5, 0, 1)
    errors = ((templates - cover) ** 2).sum(1)
    best = int(errors.argmin())
    towards = templates - templates[best]
    # The projection on the way to another shape: 0 is the best fit's outline, 0.5 half-way. Unlike
    # the error it does not grow with noise.
    way = towards @ (cover - templates[best]) / np.maximum((towards**2).sum(1), 1e-6)
    doubts = []
    if way.max() > _BETWEEN_SHAPES:
        doubts.append("a thing is between two shapes")
    # An edge that is blurred with a deviation of d px has an error of about d / 6 per px of it.
    if errors[best] / (perimeters[best] * radii[best]) > max(0.13, 0.02 * radii[best]):
        doubts.append("a thing has no clear shape")
    return SHAPES[best], float(radii[best]), depths[best], doubts


_GRID, _SPAN = 256, 1.6


@functools.cache
def _outlines() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All shapes at radius 1: signed distances on a grid [S, grid * grid], areas, perimeters."""
    step = 2 * _SPAN / _GRID
    places = (np.arange(_GRID) + 0.5) * step - _SPAN
    y, x = np.meshgrid(places, places, indexing="ij")
    table = np.stack([signed_distance(shape, x, y) for shape in SHAPES])
    areas = (table < 0).sum((1, 2)) * step**2
    near = 4 * step
    perimeters = (np.abs(table) < near).sum((1, 2)) * step**2 / (2 * near)
    return table.reshape(len(SHAPES), -1).astype(np.float32), areas, perimeters


def _depths(x: np.ndarray, y: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How many pixels deep points (x, y) [n] lie in each shape of radii [S] about 0: [S, n]."""

    def cell(offset: np.ndarray) -> np.ndarray:
        place = (offset / radii[:, None] + _SPAN) * (_GRID / (2 * _SPAN))
        return np.clip(place, 0, _GRID - 1).astype(np.int32)

    distances = np.take_along_axis(_outlines()[0], cell(y) * _GRID + cell(x), 1)
    return -distances * radii[:, None]


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3]; got {image.dtype} {list(image.shape)}")
    if min(image.shape[:2]) < 16:
        raise ValueError(f"a picture has sides of 16 px or more; got {list(image.shape[:2])}")
    return image.astype(np.float32)


def _reduce(image: np.ndarray) -> np.ndarray:
    """The picture with blocks of pixels averaged until the judge's time no longer grows with it."""
    k = min(image.shape[:2]) // _MAX_SIDE
    if k < 2:
        return image
    height, width = (side // k for side in image.shape[:2])
    return image[: height * k, : width * k].reshape(height, k, width, k, 3).mean((1, 3))


def _components(mask: np.ndarray) -> np.ndarray:
    """Numbers the 8-connected regions of a mask [H, W]: int [H, W], 0 outside of them."""
    # A pixel takes the largest number around it, then that of the pixel of this number, and so on:
    # numbers travel in leaps.
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.where(mask, _grow(labels), 0)
        flat = np.concatenate([[0], grown.reshape(-1)])
        grown = flat[flat[grown]]
        if np.array_equal(grown, labels):
            return labels
        labels = grown


def _grow(values: np.ndarray) -> np.ndarray:
    """The maximum of each pixel [H, W] and its eight neighbours; of a mask, its dilation."""
    padded = np.pad(values, 1)
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _mean3(values: np.ndarray) -> np.ndarray:
    """The mean of each pixel [H, W, C] and its eight neighbours."""
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def sharpness(image: np.ndarray) -> float:
    """How crisp a picture's edges are, uint8 [H, W, 3]: about 1 for renders, towards 0 for blur.

    The share of an edge's contrast that lies in its steepest step between neighbouring pixels, mean
    over all edges, relative to a render's. It is of this picture's pixels: enlarging one blurs it.
    0 where there is no edge. Raises ValueError as `judge`.
    """
    ycc = _checked(image) @ _TO_YCC
    reach = max(4, min(ycc.shape[:2]) // 16)
    steps, contrasts = 0.0, 0.0
    for lines in (ycc, ycc.transpose(1, 0, 2)):
        n = len(lines) - 1
        step = np.linalg.norm(lines[1:] - lines[:-1], axis=-1)
        contrast = step
        for k in range(1, reach):
            low, high = np.maximum(np.arange(n) - k, 0), np.minimum(np.arange(n) + 1 + k, n)
            across = np.linalg.norm(lines[high] - lines[low], axis=-1)
            contrast = np.maximum(contrast, across)
        edge = contrast > _OFF_GROUND
        steps += float((step**2)[edge].sum())
        contrasts += float((step * contrast)[edge].sum())
    return min(1.0, steps / contrasts / _CRISP) if contrasts else 0.0


_CRISP = 0.6  # the share for renders


def diversity(images: Sequence[np.ndarray]) -> float:
    """How different pictures of one prompt are, uint8 [N, H, W, 3]: 0 where all are the same.

    The root mean square difference of two of them, in [0, 1], mean over all pairs. Raises
    ValueError for fewer than two pictures.
    """
    if len(images) < 2:
        raise ValueError(f"diversity is between two pictures or more; got {len(images)}")
    flat = np.stack(images).reshape(len(images), -1) / 255.0
    distances = [
        np.sqrt(np.mean((flat[k + 1 :] - flat[k]) ** 2, axis=1)) for k in range(len(flat) - 1)
    ]
    return float(np.concatenate(distances).mean())
