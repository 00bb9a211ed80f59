"""Suite `data`: from JPEGs to batches, beside bare Pillow and torch's DataLoader doing the same.

The whole pipeline reads records, decodes, crops, resizes, scales to [-1, 1], tokenises and batches.
`pillow` decodes, crops and resizes and nothing else: the most that a core can do. `drafted` is the
same with JPEGs decoded at 1/2, 1/4 or 1/8 where that is enough, as the pipeline does. `torch` is a
DataLoader over the files with `drafted`'s calls, floats and collation, without texts.

Rows of one core count the processor time that a batch takes, little else on a machine that others
use, too. In other rows the clock counts: the pipeline and `pillow` make two batches at a time
by threads, `processes` (the pipeline) and `torch` by two worker processes. All times are of a batch
but for those of a start. Photographs are those that scikit-image ships, as JPEGs of twice to eight
times the size.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from launch.benchmarks.compare import Contender, Counted, peak_mib

SMALL, LARGE = (1024, 768), (2048, 1536)  # sizes of JPEGs
CASES = ((256, 32, SMALL), (256, 32, LARGE), (1024, 8, LARGE))  # side, batch
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
COPIES = 16  # of each
EPOCH = 16  # times that the set names its shard: shuffling few numbers is slower than many
AT_ONCE = 2  # threads or processes
WARM, STEADY = 4, 10  # batches before and while steady times are taken: what was ahead is used up

Step = Callable[[], Any]


def cases() -> Iterator[tuple[str, list[Contender]]]:
    """Rows of the tables: a name and its contenders, ours first."""
    with tempfile.TemporaryDirectory() as folder:
        roots = {size: write_set(Path(folder) / str(size[0]), size) for size in (SMALL, LARGE)}
        named = [
            (f"{side} px of {w} x {h}, batch {batch}", (str(roots[w, h]), side, batch))
            for side, batch, (w, h) in CASES
        ]
        alone = {"ours": our_step, "pillow": pillow_step, "drafted": drafted_step}
        for name, given in named:
            yield f"{name}, one core", _contenders({**alone, "torch": torch_step}, *given)
        many = {"threads": our_threads, "processes": our_processes}
        many |= {"pillow": pillow_threads, "torch": torch_processes}
        for batches in (1, 4):
            name, given = named[0]
            yield f"{name}, start and {batches}", _contenders(many, *given, (0, batches))
        for name, given in named:
            yield f"{name}, steady", _contenders(many, *given, (WARM, STEADY))


def _contenders(makers: dict[str, Callable], *given: Any) -> list[Contender]:
    names = ("root", "side", "batch", "taken")
    arguments = dict(zip(names, given, strict=False))
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
    sizes = [size] * len(made) * EPOCH
    records.write_index(root / "set", records.PAIRS, [part] * EPOCH, sizes, {})
    return root


def timed(start: Callable[[], Iterator], before: int, number: int) -> Step:
    """A step that starts an iterator and times `number` batches after the first few, each, or, with
    none before, the start and all of them; it ends the iterator, whose workers would go on."""

    def step() -> Counted:
        begin = time.perf_counter()
        batches = start()
        for _ in range(before):
            next(batches)
        if before:
            begin = time.perf_counter()
        for _ in range(number):
            next(batches)
        seconds = time.perf_counter() - begin
        workers = [peak_mib(child.pid) for child in psutil.Process().children()]
        getattr(batches, "close", lambda: None)()
        return Counted(seconds / number if before else seconds, max(workers, default=0.0))

    return step


def spent(step: Step) -> Step:
    """The step, counted by the processor time that it takes this process."""

    def counted() -> Counted:
        begin = time.process_time()
        step()
        return Counted(time.process_time() - begin)

    return counted


def our_recipe(root: str, side: int, batch: int) -> Any:
    from dreamlite_jax import system, tiny
    from dreamlite_jax.data import pipeline, streams

    model_dir = tiny.tiny_model_dir(Path(root) / f"model-{os.getpid()}")
    prompter = system.load_prompter(model_dir, system.read_config(model_dir).text_encoder)
    found = streams.open_streams([{"source": f"{root}/set"}], side)
    return pipeline.Recipe(found, batch_size=batch, image_size=side, prompter=prompter)


def our_step(root: str, side: int, batch: int) -> Step:
    from dreamlite_jax.data import pipeline

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    recipe = our_recipe(root, side, batch)
    plan, steps = pipeline.check(recipe), itertools.count()
    return spent(lambda: pipeline.batch(recipe, plan, range(batch), next(steps)))


def our_threads(root: str, side: int, batch: int, taken: tuple[int, int]) -> Step:
    from dreamlite_jax.data import pipeline

    recipe = our_recipe(root, side, batch)
    return timed(lambda: pipeline.batches_from(recipe, threads=AT_ONCE), *taken)


def our_processes(root: str, side: int, batch: int, taken: tuple[int, int]) -> Step:
    from dreamlite_jax.data import pipeline

    recipe = our_recipe(root, side, batch)
    return timed(lambda: pipeline.batches_from(recipe, workers=AT_ONCE), *taken)


def files_of(root: str) -> list[Path]:
    return sorted(Path(root, "files").iterdir())


def cropped(file: Path, side: int, at: tuple[float, float], drafted: bool) -> Any:
    """What the pipeline does with a file's picture, in Pillow's own calls."""
    from PIL import Image

    from dreamlite_jax.data import transforms

    image = Image.open(file)
    crop = transforms.crop_to(*image.size, (side, side), at)
    if drafted:
        scale = transforms.enough(*image.size, (side, side)) / max(image.size)
        image.draft("RGB", tuple(round(edge * scale) for edge in image.size))
    return transforms.fitted(image, (side, side), crop)


def _pillow(root: str, side: int, batch: int, drafted: bool, threads: int = 1) -> Iterator[list]:
    rng, files = np.random.default_rng(0), files_of(root)

    def picture(place: np.ndarray) -> Any:
        k, *at = place
        return cropped(files[int(k * len(files))], side, tuple(at), drafted)

    if threads == 1:
        while True:
            yield [picture(place) for place in rng.random((batch, 3))]
    with ThreadPoolExecutor(threads) as pool:
        while True:
            yield list(pool.map(picture, rng.random((batch, 3))))


def pillow_step(root: str, side: int, batch: int) -> Step:
    return spent(_pillow(root, side, batch, drafted=False).__next__)


def drafted_step(root: str, side: int, batch: int) -> Step:
    return spent(_pillow(root, side, batch, drafted=True).__next__)


def pillow_threads(root: str, side: int, batch: int, taken: tuple[int, int]) -> Step:
    """Threads share a batch, as nothing is to be batched."""
    return timed(lambda: _pillow(root, side, batch, True, AT_ONCE), *taken)


class Files:
    """What torch calls a map-style dataset."""

    def __init__(self, root: str, side: int):
        self.files, self.side = files_of(root), side

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        file = self.files[rng.integers(len(self.files))]
        image = cropped(file, self.side, tuple(rng.random(2)), drafted=True)
        return np.asarray(image, np.float32) / 127.5 - 1


def torch_step(root: str, side: int, batch: int) -> Step:
    import torch

    torch.set_num_threads(1)
    return spent(iter(torch.utils.data.DataLoader(Files(root, side), batch)).__next__)


def torch_processes(root: str, side: int, batch: int, taken: tuple[int, int]) -> Step:
    import torch

    loader = torch.utils.data.DataLoader(Files(root, side), batch, num_workers=AT_ONCE)
    return timed(lambda: iter(loader), *taken)
