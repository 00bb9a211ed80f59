"""Foreign data as samples: the same whatever it is kept in, and nothing lost of what is broken."""

import io
import itertools
import json
import os
import pickle
import re
import tarfile

import foreign
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamlite_jax.data import samples, sources
from dreamlite_jax.data.sources import SourceError


def everything(paths, shard_size=1000, **options):
    return [s for part in sources.parts(paths, shard_size, **options) for s in sources.read(part)]


def raw(kept):
    return [samples.RawSample(k.name, k.image, k.captions, k.source, None) for k in kept]


def ways(root, kept):
    """The same samples in every way of keeping them."""
    return {
        "folder": foreign.write_folder(root / "folder", kept),
        "folder with JSON": foreign.write_folder(root / "json", kept, "json"),
        "table": foreign.write_table(root / "jsonl" / "metadata.jsonl", kept).parent,
        "tar": foreign.write_tar(root / "tars" / "00000.tar", kept).parent,
        "tar with JSON": foreign.write_tar(root / "a.tar", kept, "json"),
        **{
            style: foreign.write_parquet(root / style / "data" / "0.parquet", kept, style)
            for style in ("img2dataset", "hugging face", "names")
        },
    }


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_the_same_samples_whatever_they_are_kept_in(kind, tmp_path):
    kept = getattr(foreign, kind)()
    for way, path in ways(tmp_path, kept).items():
        parts = sources.parts(path, 1000)
        assert [part.kind for part in parts] == [kind], way
        assert list(sources.read(parts[0])) == raw(kept), way
        assert parts[0].count in (len(kept), None), way


def test_a_csv_and_any_single_table(tmp_path):
    kept = foreign.pairs()
    foreign.write_table(tmp_path / "list.csv", kept)
    (tmp_path / "licences.csv").write_text("name,licence\na,b\n")  # no table of pictures
    assert everything(tmp_path) == [s._replace(captions=s.captions[:1]) for s in raw(kept)]
    edits = foreign.write_table(tmp_path / "edits" / "metadata.csv", foreign.triplets())
    assert [s.source is None for s in everything(edits)] == [False] * 3


def test_parts_are_read_alone_and_in_any_process(tmp_path):
    kept = foreign.pairs()
    for path in (
        foreign.write_folder(tmp_path / "folder", kept),
        foreign.write_table(tmp_path / "jsonl" / "metadata.jsonl", kept),
        foreign.write_table(tmp_path / "csv" / "metadata.csv", kept),
    ):
        parts = sources.parts(path, 2)
        assert [part.count for part in parts] == [2, 2, 1]
        apart = [list(sources.read(pickle.loads(pickle.dumps(p)))) for p in reversed(parts)]
        assert list(itertools.chain(*reversed(apart))) == everything(path)
    for name in ("b", "a", "c"):
        foreign.write_tar(tmp_path / "tars" / f"{name}.tar", kept[:1])
    parts = sources.parts([tmp_path / "tars", tmp_path / "folder"], 2)
    names = [part.path.rpartition("/")[2] for part in parts]
    assert names == ["a.tar", "b.tar", "c.tar", "folder", "folder", "folder"]
    assert [p.path for p in sources.parts(tmp_path / "tars" / "[ab].tar", 2)] == [
        part.path for part in parts[:2]
    ]


def test_the_state_of_a_part_follows_its_files(tmp_path):
    folder = foreign.write_folder(tmp_path, foreign.pairs())
    before = [part.state for part in sources.parts(folder, 2)]
    assert before == [part.state for part in sources.parts(folder, 2)]
    (folder / "coffee.txt").write_text("tea")
    after = [part.state for part in sources.parts(folder, 2)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_quoted_lines_of_a_csv_stay_together(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    rows = [f'a.jpg,"caption {i},\nsecond line"' for i in range(5)]
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,caption\n" + "\n\n".join(rows), "utf-8")
    found = everything(tmp_path, 2)
    assert [s.captions for s in found] == [[f"caption {i},\nsecond line"] for i in range(5)]


def errors(found):
    return {s.key: s.error for s in found}


def test_broken_samples_of_a_folder(tmp_path):
    files = {
        "good.v2.jpg": b"picture",  # dots are no extensions
        "good.v2.txt": b"\n a good one \n\n",
        "empty.jpg": b"picture",
        "empty.txt": b" \n",
        "none.jpg": b"picture",
        "latin.jpg": b"picture",
        "latin.txt": "schön".encode("latin-1"),
        "twice.jpg": b"picture",
        "twice.PNG": b"picture",
        "twice.txt": b"two",
        "json.jpg": b"picture",
        "json.json": b"{",
        "list.jpg": b"picture",
        "list.json": b"[]",
        "null.jpg": b"picture",
        "null.json": b'{"caption": null}',
        "pad.jpg": b"picture",
        "pad.txt": b"an image\nthe tokens <|image_pad|> of an image",
        "alone.txt": b"no picture",
        "phone.heic": b"picture",  # decoding will tell
        "phone.txt": b"from a phone",
        "notes.md": b"not of the data",
        ".hidden.jpg": b"picture",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = everything(tmp_path)
    expected = {
        "alone": "no picture: only txt",
        "empty": "no caption",
        "gone": "missing file: ",
        "good.v2": None,
        "json": "broken captions: not JSON",
        "latin": "caption is not UTF-8: ",
        "list": "broken captions: JSON",
        "none": "no caption",
        "null": "no caption",
        "pad": "broken captions: one contains <|image_pad|>, which is reserved",
        "phone": None,
        "twice": "several pictures: PNG, jpg, txt",
    }
    assert [s.key for s in found] == list(expected)
    for key, error in errors(found).items():
        assert (error or "").startswith(expected[key] or ""), (key, error)
        assert (error is None) == (expected[key] is None), key
    assert found[3].captions == ["a good one"]


def test_broken_triplets(tmp_path):
    foreign.write_folder(tmp_path, foreign.triplets())
    (tmp_path / "b.source.png").unlink()
    assert errors(everything(tmp_path)) == {
        "a/moon": None,
        "a/street": None,
        "b": "no source picture",
    }
    assert set(errors(everything(tmp_path, kind="pairs")).values()) == {
        None,
        "unexpected source picture",
    }


def test_broken_rows(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    lines = [
        b'{"file_name": "a.jpg", "caption": "good"}',
        b"",
        b'{"file_name": "b.jpg", "caption": "no file"}',
        b'{"file_name": "a.jpg", "caption": null}',
        b'{"file_name": "a.jpg", "caption": "\xff"}',
        b'{"file_name": "a.jpg", "caption": "\\ud800"}',
        b'{"caption": "no name"}',
        b'{"file_name": ',
        b'"text"',
        b'{"file_name": "a.jpg", "captions": ["other column"]}',
        b'{"file_name": "a.jpg", "caption": [" x ", "", null]}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    for size in (1, 3, 100):
        found = everything(tmp_path, size)
        assert [re.sub(":.*", "", s.error or "") for s in found] == [
            *("", "missing file", "no caption", "caption is not UTF-8", "caption is not UTF-8"),
            *("no picture", "broken row", "broken row", "no caption", ""),
        ]
        assert [s.key for s in found[4:8]] == ["a", "metadata/5", "metadata/6", "metadata/7"]
        assert found[-1].captions == ["x"]


def test_tars_that_are_cut_or_damaged(tmp_path):
    kept = foreign.pairs()
    whole = foreign.write_tar(tmp_path / "whole.tar", kept)
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        starts = [member.offset for member in tar]  # two members a sample
    cut = tmp_path / "cut.tar"
    cuts = {
        starts[4] + 5000: 2,  # within the third picture
        starts[5] + 100: 2,  # within the header of its captions
        starts[5]: 2,  # before it
        starts[6]: 3,  # between samples
        starts[0] + 100: 0,
        0: 0,
    }
    for end, complete in cuts.items():
        cut.write_bytes(data[:end])
        found = everything(cut)
        assert found[:-1] == raw(kept)[:complete], end
        assert found[-1].key == str(cut)
        assert found[-1].error.startswith("damaged source: tar broken"), end
    cut.write_bytes(data[: starts[6]] + b"\x07" * 512 + data[starts[6] + 512 :])
    assert everything(cut)[:-1] == raw(kept)[:3]
    assert "unreadable header" in everything(cut)[-1].error
    cut.write_bytes(b"<html>" * 1000)
    assert [s.key for s in everything(cut)] == [str(cut)]


def test_members_that_stand_apart(tmp_path):
    """Samples are runs; members strewn about are reported, not matched or dropped."""
    names = ("a.jpg", "b.jpg", "a.txt", "b.txt", "._c.jpg", "c.cls", "d.jpg", "d.txt", "d.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 7
            tar.addfile(member, io.BytesIO(b"content"))
    found = everything(tmp_path)
    assert [(s.key, s.error) for s in found] == [
        ("a", "no caption"),
        ("b", "no caption"),
        ("a", "no picture: only txt"),
        ("b", "no picture: only txt"),
        ("c", "no picture: only cls"),
        ("d", None),
        ("d", "no caption"),
    ]


def test_parquet_columns(tmp_path):
    """Usual names by what they hold; others when told."""
    table = {"TEXT": ["a"], "image": [b"after"], "source": ["a web page"], "target": [3]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (found,) = everything(tmp_path / "a.parquet")
    assert found == samples.RawSample("a/0", b"after", ["a"], None, None)
    table |= {"before": [b"before"], "edit": ["b"], "name": [17]}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    (found,) = everything(tmp_path / "b.parquet", names={"source": "before", "key": "name"})
    assert found == samples.RawSample("17", b"after", ["b"], b"before", None)
    instruct = {
        "original_prompt": ["x"],
        "original_image": [b"before"],
        "edit_prompt": ["b"],
        "edited_prompt": ["y"],
        "edited_image": [b"after"],
    }
    pq.write_table(pa.table(instruct), tmp_path / "c.parquet")
    (found,) = everything(tmp_path / "c.parquet")
    assert found == samples.RawSample("c/0", b"after", ["b"], b"before", None)


def test_broken_parquet(tmp_path):
    file = foreign.write_parquet(tmp_path / "a.parquet", foreign.pairs() * 20)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(file.read_bytes()[:-1000])
    found = everything(tmp_path)
    assert len(found) == 101 and found[-1].key == str(cut)
    assert found[-1].error.startswith("damaged source: Parquet file broken from row 0")
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\xff" * 2000
    cut.write_bytes(data)
    assert everything(cut)  # a picture's damage is for decoding, a page's ends the file
    buffers = pa.array([b"a", b"b", b"\xff", None], pa.binary()).buffers()
    texts = pa.Array.from_buffers(pa.string(), 4, buffers)  # unchecked, as careless writers do
    rows = pa.table({"image": [b"picture", None, b"picture", b"picture"], "caption": texts})
    pq.write_table(rows, cut)
    found = [re.sub(":.*", "", s.error or "") for s in everything(cut)]
    assert found == ["", "no picture", "caption is not UTF-8", "no caption"]


def test_what_cannot_be_told(tmp_path):
    def refused(paths, **options):
        with pytest.raises(SourceError) as raised:
            sources.parts(paths, 10, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no such file" in refused(tmp_path / "nowhere")
    assert "no such file" in refused(tmp_path / "*.tar")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert re.search(r"looked for \*\.tar, \*\.parquet", refused(empty))
    pictures = foreign.write_folder(tmp_path / "pictures", foreign.pairs())
    assert "columns" in refused(pictures, names={"image": "jpg"})
    foreign.write_tar(pictures / "a.tar", foreign.pairs())
    assert "loose pictures" in refused(pictures)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.jpg").write_bytes(b"picture")
    assert "no captions" in refused(bare)
    (bare / "list.csv").write_text("picture,txt\na.jpg,b\n")
    assert re.search("list.csv: no column of pictures.* it has picture, txt", refused(bare))
    (bare / "list.csv").unlink()
    (bare / "metadata.csv").write_text("name,caption\na.jpg,b\n")
    assert re.search("no column of pictures.* it has name, caption", refused(bare))
    assert "no column 'nam' (image)" in refused(bare, names={"image": "nam"})
    assert sources.parts(bare, 10, {"image": "name"})
    for name in ("a", "b"):
        (bare / f"{name}.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": "b"}))
    (bare / "metadata.csv").unlink()
    assert "several tables (a.jsonl, b.jsonl)" in refused(bare)
    (tmp_path / "urls.parquet").write_bytes(b"")
    assert "no readable Parquet" in refused(tmp_path / "urls.parquet")
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), tmp_path / "urls.parquet")
    assert "--columns=image=" in refused(tmp_path / "urls.parquet")
    pq.write_table(pa.table({"image": [b"a"], "label": [3]}), tmp_path / "urls.parquet")
    assert "no column of captions" in refused(tmp_path / "urls.parquet")
    edits = foreign.write_tar(tmp_path / "edits.tar", foreign.triplets())
    both = foreign.write_tar(tmp_path / "both.tar", foreign.pairs())
    assert "one by one" in refused([edits, both])


def test_img2dataset_folders(tmp_path):
    """Tars, or files, beside a Parquet file without pictures and statistics."""
    meta = pa.table({"url": ["a"], "caption": ["b"], "key": ["0"]})
    for folder in ("tars", "files"):
        (tmp_path / folder).mkdir()
        pq.write_table(meta, tmp_path / folder / "00000.parquet")
    foreign.write_tar(tmp_path / "tars" / "00000.tar", foreign.pairs())
    (tmp_path / "tars" / "00000_stats.json").write_text("{}")
    assert everything(tmp_path / "tars") == raw(foreign.pairs())
    foreign.write_folder(tmp_path / "files" / "00000", foreign.pairs())
    assert [s.captions for s in everything(tmp_path / "files")] == [
        s.captions for s in raw(foreign.pairs())
    ]


def test_names_that_are_not_utf8(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    try:
        (tmp_path / f"{name}.jpg").write_bytes(b"picture")
    except OSError:
        pytest.skip("this file system has none")
    (tmp_path / f"{name}.txt").write_text("coffee")
    (found,) = everything(tmp_path)
    assert found.error is None and found.key == "caf\\udce9"


def test_folders_that_cannot_be_listed_are_not_passed_over(tmp_path, monkeypatch):
    root = foreign.write_folder(tmp_path, foreign.pairs())
    scandir = os.scandir

    def forbidden(folder):
        if os.fspath(folder).endswith("animals"):
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(SourceError, match=r"animals: cannot be listed \(Permission denied\)"):
        sources.parts(root, 1000)
