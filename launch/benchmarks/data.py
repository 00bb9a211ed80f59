"""Suite `data`: from JPEGs to batches, beside bare Pillow and torch's DataLoader doing the same.

The whole pipeline reads records, decodes, crops, resizes, scales to [-1, 1], tokenises and batches.
`pillow` decodes, crops and resizes and nothing else: the most that one core can do. `torch` is a
DataLoader over the files with the same Pillow calls, floats and collation, without texts. Times are
of a batch; photographs are those that scikit-image ships, as JPEGs of twice to four times the size.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks.compare import Contender

# side, batch, size of the JPEGs
SIZES = ((256, 32, (1024, 768)), (1024, 8, (2048, 1536)))
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
COPIES = 16  # of each
MANY = 40  # batches; long enough for starting workers to matter little


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the table: a name and its contenders, ours first."""
    with tempfile.TemporaryDirectory() as folder:
        for side, batch, size in SIZES:
            root = write_set(Path(folder) / str(side), size)
            at = {"root": str(root), "side": side, "batch": batch}
            name = f"{side} px, batch {batch}"
            yield f"{name}, one core", _contenders({**at, "workers": 0, "taken": 1})
            yield f"{name}, 2 workers, start and 1 batch", _contenders({**at, "taken": 1})
            yield f"{name}, 2 workers, start and {MANY} batches", _contenders({**at, "taken": MANY})


def _contenders(arguments: dict) -> list[Contender]:
    arguments = {"workers": 2, **arguments}
    makers = {"ours": our_step, "pillow": pillow_step, "torch": torch_step}
    return [Contender(name, make, arguments) for name, make in makers.items()]


def write_set(root: Path, size: tuple[int, int]) -> Path:
    """JPEGs with captions, and the prepared set of them."""
    import skimage
    from PIL import Image

    from dreamlite_jax.data import records, shards

    source = Path(skimage.__file__).parent / "data"
    (root / "files").mkdir(parents=True)
    made = []
    for k in range(COPIES * len(PHOTOGRAPHS)):
        image = Image.open(source / PHOTOGRAPHS[k % len(PHOTOGRAPHS)]).convert("RGB").resize(size)
        file = root / "files" / f"{k}.jpg"
        image.save(file, quality=92)
        record = {"key": str(k), "captions": [f"a photograph, number {k}, of something"]}
        made.append({**record, "image": file.read_bytes(), "width": size[0], "height": size[1]})
    (root / "set").mkdir()
    part = records.write_shard(root / "set" / shards.NAME.format(0), made)
    records.write_index(root / "set", records.PAIRS, [part], [size] * len(made), {})
    return root


def our_step(root: str, side: int, batch: int, workers: int, taken: int) -> Callable[[], Any]:
    from dreamlite_jax import system, tiny
    from dreamlite_jax.data import pipeline, streams

    model_dir = tiny.tiny_model_dir(Path(root) / f"model-{os.getpid()}")
    prompter = system.load_prompter(model_dir, system.read_config(model_dir).text_encoder)
    found = streams.open_streams([{"source": f"{root}/set"}], side)
    recipe = pipeline.Recipe(found, batch_size=batch, image_size=side, prompter=prompter)
    if workers:
        return lambda: _taken(pipeline.batches_from(recipe, workers=workers), taken)
    plan, steps = pipeline.check(recipe), itertools.count()
    return lambda: pipeline.batch(recipe, plan, range(batch), next(steps))


def _taken(batches: Iterator, number: int) -> None:
    for _ in range(number):
        next(batches)


def files_of(root: str) -> list[Path]:
    return sorted(Path(root, "files").iterdir())


def decoded(file: Path, side: int, at: tuple[float, float]) -> Any:
    """What the pipeline does with a file's picture, in Pillow's own calls."""
    from PIL import Image

    from dreamlite_jax.data import transforms

    image = Image.open(file)
    scale = transforms.enough(*image.size, (side, side)) / max(image.size)
    crop = transforms.crop_to(*image.size, (side, side), at)
    image.draft("RGB", tuple(round(edge * scale) for edge in image.size))
    return transforms.fitted(image, (side, side), crop)


def pillow_step(root: str, side: int, batch: int, workers: int, taken: int) -> Callable[[], Any]:
    """Threads are its workers: Pillow decodes and resizes without Python's lock."""
    rng, files = np.random.default_rng(0), files_of(root)
    pool = ThreadPoolExecutor(workers or 1)

    def step():
        places = rng.random((taken * batch, 3))
        jobs = [
            pool.submit(decoded, files[int(k * len(files))], side, (x, y)) for k, x, y in places
        ]
        for job in jobs:
            job.result()

    return step


class Files:
    """What torch calls a map-style dataset."""

    def __init__(self, root: str, side: int):
        self.files, self.side = files_of(root), side

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        image = decoded(self.files[rng.integers(len(self.files))], self.side, tuple(rng.random(2)))
        return np.asarray(image, np.float32) / 127.5 - 1


def torch_step(root: str, side: int, batch: int, workers: int, taken: int) -> Callable[[], Any]:
    import torch

    loader = torch.utils.data.DataLoader(Files(root, side), batch, num_workers=workers)
    if workers:
        return lambda: _taken(iter(loader), taken)
    batches = iter(loader)
    return lambda: next(batches)
