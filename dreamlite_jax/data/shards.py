"""ArrayRecord shards: byte strings in order, any of which is read at once by its number."""

import bisect
import collections
import contextlib
import hashlib
import itertools
import json
import operator
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dreamlite_jax.data.pictures import replaced_file
from dreamlite_jax.errors import UserError

NAME = "part-{:05d}.arrayrecord"

# One record a group, so that a record is read without its neighbours; what is stored is compressed
# already. The parallelism is fixed because the file holds these options.
_WRITER = "group_size:1,uncompressed,max_parallelism:1"
_READER = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 1 << 15
# Open shards of a set, well below the usual limit of 1024 files a process; opening takes 0.1 ms.
_MAX_OPEN = 256


class Shard(NamedTuple):
    """A shard as an index lists it: file name, records, size in bytes, SHA-256 in hex."""

    file: str
    count: int
    bytes: int
    sha256: str


class ShardError(UserError):
    """A shard that is missing or damaged: one line."""


def write_shard(file: str | os.PathLike, records: Iterable[bytes]) -> Shard:
    """Writes records as they come; the file appears whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    file, count = Path(file), 0
    with replaced_file(file) as scratch:  # for its name: the writer opens files itself
        with _as_os_error(file):
            writer = ArrayRecordWriter(scratch.name, _WRITER)
        try:
            for record in records:
                with _as_os_error(file):
                    writer.write(record)
                count += 1
        finally:
            with _as_os_error(file):
                writer.close()
    return Shard(file.name, count, file.stat().st_size, sha256(file))


@contextlib.contextmanager
def _as_os_error(file: Path) -> Iterator[None]:
    """ArrayRecord tells of full disks by RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{file}: cannot be written ({error})") from error


def sha256(file: Path) -> str:
    """Of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; names of files that are not UTF-8 keep their bytes as escaped surrogates."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def write_json(file: Path, value: Any) -> None:
    """The file appears whole or not at all."""
    with replaced_file(file) as stream:
        stream.write(to_json(value, indent=1))


class Shards:
    """Records of several shards in a row: `len(it)`, `it[i]`.

    Threads may share it. Pickling takes names along, no open files: workers open shards when they
    read them. `check` is not repeated there.
    """

    def __init__(self, folder: str | os.PathLike, shards: Sequence[Shard]):
        self._folder, self._shards = Path(folder), list(shards)
        self._ends = list(itertools.accumulate(shard.count for shard in shards))
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> bytes:
        """Record i, from 0 (negative numbers count from the end, as in lists).

        Raises:
          IndexError: there is no such record.
          ShardError: its shard is damaged.
        """
        i, n = operator.index(i), len(self)
        if not -n <= i < n:
            raise IndexError(f"record {i} of {n}")
        i %= n
        shard = bisect.bisect_right(self._ends, i)
        position = i - (self._ends[shard] - self._shards[shard].count)
        try:
            return self._reader(shard).read([position])[0]
        except (RuntimeError, ValueError) as error:
            file = self._folder / self._shards[shard].file
            raise ShardError(f"{file}: record {position} is damaged ({error})") from error

    def __getstate__(self) -> tuple[Path, list[Shard]]:
        return self._folder, self._shards

    def __setstate__(self, state: tuple[Path, list[Shard]]) -> None:
        self.__init__(*state)

    def problems(self) -> list[str]:
        """Shards that are missing or not of their recorded size, a line for each kind."""
        found = {e.name: e.stat().st_size for e in os.scandir(self._folder) if e.is_file()}
        missing = [shard.file for shard in self._shards if shard.file not in found]
        wrong = [
            f"{shard.file} ({found[shard.file]} bytes, expected {shard.bytes})"
            for shard in self._shards
            if found.get(shard.file, shard.bytes) != shard.bytes
        ]
        lines = [f"lacks {some(missing)}"] if missing else []
        return [*lines, f"incomplete: {some(wrong)}"] if wrong else lines

    def damaged(self) -> list[str]:
        """Files whose content is not what was written; reads every byte."""
        return [s.file for s in self._shards if sha256(self._folder / s.file) != s.sha256]

    def _reader(self, shard: int) -> ArrayRecordReader:
        """Opens shards when they are needed and forgets those that were not for the longest time.

        Forgotten readers are not closed here, as other threads may be reading from them; they close
        with their last reference.
        """
        with self._lock:
            if shard not in self._readers:
                file = os.fspath(self._folder / self._shards[shard].file)
                self._readers[shard] = ArrayRecordReader(
                    file, _READER, file_reader_buffer_size=_BUFFER
                )
                if len(self._readers) > _MAX_OPEN:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return self._readers[shard]


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
