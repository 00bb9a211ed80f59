"""The same photographs as people keep them: folders, tables, tars and Parquet files."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import skimage

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"


class Kept(NamedTuple):
    """A picture with its captions and, of an edit, the picture before; `name` without extension."""

    name: str
    image: bytes
    captions: list[str]
    source: bytes | None = None
    extension: str = "png"


def pairs() -> list[Kept]:
    captions = {
        "animals/chelsea.png": ["a cat", "eine getigerte Katze, sehr nah: 猫"],
        "animals/horse.png": ["the outline of a horse"],
        "camera.png": ["a man behind a camera"],
        "coffee.png": ["a cup of coffee", 'a spoon, a saucer and a "cup"'],
        "rocket.jpg": ["a rocket at night"],
    }
    return [
        Kept(name[:-4], photograph(name.rpartition("/")[2]), texts, extension=name[-3:])
        for name, texts in captions.items()
    ]


def triplets() -> list[Kept]:
    """The pictures of each have one shape."""
    street = photograph("motorcycle_right.png"), ["go left"], photograph("motorcycle_left.png")
    return [
        Kept("a/moon", photograph("moon.png"), ["make it night"], photograph("ihc.png")),
        Kept("a/street", *street),
        Kept("b", photograph("coffee.png"), ["pour coffee", "add foam"], photograph("chelsea.png")),
    ]


def photograph(name: str) -> bytes:
    return (PHOTOGRAPHS / name).read_bytes()


def members(kept: Kept, texts: str = "txt") -> dict[str, bytes]:
    """Contents by extension."""
    found = {kept.extension: kept.image}
    if kept.source is not None:
        found["source.png"] = kept.source
    lines = "".join(f"{caption}\n" for caption in kept.captions)
    fields = json.dumps({"captions": kept.captions, "width": 3})
    return found | {texts: (lines if texts == "txt" else fields).encode()}


def write_folder(root: Path, kept: list[Kept], texts: str = "txt") -> Path:
    for one in kept:
        for extension, data in members(one, texts).items():
            file = root / f"{one.name}.{extension}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return root


def write_tar(file: Path, kept: list[Kept], texts: str = "txt") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for one in kept:
            for extension, data in members(one, texts).items():
                member = tarfile.TarInfo(f"./{one.name}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file


def write_parquet(file: Path, kept: list[Kept], style: str = "img2dataset") -> Path:
    """As img2dataset writes (bytes), or Hugging Face (structs), or with names of files."""
    file.parent.mkdir(parents=True, exist_ok=True)

    def cell(data: bytes, name: str):
        if style == "names":
            (file.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (file.parent / name).write_bytes(data)
            return name
        return data if style == "img2dataset" else {"bytes": data, "path": name}

    image = {"img2dataset": "jpg", "hugging face": "image", "names": "file_name"}[style]
    columns = {
        "key": [one.name for one in kept],
        image: [cell(one.image, f"{one.name}.{one.extension}") for one in kept],
        "caption" if kept[0].source is None else "instruction": [one.captions for one in kept],
        "width": list(range(len(kept))),
    }
    if kept[0].source is not None:
        columns["edited_image"] = columns.pop(image)
        columns["image"] = [cell(one.source, f"{one.name}.source.png") for one in kept]
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file


def write_table(file: Path, kept: list[Kept]) -> Path:
    """`metadata.jsonl` or `.csv` beside pictures; a CSV has the first caption of each only."""
    for one in kept:
        write_folder(file.parent, [one])
        (file.parent / f"{one.name}.txt").unlink()
    rows = []
    for one in kept:
        row = {"file_name": f"{one.name}.{one.extension}", "text": one.captions}
        if one.source is not None:
            row = {"source": f"{one.name}.source.png", "instruction": row.pop("text")} | row
        rows.append(row)
    with file.open("w", encoding="utf-8", newline="") as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v[0] if isinstance(v, list) else v for k, v in row.items()})
    return file
