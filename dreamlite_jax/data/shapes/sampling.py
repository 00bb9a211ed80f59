"""Samples of the shapes world: each a pure function of (settings, split, seed, index).

Splits: "train" and "iid" hold no thing of a held-out (shape, colour) pair, in no source, target or
caption, and differ in their random streams only; every "held_out" prompt is about such a pair;
"all" draws from all pairs alike, for an autoencoder (one that has not seen a pair blurs it, and
what was meant to test composition tests the autoencoder), and for prompts without their pictures.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from dreamlite_jax.data.shapes.words import caption, pick
from dreamlite_jax.data.shapes.world import (
    COLOURS,
    ELSEWHERE,
    FAR,
    GROUNDS,
    MARGIN,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZE_SPLIT,
    SIZES,
    Scene,
    Spec,
    Thing,
    Want,
    in_place,
    reach,
    related,
)

# Counts up whenever a seed and an index give another sample than before.
VERSION = 3
SPLITS = ("train", "iid", "held_out", "all")
EDITS = ("recolour", "reshape", "resize", "move", "remove", "add", "ground")
Pair = tuple[str, str]  # (shape, colour)


@dataclass(frozen=True)
class Settings:
    """What the world holds and how loose its captions are.

    Probabilities `open_*` are of a caption leaving that attribute of a thing out (an attribute that
    is not there, such as a place between left and right, is left out anyway); `jitter` 1 lets
    things lie anywhere, 0 on the crossings of a 3 x 3 grid. ValueError names what is wrong.
    """

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    grounds: tuple[str, ...]
    held_out: tuple[Pair, ...]
    counts: tuple[float, ...] = (0.5, 0.5)  # relative frequencies of 1, 2, ... things
    small: tuple[float, float] = (0.15, 0.165)  # radii
    large: tuple[float, float] = (0.205, 0.235)
    edge: float = 0.04  # least distance of an outline from the border
    gap: float = 0.08  # and of outlines from each other
    jitter: float = 1.0
    open_shape: float = 0.15
    open_colour: float = 0.25
    open_size: float = 0.6
    open_place: float = 0.6
    open_ground: float = 0.4
    twins: float = 0.25  # a further thing has the shape and colour of the one before
    relations: float = 0.3  # a caption of several things relates two of them, where clear
    another: float = 0.2  # an edit leaves open what to change to
    edits: tuple[str, ...] = EDITS

    def __post_init__(self):
        def check(good: bool, message: str) -> None:
            if not good:
                raise ValueError(f"shapes settings: {message}")

        known = {"shapes": SHAPES, "colours": COLOURS, "grounds": GROUNDS, "edits": EDITS}
        for name, names in known.items():
            own = getattr(self, name)
            bad = sorted(set(own) - set(names))
            check(not bad, f"unknown {name} {bad}; known are {list(names)}")
            check(len(set(own)) == len(own) >= 1, f"{name} must be one or more, each once")
        pairs = set(itertools.product(self.shapes, self.colours))
        check(set(self.held_out) <= pairs, "held_out pairs must be (shape, colour) of those above")
        check(set(self.held_out) < pairs, "held_out leaves no pair to train on")
        for name in ("jitter", "twins", "relations", "another"):
            check(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1]")
        for name in ("shape", "colour", "size", "place", "ground"):
            check(0 <= getattr(self, f"open_{name}") <= 1, f"open_{name} must be in [0, 1]")
        check(
            1 <= len(self.counts) <= 3 and min(self.counts) >= 0 < max(self.counts),
            "counts must be one to three frequencies, not all 0",
        )
        check(self.edge >= 0 and self.gap >= 0, "edge and gap must not be negative")
        # What the judge can tell: neither too small nor too large, and clearly one or the other.
        radii = (0.1, *self.small, 0.96 * SIZE_SPLIT, 1.04 * SIZE_SPLIT, *self.large, 0.27)
        check(
            list(radii) == sorted(radii),
            f"small and large must be rising radii in [0.1, 0.27], 4 % off {SIZE_SPLIT} either way",
        )


QUICK = Settings(
    shapes=("circle", "square"),
    colours=("red", "green", "blue"),
    grounds=("white", "black"),
    held_out=(("circle", "green"),),
)
DEMO = Settings(
    shapes=("circle", "square", "triangle", "cross"),
    colours=("red", "yellow", "green", "blue", "pink"),
    grounds=("white", "black", "navy"),
    held_out=(("circle", "blue"), ("square", "pink"), ("triangle", "red"), ("cross", "yellow")),
    counts=(0.75, 0.25),
    small=(0.16, 0.175),
    large=(0.22, 0.245),
    jitter=0.4,
)
HARD = Settings(
    shapes=SHAPES,
    colours=tuple(COLOURS),
    grounds=tuple(GROUNDS),
    held_out=tuple(
        (shape, colour)
        for k, shape in enumerate(SHAPES)
        for colour in (tuple(COLOURS)[k], tuple(COLOURS)[(k + 3) % 8])
    ),
    counts=(0.3, 0.4, 0.3),
    small=(0.13, 0.155),
    large=(0.2, 0.235),
)
# DEMO, more often of two things, whose captions leave out nothing, nor do instructions of what is
# added or becomes of a thing: learnt from sooner. Models are judged on DEMO's captions.
TOLD = replace(
    DEMO,
    counts=(0.5, 0.5),
    open_shape=0.0,
    open_colour=0.0,
    open_size=0.0,
    open_place=0.0,
    open_ground=0.0,
    another=0.0,
)
# Those pictures of DEMO that leave no doubt of sizes and places: for fine-tuning on the best.
CLEAR = replace(DEMO, small=(0.16, 0.167), large=(0.235, 0.245), jitter=0.15, gap=0.1)
SETTINGS = {"quick": QUICK, "demo": DEMO, "told": TOLD, "clear": CLEAR, "hard": HARD}


@dataclass(frozen=True)
class T2ISample:
    scene: Scene
    caption: str
    spec: Spec


def generator(split: str, seed: int, index: int, stream: str) -> np.random.Generator:
    """The random numbers of one sample; those of another stand in no relation to them.

    Raises ValueError for an unknown split and where seed or index is outside [0, 2**63).
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known are {SPLITS}")
    if not (0 <= seed < 2**63 and 0 <= index < 2**63):
        raise ValueError(f"seed and index must be in [0, 2**63): got {seed} and {index}")
    number = SPLITS.index(split) + len(SPLITS) * ("t2i", "edit").index(stream)
    # A sample's own numbers run in the counter's lowest word, far short of 2**64.
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, index, 0, 0]))


def pairs_of(settings: Settings, split: str) -> tuple[Pair, ...]:
    """The (shape, colour) pairs that things of a split may be of."""
    held = settings.held_out if split in ("train", "iid") else ()
    return tuple(p for p in itertools.product(settings.shapes, settings.colours) if p not in held)


def sample_t2i(settings: Settings, split: str, seed: int, index: int) -> T2ISample:
    """The index-th scene of a split with a caption and what the caption fixes.

    A held-out sample's caption names a held-out pair. Raises ValueError as `generator`, and for
    split "held_out" where nothing is held out.
    """
    rng = generator(split, seed, index, "t2i")
    first = None
    if split == "held_out":
        first = pick(rng, held_out_pairs(settings))
    scene = draw_scene(settings, rng, pairs_of(settings, split), draw_count(settings, rng), first)
    spec = _loosen(settings, scene, rng, named=0 if first else None)
    return T2ISample(scene, caption(spec, rng), spec)


def held_out_pairs(settings: Settings) -> tuple[Pair, ...]:
    """The held-out pairs; ValueError where there are none."""
    if not settings.held_out:
        raise ValueError("split 'held_out' is empty: these settings hold no pair out")
    return settings.held_out


def draw_count(settings: Settings, rng: np.random.Generator, least: int = 1, most: int = 3) -> int:
    """How many things a scene has, by the frequencies of the settings within the limits."""
    weights = np.array(settings.counts)
    numbers = np.arange(1, len(weights) + 1)
    weights = np.where((numbers >= least) & (numbers <= most), weights, 0)
    return int(numbers[np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), "right")])


def draw_scene(
    settings: Settings,
    rng: np.random.Generator,
    pairs: tuple[Pair, ...],
    n: int,
    first: Pair | None = None,
) -> Scene:
    """A scene of n things of the given pairs, of which the first may be asked for."""
    wants = []
    for k in range(n):
        if k == 0 and first:
            pair = first
        elif k and rng.random() < settings.twins:
            pair = wants[-1].shapes[0], wants[-1].colours[0]
        else:
            pair = pick(rng, pairs)
        wants.append(Want(shapes=(pair[0],), colours=(pair[1],)))
    return fill(settings, Spec(tuple(wants)), rng, pairs)


def _loosen(settings: Settings, scene: Scene, rng: np.random.Generator, named: int | None) -> Spec:
    """What a caption fixes of a scene, drawn at random; thing `named` keeps shape and colour."""
    wants = []
    for k, thing in enumerate(scene.things):
        shape, colour, size, place = (
            rng.random() >= p
            for p in (
                settings.open_shape,
                settings.open_colour,
                settings.open_size,
                settings.open_place,
            )
        )
        places = [p for p in PLACES if in_place(thing.x, thing.y, p, MARGIN)]
        wants.append(
            Want(
                (thing.shape,) if shape or k == named else (),
                (thing.colour,) if colour or k == named else (),
                thing.size if size else None,
                pick(rng, places) if place and places else None,
            )
        )
    relations = ()
    if len(wants) > 1 and rng.random() < settings.relations:
        a, b = scene.things[:2]
        relations = tuple((0, r, 1) for r in RELATIONS if related(a, r, b, 2 * MARGIN))
        if relations:  # their places would say much the same again
            wants[:2] = [replace(want, place=None) for want in wants[:2]]
    grounds = (scene.ground,) if rng.random() >= settings.open_ground else ()
    return Spec(tuple(wants), grounds, relations)


def sample_scene(
    settings: Settings, spec: Spec, rng: np.random.Generator, split: str = "all"
) -> Scene:
    """One of the scenes that satisfy a spec, with all that it leaves open drawn at random.

    Things that an edit keeps are exactly as in its source. Raises ValueError where none is found:
    the spec contradicts itself, the settings or the split.
    """
    return fill(settings, spec, rng, pairs_of(settings, split))


def fill(
    settings: Settings,
    spec: Spec,
    rng: np.random.Generator,
    pairs: tuple[Pair, ...],
    tries: int = 5000,
) -> Scene:
    """`sample_scene` with things of the given pairs, which gives up after so many tries."""
    options = []
    for want in spec.wants:
        was = want.was
        shapes = want.shapes or ((was.shape,) if was else settings.shapes)
        colours = want.colours or ((was.colour,) if was else settings.colours)
        fit = [p for p in itertools.product(shapes, colours) if p in pairs]
        if not fit:
            raise ValueError(f"no pair of the split and settings fits {want}")
        options.append(fit)
    for _ in range(tries):
        things = _place_things(settings, spec, rng, options)
        if things is None:
            continue
        grounds = spec.grounds or ((spec.source.ground,) if spec.source else settings.grounds)
        return Scene(tuple(things), pick(rng, grounds))
    raise ValueError(f"found no scene in {tries} tries for {spec}")


def _place_things(
    settings: Settings, spec: Spec, rng: np.random.Generator, options: list[list[Pair]]
) -> list[Thing] | None:
    """One try at all things of a spec, or None where they do not fit."""
    bodies = []  # (shape, colour, radius)
    for want, pairs in zip(spec.wants, options, strict=True):
        if want.was and not want.size:
            radius = want.was.radius
        else:
            bands = {"small": settings.small, "large": settings.large}
            low, high = bands[want.size or pick(rng, SIZES)]
            radius = low + rng.random() * (high - low)
        bodies.append((*pick(rng, pairs), radius))
    things: dict[int, Thing] = {}
    # Those that stay where they were, then the largest first: most tries find room this way.
    stays = [want.was is not None and not want.place for want in spec.wants]
    for k in sorted(range(len(bodies)), key=lambda k: (not stays[k], -bodies[k][2])):
        want, body = spec.wants[k], bodies[k]
        reached = body[2] * reach(body[0])
        for _ in range(1 if stays[k] else 20):
            x, y = (
                (want.was.x, want.was.y)
                if stays[k]
                else _position(settings, rng, reached + settings.edge)
            )
            if _fits(settings, want, reached, x, y, things.values()):
                things[k] = Thing(*body, x, y)
                break
        if k not in things:
            return None
    if any(not related(things[i], r, things[j], 2 * MARGIN) for i, r, j in spec.relations):
        return None
    return [things[k] for k in range(len(bodies))]


def _position(settings: Settings, rng: np.random.Generator, near: float) -> tuple[float, float]:
    """Uniform where a thing that reaches `near` fits; the jitter draws it to a 3 x 3 grid."""
    free = max(0.0, 1 - 2 * near)
    x = _drawn_to(settings.jitter, near, near + rng.random() * free)
    return x, _drawn_to(settings.jitter, near, near + rng.random() * free)


def _drawn_to(jitter: float, near: float, free: float) -> float:
    """A place drawn towards the nearest of `near`, the middle and 1 - `near`."""
    anchor = 1 - near
    if 2 * free <= near + 0.5:
        anchor = near
    elif 2 * free <= 1.5 - near:
        anchor = 0.5
    return anchor + jitter * (free - anchor)


def _fits(
    settings: Settings, want: Want, reached: float, x: float, y: float, others: Iterable[Thing]
) -> bool:
    """Whether a thing that reaches so far around (x, y) is where it should be, and has room."""
    near = reached + settings.edge - 1e-9
    if not (near <= x <= 1 - near and near <= y <= 1 - near):
        return False
    if want.place == ELSEWHERE:
        if (x - want.was.x) ** 2 + (y - want.was.y) ** 2 < (FAR + MARGIN) ** 2:
            return False
    elif want.place and not in_place(x, y, want.place, MARGIN):
        return False
    for other in others:
        apart = reached + other.radius * reach(other.shape) + settings.gap
        if (x - other.x) ** 2 + (y - other.y) ** 2 < apart**2:
            return False
    return True
