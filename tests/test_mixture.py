"""Which samples a step sees: epochs, weights, buckets."""

import collections

import numpy as np
import pytest

from dreamlite_jax.data import mixture, transforms
from dreamlite_jax.data.mixture import CYCLE, MixtureError, Stream

BUCKETS = transforms.aspect_buckets(256, 32, 2)


class Numbers:
    """A source of nothing but sizes."""

    task, fingerprint = "t2i", "numbers"

    def __init__(self, sizes):
        self.sizes = np.asarray(sizes)

    def __len__(self):
        return len(self.sizes)


def drawn(plan, batch_size, steps, start=0):
    """(stream, index) of all rows of some steps, by bucket."""
    rows = collections.defaultdict(list)
    for step in range(start, start + steps):
        bucket, _ = mixture.bucket_of(plan, step)
        rows[bucket] += mixture.rows_of(plan, step, batch_size, range(batch_size))
    return rows


def mixed_sizes(wide, square, tall):
    return [[288, 224]] * wide + [[256, 256]] * square + [[224, 288]] * tall


def test_an_epoch_holds_every_sample_once():
    source = Numbers(mixed_sizes(101, 205, 57))
    plan = mixture.plan([Stream("a", source)], BUCKETS, 8, seed=0)
    rows = drawn(plan, 8, 300)
    assert len(rows) == 3
    orders = []
    for bucket, pairs in rows.items():
        own = np.flatnonzero(transforms.nearest_buckets(source.sizes, plan.buckets) == bucket)
        epochs = [pairs[k : k + len(own)] for k in range(0, len(pairs), len(own))]
        for epoch in epochs[:-1]:
            assert sorted(index for _, index in epoch) == own.tolist()
        last = [index for _, index in epochs[-1]]
        assert len(set(last)) == len(last)
        orders += [tuple(epoch) for epoch in epochs[:2]]
    assert len(set(orders)) == len(orders)  # every epoch has an order of its own


def test_every_stream_of_a_mixture_has_whole_epochs():
    """Whatever the weights; the batches cut the epochs anywhere."""
    streams = [
        Stream("a", Numbers(mixed_sizes(31, 67, 0)), 0.7),
        Stream("b", Numbers(mixed_sizes(0, 45, 23)), 0.17),
        Stream("c", Numbers(mixed_sizes(19, 0, 0)), 1 / 3),
    ]
    plan = mixture.plan(streams, BUCKETS, 8, seed=2)
    rows = collections.defaultdict(list)
    for bucket, drawn_pairs in drawn(plan, 8, 400).items():
        for stream, index in drawn_pairs:
            rows[bucket, stream].append(index)
    assert len(rows) == 5
    for (bucket, stream), indices in rows.items():
        places = transforms.nearest_buckets(streams[stream].source.sizes, plan.buckets)
        own = np.flatnonzero(places == bucket).tolist()
        assert len(indices) > 3 * len(own)
        for k in range(0, len(indices), len(own)):
            epoch = indices[k : k + len(own)]
            whole = k + len(own) <= len(indices)
            assert sorted(epoch) == own if whole else len(set(epoch)) == len(epoch)


def test_weights_hold_in_every_bucket():
    streams = [
        Stream("a", Numbers(mixed_sizes(500, 500, 0)), 3.0),
        Stream("b", Numbers(mixed_sizes(0, 400, 400)), 1.0),
    ]
    plan = mixture.plan(streams, BUCKETS, 16, seed=1)
    counts = collections.Counter()
    for bucket, pairs in drawn(plan, 16, CYCLE).items():
        for stream, index in pairs:
            assert streams[stream].source.sizes[index][0] == plan.buckets[bucket][1]
            counts[plan.buckets[bucket], stream] += 1
    rows = 16 * CYCLE
    expected = {
        ((224, 288), 0): 3 / 8,
        ((256, 256), 0): 3 / 8,
        ((256, 256), 1): 1 / 8,
        ((288, 224), 1): 1 / 8,
    }
    assert {key: n / rows for key, n in counts.items()} == pytest.approx(expected, abs=2e-3)


def test_rare_shapes_go_to_their_neighbours():
    source = Numbers(mixed_sizes(3, 500, 40) + [[900, 100]] * 2)
    plan = mixture.plan([Stream("a", source)], BUCKETS, 8, seed=0)
    assert plan.buckets == ((288, 224), (256, 256))  # 3 and 2 wide ones are less than a batch
    seen = {index for pairs in drawn(plan, 8, 400).values() for _, index in pairs}
    assert seen == set(range(len(source)))


def test_samples_of_fixed_sizes_are_never_seen_at_another():
    """Of two sets, one kept a bucket for itself that their mixture would give up, because it gets
    less than one in a hundred rows or less than a batch."""
    streams = [
        Stream("a", Numbers(mixed_sizes(0, 1000, 0)), 9.0),
        Stream("b", Numbers(mixed_sizes(4, 196, 0)), 1.0),
    ]
    assert mixture.plan(streams, BUCKETS, 8, seed=0).buckets == ((256, 256),)
    plan = mixture.plan(streams, BUCKETS, 8, seed=0, fixed=True)
    assert plan.buckets == ((256, 256), (224, 288))
    for bucket, pairs in drawn(plan, 8, CYCLE).items():
        for stream, index in pairs:
            size = tuple(streams[stream].source.sizes[index][::-1])
            assert size == plan.buckets[bucket]


@pytest.mark.parametrize("rare", [[3e-4] * 2, [5e-4] * 5, [1e-5] * 400])
def test_rare_buckets_have_a_step_each(rare):
    cycle = mixture._cycle(np.array([1 - sum(rare), *rare]), seed=0)
    counts = np.bincount(cycle, minlength=len(rare) + 1)
    assert counts[1:].tolist() == [1] * len(rare) and len(cycle) == CYCLE


def test_fixed_sizes_that_are_no_bucket_are_refused():
    streams = [Stream("a", Numbers([[256, 256], [512, 512]]))]
    said = r"a was precomputed at 512x512 pixels \(record 1\), which is no bucket of .*; remove"
    with pytest.raises(MixtureError, match=said):
        mixture.plan(streams, BUCKETS, 1, seed=0, fixed=True)


def test_few_samples_still_make_batches():
    plan = mixture.plan([Stream("a", Numbers(mixed_sizes(1, 2, 0)))], BUCKETS, 8, seed=0)
    assert plan.buckets == ((256, 256),)
    assert len(mixture.rows_of(plan, 5, 8, range(8))) == 8


def test_a_bucket_counts_its_own_steps():
    plan = mixture.plan([Stream("a", Numbers(mixed_sizes(300, 500, 200)))], BUCKETS, 8, seed=3)
    counts = collections.Counter()
    for step in range(2 * CYCLE + 50):
        bucket, earlier = mixture.bucket_of(plan, step)
        assert earlier == counts[bucket]
        counts[bucket] += 1


@pytest.mark.parametrize(
    "streams, said",
    [
        ([], "no streams"),
        ([Stream("a", Numbers(np.zeros((0, 2))))], "a is empty"),
        ([Stream("a", Numbers([[64, 64]]), 0.0)], "weight of a is 0.0"),
        (
            [Stream("a", Numbers([[64, 64]])), Stream("a", Numbers([[64, 64]]))],
            "stands for several",
        ),
    ],
)
def test_impossible_mixtures_are_refused(streams, said):
    with pytest.raises(MixtureError, match=said):
        mixture.plan(streams, BUCKETS, 8, seed=0)
