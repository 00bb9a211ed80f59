"""What `convert.run_bundle` is given, before any graph is opened: a bundle here is its manifest."""

import numpy as np
import pytest
from commands import run

from convert import manifest, parts, phone, vulkan
from dreamlite_jax import tiny
from dreamlite_jax.models import unet_config

CONFIG = tiny.config()._replace(unet=unet_config.NANO)
LENGTHS, WIDTH = (12, 20), 64
GUIDANCE = 3.5


def signatures(config, height, width, lengths):
    """Of a U-Net, as a manifest has them."""
    return {
        graph.signature: {"inputs": [{"name": t.name, "shape": [*t.shape]} for t in graph.inputs]}
        for graph in parts.part("unet", config, {}, height, width, lengths)
    }


def bundle(folder, guidance=GUIDANCE):
    """In its folder is only the empty prompt's context, 3 tokens."""
    np.savez(folder / "null.npz", context=np.full((1, 3, WIDTH), 0.25, np.float32))
    unet = {"file": "unet.tflite", "signatures": signatures(CONFIG, 32, 64, LENGTHS)}
    made = {
        "components": {"unet": [unet]},
        "schedule": {"guidance": guidance},
        "size": {"height": 32, "width": 64},
        "latent": {"factor": 8, "channels": 4},
        "text": {"lengths": [*LENGTHS], "null": "null.npz"},
    }
    return phone.Bundle(folder, made)


def context(n, width=WIDTH):
    return np.random.default_rng(n).standard_normal((1, n, width), np.float32)


def test_a_length_finds_its_signature_whatever_else_is_as_long():
    """The released U-Net's sinusoids are of 256 and 512 numbers, in every signature."""
    found = signatures(parts.random_config("dreamlite"), 1024, 1024, (128, 256, 512))
    others = [t["shape"] for t in found["denoise"]["inputs"] if "sinusoids" in t["name"]]
    assert others == [[1, 256], [1, 512]]
    names = {n: phone.signature_for(found, n) for n in (None, 128, 256, 512)}
    assert names == {None: "denoise", 128: "denoise", 256: "denoise_256", 512: "denoise_512"}


@pytest.mark.parametrize("n, length", [(1, 12), (12, 12), (13, 20), (20, 20)])
def test_embeddings_of_any_length_are_padded(n, length, tmp_path):
    """By their mask, wherever that has its zeros."""
    given, mask = np.concatenate([context(n), context(30)], 1), np.arange(n + 30)[None] < n
    for array, kept in ((given, mask), (given[:, ::-1], mask[:, ::-1])):
        np.savez(tmp_path / "e.npz", context=array, mask=kept)
        texts, null = phone.read_embeddings(bundle(tmp_path, 1), tmp_path / "e.npz", edit=True)
        assert null is None and texts.context.shape == (1, length, WIDTH)
        np.testing.assert_array_equal(texts.context[:, :n], array[kept][None])
        np.testing.assert_array_equal(texts.mask, np.arange(length)[None] < n)
        assert not texts.context[:, n:].any()


@pytest.mark.parametrize("n, m, length", [(5, 2, 12), (13, 2, 20), (5, 13, 20)])
def test_a_text_and_the_empty_prompt_are_of_one_length(n, m, length, tmp_path):
    made, file = bundle(tmp_path), tmp_path / "e.npz"
    arrays = {"context": context(n), "mask": np.ones((1, n))}
    np.savez(file, **arrays, null_context=context(m), null_mask=np.ones((1, m)))
    for edit in (False, True):
        texts, null = phone.read_embeddings(made, file, edit)
        assert texts.context.shape == null.context.shape == (1, length, WIDTH)
        assert texts.mask.sum() == n and null.mask.sum() == m
    np.savez(file, **arrays)
    texts, null = phone.read_embeddings(made, file, edit=False)
    np.testing.assert_array_equal(null.context[:, :3], phone.empty_prompt(made))
    assert null.context.shape == texts.context.shape and null.mask.sum() == 3
    with pytest.raises(
        phone.PhoneError, match=r"guidance is 3\.5, so .* null_context and null_mask"
    ):
        phone.read_embeddings(made, file, edit=True)


FITTING = {"context": context(4), "mask": np.ones((1, 4))}
REQUESTS = {"prompts": np.array(["a", "b"]), "noise": np.zeros((2, 4, 8, 4), np.float32)}
SOURCE = {"source": np.zeros((2, 32, 64, 3), np.uint8)}
TEXTS = {"context": np.zeros((2, 4, WIDTH)), "mask": np.ones((2, 4))}


@pytest.mark.parametrize(
    "flag, given, expected",
    [
        ("embeddings", {"context": context(4)}, "has no mask; expected arrays context, mask"),
        ("embeddings", {**FITTING, "null_context": context(4)}, "has no null_mask"),
        ("embeddings", {**FITTING, "context": context(4, 32)}, "should be [1, 4, 64] and [1, 4]"),
        ("embeddings", {**FITTING, "mask": np.ones(4)}, "should be [1, 4, 64] and [1, 4]"),
        ("embeddings", {"context": context(21), "mask": np.ones((1, 21))}, "takes at most 20"),
        ("embeddings", context(4), "not a readable .npz file"),
        ("embeddings", "text", "not a readable .npz file"),
        ("embeddings", None, "No such file"),
        ("noise", {"noise": np.zeros((1, 4, 8, 4))}, "not a readable .npy file"),
        ("noise", "text", "not a readable .npy file"),
        ("noise", None, "No such file"),
        ("noise", np.zeros((1, 4, 8, 4)), "float64 [1, 4, 8, 4], expected float32"),
        ("noise", np.zeros((1, 4, 4, 8), np.float32), "expected float32 [1, 4, 8, 4]"),
        ("requests", {"prompts": REQUESTS["prompts"]}, "has no noise"),
        ("requests", {"noise": REQUESTS["noise"]}, "has no prompts"),
        ("requests", {**REQUESTS, "prompts": np.array(["a"])}, "one of each for every request"),
        ("requests", {**REQUESTS, "prompts": np.array("a")}, "one of each for every request"),
        ("requests", {**REQUESTS, "noise": np.zeros((2, 8, 8, 4))}, "should be [4, 8, 4]"),
        ("requests", {**REQUESTS, **SOURCE}, "needs context and mask, too"),
        ("requests", {**REQUESTS, **SOURCE, **TEXTS}, "for mobile models only"),
        ("requests", "text", "not a readable .npz file"),
        ("requests", None, "No such file"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_a_line(
    flag, given, expected, tmp_path, monkeypatch, capsys
):
    made = bundle(tmp_path)
    monkeypatch.setattr(manifest, "read", lambda folder: made.manifest)
    file = tmp_path / f"given.{'npy' if flag == 'noise' else 'npz'}"
    if isinstance(given, str):
        file.write_text(given)
    elif given is not None:
        with file.open("wb") as stream:
            np.savez(stream, **given) if isinstance(given, dict) else np.save(stream, given)
    arguments = [f"--bundle={tmp_path}", f"--out={tmp_path / 'a.png'}", f"--{flag}={file}"]
    if flag == "noise":
        np.savez(tmp_path / "e.npz", **FITTING)
        arguments.append(f"--embeddings={tmp_path / 'e.npz'}")
    assert run("convert.run_bundle", *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and expected in err, err


def test_without_a_driver_of_ours_a_warning_says_where_one_is_had(tmp_path, monkeypatch, capsys):
    for name in vulkan.SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vulkan, "FOLDER", tmp_path)
    arguments = ["--bundle=nowhere", "--golden", "--accelerator=gpu"]
    assert run("convert.run_bundle", *arguments) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "make gpu-driver" in warning and "VK_DRIVER_FILES" in warning
    assert error.startswith("error: nowhere")
