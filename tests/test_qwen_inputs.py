"""The host's side of Qwen3-VL: cases small enough to compute by hand, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

from dreamlite_jax.data.qwen_inputs import (
    PATCH_BUCKETS,
    TEXT_BUCKETS,
    bucket,
    interpolation,
    patch_grid,
    qwen_inputs,
    rope_positions,
)
from dreamlite_jax.models.qwen3_vl.config import QWEN3_VL_2B, TINY, Qwen3VLConfig

IMAGE = 99
NUMBERS = {"image_token_id": IMAGE, "spatial_merge_size": 2, "grid_side": 3, "patch_dim": 5}


def prompt(*rows, grids=(), side="right"):
    """A processor's output for rows of ids; patches count up so that their places can be read."""
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), 7), np.zeros((len(rows), longest), np.int64)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[b, place], mask[b, place] = row, 1
    out = {"input_ids": ids, "attention_mask": mask}
    if grids:
        total = sum(h * w for h, w in grids)
        out["pixel_values"] = np.arange(1, total + 1)[:, None] * np.ones(5, np.float32)
        out["image_grid_thw"] = np.array([(1, h, w) for h, w in grids])
    return out


def test_text_positions_count_up():
    got = rope_positions(np.arange(4), None, image_token_id=IMAGE, spatial_merge_size=2)
    np.testing.assert_array_equal(got, [[0, 1, 2, 3]] * 3)


def test_image_positions_by_hand():
    """Two words, 2 x 3 merged tokens, two words: time waits, and 2 + max(2, 3) follows."""
    ids = np.array([1, 2, *[IMAGE] * 6, 3, 4])
    got = rope_positions(ids, (1, 4, 6), image_token_id=IMAGE, spatial_merge_size=2)
    np.testing.assert_array_equal(
        got,
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
        ],
    )


def test_patches_come_block_by_block():
    np.testing.assert_array_equal(
        patch_grid((1, 2, 4), 2),
        [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)],
    )


def test_interpolation_aligns_corners():
    """A 2 x 5 image over a 3 x 3 table: rows hit its ends, columns fall half way between."""
    patches = np.array([(0, 0), (1, 4), (0, 1), (1, 3)])
    indices, weights = interpolation(patches, (1, 2, 5), 3)
    table = np.arange(9.0)
    np.testing.assert_allclose((table[indices] * weights).sum(-1), [0, 8, 0.5, 7.5])
    assert indices.min() >= 0 and indices.max() < 9
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1)


def test_interpolation_of_a_single_row_stays_at_the_start():
    indices, weights = interpolation(np.array([(0, 0), (0, 1)]), (1, 1, 2), 3)
    np.testing.assert_allclose((np.arange(9.0)[indices] * weights).sum(-1), [0, 2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_packed_to_the_front(side):
    """Left and right padding give the same arrays, so the prefix of a template is a plain slice."""
    encoded = prompt([1, 2, 3], [4, *[IMAGE] * 2, 5, 6], grids=[(2, 4)], side=side)
    out = qwen_inputs(encoded, **NUMBERS, text_buckets=(8,), patch_buckets=(12,))
    np.testing.assert_array_equal(
        out["input_ids"], [[1, 2, 3, 0, 0, 0, 0, 0], [4, 99, 99, 5, 6, 0, 0, 0]]
    )
    np.testing.assert_array_equal(out["attention_mask"].sum(1), [3, 5])
    np.testing.assert_array_equal(out["image_index"], [[-1] * 8, [-1, 0, 1, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(out["patch_mask"].sum(1), [0, 8])
    np.testing.assert_array_equal(out["pixel_values"][1, :, 0], [*range(1, 9), 0, 0, 0, 0])
    assert not out["pixel_values"][0].any()
    shapes = {name: (array.shape, array.dtype.name) for name, array in out.items()}
    assert shapes == {
        "input_ids": ((2, 8), "int32"),
        "attention_mask": ((2, 8), "bool"),
        "position_ids": ((2, 3, 8), "int32"),
        "pixel_values": ((2, 12, 5), "float32"),
        "patch_mask": ((2, 12), "bool"),
        "patch_positions": ((2, 12, 2), "int32"),
        "interp_indices": ((2, 12, 4), "int32"),
        "interp_weights": ((2, 12, 4), "float32"),
        "image_index": ((2, 8), "int32"),
    }


def test_images_go_to_the_rows_that_ask_for_them():
    encoded = prompt([1, *[IMAGE] * 2], [2], [IMAGE, 3], grids=[(2, 4), (2, 2)])
    out = qwen_inputs(encoded, **NUMBERS, text_buckets=(4,), patch_buckets=(8,))
    np.testing.assert_array_equal(out["patch_mask"].sum(1), [8, 0, 4])
    np.testing.assert_array_equal(out["pixel_values"][2, :5, 0], [9, 10, 11, 12, 0])


def test_text_alone_has_no_image_arrays_unless_forced():
    encoded = prompt([1, 2])
    names = {"input_ids", "attention_mask", "position_ids"}
    assert set(qwen_inputs(encoded, **NUMBERS)) == names
    forced = qwen_inputs(encoded, **NUMBERS, force_images=True)
    assert forced["pixel_values"].shape == (1, PATCH_BUCKETS[0], 5)
    assert not forced["patch_mask"].any() and (forced["image_index"] == -1).all()
    del encoded["attention_mask"]
    assert set(qwen_inputs(encoded, **NUMBERS)) == names


def test_bucket():
    assert [bucket(n, (4, 8)) for n in (0, 4, 5, 8)] == [4, 4, 8, 8]
    assert bucket(534, TEXT_BUCKETS) == 640
    assert bucket(512 * 512 // 16**2, PATCH_BUCKETS) == 1024
    with pytest.raises(ValueError, match="prompt length 9 exceeds the largest bucket, 8"):
        bucket(9, (4, 8), "prompt length")


def drop(encoded, key):
    return {k: v for k, v in encoded.items() if k != key}


ONE = prompt([1, IMAGE, 2], grids=[(2, 2)])
REFUSED = {
    "prompt length 3 exceeds the largest bucket, 2": (ONE, {"text_buckets": (2,)}),
    "image patches 4 exceeds the largest bucket, 3": (ONE, {"patch_buckets": (3,)}),
    "bucket 6 is no multiple of 4": (ONE, {"patch_buckets": (6,)}),
    "1 image tokens, but its image of 2x4 patches makes 2": (
        prompt([1, IMAGE], grids=[(2, 4)]),
        {},
    ),
    "prompt 0 has 2 images; at most one": (
        prompt([IMAGE, 1, IMAGE], grids=[(2, 2), (2, 2)]),
        {},
    ),
    "prompt 1 has image tokens, but there is no image": (
        prompt([IMAGE, 1], [IMAGE, 1], grids=[(2, 2)]),
        {},
    ),
    "1 images were given, but 0 prompts": (prompt([1], grids=[(2, 2)]), {}),
    "must be given together": (drop(ONE, "image_grid_thw"), {}),
    "patches, not multiples of 2": (prompt([IMAGE, 1], grids=[(2, 3)]), {}),
    "pixel_values has shape": (ONE, {"patch_dim": 6}),
    "3 frames": (
        ONE | {"image_grid_thw": np.array([(3, 2, 2)]), "pixel_values": np.zeros((12, 5))},
        {},
    ),
    "videos are not supported": ({**ONE, "pixel_values_videos": np.zeros(1)}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_clear_line(message):
    encoded, options = REFUSED[message]
    with pytest.raises(ValueError) as error:
        qwen_inputs(encoded, **{**NUMBERS, **options})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_config_refuses_everything_it_cannot_do_at_once():
    settings = TINY.to_dict()
    settings["text_config"] |= {"hidden_act": "relu", "num_key_value_heads": 3}
    settings["text_config"]["rope_scaling"]["rope_type"] = "yarn"
    settings["vision_config"] |= {"num_position_embeddings": 50, "out_hidden_size": 8}
    settings["vision_config"]["deepstack_visual_indexes"] = [0, 9]
    settings["quantization_config"] = {"bits": 4}
    with pytest.raises(ValueError) as error:
        Qwen3VLConfig.from_dict(settings)
    for part in (
        "text_config.hidden_act is 'relu', supported is 'silu'",
        "rope_type is 'yarn'",
        "quantization_config",
        "num_key_value_heads 3",
        "num_position_embeddings 50 is no square",
        "out_hidden_size 8 differs",
        "deepstack_visual_indexes [0, 9]",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="model_type is 'qwen2_5_vl', supported is 'qwen3_vl'"):
        Qwen3VLConfig.from_dict({"model_type": "qwen2_5_vl"})


def test_config_reads_the_released_file():
    """The settings of Qwen3-VL-2B-Instruct's own config.json."""
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    released = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": rope,
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17],
            "depth": 24,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }
    assert Qwen3VLConfig.from_dict(released) == QWEN3_VL_2B
    assert QWEN3_VL_2B.input_numbers == {
        "image_token_id": 151655,
        "spatial_merge_size": 2,
        "grid_side": 48,
        "patch_dim": 1536,
    }


def test_neither_inputs_nor_config_import_a_framework():
    code = (
        "import sys; import dreamlite_jax.data.qwen_inputs, dreamlite_jax.models.qwen3_vl.config; "
        "print(sorted({'jax', 'torch', 'flax', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
