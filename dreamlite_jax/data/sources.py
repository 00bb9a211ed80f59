"""Foreign data as samples: image folders, tables beside pictures, WebDataset tars, Parquet files.

A source is split into parts: units of work that any process reads by itself, each of which becomes
a shard of the prepared set. The same data gives the same samples whatever it is kept in. Nothing is
lost on the way: what cannot be used comes as a sample that says why.
"""

import csv
import glob
import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_jax.data import columns, samples
from dreamlite_jax.data.columns import SourceError
from dreamlite_jax.data.records import PAIRS, TRIPLETS
from dreamlite_jax.data.samples import RawSample

_TABLES = (".csv", ".jsonl")
_ROWS = 64  # Parquet rows at a time, pictures included
_PEEK = 1000  # members of a tar that tell what it holds
_BLOCK = 512  # of a tar


class Part(NamedTuple):
    """What one process reads for one shard.

    Attributes:
      reader: "folder", "table", "tar" or "parquet".
      path: the file or folder that is read.
      kind: "pairs" or "triplets", which decides whether samples need a source picture.
      count: samples in it; None where only reading tells.
      state: a digest that changes with the files' names, sizes and times.
      arguments: what the reader needs beside the path.
    """

    reader: str
    path: str
    kind: str
    count: int | None
    state: str
    arguments: dict[str, Any]


def parts(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    shard_size: int,
    names: Mapping[str, str] | None = None,
    kind: str | None = None,
) -> list[Part]:
    """Splits sources into parts, in the order of `paths` and, within each, of names.

    Args:
      paths: folders, files or patterns (`data/*.tar`). A folder holds tars, Parquet files, a table
        (`metadata.jsonl`, `metadata.csv`, or any single *.jsonl or *.csv) that names pictures, or
        pictures with captions in `name.txt` (one a line) or `name.json`.
      shard_size: the most samples of a part of a folder or table; a tar or Parquet file is a part.
      names: which columns tables and Parquet files have for image, source, caption, key, where they
        are not the usual ones.
      kind: "pairs" or "triplets"; None: told from the data.

    Raises:
      SourceError: nothing there, not told what it is, columns missing, or both kinds at once.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    found = [part for path in _expanded(paths) for part in _parts_of(path, shard_size, names or {})]
    if names and not any(part.reader in ("table", "parquet") for part in found):
        raise SourceError("columns are named, but no source is a table or Parquet file")
    told = {part.kind: part.path for part in reversed(found)}
    if kind is None and len(told) > 1:
        raise SourceError(
            f"{told[PAIRS]} holds pairs, {told[TRIPLETS]} triplets (it has source pictures); "
            "prepare them one by one"
        )
    return found if kind is None else [part._replace(kind=kind) for part in found]


def read(part: Part) -> Iterator[RawSample]:
    """The samples of a part, broken ones too, in an order that never changes."""
    reader = {"folder": _read_folder, "table": _read_table, "tar": _read_tar}
    reader["parquet"] = _read_parquet
    try:
        yield from reader[part.reader](part, **part.arguments)
    except OSError as error:
        yield samples.broken(part.path, f"{samples.DAMAGED}: {error}")


def _expanded(paths: Iterable[str | os.PathLike]) -> Iterator[Path]:
    for path in paths:
        if Path(path).exists():
            yield Path(path)
        elif found := sorted(glob.glob(os.fspath(path), recursive=True)):
            yield from map(Path, found)
        else:
            raise SourceError(f"{path}: no such file or folder")


def _parts_of(path: Path, shard_size: int, names: Mapping[str, str]) -> list[Part]:
    """The parts of one file or folder; what it is, its names tell."""
    files = [path] if path.is_file() else _files(path)
    by_suffix: dict[str, list[Path]] = {}
    for file in files:
        by_suffix.setdefault(file.suffix.lower(), []).append(file)
    pictures = sum(len(by_suffix.get(f".{name}", ())) for name in samples.PICTURES)
    tars, parquets = by_suffix.get(".tar", []), by_suffix.get(".parquet", [])
    tables = [f for f in files if f.suffix.lower() in _TABLES and path in (f, f.parent)]
    if tars and pictures:
        raise SourceError(
            f"{path}: holds tars ({tars[0].name}, ...) and loose pictures; give their folders, or "
            f"{path}/*.tar"
        )
    if tars:
        return _tar_parts(tars)
    if parquets and (found := _parquet_parts(path, parquets, names, needed=not pictures)):
        return found
    captions = any(f".{name}" in by_suffix for name in samples.TEXTS)
    if table := _table(path, tables, names, needed=not (pictures and captions)):
        return _table_parts(*table, shard_size)
    if path.is_dir() and pictures:
        return _folder_parts(path, files, shard_size)
    raise SourceError(
        f"{path}: no data found; looked for *.tar, *.parquet, a table (*.jsonl, *.csv) that names "
        "pictures, and pictures (*.jpg, *.png, *.webp, ...) with captions beside them"
    )


def _files(root: Path) -> list[Path]:
    """All files below a folder, sorted; links are followed, once each, hidden ones left out.

    Raises:
      SourceError: a folder cannot be listed; what it holds would be missing without a word.
    """
    found, seen = [], set()
    for folder, inner, names in os.walk(root, onerror=_unlisted, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if name[0] != ".")
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _unlisted(error: OSError) -> None:
    raise SourceError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _state(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            facts = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:  # a dangling link: reading will tell
            facts = "missing"
        digest.update(os.fsencode(f"{file.name}\0{facts}\n"))
    return digest.hexdigest()[:16]


# Folders of pictures with captions beside them.


def _folder_parts(root: Path, files: Sequence[Path], shard_size: int) -> list[Part]:
    members: dict[str, list[str]] = {}
    for file in files:
        key, extension = _folder_name(file.relative_to(root).as_posix())
        if samples.is_member(extension):
            members.setdefault(key, []).append(extension)
    if not any(
        name.lower() in samples.TEXTS for extensions in members.values() for name in extensions
    ):
        raise SourceError(
            f"{root}: holds pictures, but no captions; expected name.txt (one caption a line) or "
            'name.json ({"caption": ...}) beside name.jpg, or metadata.jsonl, or metadata.csv'
        )
    edits = any(samples.is_source(name) for names in members.values() for name in names)
    found = []
    for start in range(0, len(members), shard_size):
        listed = [(key, members[key]) for key in sorted(members)[start : start + shard_size]]
        state = _state(root / f"{key}.{name}" for key, names in listed for name in names)
        kind = TRIPLETS if edits else PAIRS
        arguments = {"listed": listed}
        found.append(Part("folder", os.fspath(root), kind, len(listed), state, arguments))
    return found


def _folder_name(name: str) -> tuple[str, str]:
    """Key and extension: in folders dots are common in names, so only the last parts count."""
    stem, _, extension = name.rpartition(".")
    inner, _, role = stem.rpartition(".")
    if samples.is_source(f"{role}.{extension}"):
        return inner, f"{role}.{extension}"
    return stem, extension


def _read_folder(part: Part, listed: list[tuple[str, list[str]]]) -> Iterator[RawSample]:
    for key, extensions in listed:
        try:
            members = {name: Path(part.path, f"{key}.{name}").read_bytes() for name in extensions}
        except OSError as error:
            yield samples.broken(key, f"{samples.MISSING_FILE}: {error}")
        else:
            yield samples.from_members(key, members, part.kind)


# WebDataset tars.


def _tar_parts(files: Sequence[Path]) -> list[Part]:
    kind = _tar_kind(files[0])
    return [Part("tar", os.fspath(file), kind, None, _state([file]), {}) for file in files]


def _tar_kind(file: Path) -> str:
    try:
        with tarfile.open(file, "r:") as tar:
            names = [_tar_name(member.name)[1] for member in itertools.islice(tar, _PEEK)]
    except (OSError, tarfile.TarError):
        return PAIRS
    return TRIPLETS if any(map(samples.is_source, names)) else PAIRS


def _tar_name(name: str) -> tuple[str, str]:
    """Key and extension: WebDataset's rule, the name up to its first dot and the rest."""
    path = PurePosixPath(name.lstrip("/"))
    stem, _, extension = path.name.partition(".")
    return (path.parent / stem).as_posix(), extension


def _hidden(name: str) -> bool:
    """Whether a member is none of the data's: macOS puts `._name.jpg` beside `name.jpg`."""
    return PurePosixPath(name).name.startswith(".")


def _read_tar(part: Part) -> Iterator[RawSample]:
    """Runs of members with the same key; damage ends the tar with a sample that tells of it."""
    key, members, damage = None, {}, None
    try:
        for name, extension, data in _tar_members(Path(part.path)):
            # A repeated extension is a sample of the same name, not a second picture.
            if name != key or extension in members:
                if members:
                    yield samples.from_members(key, members, part.kind)
                key, members = name, {}
            members[extension] = data
    except tarfile.TarError as error:
        damage = error
    last = samples.from_members(key, members, part.kind) if members else None
    # What is missing from the last sample of a damaged tar is the damage's doing.
    if last is not None and (damage is None or last.error is None):
        yield last
    if damage is not None:
        before = f"after the sample {key!r}" if key else "at its start"
        yield samples.broken(part.path, f"{samples.DAMAGED}: tar broken {before} ({damage})")


def _tar_members(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and content (only of known extensions) of a tar's files, in order."""
    with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # it would keep all it has seen
            key, extension = _tar_name(member.name)
            if member.isfile() and not _hidden(member.name):
                known = samples.is_member(extension)
                yield key, extension, tar.extractfile(member).read() if known else b""
        # `tarfile` takes damaged headers and the end of a cut file for the end of the tar.
        stream.seek(tar.offset)
        mark = stream.read(_BLOCK)
    if not mark or any(mark):
        raise tarfile.ReadError("unreadable header" if mark else "cut off, it has no end mark")


# Rows that name pictures: tables and Parquet files.


def _table(
    path: Path, tables: Sequence[Path], names: Mapping[str, str], needed: bool
) -> tuple[Path, list[str] | None, columns.Columns] | None:
    """The table of a folder, the header of a CSV, and its columns; None: it has no such table."""
    found, problem = [], None
    for file in [file for file in tables if file.stem == "metadata"] or tables:
        with file.open("rb") as stream:
            header = _header(stream) if file.suffix.lower() == ".csv" else None
            first = next((row for _, row in _rows(stream, header) if isinstance(row, dict)), {})
        try:
            found.append((file, header, columns.of_table(file, header or list(first), names)))
        except SourceError as error:
            # An unrelated table beside pictures is common; one called so is meant.
            if needed or names or file.stem == "metadata":
                problem = problem or error
    if len(found) > 1:
        listed = ", ".join(file.name for file, *_ in found)
        raise SourceError(f"{path}: several tables ({listed}); give one by its own path")
    if not found and problem is not None:
        raise problem
    return found[0] if found else None


def _table_parts(
    file: Path, header: list[str] | None, names: columns.Columns, shard_size: int
) -> list[Part]:
    with file.open("rb") as stream:
        if header is not None:
            _header(stream)
        starts = [start for start, _ in _rows(stream, header)]
    kind, state, found = PAIRS if names.source is None else TRIPLETS, _state([file]), []
    for first in range(0, len(starts), shard_size):
        count = min(shard_size, len(starts) - first)
        arguments = {
            "start": starts[first],
            "first": first,
            "header": header,
            "names": names,
        }
        found.append(Part("table", os.fspath(file), kind, count, state, arguments))
    return found


def _read_table(
    part: Part, start: int, first: int, header: list[str] | None, names: columns.Columns
) -> Iterator[RawSample]:
    file = Path(part.path)
    with file.open("rb") as stream:
        stream.seek(start)
        for i, (_, row) in enumerate(itertools.islice(_rows(stream, header), part.count)):
            key = f"{file.stem}/{first + i}"
            if isinstance(row, str):
                yield samples.broken(key, f"{samples.BROKEN_ROW}: {row}")
            else:
                yield samples.from_row(row, names, file.parent, key, part.kind)


def _header(stream: BinaryIO) -> list[str]:
    line = stream.readline().decode("utf-8-sig", "backslashreplace")
    return next(csv.reader([line]), [])


def _rows(stream: BinaryIO, header: list[str] | None) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows from where a stream stands: where each starts, and its fields or what is wrong with it.

    Args:
      stream: a table; bytes that are not UTF-8 become surrogates, which captions are checked for.
      header: of a CSV; None: lines of JSON.
    """
    lines = (line.decode("utf-8", "surrogateescape") for line in iter(stream.readline, b""))
    # `tell` is right because a row takes the lines that it needs and no more.
    reader = lines if header is None else csv.reader(lines)
    while True:
        start = stream.tell()
        try:
            row = next(reader, None)
            if row is None:
                return
            if not row or (header is None and not row.strip()):
                continue
            row = _object(row) if header is None else dict(zip(header, row, strict=False))
        except (csv.Error, ValueError, RecursionError) as error:
            row = str(error)
        yield start, row


def _object(line: str) -> dict[str, Any]:
    fields = json.loads(line.removeprefix("\ufeff"))
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object: {line.strip():.80}")
    return fields


def _parquet_parts(
    path: Path, files: Sequence[Path], names: Mapping[str, str], needed: bool
) -> list[Part]:
    """Parts of Parquet files; none where they have no pictures and none are `needed`."""
    kind, problem, counts = None, None, []
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                counts.append(table.metadata.num_rows)
                if kind is None:
                    found = columns.of_schema(file, table.schema_arrow, names)
                    kind = PAIRS if found.source is None else TRIPLETS
        except (OSError, pa.ArrowException) as error:
            counts.append(None)
            problem = problem or SourceError(f"{file}: no readable Parquet file ({error})")
        except SourceError:
            if needed or names:
                raise
            return []
    if kind is None:
        raise problem
    return [
        Part("parquet", os.fspath(file), kind, count, _state([file]), {"names": dict(names)})
        for file, count in zip(files, counts, strict=True)
    ]


def _read_parquet(part: Part, names: Mapping[str, str]) -> Iterator[RawSample]:
    file, done = Path(part.path), 0
    try:
        with pq.ParquetFile(file) as table:
            found = columns.of_schema(file, table.schema_arrow, names)
            wanted = [name for name in found if name is not None]
            for batch in table.iter_batches(_ROWS, columns=wanted):
                for i in range(len(batch)):
                    yield _cells_sample(batch, i, found, file, f"{file.stem}/{done}", part.kind)
                    done += 1
    except (OSError, pa.ArrowException, SourceError) as error:
        yield samples.broken(
            part.path, f"{samples.DAMAGED}: Parquet file broken from row {done} on ({error})"
        )


def _cells_sample(
    batch: pa.RecordBatch, i: int, names: columns.Columns, file: Path, key: str, kind: str
) -> RawSample:
    """A row cell by cell, as one text that is not UTF-8 would spoil the whole batch."""
    try:
        row = {name: batch.column(name)[i].as_py() for name in names if name is not None}
    except UnicodeDecodeError as error:
        return samples.broken(key, f"{samples.NOT_UTF8}: {error}")
    return samples.from_row(row, names, file.parent, key, kind)
