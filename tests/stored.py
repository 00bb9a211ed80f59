"""A prepared set with precomputed outputs, without encoders: every value is zero."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax.data import precomputed, records, shards, transforms


def write_set(
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    image_size: int,
    made_with: Mapping[str, Any],
) -> Path:
    """Pairs of these sizes, (width, height) in pixels, and their outputs at the same sizes.

    Args:
      image_size: whose outputs they are.
      made_with: as `precompute.made_with` gives it, of the encoders that are to fit.
    """
    folder.mkdir(parents=True)
    pairs = [
        records.Record(key=str(k), captions=["a"], image=b"", width=width, height=height)
        for k, (width, height) in enumerate(sizes)
    ]
    shard = records.write_shard(folder / shards.NAME.format(0), pairs)
    index = records.write_index(folder, records.PAIRS, [shard], sizes, {})
    outputs = precomputed.folder_of(folder, image_size)
    outputs.mkdir()
    made = shards.write_shard(
        outputs / shards.NAME.format(0),
        [precomputed.pack(_zeros(width, height)) for width, height in sizes],
    )
    table = np.array(sizes, np.int32)
    given = [made], table, index["fingerprint"], made_with
    precomputed.write_index(outputs, *given, drop=34)
    return folder


def _zeros(width: int, height: int) -> precomputed.Latents:
    h, w = height // 8, width // 8
    text = np.zeros((2, 4), np.float16)
    return precomputed.Latents(
        target=np.zeros((h, w, 4), np.float16),
        source=None,
        changed=np.ones((h, w), bool),
        contexts=[text],
        null=text,
        original_size=(width, height),
        crop=transforms.Crop(0.0, 0.0, 1.0, 1.0),
    )
