"""Bytes to clean pictures: decided once, while a set is prepared, never in the stream of training.

A clean picture is an encoded one that any decoder shows alike: RGB in 8 bits and sRGB, upright, one
frame, no transparency. NumPy and Pillow only.

Shapes: H and W are pixels; sides and sizes are in pixels, sizes as (width, height).
"""

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

# What is opened at all: Pillow's other readers are rare in data and rarely hardened.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
# What Pillow calls a JPEG with more JPEGs behind it: phones append a second view or a gain map.
_MPO = "MPO"
# How their files begin; BMP's two letters say too little.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")

# Reasons of `Quarantined`; scripts count them, so they stay as they are.
UNREADABLE = "unreadable"
TRUNCATED = "truncated"
TOO_SMALL = "too small"
TOO_LARGE = "too large"
ANIMATED = "animated"
UNSUPPORTED_MODE = "unsupported mode"

# What EXIF's orientation asks for, by its tag 274 (JEITA CP-3451, 4.6.4).
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Names of changes for modes that need nothing but a conversion.
_MODES = {
    "RGB": None,
    "RGBA": None,
    "RGBa": None,
    "RGBX": None,
    "1": "greyscale",
    "L": "greyscale",
    "LA": "greyscale",
    "La": "greyscale",
    "P": "palette",
    "PA": "palette",
    "CMYK": "cmyk",
    "YCbCr": "ycbcr",
}

_BITS_PER_SAMPLE = 258  # TIFF's tag
_BACKGROUND = 255  # white, which transparent pixels are laid over
# Profiles that move no color of the probe further than this (of 255) are sRGB by another name.
_SAME_COLOR = 2


class Quarantined(ValueError):
    """A picture that must not be trained on.

    Attributes:
      reason: one of this module's constants, for counting.
      detail: what was found, for people; one line.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Normalised(NamedTuple):
    """A clean picture.

    Attributes:
      data: the encoded picture: the bytes as they came where nothing had to be done, else a PNG.
      width: pixels, of the upright picture.
      height: pixels, of the upright picture.
      changes: what was done; empty where nothing was. "exif-rotated", "cmyk", "ycbcr", "16-bit",
        "greyscale", "palette", "colour profile", "alpha over white", "opaque alpha" (dropped).
    """

    data: bytes
    width: int
    height: int
    changes: tuple[str, ...]


def normalised(data: bytes, *, min_side: int, max_pixels: int) -> Normalised:
    """The clean picture of an encoded one; everything is decoded once, so that damage is found.

    An embedded colour profile is followed where it leads elsewhere than sRGB; one that is broken or
    made for other channels is ignored, as browsers do. Of 16 bits the upper 8 are kept, in grey
    pictures rounded (65535 is 257 * 255).

    Args:
      data: a JPEG (of an MPO, as phones write, the first), PNG, WebP, GIF, TIFF or BMP file.
      min_side: the shorter side that a picture needs, in pixels.
      max_pixels: the most pixels, taken from the header, before anything is decoded.

    Raises:
      Quarantined: not a picture, damaged, too small, too large, animated, or in a colour space that
        has no 8-bit RGB. Nothing else is raised on account of the data.
    """
    _check_length(data)
    with _quarantining(data), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_header(image, min_side, max_pixels)
        # Pillow turns TIFFs as it decodes them and forgets that it did; PNGs may tell after that.
        turned = image.format == "TIFF" and _orientation(image) in _TURNS
        image.load()
        colours, changes = _in_srgb(image, _is_16_bit(image, data))
        turn = _TURNS.get(_orientation(image))
        if turn is not None:
            colours = colours.transpose(turn)
        if turned or turn is not None:
            changes.append("exif-rotated")
        if changes:
            data = _png(colours)
        return Normalised(data, *colours.size, tuple(changes))


def opened(data: bytes, least: int | None = None) -> Image.Image:
    """The RGB picture of `Normalised.data`, decoded.

    Args:
      least: pixels that the longer side needs to have; a JPEG may then be decoded at 1/2, 1/4 or
        1/8 of its size, which is several times as fast.

    Raises:
      Quarantined: the bytes are no readable picture (`normalised` gives none such).
    """
    with _quarantining(data, silent=False):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if least is not None:
            scale = least / max(image.size)
            image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _quarantining(data: bytes, silent: bool = True) -> Iterator[None]:
    """Turns whatever Pillow raises on bad data into `Quarantined`.

    Its readers raise about anything, hence no list of exceptions; a lack of memory is not the
    data's fault. `silent` keeps warnings quiet, which is a matter of the process, not the thread.
    """
    try:
        with warnings.catch_warnings() if silent else contextlib.nullcontext():
            if silent:
                warnings.simplefilter("ignore")
            yield
    except (Quarantined, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Quarantined(TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise Quarantined(UNREADABLE, _unidentified(data)) from error
    except Exception as error:
        detail = _line(error)
        short = isinstance(error, EOFError) or "truncated" in detail.lower()
        raise Quarantined(TRUNCATED if short else UNREADABLE, detail) from error


def _line(error: Exception) -> str:
    known = isinstance(error, OSError | SyntaxError | ValueError) and str(error)
    return " ".join((str(error) if known else repr(error)).split())


def _unidentified(data: bytes) -> str:
    if not data:
        return "empty file"
    if data.startswith(_SIGNATURES):
        return "its header is damaged, or of a kind that nothing here reads"
    start = data[:24].decode("latin-1")
    return f"no {', '.join(FORMATS)} file; it starts with {start!r}"


def _check_length(data: bytes) -> None:
    """WebP's decoder tells cut files from others not at all; their header does."""
    expected = 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"RIFF") and len(data) + 1 < expected:  # the last byte may be padding
        raise Quarantined(TRUNCATED, f"{len(data)} of {expected} bytes")


def _check_header(image: Image.Image, min_side: int, max_pixels: int) -> None:
    """What can be told before decoding."""
    width, height = image.size
    if width * height > max_pixels:
        raise Quarantined(TOO_LARGE, f"{width}x{height} pixels, the limit is {max_pixels}")
    if min(width, height) < min_side:
        raise Quarantined(TOO_SMALL, f"{width}x{height} pixels, the shorter side needs {min_side}")
    if image.format != _MPO and getattr(image, "is_animated", False):
        raise Quarantined(ANIMATED, f"a {image.format} of several frames")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 (upright) where EXIF cannot be read, as the picture still can."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above: any broken metadata
        return 1


def _is_16_bit(image: Image.Image, data: bytes) -> bool:
    """Whether the file has 16 bits a channel; Pillow's modes tell it of grey pictures only."""
    if image.mode.startswith("I"):
        return True
    if image.format == "PNG":
        return data[24] == 16  # IHDR: signature 8, length 4, name 4, width 4, height 4, depth
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    return False


def _in_srgb(image: Image.Image, deep: bool) -> tuple[Image.Image, list[str]]:
    """RGB in sRGB over white, and what was changed for it; a loaded picture of any mode."""
    changes = ["16-bit"] if deep else []
    if image.mode.startswith("I"):
        base, alpha = _from_16_bit(image)
        changes.append("greyscale")
    elif image.mode in _MODES:
        base, alpha = _split_alpha(image)
        changes += filter(None, [_MODES[image.mode]])
    else:
        raise Quarantined(UNSUPPORTED_MODE, f"{image.format} in {image.mode}")
    base, followed = _follow_profile(base, image.info.get("icc_profile"))
    if followed:
        changes.append("colour profile")
    if alpha is not None:
        opaque = alpha.getextrema()[0] == 255
        changes.append("opaque alpha" if opaque else "alpha over white")
        if not opaque:
            base = Image.composite(base, Image.new("RGB", base.size, (_BACKGROUND,) * 3), alpha)
    return base, changes


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours (L, RGB or CMYK) and transparency (L), the palette's and a PNG's key colour too."""
    if image.mode == "CMYK":
        return image, None
    grey = _MODES[image.mode] == "greyscale"
    if not image.has_transparency_data:
        return image.convert("L" if grey else "RGB"), None
    whole = image.convert("LA" if grey else "RGBA")
    return whole.getchannel("L") if grey else whole.convert("RGB"), whole.getchannel("A")


def _from_16_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey as L, and the transparency of a PNG's key value."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Quarantined(
            UNSUPPORTED_MODE, f"{image.format} with values {values.min()} to {values.max()}"
        )
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return grey, None
    return grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))


def _follow_profile(base: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """RGB in sRGB, and whether the profile mattered; L, RGB or CMYK in."""
    if profile:
        # Grey pictures often carry the profile of the RGB picture that they were made from.
        for image in (base, base.convert("RGB")) if base.mode == "L" else (base,):
            if (transform := _to_srgb(profile, image.mode)) is not None:
                return ImageCms.applyTransform(image, transform), True
    return base.convert("RGB"), False


@functools.lru_cache(maxsize=64)  # a source has few profiles and many pictures
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile's colours to sRGB; None where it is the same or does not exist."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    probe = _probe(mode)
    moved = ImageChops.difference(ImageCms.applyTransform(probe, transform), probe.convert("RGB"))
    furthest = max(high for _, high in moved.getextrema())
    return transform if furthest > _SAME_COLOR else None


def _probe(mode: str) -> Image.Image:
    """All greys, or 729 colours across the cube."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1)
    return Image.fromarray(cube.reshape(27, 27, 3))


def _png(image: Image.Image) -> bytes:
    """Pixels alone: a picture made anew has no metadata that the writer would carry over."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(stream, "PNG")
    return stream.getvalue()
