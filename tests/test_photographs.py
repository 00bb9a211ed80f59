"""Real photographs, from a folder through prepared sets and aspect buckets, and back."""

import shutil

import commands
import numpy as np
import pytest
from foreign import PHOTOGRAPHS
from PIL import Image

from dreamlite_jax.data import pictures, pipeline, records, streams

pytestmark = pytest.mark.e2e

NAMES = (
    "astronaut.png",  # square
    "chelsea.png",  # 3:2
    "coffee.png",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",  # reduced while decoded
    "text.png",  # wider than the widest bucket
    "cell.png",  # upright, grey
)
STEPS = 24  # three epochs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "files").mkdir()
    for name in NAMES:
        shutil.copy(PHOTOGRAPHS / name, folder / "files" / name)
        (folder / "files" / name).with_suffix(".txt").write_text(f"a picture of {name[:-4]}")
    given = f"--source={folder / 'files'}", f"--out={folder / 'set'}", "--workers=1"
    assert commands.run("prepare_data", *given) == 0
    return folder / "set"


@pytest.mark.parametrize("random_crop", [False, True])
def test_every_row_is_its_photograph(prepared, random_crop):
    """Compared with another resampling of the crop that the batch says it is. Between filters these
    pictures correlate by 0.998 and more, shifted by one pixel by 0.9966 and less."""
    found = streams.open_streams([{"source": str(prepared)}], 256)
    recipe = pipeline.Recipe(
        found, batch_size=1, image_size=256, max_ratio=2.0, random_crop=random_crop
    )
    keys = [records.PreparedSet(prepared)[k]["key"] for k in range(len(NAMES))]
    seen, sizes = set(), set()
    batches = pipeline.batches_from(recipe)
    for _ in range(STEPS):
        batch = next(batches)
        made = pictures.to_bytes(batch["target"])
        height, width = made.shape[1:3]
        sizes.add((height, width))
        for b, index in enumerate(batch["index"]):
            with Image.open(PHOTOGRAPHS / found_name(keys[index])) as original:
                assert tuple(batch["original_size"][b]) == original.size
                box = batch["crop"][b] * np.tile(original.size, 2)
                part = original.convert("RGB").resize(
                    (width, height), Image.Resampling.BICUBIC, box=tuple(box)
                )
            seen.add(keys[index])
            assert tuple(batch["time_ids"][b]) == (width, height)
            aspect = (box[2] - box[0]) / (box[3] - box[1])
            assert aspect == pytest.approx(width / height, rel=1e-3)
            assert correlation(made[b], np.asarray(part)) > 0.997, keys[index]
    assert len(seen) == len(NAMES)
    assert sizes == {
        (192, 320),
        (224, 288),
        (256, 256),
        (288, 224),
    }  # the buckets nearest to their shapes


def found_name(key: str) -> str:
    return next(name for name in NAMES if name.rpartition(".")[0] == key.rpartition("/")[2])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return np.corrcoef(a.astype(float).ravel(), b.astype(float).ravel())[0, 1]
