"""The shapes world: scenes, what a prompt fixes of them, and their pictures.

Lengths are fractions: x of the width, y of the height (downwards), radii of the shorter side. A
scene is one to three things on a coloured ground, apart from each other and from the borders. A
`Spec` is the part of a scene that a caption or an instruction fixes. It is as a rule loose, so that
one prompt has many right pictures: where it fixes everything, a model that predicts the mean of the
right pictures in one step is already right, and neither distillation nor guidance has anything to
show.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

# Chosen by a search for what can be told apart at 32 px after JPEG, which halves the resolution of
# chroma: every colour keeps 42 of 255 in luma from every ground, and no colour faded by 30 to 70 %
# into a ground is taken for another.
COLOURS = {
    "red": (232, 14, 18),
    "orange": (255, 114, 0),
    "yellow": (210, 195, 0),
    "green": (25, 150, 35),
    "cyan": (15, 168, 190),
    "blue": (33, 81, 252),
    "purple": (138, 75, 237),
    "pink": (255, 73, 192),
}
GROUNDS = {
    "white": (245, 245, 245),
    "black": (10, 10, 10),
    "navy": (18, 28, 90),
    "beige": (240, 218, 176),
    "maroon": (82, 10, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
SIZES = ("small", "large")
SIZE_SPLIT = 0.185  # a radius from here on is large
PLACES = (
    "left",
    "right",
    "top",
    "bottom",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "middle",
)
ELSEWHERE = "elsewhere"  # the place of an edit that moves a thing it does not matter where
RELATIONS = ("left of", "right of", "above", "below")

# What a person would still call unmoved and of the same size.
SAME_PLACE = 0.06
SAME_RADIUS = 1.2
FAR = 0.2  # elsewhere begins here
# Drawn scenes keep this distance from where a word stops being true: nothing is borderline.
MARGIN = 0.03


@dataclass(frozen=True)
class Thing:
    """One object. Its outline stays within `reach(shape)` * radius of its centre (x, y)."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float

    @property
    def size(self) -> str:
        return "large" if self.radius >= SIZE_SPLIT else "small"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    ground: str


@dataclass(frozen=True)
class Want:
    """What a prompt fixes of one thing; an attribute left empty may be anything.

    Of several shapes or colours any will do ("another colour"). Under an edit, `was` is the
    source's thing that this one continues, and all that the edit leaves empty must be as it was
    there: shape, colour, radius and, unless there is a place, position.
    """

    shapes: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    size: str | None = None
    place: str | None = None  # of PLACES, or ELSEWHERE than `was`
    was: Thing | None = None

    def __post_init__(self):
        if self.size not in (None, *SIZES):
            raise ValueError(f"unknown size {self.size!r}; known are {SIZES}")
        if self.place not in (None, ELSEWHERE, *PLACES):
            raise ValueError(f"unknown place {self.place!r}; known are {(*PLACES, ELSEWHERE)}")
        if self.place == ELSEWHERE and self.was is None:
            raise ValueError("a thing can be elsewhere only than where it was: `was` is missing")


@dataclass(frozen=True)
class Spec:
    """What a prompt fixes: exactly the wanted things in any order, a ground, relations.

    A relation (i, "left of", j) is between wants i and j. No ground in `grounds` means any, but
    under an edit (`source` is given) the source's.
    """

    wants: tuple[Want, ...]
    grounds: tuple[str, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = ()
    source: Scene | None = None


def exactly(scene: Scene) -> Spec:
    """The spec that fixes all of a scene, as for a picture that should come back unchanged."""
    return Spec(tuple(Want(was=thing) for thing in scene.things), source=scene)


def in_place(x: float, y: float, place: str, margin: float = 0.0) -> bool:
    """Whether (x, y) lies in a place of PLACES, and `margin` inside its limits."""
    if place == "middle":
        return max(abs(x - 0.5), abs(y - 0.5)) <= 0.15 - margin
    near = 0.45 - margin
    return (
        ("left" not in place or x <= near)
        and ("right" not in place or 1 - x <= near)
        and ("top" not in place or y <= near)
        and ("bottom" not in place or 1 - y <= near)
    )


def related(a: Thing, relation: str, b: Thing, margin: float = 0.0) -> bool:
    """Whether a is `relation` b: of the four, the one along the longer axis between them."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    along = along if relation in ("left of", "above") else -along
    return along >= abs(across) + margin


def grade(scene: Scene, spec: Spec, margin: float = 0.0) -> dict[str, float]:
    """How far a scene is what a spec asks for: a score in [0, 1] by attribute.

    Keys are "count", those of "shape", "colour", "size", "place", "relation" and "ground" that the
    spec fixes, and under an edit "unchanged". Each is the share of the spec's demands that hold
    when things are assigned to wants as favourably as possible; a want without a thing fails all
    its demands. `margin` makes places and relations stricter, or laxer where it is negative.
    """
    n = len(spec.wants)
    count = 1 - abs(len(scene.things) - n) / max(len(scene.things), n, 1)
    ground = {}
    if spec.grounds:
        ground = {"ground": [scene.ground in spec.grounds]}
    elif spec.source:
        ground = {"unchanged": [scene.ground == spec.source.ground]}
    candidates = list(scene.things) + [None] * max(0, n - len(scene.things))
    table = {
        (i, k): _grade_thing(want, thing, margin)
        for i, want in enumerate(spec.wants)
        for k, thing in enumerate(candidates)
    }
    best = {}
    for chosen in itertools.permutations(range(len(candidates)), n):
        found = {key: list(values) for key, values in ground.items()}
        for pair in enumerate(chosen):
            for key, value in table[pair]:
                found.setdefault(key, []).append(value)
        for i, relation, j in spec.relations:
            a, b = candidates[chosen[i]], candidates[chosen[j]]
            holds = a is not None and b is not None and related(a, relation, b, margin)
            found.setdefault("relation", []).append(holds)
        means = {key: sum(values) / len(values) for key, values in found.items()}
        if not best or sum(means.values()) > sum(best.values()):
            best = means
    return {"count": count, **best}


def _grade_thing(want: Want, thing: Thing | None, margin: float) -> list[tuple[str, bool]]:
    """The demands of one want by attribute, and whether a thing fulfils them."""
    there, was = thing is not None, want.was
    out = []
    if want.shapes:
        out.append(("shape", there and thing.shape in want.shapes))
    elif was:
        out.append(("unchanged", there and thing.shape == was.shape))
    if want.colours:
        out.append(("colour", there and thing.colour in want.colours))
    elif was:
        out.append(("unchanged", there and thing.colour == was.colour))
    if want.size:
        out.append(("size", there and thing.size == want.size))
    elif was:
        ratio = thing.radius / was.radius if there else 0
        out.append(("unchanged", 1 / SAME_RADIUS <= ratio <= SAME_RADIUS))
    if want.place == ELSEWHERE:
        out.append(
            ("place", there and math.hypot(thing.x - was.x, thing.y - was.y) >= FAR + margin)
        )
    elif want.place:
        out.append(("place", there and in_place(thing.x, thing.y, want.place, margin)))
    elif was:
        moved = max(abs(thing.x - was.x), abs(thing.y - was.y)) if there else 1
        out.append(("unchanged", moved <= SAME_PLACE))
    return out


def satisfies(scene: Scene, spec: Spec, margin: float = 0.0) -> bool:
    """Whether a scene is all that a spec asks for; for the margin see `grade`."""
    return all(value == 1 for value in grade(scene, spec, margin).values())


def _spokes(points: int, outer: float, inner: float) -> np.ndarray:
    angles = np.pi * np.arange(2 * points) / points
    radii = np.where(np.arange(2 * points) % 2, inner, outer)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], -1)


def _cross(length: float, width: float) -> np.ndarray:
    corner = np.array([(-width, -length), (width, -length), (width, -width)])
    turns = [np.array([(1, 0), (0, 1)]), np.array([(0, 1), (-1, 0)])]
    turns += [-turns[0], -turns[1]]
    return np.concatenate([corner @ turn for turn in turns])


def _heart(width: float) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    # The centroid of a polygon, of which only the height is not 0 by symmetry.
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    cross = x * next_y - next_x * y
    y = y - np.sum((y + next_y) * cross) / (3 * np.sum(cross))
    return np.stack([x, y], -1) * width / 32


# Outlines at radius 1 about their centroids, corners [n, 2] as (x, y) or (outer, inner) radius.
# They look about equally large, and lie within a circle of 1.3.
_ROUND = {"circle": (1.0, 0.0), "ring": (1.1, 0.55)}
_POLYGONS = {
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.87,
    "triangle": _spokes(3, 1.28, 0.64)[::2],
    "star": _spokes(5, 1.28, 0.54),
    "cross": _cross(1.12, 0.38),
    "diamond": np.array([(0, -1.25), (0.85, 0), (0, 1.25), (-0.85, 0)]),
    "heart": _heart(2.2),
}


@functools.cache
def reach(shape: str) -> float:
    """The radius of the circle that a shape of radius 1 fits into."""
    return _ROUND[shape][0] if shape in _ROUND else float(np.hypot(*_POLYGONS[shape].T).max())


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of points to the outline of a shape of radius 1, negative inside; any one shape."""
    if shape in _ROUND:
        outer, inner = _ROUND[shape]
        r = np.hypot(x, y)
        return np.maximum(r - outer, inner - r) if inner else r - outer
    corners = _POLYGONS[shape]
    squared, inside = np.full(np.shape(x), np.inf), np.zeros(np.shape(x), bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        # Even-odd rule: an edge that spans y flips the points to its left.
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (px < py * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _coverage(thing: Thing, height: int, width: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of an image that a thing lies in, and how far it covers each pixel, in [0, 1]."""
    r = thing.radius * min(height, width)
    x, y, far = thing.x * width, thing.y * height, r * reach(thing.shape) + 1
    rows = slice(max(0, math.floor(y - far)), min(height, math.ceil(y + far)))
    columns = slice(max(0, math.floor(x - far)), min(width, math.ceil(x + far)))
    py, px = np.mgrid[rows, columns] + 0.5
    distance = signed_distance(thing.shape, (px - x) / r, (py - y) / r) * r
    return (rows, columns), np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """The anti-aliased picture of a scene, uint8 [height, width, 3] RGB, at any size."""
    image = np.empty((height, width, 3))
    image[:] = GROUNDS[scene.ground]
    for thing in scene.things:
        window, cover = _coverage(thing, height, width)
        image[window] += cover[..., None] * (COLOURS[thing.colour] - image[window])
    return np.rint(image).astype(np.uint8)


def changed_mask(source: Scene, target: Scene, height: int, width: int) -> np.ndarray:
    """Where the pictures of an edit's two scenes differ: bool [height, width]."""
    before, after = render(source, height, width), render(target, height, width)
    return np.any(before != after, -1)
