"""Batches as a function of the step.

`batches_from(recipe, step)` yields the batches of that step and all later ones: a host's rows of
them, the same on any number of hosts and after any restart, with no state to save. A checkpoint
keeps `description(recipe)` beside the step, so that changed data is noticed.

Shapes: B rows (of the global batch, or a host's of it), H and W pixels of the step's bucket,
h and w latent pixels, c latent channels, L tokens, C context tokens, F text feature width.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired

import numpy as np
from PIL import Image

from dreamlite_jax.data import mixture, pictures, prefetch, prompts, transforms
from dreamlite_jax.data.mixture import EDIT, TASKS, MixtureError, Plan, Stream
from dreamlite_jax.data.precomputed import Latents, PrecomputedSource
from dreamlite_jax.data.prompts import GENERATE, NULL, Prompter
from dreamlite_jax.data.qwen_inputs import QwenInputs
from dreamlite_jax.data.transforms import Choices, Dropout, Size

MODES = {mixture.T2I: GENERATE, EDIT: prompts.EDIT}  # the prompts' modes of the tasks
STEPS = 2**40  # more than anyone takes; Grain wants an end


class Batch(QwenInputs, total=False):
    """A training batch: a plain dict of NumPy arrays with one row for each sample.

    Beside the keys below there are, where a prompter tokenises, those of `QwenInputs` (with images'
    arrays where any stream is of edits), or else, from precomputed sets, the encoders' outputs.
    """

    task: np.ndarray  # int32 [B], an index of mixture.TASKS
    stream: np.ndarray  # int32 [B], an index of the recipe's streams
    index: np.ndarray  # int64 [B], of the sample in its source
    time_ids: np.ndarray  # float32 [B, 2], (width, height) of the target, as the network takes them
    original_size: np.ndarray  # int32 [B, 2], (width, height) of the target before crop and resize
    crop: np.ndarray  # float32 [B, 4], the part kept: left, top, right, bottom, of 1
    has_source: np.ndarray  # bool [B], false for T2I and where dropout took the source latents
    changed: np.ndarray  # bool [B, h, w], what an edit changes; for T2I everything

    target: NotRequired[np.ndarray]  # float32 [B, H, W, 3] in [-1, 1]
    source: NotRequired[np.ndarray]  # likewise; only with edits, 0 for T2I
    drop: NotRequired[np.ndarray]  # int32 [B], tokens of the template's prefix
    # `null_...` (`null_input_ids`, `null_context`): those of the null text, with `with_null`

    target_latents: NotRequired[np.ndarray]  # float32 [B, h, w, c]
    source_latents: NotRequired[np.ndarray]  # likewise; only with edits, 0 for T2I
    context: NotRequired[np.ndarray]  # float32 [B, C, F], behind the prefix, 0 at padding
    context_mask: NotRequired[np.ndarray]  # bool [B, C]


class Sample(NamedTuple):
    """What a source reads: RGB pictures of any size, large ones possibly reduced already."""

    captions: Sequence[str]  # for an edit: instructions
    original_size: tuple[int, int]  # (width, height) of the target as it was stored, in pixels
    target: Image.Image
    source: Image.Image | None = None  # what an edit starts from


class Recipe(NamedTuple):
    """All that decides what the batches hold."""

    streams: tuple[Stream, ...]
    batch_size: int  # global
    image_size: int  # side in pixels of the square bucket
    seed: int = 0
    max_ratio: float = 1.0  # aspect ratio of the widest bucket; 1: squares only
    pixel_multiple: int = 32
    latent_factor: int = 8
    random_crop: bool = True
    dropout: Dropout = Dropout()
    prompter: Prompter | None = None  # None: no text (training an autoencoder), or precomputed
    text_length: int = 0  # tokens of a row with the template's; 0: `default_text_length`
    with_null: bool = False  # batches hold the null text's inputs too, as `null_...`

    @property
    def edits(self) -> bool:
        return any(stream.source.task == EDIT for stream in self.streams)

    @property
    def precomputed(self) -> bool:
        return any(_is_precomputed(stream) for stream in self.streams)

    @property
    def length(self) -> int:
        return self.text_length or default_text_length(self.edits)

    @property
    def context_length(self) -> int:
        """Tokens of a row behind the shortest of its tasks' prefixes: C."""
        return self.length - min(_drop(self, stream) for stream in self.streams)


def default_text_length(edits: bool) -> int:
    """256 tokens hold the template and the 200 that diffusers gives a prompt; 512 the template, the
    256 of an image, and an instruction as long."""
    return 512 if edits else 256


def _is_precomputed(stream: Stream) -> bool:
    return isinstance(stream.source, PrecomputedSource)


def _drop(recipe: Recipe, stream: Stream) -> int:
    if _is_precomputed(stream):
        return stream.source.drop
    return getattr(recipe.prompter.drop, MODES[stream.source.task])


# --- The batches ----------------------------------------------------------------------------------


def batches_from(
    recipe: Recipe,
    step: int = 0,
    *,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    threads: int = 1,
    ahead: int = 2,
) -> Iterator[Batch]:
    """The batches of `step`, `step + 1`, ... without an end.

    Args:
      rows: of the global batch, those that this host makes (`host_rows`, or what its devices hold);
        None: all.
      workers, threads, ahead: see `prefetch.prefetched`.

    Raises:
      MixtureError: what `check` finds.
    """
    plan = check(recipe)
    rows = range(recipe.batch_size) if rows is None else tuple(rows)
    steps = _Steps(recipe, plan, rows)
    return prefetch.prefetched(steps, step, workers=workers, threads=threads, ahead=ahead)


def host_rows(batch_size: int, host: int, hosts: int) -> range:
    """The rows of one of several hosts, in the order of the hosts.

    Raises:
      MixtureError: the batch cannot be divided among them.
    """
    if batch_size % hosts:
        raise MixtureError(f"the batch size {batch_size} is no multiple of {hosts} hosts")
    size = batch_size // hosts
    return range(host * size, (host + 1) * size)


def check(recipe: Recipe) -> Plan:
    """The plan of a recipe that can be made.

    Raises:
      MixtureError: everything that is wrong with it, in one line.
    """
    problems = []
    if recipe.batch_size < 1:
        problems.append(f"the batch size is {recipe.batch_size}, should be at least 1")
    few = [stream.name for stream in recipe.streams if not _is_precomputed(stream)]
    if recipe.precomputed and few:
        problems.append(
            f"{', '.join(few)} is not precomputed, but other streams are; precompute it too, or "
            "use none of the precomputed sets"
        )
    if recipe.prompter and not recipe.precomputed:
        held, least = "the template", recipe.prompter.drop.generate + 2
        if recipe.edits:
            held += " and the image of an edit"
            least = recipe.prompter.drop.edit + recipe.prompter.image_tokens + 2
        if recipe.length <= least:
            problems.append(
                f"a text length of {recipe.length} cannot hold {held}: it should be above {least}"
            )
    try:
        sides = recipe.image_size, recipe.pixel_multiple, recipe.max_ratio
        buckets = transforms.aspect_buckets(*sides)
        how = recipe.batch_size, recipe.seed, recipe.precomputed and not few
        plan = mixture.plan(recipe.streams, buckets, *how)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise MixtureError("; ".join(problems))
    return plan


class _Steps:
    """A Grain source: element t is the batch of step t."""

    def __init__(self, recipe: Recipe, plan: Plan, rows: Sequence[int]):
        self._made_of = (recipe, plan, rows)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Batch:
        return batch(*self._made_of, int(step))

    def __repr__(self) -> str:
        return "batches as a function of the step"


def batch(recipe: Recipe, plan: Plan, rows: Sequence[int], step: int) -> Batch:
    """Some rows of a step's global batch."""
    size = plan.buckets[mixture.bucket_of(plan, step)[0]]
    drawn = mixture.rows_of(plan, step, recipe.batch_size, rows)
    random = [transforms.choices(recipe.seed, step, row) for row in rows]
    sources = [recipe.streams[stream].source for stream, _ in drawn]
    edits = [source.task == EDIT for source in sources]
    dropped = [
        transforms.dropped(recipe.dropout, edit, r.dropout)
        for edit, r in zip(edits, random, strict=True)
    ]
    out = {
        "task": np.array([TASKS.index(source.task) for source in sources], np.int32),
        "stream": np.array([stream for stream, _ in drawn], np.int32),
        "index": np.array([index for _, index in drawn], np.int64),
        "time_ids": np.tile(np.array(size[::-1], np.float32), (len(rows), 1)),
        "has_source": np.array(edits) & ~np.array([source for _, source in dropped]),
    }
    # One by one: a batch's decoded pictures would take hundreds of MiB, and new pages their time.
    views = [
        _seen(recipe, source.read(i, size), size, r)
        for source, (_, i), r in zip(sources, drawn, random, strict=True)
    ]
    out["original_size"] = np.array([view.original_size for view in views], np.int32)
    without_text = [text for text, _ in dropped]
    if recipe.precomputed:
        return out | _latents(recipe, sources, views, random, without_text)
    out |= _pixels(recipe, views)
    if recipe.prompter:
        captions = [
            transforms.pick(view.captions, r.caption) for view, r in zip(views, random, strict=True)
        ]
        texts = [NULL if null else c for c, null in zip(captions, without_text, strict=True)]
        given = [view.seen for view in views], recipe.length, recipe.edits
        out |= text_inputs(recipe.prompter, texts, *given)
        if recipe.with_null:
            nothing = text_inputs(recipe.prompter, [NULL] * len(rows), *given)
            out |= {f"null_{key}": array for key, array in nothing.items()}
    return out


def captions(recipe: Recipe, plan: Plan, rows: Sequence[int], step: int) -> list[str]:
    """The captions of some rows of a step's global batch, dropped or not; of precomputed samples,
    which have them no more, their names."""
    out = []
    size = plan.buckets[mixture.bucket_of(plan, step)[0]]
    drawn = mixture.rows_of(plan, step, recipe.batch_size, rows)
    for row, (stream, index) in zip(rows, drawn, strict=True):
        name, source, _ = recipe.streams[stream]
        if recipe.precomputed:
            out.append(f"{name}[{index}]")
        else:
            texts = source.read(index, size).captions
            out.append(transforms.pick(texts, transforms.choices(recipe.seed, step, row).caption))
    return out


class Asked(NamedTuple):
    """What a row's picture is asked to be, for people and for rewards."""

    task: str
    caption: str
    source: np.ndarray | None  # uint8 [H, W, 3], what an edit starts from
    metadata: dict[str, Any]


def asked(recipe: Recipe, plan: Plan, rows: Sequence[int], step: int) -> list[Asked]:
    """What some rows of a step's global batch ask for; the samples are read again for it. Of
    precomputed ones nothing is known."""
    out = []
    size = plan.buckets[mixture.bucket_of(plan, step)[0]]
    drawn = mixture.rows_of(plan, step, recipe.batch_size, rows)
    for row, (stream, index) in zip(rows, drawn, strict=True):
        source, random = recipe.streams[stream].source, transforms.choices(recipe.seed, step, row)
        at = random.crop if recipe.random_crop else (0.5, 0.5)
        seen = view(source.read(index, size), size, recipe.latent_factor, at, see=0)
        caption = transforms.pick(seen.captions, random.caption)
        out.append(Asked(source.task, caption, seen.source, source.metadata(index)))
    return out


class View(NamedTuple):
    """A sample as the networks see it."""

    captions: Sequence[str]
    original_size: tuple[int, int]  # as `Sample`'s
    target: np.ndarray  # uint8 [H, W, 3]
    source: np.ndarray | None  # likewise
    seen: Image.Image | None  # the source as the text encoder sees it
    changed: np.ndarray  # bool [h, w]
    crop: transforms.Crop


def view(
    sample: Sample,
    size: Size,
    factor: int,
    at: tuple[float, float] = (0.5, 0.5),
    see: int = prompts.IMAGE_SIDE,
) -> View:
    """Crops source and target alike and brings them to `size`.

    The text encoder sees the same part of the source as a square of `see` pixels (0: it does not),
    from the full picture: as in sampling.
    """
    crop = transforms.crop_to(*sample.original_size, size, at)
    facts = sample.captions, sample.original_size
    target = pictures.to_array(transforms.fitted(sample.target, size, crop))
    if sample.source is None:
        everything = np.ones([side // factor for side in size], bool)
        return View(*facts, target, None, None, everything, crop)
    seen = transforms.fitted(sample.source, (see, see), crop) if see else None
    source = pictures.to_array(transforms.fitted(sample.source, size, crop))
    changed = transforms.changed(target, source, factor)
    return View(*facts, target, source, seen, changed, crop)


def _seen(recipe: Recipe, sample: Sample | Latents, size: Size, random: Choices) -> View | Latents:
    """What becomes of a row's sample; precomputed ones are cropped already."""
    if recipe.precomputed:
        return sample
    at = random.crop if recipe.random_crop else (0.5, 0.5)
    see = recipe.prompter.image_side if recipe.prompter else 0
    return view(sample, size, recipe.latent_factor, at, see)


def _pixels(recipe: Recipe, views: Sequence[View]) -> dict[str, np.ndarray]:
    shape = (len(views), *views[0].target.shape)
    out = {
        "target": np.empty(shape, np.float32),
        "changed": np.stack([view.changed for view in views]),
        "crop": np.array([view.crop for view in views], np.float32),
    }
    if recipe.edits:
        out["source"] = np.zeros(shape, np.float32)
    # Row by row into the batch: arrays between would be several times its size, and new pages cost
    # more than the arithmetic.
    for b, view in enumerate(views):
        pictures.to_floats(view.target, out["target"][b])
        if view.source is not None:
            pictures.to_floats(view.source, out["source"][b])
    return out


def text_inputs(
    prompter: Prompter,
    texts: Sequence[str],
    images: Sequence[Image.Image | None],
    length: int,
    force_images: bool = False,
) -> dict[str, np.ndarray]:
    """The text encoder's inputs of rows of both modes, and `drop`.

    Args:
      texts: untagged prompts, or NULL for the null text. Longer ones are cut.
      images: what an edit starts from; None: the row is not an edit.
      length: tokens of every row.
      force_images: add the images' arrays where no row has an image.
    """
    parts = []
    for mode in prompts.MODES:
        rows = [i for i, image in enumerate(images) if (image is not None) == (mode != GENERATE)]
        if not rows:
            continue
        drop = getattr(prompter.drop, mode)
        inputs = prompts.prompt_inputs(
            prompter,
            mode,
            [prompts.tagged(mode, texts[i]) if texts[i] != NULL else NULL for i in rows],
            None if mode == GENERATE else [images[i] for i in rows],
            max_tokens=min(length - drop, prompts.MAX_TOKENS[mode]),
            truncate=True,
            text_buckets=(length,),
            patch_buckets=(prompter.image_patches,),
            force_images=force_images or any(image is not None for image in images),
        )
        parts.append((rows, {**inputs, "drop": np.full(len(rows), drop, np.int32)}))
    return _interleaved(parts, len(texts))


def _interleaved(
    parts: Sequence[tuple[Sequence[int], Mapping[str, np.ndarray]]], rows: int
) -> dict[str, np.ndarray]:
    """The rows of several parts, each with its places, as one set of arrays."""
    out = {key: np.empty((rows, *a.shape[1:]), a.dtype) for key, a in parts[0][1].items()}
    for places, arrays in parts:
        for key, array in arrays.items():
            out[key][places] = array
    return out


def _latents(
    recipe: Recipe,
    sources: Sequence[PrecomputedSource],
    samples: Sequence[Latents],
    random: Sequence[Choices],
    null: Sequence[bool],
) -> dict[str, np.ndarray]:
    """The batch's arrays from precomputed samples."""
    contexts = [
        sample.null if without else transforms.pick(sample.contexts, r.caption)
        for sample, r, without in zip(samples, random, null, strict=True)
    ]
    out = {
        "target_latents": np.stack([sample.target for sample in samples]).astype(np.float32),
        "changed": np.stack([sample.changed for sample in samples]),
        "crop": np.array([sample.crop for sample in samples], np.float32),
        **_contexts(recipe, sources, contexts),
    }
    if recipe.with_null:
        nothing = _contexts(recipe, sources, [sample.null for sample in samples])
        out |= {f"null_{key}": array for key, array in nothing.items()}
    if recipe.edits:
        out["source_latents"] = np.zeros_like(out["target_latents"])
        for row, sample in zip(out["source_latents"], samples, strict=True):
            if sample.source is not None:
                row[:] = sample.source
    return out


def _contexts(
    recipe: Recipe, sources: Sequence[PrecomputedSource], contexts: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Encoded texts [n, F] of every row as `context` and `context_mask`."""
    shape = (len(contexts), recipe.context_length)
    context, mask = np.zeros((*shape, contexts[0].shape[1]), np.float32), np.zeros(shape, bool)
    for b, (source, own) in enumerate(zip(sources, contexts, strict=True)):
        n = min(len(own), recipe.length - source.drop)  # what is left of a tokenised row
        context[b, :n], mask[b, :n] = own[:n], True
    return {"context": context, "context_mask": mask}


# --- The same data as before? ---------------------------------------------------------------------


def description(recipe: Recipe) -> dict[str, Any]:
    """All that decides what the batches hold, as JSON knows it; a checkpoint keeps it."""
    out = {
        name: getattr(recipe, name)
        for name in (
            "batch_size",
            "image_size",
            "seed",
            "max_ratio",
            "pixel_multiple",
            "latent_factor",
            "random_crop",
        )
    }
    out |= {f"dropout.{name}": rate for name, rate in recipe.dropout._asdict().items()}
    if recipe.prompter or recipe.precomputed:
        out["text_length"] = recipe.length
    if recipe.prompter and not recipe.precomputed:
        out["prompts"] = prompts.fingerprint(recipe.prompter)
    out["streams"] = [name for name, *_ in recipe.streams]  # whose order decides, too
    for name, source, weight in recipe.streams:
        out[f"streams.{name}.weight"] = weight
        out[f"streams.{name}.data"] = source.fingerprint
    return out


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two descriptions differ in, a line each, such as "batch_size was 64, is 32"."""

    def shown(side, key):
        return repr(side[key]) if key in side else "absent"

    keys = dict.fromkeys([*saved, *now])
    return [
        f"{key} was {shown(saved, key)}, is {shown(now, key)}"
        for key in keys
        if shown(saved, key) != shown(now, key)
    ]


def check_unchanged(saved: Mapping[str, Any], recipe: Recipe, allow: bool = False) -> list[str]:
    """The differences between a run's data and a recipe's.

    Raises:
      MixtureError: there are some, and they are not allowed.
    """
    found = differences(saved, description(recipe))
    if found and not allow:
        raise MixtureError(
            f"the data is not that of the run so far: {'; '.join(found)}; restore it, or allow "
            "changed data"
        )
    return found


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
