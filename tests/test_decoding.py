"""Bytes to clean pictures: what is set right, to the pixel, and what is quarantined, and why."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageChops, ImageCms

from dreamlite_jax.data import decoding
from dreamlite_jax.data.decoding import Quarantined, normalised, opened

DATA = Path(skimage.__file__).parent / "data"
LIMITS = {"min_side": 8, "max_pixels": 1 << 22}


def clean(data, **limits):
    return normalised(data, **(LIMITS | limits))


def picture(data):
    return np.asarray(opened(clean(data).data), int)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photograph(size=(96, 64)):
    return Image.open(DATA / "coffee.png").convert("RGB").resize(size)


def reason(data, **limits):
    with pytest.raises(Quarantined) as raised:
        clean(data, **limits)
    assert "\n" not in str(raised.value) and raised.value.detail
    return raised.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_clean_pictures_keep_their_bytes(kind):
    data = encoded(photograph(), kind)
    made = clean(data)
    assert made == (data, 96, 64, ())
    assert opened(data).mode == "RGB"


# Real files with something to set right, beside plain grey ones.
CHANGED = {
    "chessboard_RGB.png": ("16-bit",),
    "color.png": ("colour profile",),  # of a display
    "horse.png": ("alpha over white",),
    "logo.png": ("opaque alpha",),
    "page.png": ("greyscale", "colour profile"),  # Dot Gain 20%
    "rocket.jpg": ("colour profile",),  # Adobe RGB
}


def test_every_photograph_of_scikit_image():
    """Several have an embedded sRGB profile, which changes nothing."""
    for file in sorted({*DATA.glob("*.png"), *DATA.glob("*.jpg")}):
        with Image.open(file) as image:
            image.load()
        made = clean(file.read_bytes())
        again = opened(made.data)
        grey = ("greyscale",) if image.mode in ("1", "L") else ()
        assert made.changes == CHANGED.get(file.name, grey), file.name
        assert again.mode == "RGB" and (made.width, made.height) == again.size == image.size
        assert clean(made.data) == made._replace(changes=()), file.name
        if not made.changes:
            assert made.data == file.read_bytes(), file.name
        if grey and file.name not in CHANGED:
            assert not ImageChops.difference(again, image.convert("RGB")).getbbox(), file.name


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation(orientation, kind):
    """Turned as the standard says: the 0th row and column of each orientation (JEITA CP-3451)."""
    upright = np.asarray(photograph())
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 95, "subsampling": 0}
        if kind == "JPEG"
        else {"lossless": True}
        if kind == "WEBP"
        else {}
    )
    made = clean(encoded(Image.fromarray(stored), kind, exif=exif, **options))
    assert made.changes == ("exif-rotated",) and (made.width, made.height) == (96, 64)
    assert not Image.open(io.BytesIO(made.data)).getexif()
    far = np.abs(np.asarray(opened(made.data), int) - upright)
    assert far.mean() < 3 if kind == "JPEG" else far.max() == 0


def test_broken_exif_costs_the_orientation_only():
    data = encoded(photograph(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert clean(data) == (data, 96, 64, ())


def test_cmyk():
    """Without a profile by the plain formula, near the RGB that it was made from."""
    image = photograph()
    made = clean(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert made.changes == ("cmyk",)
    far = np.abs(np.asarray(opened(made.data), int) - np.asarray(image, int))
    assert far.mean() < 3
    exact = clean(encoded(image.convert("CMYK"), "TIFF"))
    np.testing.assert_array_equal(opened(exact.data), image.convert("CMYK").convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_exact(kind):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    made = clean(encoded(Image.fromarray(values * 257), kind))
    assert made.changes == ("16-bit", "greyscale")
    np.testing.assert_array_equal(np.asarray(opened(made.data))[..., 0], values)
    between = clean(encoded(Image.fromarray(values * 257 - (values > 0) * np.uint16(128)), kind))
    np.testing.assert_array_equal(np.asarray(opened(between.data))[..., 2], values)


def test_16_bit_colours_keep_their_upper_bits():
    values = (np.arange(256 * 3).reshape(16, 16, 3) * 85).astype(">u2")
    made = clean(png(16, 16, 16, 2, values))
    assert made.changes == ("16-bit",)
    np.testing.assert_array_equal(opened(made.data), values >> 8)


def png(width, height, depth, colour, values):
    """A PNG by hand, of what Pillow does not write."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_alpha_goes_over_white():
    image, alpha = photograph(), np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
    rgba = np.dstack([np.asarray(image), alpha])
    made = clean(encoded(Image.fromarray(rgba)))
    assert made.changes == ("alpha over white",)
    weight = alpha[..., None] / 255
    expected = np.asarray(image) * weight + 255 * (1 - weight)
    assert np.abs(np.asarray(opened(made.data)) - expected).max() <= 1
    assert (np.asarray(opened(made.data))[:, 0] == 255).all()


def test_opaque_alpha_is_dropped():
    image = photograph()
    made = clean(encoded(image.convert("RGBA")))
    assert made.changes == ("opaque alpha",)
    np.testing.assert_array_equal(opened(made.data), image)


def test_palettes():
    image = photograph().quantize(16)
    made = clean(encoded(image))
    assert made.changes == ("palette",)
    np.testing.assert_array_equal(opened(made.data), image.convert("RGB"))
    for kind in ("PNG", "GIF"):
        data = encoded(image, kind, transparency=3)
        made = clean(data)
        assert made.changes == ("palette", "alpha over white")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
        clear = expected[..., 3] == 0
        assert 0 < clear.mean() < 1
        shown = np.asarray(opened(made.data))
        assert (shown[clear] == 255).all()
        np.testing.assert_array_equal(shown[~clear], expected[~clear, :3])


def test_grey_alpha_and_key_values():
    grey = photograph().convert("L")
    faded = Image.merge("LA", (grey, Image.new("L", grey.size, 128)))
    made = clean(encoded(faded))
    assert made.changes == ("greyscale", "alpha over white")
    expected = (np.asarray(grey, float) * 128 + 255 * 127) / 255
    assert np.abs(np.asarray(opened(made.data))[..., 0] - expected).max() <= 1
    values = np.full((16, 16), 1000, np.uint16)
    values[3, 4] = 7
    made = clean(encoded(Image.fromarray(values), transparency=7))
    shown = np.asarray(opened(made.data))
    assert (shown[3, 4] == 255).all() and (shown[3, 5] == 4).all()


def s15(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(kind, space, connection, tags):
    """An ICC profile by hand (ICC.1:2001-04, 6)."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 81
    white = b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249)
    tags = {b"desc": text, b"wtpt": white} | tags
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x", start + len(body), 0x02100000, kind, space, connection, b"acsp"
    )
    return (head + s15(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


def profile_of(primaries, gamma):
    """A display's: XYZ of its red, green and blue under D50."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
        tags[name] = b"XYZ \0\0\0\0" + s15(*row)
    return icc(b"mntr", b"RGB ", b"XYZ ", tags)


def green_ink_profile():
    """A press whose cyan is green: Lab by the 16 corners of CMYK, linear between them."""
    lab = np.full((2, 2, 2, 2, 3), (0, 128, 128), np.uint8)  # more inks, or black: black
    lab[0, 0, 0, 0] = 255, 128, 128
    lab[1, 0, 0, 0] = 0.6 * 255, 128 - 50, 128 + 40
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table + ramp * 4 + lab.tobytes() + ramp * 3})


# Display P3 under D50 (Apple's profile); its transfer function is near a gamma of 2.2.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_display_p3(kind):
    """A P3 red is beyond sRGB's, a P3 grey is the same grey, colours between move outwards."""
    patches = np.zeros((16, 64, 3), np.uint8)
    patches[:, :16], patches[:, 16:32] = (255, 0, 0), (128, 128, 128)
    patches[:, 32:48], patches[:, 48:] = (200, 100, 100), (255, 255, 255)
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    options = {} if kind in ("PNG", "TIFF") else options
    data = encoded(Image.fromarray(patches), kind, icc_profile=profile_of(P3, 2.2), **options)
    made = clean(data)
    assert made.changes == ("colour profile",)
    assert "icc_profile" not in Image.open(io.BytesIO(made.data)).info
    shown = np.asarray(opened(made.data), int)[8]
    assert np.abs(shown[8] - (255, 0, 0)).max() <= 2
    assert np.abs(shown[24] - 128).max() <= 3
    assert np.abs(shown[40] - (213, 93, 97)).max() <= 4
    assert np.abs(shown[56] - 255).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_follows_its_profile(kind):
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 16:, 0] = 255
    image = Image.fromarray(inks, "CMYK")
    options = {"quality": 95} if kind == "JPEG" else {}
    made = clean(encoded(image, kind, icc_profile=green_ink_profile(), **options))
    assert made.changes == ("cmyk", "colour profile")
    shown = np.asarray(opened(made.data), int)[8]
    assert np.abs(shown[4] - 255).max() <= 2
    assert np.abs(shown[28] - (43, 166, 67)).max() <= 3  # Lab 60 -50 40, of ink 0 255 255


def test_srgb_by_any_name_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(photograph(), "JPEG", icc_profile=profile)
    assert clean(data) == (data, 96, 64, ())


def test_unusable_profiles_are_ignored():
    for profile in (b"nonsense", profile_of(P3, 2.2)[:200]):
        data = encoded(photograph(), "JPEG", icc_profile=profile)
        assert clean(data) == (data, 96, 64, ())
    wrong = clean(encoded(photograph().convert("CMYK"), "JPEG", icc_profile=profile_of(P3, 2.2)))
    assert wrong.changes == ("cmyk",)


def test_grey_pictures_follow_the_profile_of_their_colours():
    grey = photograph().convert("L")
    data = encoded(grey, "JPEG", quality=95, icc_profile=profile_of(P3, 1.0))
    made = clean(data)
    assert made.changes == ("greyscale", "colour profile")
    stored, shown = np.asarray(Image.open(io.BytesIO(data))), np.asarray(opened(made.data))
    middle = shown[np.abs(stored.astype(int) - 55) <= 1]  # linear 0.216 is 0.5 in sRGB
    assert len(middle) and np.abs(middle.astype(int) - 128).max() <= 3


def test_a_phones_second_view_is_not_a_second_frame():
    data = encoded(photograph(), "MPO", save_all=True, append_images=[photograph((48, 32))])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert clean(data) == (data, 96, 64, ())
    assert opened(data).size == (96, 64)


def test_damage_is_found():
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        data = encoded(photograph(), kind)
        for share in (0.3, 0.6, 0.9):
            assert reason(data[: int(len(data) * share)]) == "truncated", kind
    jpeg = (DATA / "rocket.jpg").read_bytes()
    assert reason(jpeg[: len(jpeg) // 2]) == "truncated"
    assert reason((DATA / "chelsea.png").read_bytes()[:200_000]) == "truncated"


def test_what_is_no_picture():
    for data in (
        b"",
        b"<!DOCTYPE html><html></html>",
        b"\0" * 5000,
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
    ):
        assert reason(data) == "unreadable"
    with pytest.raises(Quarantined, match=r"starts with '<!DOCTYPE"):
        clean(b"<!DOCTYPE html>")
    assert reason(encoded(photograph(), "PPM")) == "unreadable"


def test_random_damage_is_never_another_exception():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        whole = encoded(photograph((48, 32)), kind, exif=Image.Exif())
        for _ in range(60):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), 8):
                data[position] = rng.integers(256)
            try:
                clean(bytes(data))
            except Quarantined as error:
                assert error.reason


def test_bombs_are_refused_by_their_header():
    pixels = np.zeros((1, 1, 3), np.uint8)
    for side in (3000, 12_000, 60_000):  # under Pillow's warning, its error and beyond
        assert reason(png(side, side, 8, 2, pixels)) == "too large"
    assert reason(encoded(photograph()), max_pixels=96 * 64 - 1) == "too large"
    assert clean(encoded(photograph()), max_pixels=96 * 64)


def test_small_ones():
    assert reason(encoded(photograph()), min_side=65) == "too small"
    assert clean(encoded(photograph()), min_side=64)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations(kind):
    frames = [photograph().rotate(angle) for angle in (10, 20)]
    assert reason(encoded(photograph(), kind, save_all=True, append_images=frames)) == "animated"


def test_unsupported_modes():
    floats = Image.fromarray(np.zeros((16, 16), np.float32))
    assert reason(encoded(floats, "TIFF")) == "unsupported mode"
    large = Image.fromarray(np.full((16, 16), 70_000, np.int32))
    assert reason(encoded(large, "TIFF")) == "unsupported mode"


def test_warnings_stay_inside(recwarn):
    clean(encoded(photograph(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert reason(png(12_000, 12_000, 8, 2, np.zeros((1, 1, 3), np.uint8))) == "too large"
    assert not recwarn.list


def test_no_memory_is_not_the_datas_fault(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(decoding.Image, "open", fail)
    with pytest.raises(MemoryError):
        clean(b"")
