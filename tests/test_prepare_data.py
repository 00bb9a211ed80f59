"""`launch.prepare_data` as people type it: the set, its report, interruptions and errors."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import foreign
import numpy as np
import psutil
import pytest
from PIL import Image

from dreamlite_jax.data import records
from dreamlite_jax.data.decoding import opened
from dreamlite_jax.data.records import PreparedSet

pytestmark = pytest.mark.e2e

COMMAND = "launch.prepare_data"


def prepare(source, out, *arguments, workers=1):
    given = (f"--source={source}", f"--out={out}", f"--workers={workers}", *arguments)
    return commands.run("prepare_data", *given)


def started(source, out, *arguments):
    """In a process of its own, as leader of a group, as a shell starts it."""
    given = (f"--source={source}", f"--out={out}", *arguments)
    return subprocess.Popen(
        [sys.executable, "-m", COMMAND, *map(str, given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_the_same_set_whatever_the_data_is_kept_in(kind, tmp_path, capsys):
    kept = getattr(foreign, kind)()
    ways = {
        "folder": foreign.write_folder(tmp_path / "folder", kept),
        "table": foreign.write_table(tmp_path / "table" / "metadata.jsonl", kept).parent,
        "tar": foreign.write_tar(tmp_path / "tars" / "0.tar", kept).parent,
        **{
            style: foreign.write_parquet(tmp_path / style / "0.parquet", kept, style)
            for style in ("img2dataset", "hugging face", "names")
        },
    }
    sets = {}
    for way, path in ways.items():
        assert prepare(path, tmp_path / "out" / way) == 0, way
        assert f"{len(kept)} {kind} kept of {len(kept)} samples" in capsys.readouterr().out
        sets[way] = PreparedSet(tmp_path / "out" / way)
    first = sets["folder"]
    assert first.kind == kind
    assert {s.fingerprint for s in sets.values()} == {first.fingerprint}
    records.verify(first.folder)
    for record, one in zip(first, kept, strict=True):
        assert record["key"] == one.name and record["captions"] == one.captions
        assert ("source" in record) == (kind == "triplets")
        assert opened(record["image"]).size == (record["width"], record["height"])
    by_key = {record["key"]: record for record in first}
    if kind == "pairs":
        assert by_key["coffee"]["image"] == foreign.photograph("coffee.png")
        assert by_key["camera"]["image"] != foreign.photograph("camera.png")  # grey
    else:
        assert by_key["a/street"]["source"] == foreign.photograph("motorcycle_left.png")


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def corrupted():
    """Files, and what must come of them: the picture, or the reason for which there is none."""
    image = Image.open(foreign.PHOTOGRAPHS / "coffee.png").convert("RGB").resize((120, 80))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = np.linspace(0, 65535, 80 * 120).astype(np.uint16).reshape(80, 120)
    fine = {"quality": 95, "subsampling": 0}
    jpeg = encoded(image, "JPEG", **fine)
    side = image.transpose(Image.Transpose.ROTATE_90)
    bomb = bytearray(foreign.photograph("chelsea.png"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    return {
        "animated.gif": (encoded(image, "GIF", save_all=True, append_images=[side]), "animated"),
        "bomb.png": (bytes(bomb), "unreadable"),  # of a wrong checksum too
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", **fine), image),
        "deep.png": (encoded(Image.fromarray(deep), "PNG"), np.round(deep / 257)),
        "empty.jpg": (b"", "unreadable"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "huge.png": (encoded(Image.new("RGB", (2001, 1000)), "PNG"), "too large"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", "unreadable"),
        "tiny.png": (encoded(image.resize((100, 63)), "PNG"), "too small"),
        "turned.jpg": (encoded(side, "JPEG", exif=turned, **fine), image),
        "veiled.png": (encoded(Image.new("RGBA", (70, 70), (0, 0, 0, 0)), "PNG"), 255),
        "wrong.png": (jpeg, image),
        "zeros.jpg": (bytes(1000), "unreadable"),
    }


def test_what_is_set_right_and_what_is_quarantined(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    files = corrupted()
    for name, (data, _) in files.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(name)
    (source / "mute.jpg").write_bytes(files["wrong.png"][0])
    assert prepare(source, out, "--max_pixels=2000000", "--shard_size=4", workers=2) == 0
    prepared = PreparedSet(out)
    pictures = {record["captions"][0]: np.asarray(opened(record["image"])) for record in prepared}
    reported = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in reported}
    assert reasons.pop("mute") == "no caption"
    for name, (_, expected) in files.items():
        if isinstance(expected, str):
            assert reasons.pop(name.partition(".")[0]) == expected, name
            continue
        shown, expected = pictures.pop(name).astype(int), np.asarray(expected, int)
        if name == "deep.png":
            np.testing.assert_array_equal(shown, np.repeat(expected[..., None], 3, -1))
        else:
            assert np.abs(shown - expected).mean() < 3, name
    assert not pictures and not reasons
    assert all(entry["from"] == str(source) and entry["detail"] for entry in reported[:3])
    text = capsys.readouterr().out
    assert f"{out}: 5 pairs kept of 14 samples" in text
    assert "1 exif-rotated" in text and "1 cmyk" in text
    assert "4 unreadable" in text and str(out / "report.jsonl") in text
    index = prepared.index
    assert index["quarantined"]["unreadable"] == 4 and index["changes"]["cmyk"] == 1
    assert index["settings"]["max_pixels"] == 2_000_000 and index["sources"] == [str(source)]
    assert sum(index["aspects"].values()) == index["count"] == 5


def test_an_edit_of_another_shape_than_its_source_is_set_aside(tmp_path, capsys):
    """Sides that were rounded apart are not."""
    sides = {"alike": (600, 400), "rounded": (150, 101), "wider": (625, 400), "turned": (400, 600)}
    target = encoded(Image.new("RGB", (600, 400)), "PNG")
    kept = [
        foreign.Kept(name, target, ["wait"], encoded(Image.new("RGB", size), "PNG"))
        for name, size in sides.items()
    ]
    foreign.write_folder(tmp_path / "source", kept)
    assert prepare(tmp_path / "source", tmp_path / "out") == 0
    assert [record["key"] for record in PreparedSet(tmp_path / "out")] == ["alike", "rounded"]
    found = [
        json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()
    ]
    assert {one["key"]: one["reason"] for one in found} == dict.fromkeys(
        ("turned", "wider"), "other shape"
    )
    assert "2 other shape; see" in capsys.readouterr().out


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Parts that take a while (large pictures that are encoded anew), and their set."""
    folder = tmp_path_factory.mktemp("many")
    image = Image.open(foreign.PHOTOGRAPHS / "coffee.png").resize((600, 400)).convert("RGBA")
    data = encoded(image, "PNG")
    kept = [foreign.Kept(f"{i:02d}", data, [f"caption {i}"]) for i in range(24)]
    foreign.write_folder(folder / "source", kept)
    assert prepare(folder / "source", folder / "whole", "--shard_size=1") == 0
    return folder


def until(condition, process, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def finished_parts(out):
    return len(list(out.glob("part-*.json")))


def workers_of(process):
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    ("how", "workers"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGKILL, 2)]
)
def test_a_stopped_run_goes_on(how, workers, many, tmp_path, capsys):
    out, size = tmp_path / "out", "--shard_size=1"
    process = started(many / "source", out, size, f"--workers={workers}")
    until(lambda: finished_parts(out) >= 3, process)
    children = workers_of(process)
    assert len(children) == (workers if workers > 1 else 0)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    _, err = process.communicate(timeout=180)
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() for child in children)
    done = finished_parts(out)
    assert 3 <= done < 24 and not (out / "index.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        lines = (
            f"{done} of 24 parts are finished; the same command goes on from there\ninterrupted\n"
        )
        assert err == lines
        assert not list(out.glob(".*"))
    with pytest.raises(records.PreparedSetError, match="unfinished"):
        PreparedSet(out)
    capsys.readouterr()
    assert prepare(many / "source", out, size, workers=3 - workers) == 0
    assert f"{done} of 24 parts were finished before and are kept\n" in capsys.readouterr().out
    assert contents(out) == contents(many / "whole")


def test_an_interruption_while_workers_start(many, tmp_path):
    process = started(many / "source", tmp_path / "out", "--shard_size=1", "--workers=2")
    until(lambda: len(workers_of(process)) == 2, process)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert re.fullmatch(r"\d of 24 parts are finished; .*\ninterrupted\n", err), err


def test_a_part_that_was_half_written_is_made_again(many, tmp_path, monkeypatch, capsys):
    source, out, size = many / "source", tmp_path / "out", "--shard_size=1"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[COMMAND], "finish", lambda *_: None)
        assert prepare(source, out, size) == 0
    os.truncate(out / "part-00000.arrayrecord", 1000)
    (out / "part-00001.json").write_text("{")
    (out / "part-00002.arrayrecord").unlink()
    (out / ".part-00003.arrayrecord-17.part").write_bytes(b"of a run that was killed")
    assert prepare(source, out, size) == 0
    assert "21 of 24 parts were finished before" in capsys.readouterr().out
    assert contents(out) == contents(many / "whole")


def test_a_worker_that_dies_is_one_line(many, tmp_path):
    process = started(many / "source", tmp_path / "out", "--shard_size=1", "--workers=2")
    until(lambda: finished_parts(tmp_path / "out") >= 1, process)
    workers_of(process)[0].kill()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 2
    assert err.startswith("error: a worker process ended abruptly") and err.count("\n") == 1


def test_a_finished_set_stays(many, tmp_path, capsys):
    source, out = many / "source", many / "whole"
    before = contents(out)
    capsys.readouterr()
    assert prepare(source, out, "--shard_size=1") == 0
    assert capsys.readouterr().out == f"{out}: already prepared, 24 pairs\n"
    for changed in ("--shard_size=3", "--min_side=65", "--kind=triplets", "--max_pixels=999"):
        assert prepare(source, out, "--shard_size=1", changed) == 2
        name, _, value = changed[2:].partition("=")
        line = capsys.readouterr().err
        assert re.search(f"was begun with {name} .*now {name} is {value}; ", line), line
    other = foreign.write_folder(tmp_path, foreign.pairs())
    assert prepare(other, out, "--shard_size=1") == 2
    assert "its sources have changed" in capsys.readouterr().err
    assert contents(out) == before


def test_changed_sources_are_refused(tmp_path, capsys):
    source = foreign.write_folder(tmp_path / "source", foreign.pairs())
    out = tmp_path / "out"
    assert prepare(source, out) == 0
    (source / "coffee.txt").write_text("tea")
    assert prepare(source, out) == 2
    err = capsys.readouterr().err
    assert f"its sources have changed since it was begun ({source})" in err and "--out" in err


def test_nothing_kept(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.jpg").write_text("<html>")
    (source / "a.txt").write_text("a page")
    for _ in range(2):
        assert prepare(source, out) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"nothing was kept: 1 samples were quarantined (1 unreadable); see {out}/rep" in err
    assert len((out / "report.jsonl").read_text().splitlines()) == 1
    assert not (out / "index.json").exists()


def test_an_empty_shard_among_others(tmp_path):
    files = [foreign.Kept(f"a{i}", b"<html>", ["a page"]) for i in range(2)]
    source = foreign.write_folder(tmp_path / "source", files + foreign.pairs())
    assert prepare(source, tmp_path / "out", "--shard_size=2") == 0
    prepared = PreparedSet(tmp_path / "out")
    assert [shard["count"] for shard in prepared.index["shards"]] == [0, 2, 2, 1]
    assert sorted(record["key"] for record in prepared) == [
        one.name for one in sorted(foreign.pairs())
    ]
    records.verify(tmp_path / "out")


def _wrong_use(folder):
    """Each wrong use: the flags that make it, and what its line must say."""
    source = foreign.write_folder(folder / "source", foreign.pairs())
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("years of work")
    (folder / "file").write_text("a file")
    (folder / "header.csv").write_text("file_name,caption\n")
    out, given = f"--out={folder / 'out'}", f"--source={source}"
    return {
        "no source": ([out], "--source"),
        "no out": ([given], "--out"),
        "unknown flag": ([given, out, "--worker=3"], "'worker'"),
        "no number": ([given, out, "--min_side=big"], "min_side"),
        "no workers": ([given, out, "--workers=0"], "workers"),
        "too many pixels": ([given, out, "--max_pixels=1000000000"], "max_pixels"),
        "unknown kind": ([given, out, "--kind=pair"], "pairs|triplets"),
        "no such source": ([f"--source={folder}/nowhere", out], "nowhere: no such file"),
        "empty source": ([f"--source={folder}/empty", out], "no data found; looked for"),
        "no rows": ([f"--source={folder}/header.csv", out], "holds no samples"),
        "no text": (["--source=", out], "holds no samples"),
        "column without role": ([given, out, "--columns=jpg"], "role=NAME .* image, source"),
        "columns of a folder": ([given, out, "--columns=image=jpg"], "no source is a table"),
        "other files": ([given, f"--out={folder / 'full'}"], "holds other files"),
        "out is a file": ([given, f"--out={folder / 'file'}"], "is not a folder"),
        "out within source": ([given, f"--out={source}/prepared"], "lies within --source"),
    }


def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, capsys):
    for name, (given, expected) in _wrong_use(tmp_path).items():
        capsys.readouterr()
        code = commands.run("prepare_data", *given)
        err = capsys.readouterr().err
        assert code == 2, name
        assert err.count("\n") == 1 and err.startswith("error: "), (name, err)
        assert re.search(expected, err), (name, err)
        assert not (tmp_path / "out").exists(), name


def test_every_reader_is_parallel_and_silent(tmp_path):
    """As a user runs it: workers without noise on stderr, which is no terminal."""
    foreign.write_folder(tmp_path / "folder", foreign.pairs())
    foreign.write_tar(tmp_path / "a.tar", foreign.pairs())
    foreign.write_parquet(tmp_path / "b.parquet", foreign.pairs())
    source = ",".join(str(tmp_path / name) for name in ("folder", "a.tar", "b.parquet"))
    process = started(source, tmp_path / "out", "--workers=2")
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[0] == f"{tmp_path / 'out'}: 15 pairs kept of 15 samples"
    shards = PreparedSet(tmp_path / "out").index["shards"]
    assert [shard["count"] for shard in shards] == [5, 5, 5]
    assert len({shard["sha256"] for shard in shards}) == 1


def test_workers_do_without_jax():
    """Every worker imports the command's module; JAX would cost each of them its memory."""
    code = (
        f"import sys, {COMMAND}; print(sorted({{'jax', 'torch', 'tensorflow'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout == "[]\n", done.stderr
