"""What an app does with a bundle: a prompt (and a picture) to a picture, with LiteRT alone.

NumPy, a tokenizer and LiteRT; no JAX. It is the reference for an app's code: read it from top to
bottom. Graphs are opened one after another and closed again, so that only one is ever in memory.

Shapes: h and w of the latent, L context tokens, F text feature width.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from convert import manifest
from convert.litert import CompiledModel
from dreamlite_jax.data.pictures import read_picture, resized, to_bytes, to_floats
from dreamlite_jax.errors import UserError


class PhoneError(UserError):
    """Something that this bundle cannot do: one line."""


class Bundle(NamedTuple):
    """A checked bundle, and where its graphs run. With a dict as `kept` graphs stay open in it, for
    many pictures."""

    folder: Path
    manifest: dict[str, Any]
    accelerator: str = "cpu"
    precision: str = "fp16"
    kept: dict[tuple, CompiledModel] | None = None

    @property
    def guided(self) -> bool:
        """Whether every step also needs the empty prompt's velocity."""
        return self.manifest["schedule"]["guidance"] != 1

    def run(self, component: str, part: int = 0, **inputs: np.ndarray) -> np.ndarray:
        """One call of a graph that is opened for it."""
        with self.opened(component, part) as model:
            (output,) = model(**inputs).values()
        return output

    @contextlib.contextmanager
    def opened(
        self, component: str, part: int = 0, length: int | None = None
    ) -> Iterator[CompiledModel]:
        """A graph for a while; of several signatures the one for `length` context tokens."""
        if self.kept is None:
            with contextlib.closing(self._open(component, part, length)) as model:
                yield model
        else:
            key = (component, part, length)
            if key not in self.kept:
                self.kept[key] = self._open(*key)
            yield self.kept[key]

    def _open(self, component: str, part: int, length: int | None) -> CompiledModel:
        entry = self.manifest["components"][component][part]
        name = signature_for(entry["signatures"], length)
        return CompiledModel(self.folder / entry["file"], name, self.accelerator, self.precision)


def signature_for(signatures: Mapping[str, Any], length: int | None = None) -> str:
    """The name of the signature for `length` context tokens; None: of the first."""
    return next(
        name
        for name, signature in signatures.items()
        # By name: sinusoids have as many axes, and may have as many channels as a text tokens.
        if length is None or _shapes(signature)["encoder_attention_mask"] == [1, length]
    )


def _shapes(signature: Mapping[str, Any]) -> dict[str, list[int]]:
    return {tensor["name"]: tensor["shape"] for tensor in signature["inputs"]}


class Context(NamedTuple):
    """An encoded text: context float32 [1, L, F], zero at padding, and mask float32 [1, L]."""

    context: np.ndarray
    mask: np.ndarray


# --- The pipeline ---------------------------------------------------------------------------------


def sinusoids(
    values: np.ndarray, width: int, cos_first: bool = True, shift: float = 0.0
) -> np.ndarray:
    """values [N] -> float32 [1, N width]: each as sines and cosines at `width / 2` frequencies."""
    half = width // 2
    steps = np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies = np.exp(-np.log(np.float32(10000)) * steps)
    angles = np.asarray(values, np.float32)[:, None] * frequencies
    parts = (np.cos(angles), np.sin(angles))
    return np.concatenate(parts if cos_first else parts[::-1], axis=1).reshape(1, -1)


def encode_prompt(bundle: Bundle, prompt: str) -> Context:
    """The prompt in its template through the text tower, in generate mode."""
    from tokenizers import Tokenizer

    text = bundle.manifest["text"]
    if "text_encoder" not in bundle.manifest["components"]:
        raise PhoneError("the bundle has no text encoder; give --embeddings")
    template = text["templates"]["generate"]
    tokenizer = Tokenizer.from_file(str(bundle.folder / "tokenizer" / "tokenizer.json"))
    filled = template["prefix"] + template["tag"] + prompt + template["suffix"]
    ids = tokenizer.encode(filled, add_special_tokens=False).ids
    room, drop = text["prompt_length"], template["drop"]
    if len(ids) > drop + room:
        raise PhoneError(f"the prompt takes {len(ids) - drop} tokens, the limit is {room}")
    table = np.load(bundle.folder / text["embeddings"], mmap_mode="r")
    hidden = table[ids + [0] * (drop + room - len(ids))][None].astype(np.float32)
    for part in range(len(bundle.manifest["components"]["text_encoder"])):
        hidden = bundle.run("text_encoder", part, inputs_embeds=hidden)
    return padded(bundle, hidden[:, : len(ids) - drop])


def padded(bundle: Bundle, context: np.ndarray, least: int = 0) -> Context:
    """context [1, n, F] with zeros up to the shortest length, of `least` or more, that the U-Net
    takes.

    Raises:
      PhoneError: it takes none that long.
    """
    lengths, n = bundle.manifest["text"]["lengths"], context.shape[1]
    if (most := max(n, least)) > max(lengths):
        raise PhoneError(
            f"{most} context tokens, but the bundle's U-Net takes at most {max(lengths)}; shorten "
            "the text, or make the bundle with larger --text_lengths"
        )
    length = min(length for length in lengths if length >= most)
    mask = (np.arange(length) < n).astype(np.float32)[None]
    return Context(np.pad(context, ((0, 0), (0, length - n), (0, 0))).astype(np.float32), mask)


def denoise(
    bundle: Bundle, noise: np.ndarray, texts: Context, null: Context | None, source: np.ndarray
) -> Iterator[np.ndarray]:
    """The latent [1, 4, h, w] after each step: Euler's, along the schedule's sigmas.

    noise and source are latents; source is zeros to generate. `null` is the empty prompt's context,
    for models that need guidance.
    """
    schedule, factor = bundle.manifest["schedule"], bundle.manifest["latent"]["factor"]
    time = bundle.manifest["sinusoids"]
    h, w = noise.shape[2:]
    kind = (time["cos_first"], time["shift"])
    sizes = np.array([w * factor, h * factor], np.float32)
    common = {"time_ids": sizes[None]}
    if time["size_width"]:
        common["time_ids_sinusoids"] = sinusoids(sizes, time["size_width"], *kind)
    xt = noise
    with bundle.opened("unet", length=texts.mask.shape[1]) as unet:
        for sigma, after in zip(schedule["sigmas"][:-1], schedule["sigmas"][1:], strict=True):
            timestep = np.array([1000 * sigma], np.float32)
            common["sample"] = np.concatenate([xt, source], axis=3)
            common["timestep"] = timestep
            common["timestep_sinusoids"] = sinusoids(timestep, time["time_width"], *kind)

            def velocity(texts):
                named = {
                    "encoder_hidden_states": texts.context,
                    "encoder_attention_mask": texts.mask,
                }
                inputs = {name: (common | named)[name] for name in unet.inputs}
                return unet(**inputs)["noise_pred"][..., :w]

            vt = velocity(texts)
            if null is not None:
                vt0 = velocity(null)
                vt = vt0 + np.float32(schedule["guidance"]) * (vt - vt0)
            xt = xt + np.float32(after - sigma) * vt
            yield xt


def encode_image(bundle: Bundle, image: Image.Image) -> np.ndarray:
    """The source's latent [1, 4, h, w]."""
    height, width = bundle.manifest["size"]["height"], bundle.manifest["size"]["width"]
    values = to_floats(resized(image, height, width)).transpose(2, 0, 1)[None]
    return bundle.run("vae_encoder", image=values)


def decode(bundle: Bundle, latent: np.ndarray) -> np.ndarray:
    """The picture uint8 [H, W, 3] of a latent."""
    return to_bytes(bundle.run("vae_decoder", latent=latent)[0].transpose(1, 2, 0))


def empty_prompt(bundle: Bundle) -> np.ndarray:
    """Its context [1, n, F] in generate mode, which bundles that may be guided have."""
    return read_arrays(bundle.folder / bundle.manifest["text"]["null"], ["context"])["context"]


def read_embeddings(bundle: Bundle, file: str | Path, edit: bool) -> tuple[Context, Context | None]:
    """A text that was encoded elsewhere, and the empty prompt where the bundle is guided, padded to
    one length.

    A .npz holds context [1, n, F] and mask [1, n], 1 at tokens; the empty prompt's are
    null_context and null_mask. To generate, the bundle's own stands in for those; to edit, it was
    encoded without the picture and cannot.

    Raises:
      PhoneError: no such .npz, arrays that are missing or of other shapes, too many tokens.
    """
    null = [("null_context", "null_mask")] if bundle.guided else []
    found = read_arrays(file, ("context", "mask"), *null)
    texts = _tokens(bundle, file, found)
    if not bundle.guided:
        return padded(bundle, texts), None
    if "null_context" in found:
        null = _tokens(bundle, file, found, "null_")
    elif edit:
        raise PhoneError(
            f"{file}: the bundle's guidance is {bundle.manifest['schedule']['guidance']:g}, so an "
            "edit takes null_context and null_mask, too: the empty prompt encoded with the picture"
        )
    else:
        null = empty_prompt(bundle)
    most = max(texts.shape[1], null.shape[1])
    return padded(bundle, texts, most), padded(bundle, null, most)


def _tokens(
    bundle: Bundle, file: str | Path, found: Mapping[str, np.ndarray], kind: str = ""
) -> np.ndarray:
    """The context [1, n, F] without its padding."""
    context, mask = found[f"{kind}context"], found[f"{kind}mask"]
    signatures = bundle.manifest["components"]["unet"][0]["signatures"]
    width = _shapes(signatures[signature_for(signatures)])["encoder_hidden_states"][2]
    length = context.shape[1] if context.ndim == 3 else "L"
    if context.shape != (1, length, width) or mask.shape != (1, length):
        raise PhoneError(
            f"{file}: {kind}context is {list(context.shape)} and {kind}mask {list(mask.shape)}, "
            f"should be [1, {length}, {width}] and [1, {length}]"
        )
    return context[:, mask[0] > 0]


def read_arrays(
    file: str | Path, needed: Sequence[str], *others: Sequence[str]
) -> dict[str, np.ndarray]:
    """Arrays of a .npz by name: those that are needed, and of each of `others` all or none.

    Raises:
      PhoneError: no readable .npz, or it lacks some of them.
    """
    try:
        with np.lib.npyio.NpzFile(file) as arrays:
            there = [group for group in others if {*group} & {*arrays.files}]
            wanted = [name for group in (needed, *there) for name in group]
            found = {name: arrays[name] for name in wanted if name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PhoneError(f"{file}: not a readable .npz file ({error})") from error
    if missing := [name for name in wanted if name not in found]:
        raise PhoneError(f"{file}: has no {missing[0]}; expected arrays {', '.join(wanted)}")
    return found


class Verdict(NamedTuple):
    """A result beside the golden one, and the dB that it must reach."""

    what: str
    ours: np.ndarray
    expected: np.ndarray
    demand: float

    @property
    def reached(self) -> float:
        return manifest.psnr(self.ours, self.expected)


def replay(bundle: Bundle, mode: str) -> Iterator[Verdict]:
    """A golden case from its inputs on: the text, the source, every step, the picture."""
    entry = bundle.manifest["golden"][mode]
    place = bundle.accelerator if bundle.accelerator == "cpu" else f"gpu_{bundle.precision}"
    demand = entry["tolerance"][place]
    with np.load(bundle.folder / entry["arrays"]) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    texts, null = read_embeddings(bundle, bundle.folder / entry["arrays"], "source" in entry)
    if mode == "generate" and "text_encoder" in bundle.manifest["components"]:
        ours, n = encode_prompt(bundle, entry["prompt"]).context, int(texts.mask.sum())
        yield Verdict(f"{mode}: text", ours[:, :n], texts.context[:, :n], demand)
    source = np.zeros_like(found["noise"])
    if "source" in entry:
        source = encode_image(bundle, read_picture(bundle.folder / entry["source"]))
        yield Verdict(f"{mode}: source latent", source, found["source"], demand)
    steps = denoise(bundle, found["noise"], texts, null, source)
    for i, (xt, expected) in enumerate(zip(steps, found["latents"], strict=True)):
        yield Verdict(f"{mode}: step {i + 1}", xt, expected, demand)
    picture = np.asarray(read_picture(bundle.folder / entry["picture"]))
    yield Verdict(f"{mode}: picture", decode(bundle, xt), picture, demand)
