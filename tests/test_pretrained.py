"""Model directories: bit-exact round trips, little memory, and clear words about what is wrong."""

import dataclasses
import json
import pathlib
import tracemalloc

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dreamlite_jax import pretrained
from dreamlite_jax.models.autoencoder import TINY as TINY_AUTOENCODER
from dreamlite_jax.models.qwen3_vl.config import TINY as TINY_ENCODER
from dreamlite_jax.models.unet_config import NANO, TINY
from dreamlite_jax.pretrained import AUTOENCODER, TEXT_ENCODER, UNET, ModelDirectoryError
from dreamlite_jax.tiny import random_params

SMALL = dataclasses.replace(
    TINY,
    block_out_channels=(16, 32, 48),
    layers_per_block=1,
    transformer_layers_per_block=1,
    cross_attention_dim=40,
    encoder_hid_dim=24,
)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def params():
    return random_params(UNET, SMALL, 0)


@pytest.fixture
def model_dir(tmp_path, params):
    pretrained.write(tmp_path, UNET, SMALL, params)
    return tmp_path


def change(model_dir, edit):
    """Lets `edit` change the tensors of the written U-Net."""
    file = model_dir / "unet" / FILE
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def error_of(model_dir) -> str:
    with pytest.raises(ModelDirectoryError) as error:
        pretrained.read(model_dir, UNET)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("limit", [10**9, 10**5])
def test_round_trip_is_bit_exact(limit, tmp_path, params):
    pretrained.write(tmp_path, UNET, SMALL, params, max_shard_bytes=limit)
    config, again = pretrained.read(tmp_path, UNET)
    assert config == SMALL
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_table_maps_both_ways(params):
    table = pretrained.tensor_table(params)
    assert len({row.path for row in table}) == len({row.name for row in table}) == len(table)
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    row = next(row for row in table if row.name == "down_blocks.0.resnets.0.conv1.depthwise.weight")
    assert row.path == ("down_blocks_0", "resnets_0", "conv1", "depthwise", "kernel")
    assert row.to_file(kernel).shape == (5, 4, 2, 3)
    np.testing.assert_array_equal(row.to_parameter(row.to_file(kernel)), kernel)


def test_reading_holds_one_extra_tensor(tmp_path):
    """Of a network with large tensors that follow each other; what is read is given away at
    once."""
    text = dataclasses.replace(TINY_ENCODER.text, num_hidden_layers=2, intermediate_size=40_000)
    config = dataclasses.replace(TINY_ENCODER, text=text)
    shapes = pretrained.param_shapes(TEXT_ENCODER, config)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    pretrained.write(tmp_path, TEXT_ENCODER, config, zeros)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(zeros))
    del zeros
    pretrained.read(tmp_path, TEXT_ENCODER, put=lambda path, array: None)  # so caches are warm
    tracemalloc.start()
    pretrained.read(tmp_path, TEXT_ENCODER, put=lambda path, array: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest > 10**7
    assert peak < 2 * largest + 3 * 10**6  # the parameter, one extra copy, and small things


def test_no_such_place(tmp_path, model_dir):
    with pytest.raises(ModelDirectoryError, match=r"nowhere: no such directory"):
        pretrained.read(tmp_path / "nowhere", UNET)
    with pytest.raises(ModelDirectoryError, match=r"has no folder vae/"):
        pretrained.read(model_dir, AUTOENCODER)
    (model_dir / "unet" / "config.json").unlink()
    assert "config.json: no such file" in error_of(model_dir)


def test_no_weights(model_dir):
    (model_dir / "unet" / FILE).rename(model_dir / "unet" / "diffusion_pytorch_model.bin")
    assert f"neither {FILE} nor {FILE}.index.json" in error_of(model_dir)


def test_all_wrong_tensors_are_named(model_dir):
    def edit(tensors):
        del tensors["conv_in.bias"], tensors["mid_block.resnets.0.norm1.weight"]
        tensors["lora.up"] = np.zeros(3, np.float32)
        tensors["conv_out.bias"] = np.zeros(7, np.float32)

    change(model_dir, edit)
    message = error_of(model_dir)
    assert "2 missing tensors: conv_in.bias, mid_block.resnets.0.norm1.weight" in message
    assert "1 tensors that this network does not have: lora.up" in message
    assert "1 tensors of another shape: conv_out.bias [7] instead of [4]" in message


def test_numbers_that_are_none(model_dir):
    def edit(tensors):
        tensors["conv_in.bias"][0] = np.nan
        tensors["conv_out.weight"][0, 0, 0, 0] = np.inf

    change(model_dir, edit)
    assert "not a number or infinite: conv_in.bias, conv_out.weight" in error_of(model_dir)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_file_cut_short(keep, model_dir):
    file = model_dir / "unet" / FILE
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file}: damaged or cut short" in error_of(model_dir)


def test_a_missing_shard(tmp_path, params):
    pretrained.write(tmp_path, UNET, SMALL, params, max_shard_bytes=10**5)
    second = sorted((tmp_path / "unet").glob("*-00002-of-*.safetensors"))[0]
    second.unlink()
    assert f"names missing files: {second.name}" in error_of(tmp_path)


def test_a_damaged_shard_is_named(tmp_path, params):
    pretrained.write(tmp_path, UNET, SMALL, params, max_shard_bytes=10**5)
    second = sorted((tmp_path / "unet").glob("*-00002-of-*.safetensors"))[0]
    second.write_bytes(second.read_bytes()[:-4])
    assert f"{second}: damaged or cut short" in error_of(tmp_path)


def test_the_index_must_be_sound(tmp_path, params):
    pretrained.write(tmp_path, UNET, SMALL, params, max_shard_bytes=10**5)
    folder = tmp_path / "unet"
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    name, tensor = next(iter(tensors.items()))
    save_file({**load_file(second), name: tensor}, second)
    assert f"tensors in more than one file: {name} ({first.name}" in error_of(tmp_path)
    index = folder / f"{FILE}.index.json"
    for target in ("../elsewhere.safetensors", "/x.safetensors", 7, None):
        weight_map = json.loads(index.read_text())["weight_map"] | {name: target}
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert "has no weight_map from tensors to files beside it" in error_of(tmp_path)


def test_dtypes_that_numpy_does_not_know(model_dir):
    file = model_dir / "unet" / FILE
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data, start = content[8 + length :], header["conv_in.bias"]["data_offsets"][0]
    for entry in header.values():  # conv_in.bias becomes a quarter of its bytes
        if "data_offsets" in entry and entry["data_offsets"][0] > start:
            entry["data_offsets"] = [place - 48 for place in entry["data_offsets"]]
    header["conv_in.bias"] = {
        "dtype": "F8_E4M3",
        "shape": [16],
        "data_offsets": [start, start + 16],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = data[: start + 16] + data[start + 64 :]
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert "dtype is not supported" in error_of(model_dir)


def test_a_failed_rename_leaves_what_was_there(model_dir, params, monkeypatch):
    before, rename = (model_dir / "unet" / FILE).read_bytes(), pathlib.Path.rename

    def fails_once(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        pretrained.write(model_dir, UNET, SMALL, params)
    assert (model_dir / "unet" / FILE).read_bytes() == before
    assert [p.name for p in model_dir.iterdir()] == ["unet"]


def test_places_that_are_no_folders(tmp_path, params):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet").symlink_to(elsewhere)
    pretrained.write(tmp_path / "model", UNET, SMALL, params)
    assert (tmp_path / "model" / "unet").is_symlink() and (elsewhere / FILE).is_file()
    assert (elsewhere / FILE).stat().st_mode == (elsewhere / "config.json").stat().st_mode
    (tmp_path / "unet").write_text("a file")
    with pytest.raises(ModelDirectoryError, match="is a file, should be a folder"):
        pretrained.write(tmp_path, UNET, SMALL, params)


def test_unusable_config(model_dir):
    file = model_dir / "unet" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "dropout": 0.1, "magic": 1, "act_fn": "gelu"}))
    message = error_of(model_dir)
    assert str(file) in message
    for part in ("act_fn='gelu' is not supported", "dropout=0.1", "unknown setting magic=1"):
        assert part in message
    file.write_text("{")
    assert "not valid JSON" in error_of(model_dir)
    file.write_text("[]")
    assert "not a JSON object" in error_of(model_dir)


def test_a_failed_write_leaves_what_was_there(model_dir, params, monkeypatch):
    before = (model_dir / "unet" / FILE).read_bytes()

    def full_disk(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pretrained.write(model_dir, UNET, SMALL, params)
    assert (model_dir / "unet" / FILE).read_bytes() == before
    assert [p.name for p in model_dir.iterdir()] == ["unet"]


def test_writing_the_wrong_parameters(tmp_path, params):
    wrong = {**params, "conv_in": {"kernel": np.zeros((3, 3, 4, 8), np.float32)}}
    with pytest.raises(ValueError, match=r"conv_in.bias None instead of \(16,\), conv_in.weight"):
        pretrained.write(tmp_path, UNET, SMALL, wrong)
    assert not (tmp_path / "unet").exists()


def test_autoencoder_round_trip_and_file_form(tmp_path):
    params = random_params(AUTOENCODER, TINY_AUTOENCODER, 1)
    pretrained.write(tmp_path, AUTOENCODER, TINY_AUTOENCODER, params)
    config, again = pretrained.read(tmp_path, AUTOENCODER)
    assert config == TINY_AUTOENCODER
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with safe_open(tmp_path / "vae" / FILE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert "decoder.layers.2.conv.0.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("component", "config"),
    [
        (UNET, NANO),
        (AUTOENCODER, TINY_AUTOENCODER),
        (TEXT_ENCODER, TINY_ENCODER),
    ],
    ids=lambda part: getattr(part, "folder", ""),
)
def test_fresh_parameters_are_those_of_the_modules_own_initialisers(component, config):
    """Each leaf has their range and, within five standard errors, their mean and deviation."""
    module, example = component.module(config), component.example(config)
    init = jax.jit(lambda key: module.init(key, *example)["params"])
    theirs = flatten_dict(jax.device_get(init(jax.random.key(0))))
    ours = flatten_dict(pretrained.init_params(component, config, seed=0))
    assert ours.keys() == theirs.keys()
    for path, wanted in theirs.items():
        found = ours[path]
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, path
        if path[-1] in ("scale", "bias"):
            np.testing.assert_array_equal(found, wanted, err_msg=str(path))
            continue
        # Both are samples of one distribution: a difference of two means, of two deviations.
        error = wanted.std() * np.sqrt(2 / found.size)
        assert abs(found.mean() - wanted.mean()) < 5 * error, path
        assert abs(found.std() - wanted.std()) < 5 * error, path
        if path[-1] == "kernel":  # uniform: nothing lies beyond sqrt(3) deviations
            reach = np.prod(found.shape[:-1]) ** -0.5
            assert max(np.abs(found).max(), np.abs(wanted).max()) <= reach * (1 + 1e-6), path
    again = flatten_dict(pretrained.init_params(component, config, seed=0))
    other = flatten_dict(pretrained.init_params(component, config, seed=1))
    assert all(np.array_equal(ours[path], again[path]) for path in ours)
    assert not all(np.array_equal(ours[path], other[path]) for path in ours)
