"""Edits of the shapes world: (source, instruction, target), each of one thing or of the ground.

What an instruction does not mention stays as it was, and its spec says so; what it leaves open
("another colour", where a new thing goes) is open in the spec.
"""

from dataclasses import dataclass, replace

import numpy as np

from dreamlite_jax.data.shapes.sampling import (
    EDITS,
    Pair,
    Settings,
    draw_count,
    draw_scene,
    fill,
    generator,
    held_out_pairs,
    pairs_of,
)
from dreamlite_jax.data.shapes.words import instruction, pick
from dreamlite_jax.data.shapes.world import (
    ELSEWHERE,
    MARGIN,
    PLACES,
    RELATIONS,
    Scene,
    Spec,
    Want,
    in_place,
    satisfies,
)

_TRIES = 400


@dataclass(frozen=True)
class EditSample:
    source: Scene
    target: Scene
    instruction: str
    spec: Spec  # of the target
    kind: str  # one of EDITS


def sample_edit(settings: Settings, split: str, seed: int, index: int) -> EditSample:
    """The index-th edit of a split: source, target and instruction, with what the latter fixes.

    The instruction calls the thing it changes by attributes that no other thing of the source has.
    In split "held_out" that thing is of a held-out pair before or after (under "ground": any thing
    of the scene is). Raises ValueError as `sample_t2i`, and where the settings allow no edit.
    """
    rng = generator(split, seed, index, "edit")
    held = held_out_pairs(settings) if split == "held_out" else ()
    pairs = pairs_of(settings, split)
    kinds = [kind for kind in EDITS if kind in settings.edits and _possible(settings, kind)]
    if not kinds:
        raise ValueError(f"none of the edits {settings.edits} is possible with these settings")
    kind = pick(rng, kinds)
    least, most = (2 if kind == "remove" else 1), len(settings.counts) - (kind == "add")
    for _ in range(_TRIES):
        # The first thing is the one that is changed. Half of the held-out edits begin with a
        # held-out pair, so that the others may make one.
        first = pick(rng, held) if held and rng.random() < 0.5 else None
        count = draw_count(settings, rng, least, most)
        source = draw_scene(settings, rng, pairs, count, first)
        made = _edit(settings, kind, source, rng, pairs)
        if made is None:
            continue
        referent, change, spec = made
        try:
            target = fill(settings, spec, rng, pairs, tries=10)
        except ValueError:
            continue
        if held and not _pairs_at_stake(kind, source, target) & set(held):
            continue
        relation = spec.relations[0][1] if spec.relations else None
        text = instruction(kind, rng, referent, change, spec.grounds, relation)
        return EditSample(source, target, text, spec, kind)
    raise ValueError(
        f"found no edit of kind {kind!r} in {_TRIES} tries: the settings are too tight"
    )


def _possible(settings: Settings, kind: str) -> bool:
    needs = {
        "recolour": settings.colours,
        "reshape": settings.shapes,
        "ground": settings.grounds,
        "remove": settings.counts,
        "add": settings.counts,
    }
    return kind not in needs or len(needs[kind]) > 1


def _pairs_at_stake(kind: str, source: Scene, target: Scene) -> set[Pair]:
    if kind == "ground":
        things = source.things
    elif kind == "add":
        things = target.things[-1:]
    elif kind == "remove":
        things = source.things[:1]
    else:
        things = source.things[:1] + target.things[:1]
    return {(thing.shape, thing.colour) for thing in things}


def _edit(
    settings: Settings,
    kind: str,
    source: Scene,
    rng: np.random.Generator,
    pairs: tuple[Pair, ...],
) -> tuple[Want | None, Want | None, Spec] | None:
    """An edit of the source's first thing: what to call it, what to change, the target's spec.

    None where this source does not allow it.
    """
    kept = tuple(Want(was=thing) for thing in source.things)
    referent = _refer(source, rng)
    if kind == "ground":
        grounds = _others(settings, settings.grounds, source.ground, rng)
        return None, None, Spec(kept, grounds, source=source)
    if kind == "add":
        relation = pick(rng, RELATIONS) if rng.random() < settings.relations else None
        change, relations = _addition(settings, rng, pairs), ()
        if relation and referent:
            # A place would as a rule contradict the relation.
            change, relations = replace(change, place=None), ((len(kept), relation, 0),)
        return referent, change, Spec((*kept, change), relations=relations, source=source)
    if referent is None:
        return None
    if kind == "remove":
        return referent, None, Spec(kept[1:], source=source)
    change = _change(settings, kind, source, rng, pairs)
    return change and (referent, change, Spec((change, *kept[1:]), source=source))


def _change(
    settings: Settings,
    kind: str,
    source: Scene,
    rng: np.random.Generator,
    pairs: tuple[Pair, ...],
) -> Want | None:
    """What the source's first thing becomes, or None if it can become nothing new."""
    thing = source.things[0]
    if kind == "resize":
        return Want(size="large" if thing.size == "small" else "small", was=thing)
    if kind == "move":
        places = [p for p in PLACES if not in_place(thing.x, thing.y, p, -2 * MARGIN)]
        another = not places or rng.random() < settings.another
        return Want(place=ELSEWHERE if another else pick(rng, places), was=thing)
    if kind == "recolour":
        allowed = tuple(c for c in settings.colours if (thing.shape, c) in pairs)
        new = _others(settings, settings.colours, thing.colour, rng, allowed)
        return Want(colours=new, was=thing) if new else None
    allowed = tuple(s for s in settings.shapes if (s, thing.colour) in pairs)
    new = _others(settings, settings.shapes, thing.shape, rng, allowed)
    return Want(shapes=new, was=thing) if new else None


def _others(
    settings: Settings,
    names: tuple[str, ...],
    old: str,
    rng: np.random.Generator,
    allowed: tuple[str, ...] | None = None,
) -> tuple[str, ...]:
    """What an edit may change a name to: any other ("another") or one of the allowed others."""
    others = tuple(name for name in names if name != old)
    if rng.random() < settings.another:
        return others
    others = tuple(name for name in others if allowed is None or name in allowed)
    return (pick(rng, others),) if others else ()


def _addition(settings: Settings, rng: np.random.Generator, pairs: tuple[Pair, ...]) -> Want:
    """A new thing of which something is named, if only that it is a shape."""
    shape, colour = pick(rng, pairs)
    return Want(
        (shape,) if rng.random() >= settings.open_shape else (),
        (colour,) if rng.random() >= settings.open_colour else (),
        pick(rng, ("small", "large")) if rng.random() >= settings.open_size else None,
        pick(rng, PLACES) if rng.random() >= settings.open_place else None,
    )


def _refer(source: Scene, rng: np.random.Generator) -> Want | None:
    """Attributes that only the first thing of a scene has, drawn at random; None if there are none.

    A place counts only where the thing is well inside of it and the others are well outside.
    """
    thing, others = source.things[0], source.things[1:]
    places = [p for p in PLACES if in_place(thing.x, thing.y, p, MARGIN)]
    found = []
    for bits in range(8):
        for place in (None, *places):
            want = Want(
                (thing.shape,) if bits & 1 else (),
                (thing.colour,) if bits & 2 else (),
                thing.size if bits & 4 else None,
                place,
            )
            alone = (Scene((other,), source.ground) for other in others)
            if not any(satisfies(scene, Spec((want,)), -MARGIN) for scene in alone):
                found.append(want)
    return pick(rng, found) if found else None
