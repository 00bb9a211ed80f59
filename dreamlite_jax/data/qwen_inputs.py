"""What Qwen3-VL sees, computed on the host: a processor's output as arrays of few fixed shapes.

Shapes: B prompts, L tokens, P patches, E numbers in a patch; L and P are the smallest bucket that
holds the batch. All that depends on token values or on image sizes is settled here (positions,
interpolation, which token an image patch becomes), so the network is compiled once a bucket. NumPy
only.

Facts of the layout are those of transformers: `Qwen3VLModel.get_rope_index` (modeling_qwen3_vl.py),
`get_vision_position_ids` and `get_vision_interpolation_indices_and_weights` (vision_utils.py).
"""

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

# DreamLite's prompts are at most 534 tokens in generate mode, and 64 + 256 + the prompt in edit
# mode, whose 512 x 512 image is 1024 patches.
TEXT_BUCKETS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048)
PATCH_BUCKETS = (256, 1024, 4096)


class QwenInputs(TypedDict):
    """A batch for `models.qwen3_vl.model.Qwen3VL`; in every row valid tokens first, padding last.

    The arrays of images are there together or not at all. A row without an image has an all-false
    patch_mask and an image_index of -1 everywhere.
    """

    input_ids: np.ndarray  # int32 [B, L], 0 at padding
    attention_mask: np.ndarray  # bool [B, L], true at tokens
    position_ids: np.ndarray  # int32 [B, 3, L], M-RoPE's (time, row, column), 0 at padding
    pixel_values: NotRequired[np.ndarray]  # float32 [B, P, E], 0 at padding
    patch_mask: NotRequired[np.ndarray]  # bool [B, P], true at patches
    patch_positions: NotRequired[np.ndarray]  # int32 [B, P, 2], a patch's (row, column)
    interp_indices: NotRequired[np.ndarray]  # int32 [B, P, 4], rows of the position-embedding table
    interp_weights: NotRequired[np.ndarray]  # float32 [B, P, 4], their weights
    image_index: NotRequired[np.ndarray]  # int32 [B, L], the merged patch that stands here, else -1


def bucket(n: int, buckets: Sequence[int], what: str = "length") -> int:
    """The smallest of `buckets` that holds n; ValueError where none does."""
    fitting = [size for size in buckets if size >= n]
    if not fitting:
        raise ValueError(
            f"{what} {n} exceeds the largest bucket, {max(buckets)}; "
            "shorten the input or add a bucket"
        )
    return min(fitting)


def rope_positions(
    ids: np.ndarray, grid: Sequence[int] | None, *, image_token_id: int, spatial_merge_size: int
) -> np.ndarray:
    """M-RoPE positions int32 [3, n] (time, row, column) of one prompt's ids [n], without padding.

    Text counts on along all three axes. The image (grid: time, height, width in patches) stands
    still in time while its merged tokens count rows and columns from where it begins; the text
    after it continues behind the longer side.
    """
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    if grid is None:
        return positions
    start = int(np.argmax(ids == image_token_id))
    height, width = (side // spatial_merge_size for side in grid[1:])
    end = start + height * width
    rows, columns = np.indices((height, width)).reshape(2, -1)
    positions[:, start:end] = start + np.stack([np.zeros_like(rows), rows, columns])
    positions[:, end:] += max(height, width) - height * width
    return positions


def patch_grid(grid: Sequence[int], spatial_merge_size: int) -> np.ndarray:
    """int32 [height * width, 2]: (row, column) of each patch in a processor's order.

    Processors emit patches block by block, so that `spatial_merge_size` squared neighbours follow
    each other.
    """
    height, width, m = grid[1], grid[2], spatial_merge_size
    places = np.indices((height, width), dtype=np.int32).reshape(2, height // m, m, width // m, m)
    return places.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def interpolation(
    patches: np.ndarray, grid: Sequence[int], grid_side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resampling, corners aligned, of a square table of embeddings to an image's patches.

    patches [n, 2] (row, column). Returns indices int32 [n, 4] into the flattened table and weights
    float32 [n, 4], for the corners (top left, top right, bottom left, bottom right).
    """

    def taps(index, size):  # [n] -> two neighbours [n, 2] along one axis and their weights
        place = index.astype(np.float32) * np.float32(grid_side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(place)
        upper = place - low
        neighbours = np.stack([low, np.minimum(low + 1, grid_side - 1)], -1).astype(np.int32)
        return neighbours, np.stack([1 - upper, upper], -1)

    rows, row_weights = taps(patches[:, 0], grid[1])
    columns, column_weights = taps(patches[:, 1], grid[2])
    indices = rows[:, :, None] * grid_side + columns[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)


def qwen_inputs(
    encoded: Mapping[str, np.ndarray],
    *,
    image_token_id: int,
    spatial_merge_size: int,
    grid_side: int,
    patch_dim: int,
    text_buckets: Sequence[int] = TEXT_BUCKETS,
    patch_buckets: Sequence[int] = PATCH_BUCKETS,
    force_images: bool = False,
) -> QwenInputs:
    """What a transformers tokenizer or processor returned (as NumPy) as the network's inputs.

    encoded: input_ids [B, T]; attention_mask [B, T] (absent: all ones), padded left or right; and
    for images pixel_values [sum of patches, E] with image_grid_thw [images, 3], in the order of the
    prompts. Other keys, such as mm_token_type_ids, are not needed. The numbers in between are
    `Qwen3VLConfig.input_numbers`. `force_images` adds the images' arrays to a batch that has none:
    hosts that share one computation must all have the same arrays (and for that, one bucket each in
    `text_buckets` and `patch_buckets`).

    Raises ValueError where prompts and images do not match, a prompt has more than one image, an
    image has several frames (video), or no bucket fits.
    """
    if encoded.get("pixel_values_videos") is not None:
        raise ValueError("videos are not supported: got pixel_values_videos")
    ids = np.asarray(encoded["input_ids"])
    mask = encoded.get("attention_mask")
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    rows = [row[valid] for row, valid in zip(ids, mask, strict=True)]
    numbers = {"image_token_id": image_token_id, "spatial_merge_size": spatial_merge_size}
    images = _images_of_rows(encoded, rows, patch_dim=patch_dim, **numbers)

    length = bucket(max(map(len, rows)), text_buckets, "prompt length")
    out = _text_arrays(rows, images, length, **numbers)
    if force_images or any(image is not None for image in images):
        most = max(0 if image is None else len(image[1]) for image in images)
        patches = bucket(most, patch_buckets, "number of image patches")
        if patches % spatial_merge_size**2:
            raise ValueError(
                f"the patch bucket {patches} is no multiple of {spatial_merge_size**2}, "
                "the patches that make one token"
            )
        out |= _image_arrays(images, patches, patch_dim, spatial_merge_size, grid_side)
        out["image_index"] = _image_index(rows, length, image_token_id)
    return out


# The grid (1, height, width) and the patches [height * width, E].
_Image = tuple[tuple[int, int, int], np.ndarray]


def _images_of_rows(
    encoded: Mapping[str, np.ndarray],
    rows: Sequence[np.ndarray],
    *,
    image_token_id: int,
    spatial_merge_size: int,
    patch_dim: int,
) -> list[_Image | None]:
    """The image of each row or None, after checking that images and image tokens match."""
    pixels, grids = encoded.get("pixel_values"), encoded.get("image_grid_thw")
    if (pixels is None) != (grids is None):
        raise ValueError("pixel_values and image_grid_thw must be given together")
    pixels = np.zeros((0, patch_dim)) if pixels is None else np.asarray(pixels)
    grids = [] if grids is None else np.asarray(grids).tolist()
    expected = (sum(t * h * w for t, h, w in grids), patch_dim)
    if pixels.shape != expected:
        raise ValueError(
            f"pixel_values has shape {pixels.shape}, but image_grid_thw {grids} and the model's "
            f"patch size ask for {expected}"
        )
    images, used, start = [], 0, 0
    for number, row in enumerate(rows):
        is_image = row == image_token_id
        runs = int(np.sum(is_image[1:] & ~is_image[:-1])) + int(is_image[:1].sum())
        if runs > 1:
            raise ValueError(f"prompt {number} has {runs} images; at most one is supported")
        if not runs:
            images.append(None)
            continue
        if used == len(grids):
            raise ValueError(f"prompt {number} has image tokens, but there is no image for it")
        grid = tuple(grids[used])
        _check_grid(number, grid, int(is_image.sum()), spatial_merge_size)
        count = grid[1] * grid[2]
        images.append((grid, pixels[start : start + count]))
        used, start = used + 1, start + count
    if used != len(grids):
        raise ValueError(f"{len(grids)} images were given, but {used} prompts have image tokens")
    return images


def _check_grid(number: int, grid: tuple[int, ...], tokens: int, merge: int) -> None:
    frames, height, width = grid
    if frames != 1:
        raise ValueError(f"prompt {number}'s image has {frames} frames; videos are unsupported")
    if height % merge or width % merge:
        raise ValueError(
            f"prompt {number}'s image has {height}x{width} patches, not multiples of {merge}"
        )
    expected = height * width // merge**2
    if tokens != expected:
        raise ValueError(
            f"prompt {number} has {tokens} image tokens, but its image of {height}x{width} patches "
            f"makes {expected}; was the prompt cut short?"
        )


def _text_arrays(
    rows: Sequence[np.ndarray],
    images: Sequence[_Image | None],
    length: int,
    *,
    image_token_id: int,
    spatial_merge_size: int,
) -> QwenInputs:
    shape = (len(rows), length)
    out = QwenInputs(
        input_ids=np.zeros(shape, np.int32),
        attention_mask=np.zeros(shape, bool),
        position_ids=np.zeros((len(rows), 3, length), np.int32),
    )
    for b, (row, image) in enumerate(zip(rows, images, strict=True)):
        out["input_ids"][b, : len(row)] = row
        out["attention_mask"][b, : len(row)] = True
        out["position_ids"][b, :, : len(row)] = rope_positions(
            row,
            None if image is None else image[0],
            image_token_id=image_token_id,
            spatial_merge_size=spatial_merge_size,
        )
    return out


def _image_arrays(
    images: Sequence[_Image | None], patches: int, patch_dim: int, merge: int, grid_side: int
) -> dict[str, np.ndarray]:
    shape = (len(images), patches)
    out = {
        "pixel_values": np.zeros((*shape, patch_dim), np.float32),
        "patch_mask": np.zeros(shape, bool),
        "patch_positions": np.zeros((*shape, 2), np.int32),
        "interp_indices": np.zeros((*shape, 4), np.int32),
        "interp_weights": np.zeros((*shape, 4), np.float32),
    }
    for b, image in enumerate(images):
        if image is None:
            continue
        grid, pixels = image
        places, n = patch_grid(grid, merge), len(pixels)
        out["pixel_values"][b, :n] = pixels
        out["patch_mask"][b, :n] = True
        out["patch_positions"][b, :n] = places
        out["interp_indices"][b, :n], out["interp_weights"][b, :n] = interpolation(
            places, grid, grid_side
        )
    return out


def _image_index(rows: Sequence[np.ndarray], length: int, image_token_id: int) -> np.ndarray:
    out = np.full((len(rows), length), -1, np.int32)
    for b, row in enumerate(rows):
        places = np.flatnonzero(row == image_token_id)
        out[b, places] = np.arange(len(places))
    return out
