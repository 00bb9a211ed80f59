"""Which samples a step sees: streams with weights, spread over aspect buckets, in closed form.

A *source* is random-access data of one task; a *stream* is a source with a weight. Every step has
one bucket, so all its pictures have one size; within it the streams are mixed by weight. Nothing
here has a state: the bucket of a step and the samples of its rows are functions of the step.

An *epoch* is of a stream within a bucket: every sample once, in a new order, before any comes
again. Epochs end within batches, those of several buckets or streams not at the same step.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from dreamlite_jax.data.transforms import Size, nearest_buckets
from dreamlite_jax.errors import UserError

T2I, EDIT = "t2i", "edit"
TASKS = (T2I, EDIT)
CYCLE = 1000  # steps after which the order of the buckets repeats


class MixtureError(UserError):
    """A mixture that cannot be made: one line."""


class Source(Protocol):
    """Samples of one task, readable in any order and from any process."""

    task: str  # of TASKS
    fingerprint: str  # changes when a sample does
    sizes: np.ndarray  # [N, 2] (width, height), of which the ratio decides over the bucket

    def __len__(self) -> int: ...

    def read(self, index: int, size: Size) -> Any:
        """A `pipeline.Sample`, or `precomputed.Latents`, for a batch of `size`."""

    def metadata(self, index: int) -> dict[str, Any]:
        """A JSON object that tells rewards which sample it is; sources of precomputed samples, of
        which no reward is asked, have none."""


class Stream(NamedTuple):
    name: str
    source: Source
    weight: float = 1.0


class Plan(NamedTuple):
    """The order of all samples. `mixes[b]` holds (stream, sample index) pairs without an end."""

    buckets: tuple[Size, ...]
    cycle: np.ndarray  # [CYCLE] the bucket of each step
    mixes: tuple[grain.MapDataset, ...]
    shares: np.ndarray  # [buckets, streams] how often a row is of this bucket and stream


def plan(
    streams: Sequence[Stream],
    buckets: Sequence[Size],
    batch_size: int,
    seed: int,
    fixed: bool = False,
) -> Plan:
    """Spreads the streams over the buckets.

    A bucket that gets less than a batch of samples, or less than one in a hundred rows, is given up
    and its samples go to the nearest that is left: a batch then never holds a sample twice because
    its bucket has too few.

    Args:
      fixed: the sources' sizes are those of their buckets already, and no sample can be brought to
        another: no bucket that holds one is given up. A batch of a bucket with fewer samples than
        rows then holds some twice, and a bucket has at least one of `CYCLE` steps.

    Raises:
      MixtureError: no streams, an empty source, a weight that is not positive, equal names; with
        `fixed`, a size that is no bucket.
    """
    _check(streams)
    weights = np.array([stream.weight for stream in streams], float)
    if fixed:
        places = [_place(stream, buckets) for stream in streams]
    else:
        places = spread([stream.source.sizes for stream in streams], weights, buckets, batch_size)
    shares = np.stack([np.bincount(p, minlength=len(buckets)) / len(p) for p in places], 1)
    shares *= weights / weights.sum()
    used = np.flatnonzero(shares.sum(1))
    mixes = []
    for b in used:
        names = [f"{seed}/{stream.name}/{buckets[b]}" for stream in streams]
        parts = [
            (shares[b, k], _shuffled(k, np.flatnonzero(places[k] == b), names[k]))
            for k in np.flatnonzero(shares[b])
        ]
        mixes.append(grain.MapDataset.mix([d for _, d in parts], [w for w, _ in parts]))
    return Plan(
        tuple(buckets[b] for b in used),
        _cycle(shares[used].sum(1), seed),
        tuple(mixes),
        shares[used],
    )


def _check(streams: Sequence[Stream]) -> None:
    names = [stream.name for stream in streams]
    problems = [] if streams else ["there are no streams; give at least one source"]
    problems += [f"the name {n!r} stands for several" for n in set(names) if names.count(n) > 1]
    for name, source, weight in streams:
        if not len(source):
            problems.append(f"{name} is empty")
        if not 0 < weight < float("inf"):
            problems.append(f"the weight of {name} is {weight}, should be positive")
    if problems:
        raise MixtureError(f"data: {'; '.join(problems)}")


def spread(
    sizes: Sequence[np.ndarray], weights: np.ndarray, buckets: Sequence[Size], least: int
) -> list[np.ndarray]:
    """The bucket, int32 [N], of every sample of several sources with weights; see `plan`.

    Buckets that get less than `least` samples, or less than one in a hundred rows, stay empty.
    """

    def assigned(kept: np.ndarray) -> list[np.ndarray]:
        options = [buckets[b] for b in kept]
        return [kept[nearest_buckets(own, options)] for own in sizes]

    places = assigned(np.arange(len(buckets)))
    counts = np.stack([np.bincount(p, minlength=len(buckets)) for p in places], 1)
    share = (counts / counts.sum(0) * weights / weights.sum()).sum(1)
    kept = np.flatnonzero((counts.sum(1) >= least) & (share >= 0.01))
    return assigned(kept if len(kept) else np.array([share.argmax()]))


def _place(stream: Stream, buckets: Sequence[Size]) -> np.ndarray:
    """The bucket, int32 [N], that is as large as each sample is.

    Raises:
      MixtureError: there is none.
    """
    sizes = np.asarray(stream.source.sizes)
    places = nearest_buckets(sizes, buckets)
    other = np.flatnonzero((np.array(buckets)[places][:, ::-1] != sizes).any(1))
    if len(other):
        width, height = sizes[other[0]]
        raise MixtureError(
            f"data: {stream.name} was precomputed at {width}x{height} pixels (record {other[0]}), "
            "which is no bucket of this image_size and max_ratio; remove its precomputed folder "
            "and run launch.precompute with the config's, or set precomputed=False"
        )
    return places


def _shuffled(stream: int, indices: np.ndarray, name: str) -> grain.MapDataset:
    """(stream, index) pairs: every epoch holds each index once, in an order of its own."""
    data = grain.MapDataset.source(indices).shuffle(seed=zlib.crc32(name.encode()))
    return data.repeat().map(functools.partial(_pair, stream))


def _pair(stream: int, index: np.integer) -> tuple[int, int]:
    return stream, int(index)


def _cycle(shares: np.ndarray, seed: int) -> np.ndarray:
    """[CYCLE] buckets as often as their shares ask, at least once each, shuffled."""
    exact = shares / shares.sum() * CYCLE
    counts = np.maximum(exact.astype(int), 1)
    while (missing := CYCLE - counts.sum()) != 0:  # largest remainders first
        k = (exact - counts).argmax() if missing > 0 else counts.argmax()
        counts[k] += np.sign(missing)
    order = np.repeat(np.arange(len(shares)), counts)
    return np.random.default_rng((seed, CYCLE)).permutation(order)


def bucket_of(plan: Plan, step: int) -> tuple[int, int]:
    """A step's bucket, and how many earlier steps had the same."""
    rounds, place = divmod(step, CYCLE)
    bucket = int(plan.cycle[place])
    before = int((plan.cycle[:place] == bucket).sum())
    return bucket, rounds * int((plan.cycle == bucket).sum()) + before


def rows_of(plan: Plan, step: int, batch_size: int, rows: Sequence[int]) -> list[tuple[int, int]]:
    """(stream, sample index) of some rows of a step's global batch."""
    bucket, earlier = bucket_of(plan, step)
    mix = plan.mixes[bucket]
    return [mix[earlier * batch_size + row] for row in rows]
