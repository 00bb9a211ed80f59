"""The encoders' outputs of a prepared set, made once: latents and text embeddings.

What training would compute in every epoch, by the same functions: `pipeline.view` crops (the
middle), `system.encode_pictures` and `system.encode_texts` encode. `data/precomputed.py` says how
they are stored and reads them.

Shapes: B samples, H and W pixels, h and w latent pixels, c latent channels.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamlite_jax import system
from dreamlite_jax.data import mixture, pipeline, prompts, streams
from dreamlite_jax.data.pictures import to_floats
from dreamlite_jax.data.pipeline import View
from dreamlite_jax.data.precomputed import Latents
from dreamlite_jax.data.prompts import NULL
from dreamlite_jax.data.records import PreparedSet
from dreamlite_jax.data.transforms import Size
from dreamlite_jax.errors import UserError
from dreamlite_jax.system import System

WINDOW = 8  # batches' worth of records that are read ahead and sorted by bucket together


class PrecomputeError(UserError):
    """Outputs that cannot be stored: one line."""


def made_with(model_dir: str | os.PathLike, config: system.Config, **settings: Any) -> dict:
    """All that decides what the outputs are, as JSON values: the encoders' files, how prompts are
    written, and further settings. Reads every byte of the encoders' weights."""
    folder = Path(model_dir)
    return {
        **{name: _digest(folder / name) for name in ("vae", "text_encoder", "tokenizer")},
        "prompts": pipeline.digest(prompts.rules(config.drop, config.image_side)),
        "pixel_multiple": config.pixel_multiple,
        **settings,
    }


def _digest(folder: Path) -> str:
    """sha256 of a folder's files, names and contents."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def sizes_of(prepared: PreparedSet, buckets: Sequence[Size], least: int) -> np.ndarray:
    """int32 [N, 2]: the (width, height) that each record is brought to, one of the buckets that
    have `least` records or more, and one in a hundred (`mixture.spread`). Training, whatever else
    it mixes in, keeps them (`mixture.plan`, `fixed`)."""
    places = mixture.spread([prepared.sizes], np.ones(1), buckets, least)[0]
    return np.array(buckets, np.int32)[places][:, ::-1]


class Encoders(NamedTuple):
    """A model's encoders, ready on all devices of this process."""

    model: System
    params: dict[str, Any]  # of the autoencoder and the text encoder, on every device
    rows: NamedSharding  # spreads a batch over the devices


def encoders(model: System) -> Encoders:
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = {name: model.params[name] for name in ("vae", "text_encoder")}
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return Encoders(model, jax.device_put(params, everywhere), rows)


def encoded(
    using: Encoders, prepared: PreparedSet, sizes: np.ndarray, records: range, batch_size: int
) -> Iterator[Latents]:
    """The outputs of some records, in their order; threads read and crop ahead.

    Args:
      sizes: of `sizes_of`.
      batch_size: records encoded at once, a multiple of the number of local devices.

    Raises:
      PrecomputeError: an output is too large for half precision.
    """
    source = streams.PreparedSource(prepared)
    mode = pipeline.MODES[source.task]

    def load(index: int) -> View:
        size = tuple(sizes[index][::-1].tolist())
        config = using.model.config
        return pipeline.view(
            source.read(index, size), size, config.vae.factor, see=config.image_side
        )

    step = WINDOW * batch_size
    with ThreadPoolExecutor() as pool:
        starts = records[::step]
        jobs = (
            [pool.submit(load, i) for i in range(k, min(k + step, records.stop))] for k in starts
        )
        ahead = next(jobs, [])
        while ahead:
            window, ahead = ahead, next(jobs, [])
            yield from _encoded(using, mode, [job.result() for job in window], batch_size)


def _encoded(using: Encoders, mode: str, views: list[View], size: int) -> Iterator[Latents]:
    """The outputs of a window of samples."""
    targets = _latents(using, [view.target for view in views], size)
    sources, nulls = [None] * len(views), [NULL]
    if mode == prompts.EDIT:
        sources = _latents(using, [view.source for view in views], size)
        nulls = [NULL] * len(views)
    texts = [*nulls, *(prompts.tagged(mode, c) for view in views for c in view.captions)]
    images = [view.seen for view in views]
    images += [view.seen for view in views for _ in view.captions]
    contexts = _contexts(using, mode, texts, images if mode == prompts.EDIT else None, size)
    empty, captions = contexts[: len(nulls)], iter(contexts[len(nulls) :])
    for k, (view, target, source) in enumerate(zip(views, targets, sources, strict=True)):
        own, null = [next(captions) for _ in view.captions], empty[k % len(empty)]
        yield Latents(target, source, view.changed, own, null, view.original_size, view.crop)


def _latents(using: Encoders, pictures: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """float16 [h, w, c] of uint8 [H, W, 3] pictures of a few sizes."""
    out: list[Any] = [None] * len(pictures)
    for shape in {picture.shape for picture in pictures}:
        alike = [k for k, picture in enumerate(pictures) if picture.shape == shape]
        for batch in system.batches(len(alike), size):
            values = to_floats(np.stack([pictures[alike[b]] for b in batch]))
            values = jax.device_put(values, using.rows)
            made = system.encode_pictures(using.model.config, using.params["vae"], values)
            for b, latent in zip(batch, np.asarray(made), strict=True):
                out[alike[b]] = _half(latent)
    return out


def _contexts(
    using: Encoders,
    mode: str,
    texts: Sequence[str],
    images: Sequence[Any] | None,
    size: int,
) -> list[np.ndarray]:
    """float16 [n, F] behind the template's prefix, of texts as `prompts.prompt_inputs` takes
    them."""
    drop, out = getattr(using.model.config.drop, mode), []
    for batch in system.batches(len(texts), size):
        inputs = prompts.prompt_inputs(
            using.model.prompter,
            mode,
            [texts[b] for b in batch],
            None if images is None else [images[b] for b in batch],
            truncate=True,
        )
        inputs = jax.device_put(inputs, using.rows)
        params = using.params["text_encoder"]
        context, mask = system.encode_texts(using.model.config, params, inputs, drop)
        rows = zip(np.asarray(context), np.asarray(mask), strict=True)
        out += [_half(row[: valid.sum()]) for row, valid in rows]
    return out[: len(texts)]


def _half(values: np.ndarray) -> np.ndarray:
    half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise PrecomputeError(
            f"an encoder's output reaches {np.abs(values).max():.3g}, half precision only 65504; "
            "train without precomputed outputs"
        )
    return half
