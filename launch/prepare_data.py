"""Prepares data for training: clean pictures with captions in shards that are read in any order.

    python -m launch.prepare_data --source=photos --out=prepared
    python -m launch.prepare_data --source='cc12m/*.tar',laion --out=prepared --workers=32
    python -m launch.prepare_data --source=edits.parquet --out=edits \\
      --columns=image=after,source=before

A source is a folder of pictures with captions beside them (name.txt, one a line, or name.json), a
table that names pictures (metadata.jsonl, metadata.csv), WebDataset tars or Parquet files. Edits
(triplets) have a source picture too: name.source.jpg beside name.jpg, or a column.

What cannot be trained on, such as an edit of another shape than its source, is set aside with its
reason, in --out/report.jsonl. The command may be stopped at any time; run again, it goes on where
it was. The same data gives the same shards, whatever the number of workers.
"""

import collections
import concurrent.futures
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from PIL import Image
from tqdm import tqdm

# Every worker imports this module: nothing here may bring JAX along.
from dreamlite_jax import cli
from dreamlite_jax.data import columns, decoding, records, shards, sources
from dreamlite_jax.data.pictures import replaced_file
from dreamlite_jax.errors import UserError

SOURCE = flags.DEFINE_list(
    "source", None, "folders, files or patterns, separated by commas", required=True
)
OUT = flags.DEFINE_string("out", None, "folder for the prepared set", required=True)
COLUMNS = flags.DEFINE_list(
    "columns", [], "columns of tables, where not the usual ones: image=NAME,source=,caption=,key="
)
KIND = flags.DEFINE_enum("kind", None, records.KINDS, "default: told from the data")
MIN_SIDE = flags.DEFINE_integer("min_side", 64, "pixels a shorter side must have", lower_bound=1)
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    1 << 26,
    "pixels a picture may have",
    lower_bound=1,
    upper_bound=2 * Image.MAX_IMAGE_PIXELS,  # Pillow opens no larger ones
)
SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 1000, "samples of a shard; a tar or Parquet file is one shard", lower_bound=1
)
WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count(), "processes; default: one a CPU", lower_bound=1
)

PLAN, REPORT = "plan.json", "report.jsonl"
OTHER_SHAPE = "other shape"  # a reason of `decoding.Quarantined`, beside those there
SAME_SHAPE = 1.03  # how far apart two aspect ratios may be: roundings of small sides, no more
_POLL = 0.2  # seconds between looks at the workers' counter


class PreparationError(UserError):
    """Wrong use, or nothing to be had from the data: one line."""


class Limits(NamedTuple):
    """What `decoding.normalised` is told, in pixels."""

    min_side: int
    max_pixels: int


class Job(NamedTuple):
    """One part and where its shard goes."""

    part: sources.Part
    shard: Path
    limits: Limits


class _StoppedError(Exception):
    """The command was interrupted; what a worker has begun is dropped."""


def main() -> None:
    out, limits = Path(OUT.value), Limits(MIN_SIDE.value, MAX_PIXELS.value)
    names = read_columns(COLUMNS.value)
    check_out(out, SOURCE.value)
    parts = sources.parts(filter(None, SOURCE.value), SHARD_SIZE.value, names, KIND.value)
    if not parts:
        raise PreparationError(f"--source={','.join(SOURCE.value)}: holds no samples")
    settings = {**limits._asdict(), "shard_size": SHARD_SIZE.value, "kind": parts[0].kind}
    plan = {
        "version": records.VERSION,
        "settings": settings | {"columns": names},
        "sources": SOURCE.value,
        "parts": [[part.path, part.state] for part in parts],
    }
    check_plan(out, plan)
    if (out / records.INDEX).exists():
        print(f"{out}: already prepared, {len(records.PreparedSet(out))} {parts[0].kind}")
        return
    jobs = [Job(part, out / shards.NAME.format(i), limits) for i, part in enumerate(parts)]
    todo = [job for job in jobs if read_result(job) is None]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} parts were finished before and are kept")
    try:
        run(todo, WORKERS.value)
    except KeyboardInterrupt:
        done = sum(read_result(job) is not None for job in jobs)
        print(
            f"{done} of {len(jobs)} parts are finished; the same command goes on from there",
            file=sys.stderr,
        )
        raise
    finish(out, plan, jobs)


# Before anything is done.


def read_columns(given: Sequence[str]) -> dict[str, str]:
    """--columns as a map of roles to names."""
    pairs = [text.partition("=") for text in given]
    for role, _, name in pairs:
        if role not in columns.ROLES or not name:
            raise PreparationError(
                f"--columns: {role!r} is not understood; expected a list of role=NAME with the "
                f"roles {', '.join(columns.ROLES)}"
            )
    return {role: name for role, _, name in pairs}


def check_out(out: Path, paths: Sequence[str]) -> None:
    """Refuses folders that cannot be written or that hold something else."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not folder.is_dir():
        raise PreparationError(f"--out={out}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise PreparationError(f"--out={out}: no permission to write into {folder}")
    if out.exists() and any(out.iterdir()) and not (out / PLAN).exists():
        raise PreparationError(
            f"--out={out}: holds other files and no {PLAN} of a preparation; give a new folder"
        )
    for path in map(Path, paths):
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise PreparationError(f"--out={out}: lies within --source={path}; give another folder")


def check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Stores what is to be done, or refuses what differs from what was begun in this folder."""
    file = out / PLAN
    if not file.exists():
        with replaced_file(file) as stream:
            stream.write(shards.to_json(plan))
        return
    try:
        begun = json.loads(file.read_bytes())
        version, settings, parts = (begun[key] for key in ("version", "settings", "parts"))
    except (ValueError, TypeError, KeyError) as error:
        raise PreparationError(f"{file}: not readable ({error!r}); give a new --out") from error
    if version != plan["version"]:
        raise PreparationError(
            f"{file}: version {version}, expected {plan['version']}; give a new --out"
        )
    for key, value in plan["settings"].items():
        if settings.get(key) != value:
            raise PreparationError(
                f"--out={out}: was begun with {key} {settings.get(key)}, now {key} is {value}; "
                "keep to it, or give a new --out"
            )
    before, now = ([state for _, state in listed] for listed in (parts, plan["parts"]))
    if before != now:
        changed = [i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b]
        where = plan["parts"][changed[0]][0] if changed else f"{len(before)} parts, now {len(now)}"
        raise PreparationError(
            f"--out={out}: its sources have changed since it was begun ({where}); give a new --out"
        )


# One part, in any process.


def record_of(sample: sources.RawSample, limits: Limits) -> tuple[records.Record, tuple[str, ...]]:
    """The record of a sample, and what was changed in its pictures.

    Raises:
      decoding.Quarantined: it must not be trained on.
    """
    if sample.error is not None:
        reason, _, detail = sample.error.partition(": ")
        raise decoding.Quarantined(reason, detail)
    image = decoding.normalised(sample.image, **limits._asdict())
    record = records.Record(
        key=sample.key,
        captions=sample.captions,
        image=image.data,
        width=image.width,
        height=image.height,
    )
    if sample.source is None:
        return record, image.changes
    try:
        source = decoding.normalised(sample.source, **limits._asdict())
    except decoding.Quarantined as error:
        raise decoding.Quarantined(error.reason, f"source picture: {error.detail}") from error
    if _apart(image, source) > SAME_SHAPE:
        raise decoding.Quarantined(
            OTHER_SHAPE,
            f"{image.width}x{image.height} pixels, source picture: {source.width}x{source.height}",
        )
    record["source"] = source.data
    return record, image.changes + source.changes


def _apart(one: decoding.Normalised, other: decoding.Normalised) -> float:
    """The quotient, 1 or more, of two pictures' aspect ratios. Training crops both by the same
    fractions and brings them to the same size, which would stretch a source of another ratio."""
    quotient = one.width * other.height / (one.height * other.width)
    return max(quotient, 1 / quotient)


def prepare_part(job: Job, tick: Callable[[], Any]) -> None:
    """Writes a part's shard and then what is to be told of it, whose presence says it is whole."""
    seen, sizes, quarantined = 0, [], []
    changes: collections.Counter[str] = collections.Counter()

    def kept() -> Iterator[records.Record]:
        nonlocal seen
        for sample in sources.read(job.part):
            seen += 1
            try:
                record, changed = record_of(sample, job.limits)
            except decoding.Quarantined as error:
                facts = {"key": sample.key, "reason": error.reason, "detail": error.detail}
                quarantined.append(facts | {"from": job.part.path})
            else:
                sizes.append((record["width"], record["height"]))
                changes.update(changed)
                yield record
            tick()

    shard = records.write_shard(job.shard, kept())
    assert seen == len(sizes) + len(quarantined) and shard.count == len(sizes)
    result = {"shard": shard._asdict(), "sizes": sizes, "changes": changes}
    with replaced_file(_result_file(job)) as stream:
        stream.write(shards.to_json(result | {"quarantined": quarantined}))


def read_result(job: Job) -> dict[str, Any] | None:
    """What `prepare_part` wrote; None where the part is not finished."""
    try:
        result = json.loads(_result_file(job).read_bytes())
        whole = job.shard.stat().st_size == result["shard"]["bytes"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return result if whole else None


def _result_file(job: Job) -> Path:
    return job.shard.with_suffix(".json")


# All parts.


def run(jobs: Sequence[Job], workers: int) -> None:
    """Prepares parts behind a bar that counts samples, where stderr is a terminal."""
    counts = [job.part.count for job in jobs]
    total = None if None in counts else sum(counts)
    workers = min(workers, len(jobs))
    with tqdm(total=total, unit="sample", desc="preparing", disable=None) as bar:
        if workers > 1:
            _run_in_processes(jobs, workers, bar)
            return
        _quieten_pillow()
        for job in jobs:
            prepare_part(job, bar.update)


def _run_in_processes(jobs: Sequence[Job], workers: int, bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_begin_worker, initargs=(counter, stop)
    )
    try:
        with _ignored_interrupts():  # workers inherit it; they start here
            pending = {pool.submit(_prepare_in_worker, job) for job in jobs}
        while pending:
            done, pending = concurrent.futures.wait(
                pending, _POLL, concurrent.futures.FIRST_COMPLETED
            )
            bar.update(counter.value - bar.n)
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        raise PreparationError(
            "a worker process ended abruptly (out of memory?); finished parts are kept: run again, "
            "with fewer --workers"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """A terminal interrupts all processes; what becomes of the workers, the command decides."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_in_worker: tuple[Any, Any] | None = None  # the counter of samples and the event that stops


def _begin_worker(counter: Any, stop: Any) -> None:
    global _in_worker
    _in_worker = counter, stop
    _quieten_pillow()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers whose command was killed would wait for more work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare_in_worker(job: Job) -> None:
    counter, stop = _in_worker

    def tick() -> None:
        if stop.is_set():
            raise _StoppedError
        with counter.get_lock():
            counter.value += 1

    prepare_part(job, tick)


def _quieten_pillow() -> None:
    """It logs what is wrong with files; here that is in the report."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


# When all parts are there.


def finish(out: Path, plan: dict[str, Any], jobs: Sequence[Job]) -> None:
    """Makes the parts a prepared set, and says what became of the samples."""
    results = [read_result(job) for job in jobs]
    sizes = [size for result in results for size in result["sizes"]]
    quarantined = [facts for result in results for facts in result["quarantined"]]
    with replaced_file(out / REPORT) as stream:
        stream.writelines(shards.to_json(facts) + b"\n" for facts in quarantined)
    reasons = collections.Counter(facts["reason"] for facts in quarantined)
    changes: collections.Counter[str] = collections.Counter()
    for result in results:
        changes.update(result["changes"])
    if not sizes and not quarantined:
        raise PreparationError("the sources hold no samples")
    if not sizes:
        raise PreparationError(
            f"nothing was kept: {len(quarantined)} samples were quarantined "
            f"({_listed(reasons)}); see {out / REPORT}"
        )
    kind = plan["settings"]["kind"]
    facts = {key: plan[key] for key in ("sources", "settings")}
    facts |= {
        "quarantined": dict(sorted(reasons.items())),
        "changes": dict(sorted(changes.items())),
    }
    parts = [shards.Shard(**result["shard"]) for result in results]
    records.write_index(out, kind, parts, sizes, facts)
    for job in jobs:
        _result_file(job).unlink(missing_ok=True)
    for scratch in out.glob(".*.part"):  # of runs that were killed
        scratch.unlink(missing_ok=True)
    print(f"{out}: {len(sizes)} {kind} kept of {len(sizes) + len(quarantined)} samples")
    if changes:
        print(f"  changed: {_listed(changes)}")
    if quarantined:
        print(f"  quarantined: {_listed(reasons)}; see {out / REPORT}")


def _listed(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())


if __name__ == "__main__":
    cli.run(main)
