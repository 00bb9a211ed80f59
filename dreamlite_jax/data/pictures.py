"""Pictures on the host: files, sizes, value ranges, contact sheets. NumPy and Pillow only.

Shapes: H and W are pixels. A picture is uint8 [H, W, 3] or Pillow's RGB; the autoencoder takes and
gives float32 [H, W, 3] in [-1, 1].
"""

import contextlib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dreamlite_jax.errors import UserError


class PictureError(UserError):
    """A file that is no readable picture: one line."""


def read_picture(file: str | os.PathLike) -> Image.Image:
    """RGB, turned as its EXIF data says (as diffusers' `load_image`).

    Raises:
      PictureError: no such file, or not a picture.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise PictureError(f"{file}: no such file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{file}: not a readable picture ({error})") from error


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """LANCZOS, aspect ratio not kept, as diffusers' `VaeImageProcessor.resize`."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of an RGB picture: `np.asarray`, in strips. Pillow collects the bytes of a
    picture in pieces and joins them, in new pages; for large ones that is four times the work."""
    out = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        out[top:bottom] = image.crop((0, top, image.width, bottom))
    return out


_STRIP = 1 << 16  # pixels: what stays in a core's cache


def to_floats(image: Image.Image | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [..., H, W, 3] -> float32 in [-1, 1], as diffusers' `VaeImageProcessor.preprocess`;
    `out` is filled where it is given."""
    values = np.divide(np.asarray(image), np.float32(255), out=out)
    values *= 2
    values -= 1
    return values


def to_bytes(values: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] (clipped) -> uint8, as diffusers' `VaeImageProcessor.postprocess`."""
    return (np.clip(values * 0.5 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def write_png(
    file: str | os.PathLike,
    picture: Image.Image | np.ndarray,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG with text notes; the file appears whole or not at all."""
    info = PngInfo()
    for key, value in (notes or {}).items():
        info.add_itxt(key, value)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with replaced_file(file) as stream:
        image.save(stream, "PNG", pnginfo=info)


@contextlib.contextmanager
def replaced_file(file: str | os.PathLike) -> Iterator[BinaryIO]:
    """A stream to fill; on leaving without an error it takes the place of `file`.

    An OSError on the way names a file: this one, where it names none.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}-{os.getpid()}.part")
    try:
        with scratch.open("wb") as stream:
            yield stream
        scratch.replace(file)
    except OSError as error:
        if error.filename is None:  # a full disk's does not say where
            error.filename = str(file)
        raise
    finally:
        scratch.unlink(missing_ok=True)


_MARGIN, _LINE = 8, 20  # of a contact sheet, in pixels


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | Image.Image]], captions: Sequence[str], cell: int = 256
) -> Image.Image:
    """One row of pictures for each caption, which stands above it (cut where it is too long).

    Pictures are scaled to fit squares of `cell` pixels, aspect ratio kept, never enlarged beyond
    whole multiples of their pixels.
    """
    columns = max(map(len, rows))
    width = _MARGIN + columns * (cell + _MARGIN)
    height = _MARGIN + len(rows) * (_LINE + cell + _MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = _MARGIN + i * (_LINE + cell + _MARGIN)
        text, font = _readable(caption)
        draw.text((_MARGIN, top), _fitted(draw, text, font, width - 2 * _MARGIN), "black", font)
        for j, picture in enumerate(row):
            shown = thumbnail(picture, cell)
            left = _MARGIN + j * (cell + _MARGIN) + (cell - shown.width) // 2
            sheet.paste(shown, (left, top + _LINE + (cell - shown.height) // 2))
    return sheet


def thumbnail(picture: np.ndarray | Image.Image, cell: int) -> Image.Image:
    """A picture scaled to fit a square of `cell` pixels, as `contact_sheet` says."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    longest = max(image.size)
    if longest <= cell:
        factor = cell // longest
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    size = [max(1, side * cell // longest) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


# Fonts that a machine may have, those with the most characters first. Pillow's own knows ASCII.
_FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf", "Arial.ttf")
_FONT_SIZE = 13


def _readable(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a font for it; where no font knows the text's characters, letters lose their
    accents and what is left becomes a question mark."""
    if not text.isascii():
        for name in _FONTS:
            with contextlib.suppress(OSError):
                font = ImageFont.truetype(name, _FONT_SIZE)
                if _knows(font, text):
                    return text, font
        plain = unicodedata.normalize("NFKD", text)
        plain = "".join(c for c in plain if not unicodedata.combining(c))
        text = plain.encode("ascii", "replace").decode()
    return text, ImageFont.load_default(_FONT_SIZE)


def _knows(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether no character of the text is drawn as the box that stands for unknown ones."""
    box = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(c)) != box for c in set(text) if not c.isspace())


def _fitted(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
