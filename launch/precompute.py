"""Encodes a prepared set once: latents and text embeddings, used by training instead of encoding.

    python -m launch.precompute --data=SET --model=DIR --image_size=256 --max_ratio=2

Writes SET/precomputed-256/, shard by shard beside the records; run again after an interruption, it
goes on. --image_size and --max_ratio are those of the config that trains on it: training takes the
outputs where they are there, in the buckets that they were made for, and refuses those of other
encoders or settings. Crops are the middle, not random.

On a TPU pod, start it on every host; elsewhere several processes find each other by
--coordinator=HOST:PORT --processes=N --process=I. Each encodes shards of its own on all its
devices, so that a pod needs as many shards as hosts.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from dreamlite_jax import cli, precompute, system
from dreamlite_jax.data import precomputed, transforms
from dreamlite_jax.data.pipeline import MODES, differences
from dreamlite_jax.data.records import PreparedSet
from dreamlite_jax.data.shards import NAME, Shard, write_json, write_shard
from dreamlite_jax.data.streams import TASK_OF
from launch import processes

DATA = flags.DEFINE_string("data", None, "folder of a prepared set", required=True)
MODEL = flags.DEFINE_string("model", None, "model directory with the encoders", required=True)
SIZE = flags.DEFINE_integer("image_size", None, "side of square pictures, pixels", required=True)
MAX_RATIO = flags.DEFINE_float("max_ratio", 1.0, "aspect ratio of the widest bucket; 1: squares")
LEAST = flags.DEFINE_integer(
    "least",
    256,
    "records a bucket needs, beside one in a hundred; with fewer than a training batch, batches "
    "hold some twice",
    lower_bound=1,
)
BATCH = flags.DEFINE_integer("batch_size", 8, "records at a time and device", lower_bound=1)
FLOAT32 = flags.DEFINE_boolean("float32", False, "compute in float32; default: bfloat16 on TPU")
connect = processes.define()


def main() -> None:
    connect()
    dtype = jnp.bfloat16 if jax.default_backend() == "tpu" and not FLOAT32.value else jnp.float32
    config = system.read_config(MODEL.value, dtype)
    buckets = transforms.aspect_buckets(SIZE.value, config.pixel_multiple, MAX_RATIO.value)
    prepared = PreparedSet(DATA.value)
    sizes = precompute.sizes_of(prepared, buckets, LEAST.value)
    made_with = precompute.made_with(
        MODEL.value, config, image_size=SIZE.value, max_ratio=MAX_RATIO.value
    )
    plan = {"prepared": prepared.fingerprint, "least": LEAST.value, **made_with}
    folder = precomputed.folder_of(DATA.value, SIZE.value)
    if (folder / precomputed.INDEX).is_file():
        task = TASK_OF[prepared.kind]
        precomputed.PrecomputedSource(folder, task, prepared.fingerprint, made_with)
        print(f"{folder}: already complete")
        return
    check_plan(folder, plan)

    shards = prepared.shards
    own = range(jax.process_index(), len(shards), jax.process_count())
    missing = [k for k in own if not note_of(folder, k).is_file()]
    if len(missing) < len(own):
        print(f"{folder}: {len(own) - len(missing)} of {len(own)} shards are there, going on")
    using = precompute.encoders(system.load(MODEL.value, dtype, dtype))
    ends = np.cumsum([shard.count for shard in shards])
    batch_size = BATCH.value * jax.local_device_count()
    total = sum(shards[k].count for k in missing)
    with interruptible(folder, own), tqdm(total=total, unit="record", disable=None) as bar:
        for k in missing:
            records = range(int(ends[k]) - shards[k].count, int(ends[k]))
            outputs = precompute.encoded(using, prepared, sizes, records, batch_size)
            shard = write_shard(
                folder / NAME.format(k), _counted(map(precomputed.pack, outputs), bar)
            )
            write_json(note_of(folder, k), shard._asdict())
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("precomputed shards")
    if jax.process_index() == 0:
        done = [Shard(**json.loads(note_of(folder, k).read_text())) for k in range(len(shards))]
        drop = getattr(config.drop, MODES[TASK_OF[prepared.kind]])
        precomputed.write_index(folder, done, sizes, prepared.fingerprint, made_with, drop)
        size = sum(shard.bytes for shard in done) / 2**20
        print(f"{folder}: {len(sizes)} records, {size:.1f} MiB")


def _counted(items: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    for item in items:
        yield item
        bar.update()


def check_plan(folder: Path, plan: dict) -> None:
    """Keeps what an unfinished folder is made with, and refuses to go on with anything else."""
    file = folder / "plan.json"
    if not file.is_file():
        if jax.process_index() == 0:  # the others find the same, or have nothing to compare with
            write_json(file, plan)
        return
    try:
        changed = differences(json.loads(file.read_bytes()), plan)
    except (ValueError, TypeError) as error:
        raise cli.CommandError(f"{file}: not readable ({error}); remove {folder}") from error
    if changed:
        raise cli.CommandError(
            f"{folder} was begun otherwise: {'; '.join(changed)}; remove it or use the same again"
        )


@contextlib.contextmanager
def interruptible(folder: Path, own: Sequence[int]) -> Iterator[None]:
    """Says what was done before somebody interrupted it."""
    try:
        yield
    except KeyboardInterrupt:
        done = sum(note_of(folder, k).is_file() for k in own)
        print(
            f"{done} of {len(own)} shards are finished; the same command goes on from there",
            file=sys.stderr,
        )
        raise


def note_of(folder: Path, shard: int) -> Path:
    """The file that says that a shard is finished."""
    return folder / f"{NAME.format(shard)}.json"


if __name__ == "__main__":
    cli.run(main)
