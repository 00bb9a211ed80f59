"""The prepared set: what is written is read, from any thread or process, and damage is told."""

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest

from dreamlite_jax.data import pictures, pipeline, records, shards, streams
from dreamlite_jax.data.records import PreparedSet, PreparedSetError, Record
from dreamlite_jax.train import loop

COUNTS = (3, 0, 4, 1)  # records of the shards


def made(i: int, triplets: bool = False) -> Record:
    size = {"width": 64 + i, "height": 64}
    captions = [f"caption {i} 猫"] * (1 + i % 2)
    image = np.random.default_rng(i).bytes(100_000 if i == 4 else 500)
    source = {"source": b"before" * i} if triplets else {}
    return Record(key=f"k/{i}", captions=captions, image=image, **source, **size)


def prepare(folder, triplets=False, counts=COUNTS):
    parts, sizes = [], []
    for number, count in enumerate(counts):
        these = [made(len(sizes) + i, triplets) for i in range(count)]
        parts.append(records.write_shard(folder / shards.NAME.format(number), these))
        sizes += [(record["width"], record["height"]) for record in these]
    kind = records.TRIPLETS if triplets else records.PAIRS
    return records.write_index(folder, kind, parts, sizes, {"sources": ["somewhere"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    prepare(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def problem(folder, check=PreparedSet):
    with pytest.raises(PreparedSetError) as raised:
        check(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    return str(raised.value)


def test_packing():
    for triplets in (False, True):
        record = made(5, triplets)
        assert records.unpack(records.pack(record)) == record
        assert records.pack(dict(reversed(record.items()))) == records.pack(record)


def test_what_is_written_is_read(folder):
    prepared = PreparedSet(folder)
    assert len(prepared) == 8 and prepared.kind == "pairs"
    assert list(prepared) == [made(i) for i in range(8)]
    assert prepared[np.int64(-1)] == made(7)
    assert prepared.sizes.dtype == np.int32
    np.testing.assert_array_equal(prepared.sizes, [(64 + i, 64) for i in range(8)])
    for i in (8, -9):
        with pytest.raises(IndexError, match=f"record {i} of 8"):
            prepared[i]
    assert prepared.index["sources"] == ["somewhere"]
    assert not list(folder.glob(".*"))
    records.verify(folder)


def test_triplets(tmp_path):
    prepare(tmp_path, triplets=True)
    prepared = PreparedSet(tmp_path)
    assert prepared.kind == "triplets" and prepared[2] == made(2, triplets=True)


def test_the_fingerprint_is_that_of_the_content(folder, tmp_path):
    first = PreparedSet(folder).fingerprint
    assert prepare(tmp_path / "same")["fingerprint"] == first
    others = [prepare(tmp_path / str(counts), counts=counts) for counts in ((8,), (3, 0, 4))]
    kinds = prepare(tmp_path / "triplets", triplets=True)
    assert len({first, kinds["fingerprint"], *(other["fingerprint"] for other in others)}) == 4


def test_threads_share_a_set(folder, monkeypatch):
    """More shards than may be open at once."""
    monkeypatch.setattr(shards, "_MAX_OPEN", 1)
    prepared = PreparedSet(folder)
    order = np.random.default_rng(0).integers(0, 8, 2000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: prepared[i]["key"], order))
    assert found == [f"k/{i}" for i in order]
    assert len(prepared._records._readers) == 1


def _key(prepared, i):
    return prepared[i]["key"]


def test_processes_get_the_folder_only(folder):
    prepared = PreparedSet(folder)
    assert prepared[0]["key"] == "k/0"  # a shard is open
    assert len(pickle.dumps(prepared)) < 500
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        assert pool.submit(_key, prepared, 5).result() == "k/5"


def test_a_set_that_changed_under_its_workers(copy):
    pickled = pickle.dumps(PreparedSet(copy))
    prepare(copy, counts=(2,))
    with pytest.raises(PreparedSetError, match="prepared anew"):
        pickle.loads(pickled)


def test_aspects():
    sizes = np.int32([(100, 100), (110, 100), (1920, 1080), (90, 200), (10, 1000), (60, 90)])
    counts = records.aspect_counts(sizes)
    assert {name: n for name, n in counts.items() if n} == {
        "1:1": 2,
        "16:9": 1,
        "1:2": 2,
        "2:3": 1,
    }


def test_what_is_no_set(copy, tmp_path):
    assert "no such folder" in problem(tmp_path / "nowhere")
    assert "index.json is missing" in problem(tmp_path)
    index = json.loads((copy / "index.json").read_text())

    def with_index(text):
        (copy / "index.json").write_text(text)
        return problem(copy)

    assert "version 7, this program reads 1" in with_index(json.dumps(index | {"version": 7}))
    assert "no index of a prepared set" in with_index("{")
    assert "no index of a prepared set" in with_index("[]")
    del index["kind"]
    assert "lacks kind" in with_index(json.dumps(index))
    (copy / "index.json").unlink()
    assert "preparation is unfinished (4 part files" in problem(copy)


def test_missing_and_cut_shards(copy):
    shard = copy / "part-00002.arrayrecord"
    os.truncate(shard, 70_000)
    assert "part-00002.arrayrecord (70000 bytes, expected" in problem(copy)
    shard.unlink()
    assert "lacks part-00002.arrayrecord" in problem(copy)


def test_sizes_that_do_not_fit(copy):
    np.save(copy / "sizes.npy", np.zeros((5, 2), np.int32))
    assert "int32 [5, 2], expected int32 [8, 2]" in problem(copy)
    (copy / "sizes.npy").unlink()
    assert "sizes.npy" in problem(copy)


def test_damage_within_a_shard(copy):
    shard = copy / "part-00002.arrayrecord"
    data = bytearray(shard.read_bytes())
    at = data.index(made(4)["image"][:50])
    data[at + 20_000] ^= 1
    shard.write_bytes(data)
    prepared = PreparedSet(copy)  # sizes are as they should be
    assert prepared[3] == made(3)
    with pytest.raises(shards.ShardError, match=r"part-00002.arrayrecord: record 1 is damaged"):
        prepared[4]
    assert "damaged: part-00002.arrayrecord" in problem(copy, records.verify)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disks_that_are_full(tmp_path, monkeypatch):
    def full(_):
        return open("/dev/full", "wb")

    monkeypatch.setattr(shards, "replaced_file", full)
    with pytest.raises(OSError, match=r"a\.arrayrecord: cannot be written .*No space left"):
        records.write_shard(tmp_path / "a.arrayrecord", [made(0)])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_says_which_file(tmp_path):
    """The error of a write names none by itself."""
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'"),
        pictures.replaced_file(tmp_path / "a"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"something")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path):
    def failing():
        yield made(0)
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        records.write_shard(tmp_path / "part-00000.arrayrecord", failing())
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_read_ends_training_as_a_shard_does(folder):
    """Saved, and with a line that says which it is, in worker processes, too."""
    found, saved = streams.open_streams([{"source": str(folder)}], 64), []
    recipe = pipeline.Recipe(found, batch_size=2, image_size=64)
    with (
        pytest.raises(PreparedSetError) as error,
        loop.kept(lambda: saved.append(1), lambda: False),
        loop.reading(),
    ):
        next(pipeline.batches_from(recipe))
    assert saved
    message = str(pickle.loads(pickle.dumps(error.value)))
    assert message.startswith(f"{folder}: a picture of record ") and "\n" not in message
    assert "(k/" in message and "(unreadable: no JPEG, " in message
