"""Captions and instructions: what a spec fixes in English, in several wordings and no more.

Each function draws a wording with the generator it is given and states exactly the attributes that
are fixed. Colours, shapes, sizes, places and grounds keep their names of `world` (sizes have
synonyms too), so that a caption can be searched for them.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from dreamlite_jax.data.shapes.world import ELSEWHERE, Spec, Want

T = TypeVar("T")

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
_CAPTIONS = ("{}", "a picture of {}", "an image with {}", "{}", "a drawing of {}", "there {be} {}")
_ON_GROUND = ("on a {} ground", "on a {} background", "against a {} background")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options. Only `random()` is drawn on, the steadiest part of NumPy's generators."""
    return options[int(rng.random() * len(options))]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _place(place: str, rng: np.random.Generator) -> str:
    if place == "middle":
        return pick(rng, ("in the middle", "in the centre"))
    if " " in place:
        return pick(rng, (f"in the {place} corner", f"at the {place}"))
    side = "on" if place in ("left", "right") else "at"
    return pick(rng, (f"{side} the {place}", f"in the {place} half"))


def noun(want: Want, rng: np.random.Generator, count: int = 1) -> str:
    """A want's size, colour, shape and place in words without an article: "big red star"."""
    shape = want.shapes[0] if want.shapes else pick(rng, ("shape", "object"))
    words = [pick(rng, SIZE_WORDS[want.size])] if want.size else []
    words += [*want.colours, shape if count == 1 else _plural(shape)]
    if want.place:
        words.append(_place(want.place, rng))
    return " ".join(words)


def _listing(parts: Sequence[str]) -> str:
    if len(parts) < 3:
        return " and ".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """A text-to-image caption of a spec whose wants name one shape and one colour at most."""
    wants = list(spec.wants)
    if spec.relations:
        i, relation, j = spec.relations[0]
        a, b = (_article(noun(wants[k], rng)) for k in (i, j))
        parts = [f"{a} {pick(rng, _RELATION_WORDS[relation])} {b}"]
        parts += [_article(noun(want, rng)) for k, want in enumerate(wants) if k not in (i, j)]
        # "a, b and c" would leave open what the relation is between.
        subject, plural = ", with ".join(parts), False
    else:
        subject, plural = _group(wants, rng)
    text = pick(rng, _CAPTIONS).format(subject, be="are" if plural else "is")
    if not spec.grounds:
        return text.rstrip(",")
    return text + " " + pick(rng, _ON_GROUND).format(spec.grounds[0])


def _group(wants: list[Want], rng: np.random.Generator) -> tuple[str, bool]:
    """All wants without relations: those that read alike are counted. And whether to say "are"."""
    shapes, colours = {w.shapes for w in wants}, [w.colours for w in wants]
    bare = not any(want.size or want.place for want in wants)
    if (
        len(wants) > 1
        and len(shapes) == 1
        and bare
        and len(set(colours)) > 1
        and rng.random() < 0.5
    ):
        head = f"{NUMBERS[len(wants)]} {noun(Want(*shapes), rng, len(wants))}"
        each = [f"one {colour[0]}" if colour else "one of any colour" for colour in colours]
        return f"{head}, {_listing(each)},", True
    counts = {want: wants.count(want) for want in wants}
    parts = [
        _article(noun(want, rng)) if n == 1 else f"{NUMBERS[n]} {noun(want, rng, n)}"
        for want, n in counts.items()
    ]
    return _listing(parts), next(iter(counts.values())) > 1


_INSTRUCTIONS = {
    "recolour": (
        "make {ref} {new}",
        "paint {ref} {new}",
        "change the colour of {ref} to {new}",
        "colour {ref} {new}",
    ),
    "recolour to another": ("give {ref} another colour", "change the colour of {ref}"),
    "reshape": ("turn {ref} into {a_new}", "change {ref} into {a_new}", "make {ref} {a_new}"),
    "reshape to another": ("give {ref} another shape", "change the shape of {ref}"),
    "resize to large": ("make {ref} larger", "enlarge {ref}", "make {ref} big"),
    "resize to small": ("make {ref} smaller", "shrink {ref}", "make {ref} small"),
    "move": ("move {ref} {to}", "shift {ref} {to}", "bring {ref} {to}"),
    "move to another": ("move {ref} somewhere else", "put {ref} in another place"),
    "remove": ("remove {ref}", "delete {ref}", "take {ref} away", "erase {ref}"),
    "add": ("add {new}", "draw {new}", "insert {new}"),
    "ground": (
        "make the background {new}",
        "change the background to {new}",
        "change the ground to {new}",
        "put everything on a {new} ground",
    ),
    "ground to another": (
        "change the colour of the background",
        "give the picture another background",
    ),
}


def instruction(
    kind: str,
    rng: np.random.Generator,
    referent: Want | None = None,
    change: Want | None = None,
    grounds: tuple[str, ...] = (),
    relation: str | None = None,
) -> str:
    """An edit's instruction.

    kind: one of `sampling.EDITS`. referent: what the thing to be changed is called by, or for
    "add" what the new thing is `relation` of. change: the attributes that the edit fixes anew,
    several for "another". grounds: the same for "ground".
    """
    words = {"ref": f"the {noun(referent, rng)}" if referent else ""}
    key = kind
    if kind == "recolour":
        new = change.colours
    elif kind == "reshape":
        new = change.shapes
    elif kind == "ground":
        new = grounds
    else:
        new = ()
    if len(new) > 1:
        key = f"{kind} to another"
    elif new:
        words |= {"new": new[0], "a_new": _article(new[0])}
    if kind == "resize":
        key = f"resize to {change.size}"
    elif kind == "move" and change.place == ELSEWHERE:
        key = "move to another"
    elif kind == "move":
        words["to"] = f"to the {change.place}"
    elif kind == "add":
        words["new"] = _article(noun(change, rng))
        if relation:
            words["new"] += f" {pick(rng, _RELATION_WORDS[relation])} {words['ref']}"
    return pick(rng, _INSTRUCTIONS[key]).format(**words)
