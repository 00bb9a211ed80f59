"""Buckets, crops and choices: what becomes of a picture on its way into a batch."""

import numpy as np
import pytest
from PIL import Image

from dreamlite_jax.data import decoding, pictures, shapes, transforms
from dreamlite_jax.data.transforms import Dropout


@pytest.mark.parametrize("side, multiple, ratio", [(64, 32, 2), (256, 32, 2), (1024, 32, 3)])
def test_buckets_keep_within_the_budget(side, multiple, ratio):
    buckets = transforms.aspect_buckets(side, multiple, ratio)
    assert (side, side) in buckets
    assert len(set(buckets)) == len(buckets)
    shapes_ = [width / height for height, width in buckets]
    assert shapes_ == sorted(shapes_)
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert height * width <= side**2 < (height + multiple) * (width + multiple)
        assert 1 / ratio <= width / height <= ratio
        assert (width, height) in buckets


def test_a_ratio_of_one_leaves_the_square():
    assert transforms.aspect_buckets(512, 32, 1) == [(512, 512)]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((100,), "100 is not a positive multiple of 32"),
        ((0,), "multiple of 32"),
        ((-64,), "multiple of 32"),
        ((64, 32, 0.5), "0.5, should be at least 1"),
        ((64, 32, float("nan")), "nan, should be at least 1"),
    ],
)
def test_impossible_buckets_are_refused(arguments, said):
    with pytest.raises(transforms.SizeError, match=said):
        transforms.aspect_buckets(*arguments)


def test_nearest_buckets_by_shape():
    buckets = transforms.aspect_buckets(256, 32, 2)
    sizes = np.array([[640, 480], [480, 640], [999, 1000], [3000, 100]])
    chosen = [buckets[b] for b in transforms.nearest_buckets(sizes, buckets)]
    assert chosen == [(224, 288), (288, 224), (256, 256), buckets[-1]]


def test_crops_keep_as_much_as_they_can():
    crop = transforms.crop_to(400, 200, (64, 64))
    assert crop == (0.25, 0, 0.75, 1)
    assert transforms.crop_to(400, 200, (64, 64), (0, 0)) == (0, 0, 0.5, 1)
    assert transforms.crop_to(400, 200, (64, 64), (1, 1)) == (0.5, 0, 1, 1)
    assert transforms.crop_to(200, 400, (64, 64)) == (0, 0.25, 1, 0.75)
    assert transforms.crop_to(300, 200, (128, 192)) == pytest.approx((0, 0, 1, 1))


def test_captions_of_a_sheet_are_readable(monkeypatch):
    """Without a font that knows their letters, these lose their accents, never become boxes."""

    def sheet(caption):
        return np.asarray(pictures.contact_sheet([[Image.new("RGB", (8, 8))]], [caption]))

    captions = ("a red boat", "ein grünes Boot — joli", "一只船 é")
    for text, font in map(pictures._readable, captions):
        assert pictures._knows(font, text)
    monkeypatch.setattr(pictures, "_FONTS", ("no such font.ttf",))
    np.testing.assert_array_equal(sheet(captions[1]), sheet("ein grunes Boot ? joli"))
    np.testing.assert_array_equal(sheet(captions[2]), sheet("??? e"))


def test_fitted_shows_the_crop():
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:200] = 255  # the middle third
    image = Image.fromarray(pixels)
    for at, shade in (((0, 0), 0), ((0.5, 0.5), 255), ((1, 1), 0)):
        out = transforms.fitted(image, (32, 32), transforms.crop_to(300, 100, (32, 32), at))
        assert out.size == (32, 32)
        assert (np.asarray(out)[:, 4:28] == shade).all()


def test_a_jpeg_is_decoded_no_smaller_than_is_good(tmp_path):
    scene = shapes.sample_t2i(shapes.DEMO, "train", 0, 3).scene
    Image.fromarray(shapes.render(scene, 512, 512)).save(tmp_path / "big.jpg", quality=95)
    opened = decoding.opened(
        (tmp_path / "big.jpg").read_bytes(), transforms.enough(512, 512, (64, 64))
    )
    assert opened.size == (128, 128)
    quick = transforms.fitted(opened, (64, 64), transforms.crop_to(512, 512, (64, 64)))
    whole = Image.open(tmp_path / "big.jpg").convert("RGB").resize((64, 64), Image.LANCZOS)
    difference = np.asarray(quick, float) - np.asarray(whole, float)
    assert np.abs(difference).mean() < 1.5  # of 255; what people cannot see


def test_floats_are_those_of_diffusers_and_become_the_same_bytes_again():
    """`VaeImageProcessor`: numpy's `astype(float32) / 255`, then torch's `2.0 * x - 1.0`."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = 2 * (levels.astype(np.float32) / 255) - 1
    row = np.empty((2, 16, 16), np.float32)
    assert pictures.to_floats(levels, row[1]).dtype == np.float32
    np.testing.assert_array_equal(row[1], expected)
    np.testing.assert_array_equal(pictures.to_floats(levels), expected)
    np.testing.assert_array_equal(pictures.to_bytes(row[1]), levels)


@pytest.mark.parametrize("width, height", [(1, 1), (31, 500), (700, 301), (70_000, 2)])
def test_arrays_are_the_pictures(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(pictures.to_array(Image.fromarray(pixels)), pixels)


def test_the_changed_map_finds_what_an_edit_changes():
    for index in range(20):
        edit = shapes.sample_edit(shapes.DEMO, "train", 0, index)
        before, after = (shapes.render(s, 128, 128) for s in (edit.source, edit.target))
        found = transforms.changed(after, before, 8)
        exact = shapes.changed_mask(edit.source, edit.target, 128, 128)
        share = exact.reshape(16, 8, 16, 8).mean((1, 3))
        assert found[share > 0.5].all()
        assert not found[share == 0].any()


def test_choices_depend_on_seed_step_and_row_alone():
    one = transforms.choices(1, 2, 3)
    assert one == transforms.choices(1, 2, 3)
    assert (
        len({transforms.choices(*key) for key in ((1, 2, 3), (2, 1, 3), (1, 3, 2), (0, 2, 3))}) == 4
    )
    numbers = np.array(
        [transforms.choices(0, step, row)[1:] for step in range(50) for row in range(20)]
    )
    assert np.abs(numbers.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 1000)


def test_dropout_happens_as_often_as_asked():
    u = (np.arange(100_000) + 0.5) / 100_000
    rates = Dropout(0.1, 0.05, 0.04, 0.03)
    t2i = np.array([transforms.dropped(rates, False, x) for x in u])
    assert t2i.mean(0) == pytest.approx((0.1, 0), abs=1e-4)
    edit = [transforms.dropped(rates, True, x) for x in u]
    share = {pair: edit.count(pair) / len(edit) for pair in set(edit)}
    assert share == pytest.approx(
        {(True, False): 0.05, (True, True): 0.04, (False, True): 0.03, (False, False): 0.88},
        abs=1e-4,
    )
