"""The bundle for the phone: made, read, refused where it is broken, and at work beside JAX."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from commands import only_flags_of, run
from jsonschema import Draft202012Validator
from PIL import Image

from convert import flatbuffer, lowering, manifest, parts, verify
from dreamlite_jax import cli, pretrained, tiny
from dreamlite_jax.models import unet_config

pytestmark = pytest.mark.e2e

SIZE = ("--height=32", "--width=64")
LENGTHS = ("--text_lengths=320", "--prompt_length=60")


def nano_model(folder, mobile):
    """A random model directory with the smallest U-Net."""
    tiny.tiny_model_dir(folder, seed=3, mobile=mobile)
    params = tiny.random_params(pretrained.UNET, unet_config.NANO, 3)
    pretrained.write(folder, pretrained.UNET, unet_config.NANO, params)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: nano_model(folder / kind, kind == "mobile") for kind in ("base", "mobile")}


STEPS = 2
TEXT_PARTS = {"base": 1, "mobile": 2}


@pytest.fixture(scope="module")
def bundles(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for kind, model in models.items():
        arguments = [f"--model={model}", f"--out={folder / kind}", "--nogpu", "--zip"]
        arguments.append(f"--text_parts={TEXT_PARTS[kind]}")
        assert run("convert.bundle", *arguments, *SIZE, *LENGTHS, f"--steps={STEPS}") == 0
    return folder


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles / "mobile"


def test_what_a_bundle_holds(bundle):
    made = manifest.read(bundle)
    assert made["components"].keys() == parts.PARTS.keys()
    assert made["size"] == {"height": 32, "width": 64}
    sigmas = made["schedule"]["sigmas"]
    assert len(sigmas) == STEPS + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    np.testing.assert_allclose(made["schedule"]["timesteps"], 1000 * np.array(sigmas[:-1]))
    report = json.loads((bundle / "gpu_report.json").read_text())
    for name, counts in report.items():
        assert counts["operations"] == flatbuffer.counts(bundle / name)
        assert counts["delegated"] is None  # never claimed without having been seen
        assert min(counts["psnr_of_float32_weights"].values()) >= verify.DEMANDS["cpu", "fp32"]
    assert {"unet.tflite", "tokenizer/tokenizer.json", "README.md"} <= made["files"].keys()
    quality = json.loads((bundle / "quality.json").read_text())
    assert quality["edit: picture"]["psnr"] >= 35 and quality["edit: picture"]["ssim"] > 0.99
    assert (bundle.parent / "mobile.zip").is_file()
    assert not list(bundle.rglob(".*"))


def test_the_text_tower_in_parts(bundles):
    """In order, each going on where the one before ended; all other tests run with them."""
    for kind, count in TEXT_PARTS.items():
        entries = manifest.read(bundles / kind)["components"]["text_encoder"]
        names = ["text_encoder_1", "text_encoder_2"] if count == 2 else ["text_encoder"]
        assert [entry["file"] for entry in entries] == [f"{name}.tflite" for name in names]
        shapes = [
            [tensor["shape"] for tensor in entry["signatures"]["encode"][side]]
            for entry in entries
            for side in ("inputs", "outputs")
        ]
        assert shapes[1:-1:2] == shapes[2::2]
    report = json.loads((bundles / "mobile" / "gpu_report.json").read_text())
    assert {"text_encoder_1.tflite", "text_encoder_2.tflite"} <= report.keys()


def test_the_schema_is_a_schema_and_leaves_nothing_open():
    Draft202012Validator.check_schema(manifest.schema())
    assert manifest.schema()["additionalProperties"] is False


@pytest.mark.parametrize("mode", ["generate", "edit"])
@pytest.mark.parametrize("kind", ["mobile", "base"])
def test_pictures_are_those_of_jax(mode, kind, models, bundles, tmp_path):
    """`run_bundle` with half-precision weights beside `launch.sample`, from the same noise."""
    made = bundles / kind
    entry = manifest.read(made)["golden"][mode]
    with np.load(made / entry["arrays"]) as arrays:
        np.save(tmp_path / "noise.npy", arrays["noise"].transpose(0, 2, 3, 1))
    common = [f"--prompt={entry['prompt']}", f"--noise={tmp_path / 'noise.npy'}"]
    theirs, ours = [f"--model={models[kind]}", f"--steps={STEPS}", *SIZE], [f"--bundle={made}"]
    if mode == "edit":
        common.append(f"--image={made / entry['source']}")
        ours.append(f"--embeddings={made / entry['arrays']}")
        theirs.append("--image_guidance=1")
    assert run("sample", *theirs, *common, f"--out={tmp_path / 'jax.png'}") == 0
    assert run("convert.run_bundle", *ours, *common, f"--out={tmp_path / 'phone.png'}") == 0
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("phone", "jax"))
    assert manifest.psnr(a, b) >= 35


@pytest.fixture
def given(bundles, tmp_path):
    """A function that writes some of a golden case's arrays, without padding, as a .npz."""

    def write(mode, *names):
        with np.load(bundles / "base" / "golden" / f"{mode}.npz") as arrays:
            found = {name: arrays[name] for name in names}
        for name in {"context", "null_context"} & {*names}:
            mask = found[name.replace("context", "mask")]
            n = int(mask.sum())
            found[name], found[name.replace("context", "mask")] = found[name][:, :n], mask[:, :n]
        np.savez(tmp_path / "given.npz", **found)
        return tmp_path / "given.npz"

    return write


def drawn(bundle, file, *arguments):
    code = run("convert.run_bundle", f"--bundle={bundle}", f"--out={file}", *arguments)
    return np.asarray(Image.open(file)) if code == 0 else None


NULL = ("null_context", "null_mask")


def test_given_embeddings_are_guided_as_prompts_are(bundles, given, tmp_path):
    """A base model's: generating needs no null of its own. Of fewer tokens than the U-Net takes."""
    base, out = bundles / "base", tmp_path / "a.png"
    whole = drawn(base, out, f"--embeddings={base / 'golden' / 'generate.npz'}")
    for names in (NULL, ()):
        file = given("generate", "context", "mask", *names)
        np.testing.assert_array_equal(drawn(base, out, f"--embeddings={file}"), whole)


def test_a_guided_edit_needs_the_empty_prompt_with_the_picture(bundles, given, tmp_path, capsys):
    base, out = bundles / "base", tmp_path / "a.png"
    image = f"--image={base / 'golden' / 'generate.png'}"
    whole = drawn(base, out, image, f"--embeddings={base / 'golden' / 'edit.npz'}")
    file = given("edit", "context", "mask", *NULL)
    np.testing.assert_array_equal(drawn(base, out, image, f"--embeddings={file}"), whole)
    file = given("edit", "context", "mask")
    assert drawn(base, out, image, f"--embeddings={file}") is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "takes null_context and null_mask, too" in err


def test_a_receiver_needs_no_jax():
    code = (
        "import sys, convert.run_bundle; print([m for m in ('jax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_golden_verdicts(bundle, capsys):
    """By the command that the bundle's README has for its receiver."""
    lines = (bundle / "README.md").read_text("utf-8").splitlines()
    (typed,) = [line for line in lines if "run_bundle" in line and "=cpu" in line]
    module, *arguments = typed.replace("PATH", str(bundle)).split()[2:]
    assert run(module, *arguments) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == 2 * STEPS + 4 and "FAIL" not in out


def test_golden_on_the_gpu(bundle, gpu):
    """In a process of its own, as people run it: the driver's libraries stay out of this one."""
    arguments = [f"--bundle={bundle}", "--golden", "--accelerator=gpu", "--precision=fp16"]
    for _ in range(8):  # a slow machine compiles shaders for longer than LiteRT waits
        command = [sys.executable, "-m", "convert.run_bundle", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if "shaders are being compiled" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ok ") == 2 * STEPS + 4 and "FAIL" not in done.stdout
    assert "accelerator_registry" not in done.stderr  # nothing of LiteRT's but errors


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def _rewritten(folder, change):
    made = json.loads((folder / manifest.NAME).read_text())
    change(made)
    (folder / manifest.NAME).write_text(json.dumps(made))


def flip_byte(folder):
    content = bytearray((folder / "unet.tflite").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "unet.tflite").write_bytes(content)


def lose_file(folder):
    (folder / "vae_decoder.tflite").unlink()


def shorten_file(folder):
    content = (folder / "text" / "embeddings.npy").read_bytes()
    (folder / "text" / "embeddings.npy").write_bytes(content[:-1])


def other_version(folder):
    _rewritten(folder, lambda made: made.update(schema_version=2))


def rename_tensor(folder):
    def change(made):
        signature = made["components"]["unet"][0]["signatures"]["denoise"]
        signature["inputs"][0]["name"] = "latents"

    _rewritten(folder, change)


def lose_key(folder):
    _rewritten(folder, lambda made: made["schedule"].pop("sigmas"))


def no_json(folder):
    (folder / manifest.NAME).write_text("{")


def no_manifest(folder):
    (folder / manifest.NAME).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_byte, "unet.tflite: is damaged"),
        (lose_file, "vae_decoder.tflite: is missing"),
        (shorten_file, "embeddings.npy: .* bytes, should be"),
        (other_version, "schema version 2, this reads 1"),
        (rename_tensor, "latents"),
        (lose_key, "'sigmas' is a required property"),
        (no_json, "not valid JSON"),
        (no_manifest, "is it a bundle"),
    ],
)
def test_broken_bundles_are_refused(damage, reason, copy, capsys):
    damage(copy)
    with pytest.raises(manifest.BundleError, match=reason):
        manifest.read(copy)
    assert run("convert.run_bundle", f"--bundle={copy}", "--golden") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missed_golden_output_is_a_failure(copy, capsys):
    made = manifest.read(copy)
    name = made["golden"]["generate"]["arrays"]
    with np.load(copy / name) as arrays:
        np.savez(copy / name, **{**arrays, "latents": -arrays["latents"]})
    size, digest = (copy / name).stat().st_size, manifest.digest(copy / name)
    _rewritten(copy, lambda made: made["files"][name].update(bytes=size, sha256=digest))
    assert run("convert.run_bundle", f"--bundle={copy}", "--golden") == 2
    out, err = capsys.readouterr()
    assert "FAIL generate: step 1" in out and f"{STEPS} golden outputs were not reached" in err


def test_wrong_use_is_one_line(models, bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lowering, "write", None)  # nothing is worth lowering
    model, out = f"--model={models['mobile']}", f"--out={tmp_path / 'b'}"
    picture = bundle / "golden" / "edit.png"
    long = f"--prompt={'boat ' * 90}"
    wrong = {
        "odd size": ("bundle", [model, out, "--nogpu", "--height=40"], "multiple of 16"),
        "there already": ("bundle", [model, f"--out={bundle}", "--nogpu"], "exists"),
        "no model": ("bundle", ["--model=nowhere", out, "--nogpu"], "no such directory"),
        "weights": ("bundle", [model, out, "--nogpu", "--weights=int3"], "int3"),
        "lengths": ("bundle", [model, out, "--nogpu", "--text_lengths=128 384"], "written 128,384"),
        "no length": ("bundle", [model, out, "--nogpu", "--text_lengths="], "written 128,384"),
        "no room": ("bundle", [model, out, "--nogpu", "--text_lengths=40"], "has room for 40"),
        "no prompt": ("bundle", [model, out, "--nogpu", "--prompt_length=9"], "has room for 9"),
        "no parts": ("bundle", [model, out, "--nogpu", "--text_parts=0"], "text_parts"),
        "too many parts": ("bundle", [model, out, "--nogpu", "--text_parts=4"], "has 3 layers"),
        "prompt": ("run_bundle", [f"--bundle={bundle}", out], "give --prompt"),
        "long": ("run_bundle", [f"--bundle={bundle}", out, long], "the limit is 60"),
        "edit": ("run_bundle", [f"--bundle={bundle}", out, f"--image={picture}"], "--embeddings"),
        "no out": ("run_bundle", [f"--bundle={bundle}", "--prompt=a"], "--out"),
    }
    for name, (command, arguments, expected) in wrong.items():
        capsys.readouterr()
        assert run(f"convert.{command}", *arguments) == 2, name
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and expected in err, (name, err)
        assert not (tmp_path / "b").exists(), name


@pytest.fixture
def build():
    """The module of the command."""
    with only_flags_of("convert.bundle") as module:
        yield module


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder with somebody's files, where commands run, and an empty one in it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lowering, "write", None)  # what is refused is refused before
    return tmp_path


def test_only_a_bundle_is_overwritten(build, models, bundle, folders, capsys):
    model = models["mobile"]
    before = sorted(file for file in model.rglob("*"))
    for out in (model, ".", "note.txt"):
        arguments = [f"--model={model}", f"--out={out}", "--nogpu", "--overwrite"]
        assert run("convert.bundle", *arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "is no bundle" in err, err
    assert sorted(file for file in model.rglob("*")) == before
    assert (folders / "note.txt").read_text() == "mine"
    build.check_place(folders / "empty", overwrite=False)
    build.check_place(bundle, overwrite=True)


def test_only_on_demand_a_zip_is_overwritten(build, models, folders, capsys):
    archive = folders / "new.zip"
    archive.write_text("mine")
    assert (
        run("convert.bundle", f"--model={models['mobile']}", "--out=new", "--nogpu", "--zip") == 2
    )
    assert "new.zip exists" in capsys.readouterr().err and archive.read_text() == "mine"
    build.check_archive(archive, overwrite=True)
    (folders / "empty.zip").mkdir()
    with pytest.raises(cli.CommandError, match="exists"):
        build.check_archive(folders / "empty.zip", overwrite=True)


def test_a_zip_appears_whole_or_not_at_all(build, bundle, folders, monkeypatch):
    archive = bundle.parent / "mobile.zip"
    with zipfile.ZipFile(archive) as found:
        assert {name for name in found.namelist() if not name.endswith("/")} == {
            file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()
        }
        assert found.testzip() is None
    (folders / "old.zip").write_text("mine")
    monkeypatch.setattr(zipfile.ZipFile, "write", None)
    with pytest.raises(TypeError):
        build.write_zip(bundle, folders / "old.zip")
    assert (folders / "old.zip").read_text() == "mine"
    assert {file.name for file in folders.iterdir()} == {"empty", "note.txt", "old.zip"}


def test_files_that_are_no_gpu_variants_are_named(build, models, folders, monkeypatch, capsys):
    reports = {
        "a.tflite": {"delegated": True, "reason": ""},
        "b.tflite": {"delegated": False, "reason": "GATHER_ND is not supported"},
        "c.tflite": {"delegated": None, "reason": "not tried"},
    }

    def made(model, out, plan, gpu):
        out.mkdir()
        pretrained.write_json(out / "gpu_report.json", reports)

    monkeypatch.setattr(build, "build", made)
    assert run("convert.bundle", f"--model={models['mobile']}", "--out=new", "--nogpu") == 0
    out, err = capsys.readouterr()
    assert err == "warning: b.tflite is no GPU variant: GATHER_ND is not supported\n"
    assert out.startswith("new: ")


def test_what_the_accelerator_refuses_is_said_of_the_file_alone(build, folders, monkeypatch):
    """Not of the folder that it lies in for now."""
    file = folders / "unet.tflite"

    def run(file, signature, inputs, accelerator, precision):
        if accelerator == "gpu":
            raise verify.VerifyError(f"{file} on the gpu: {file} is not supported")
        return [np.arange(3.0)]

    monkeypatch.setattr(verify, "run", run)
    graph = lowering.Graph("f", None, (), lowering.Tensor("y", (3,), ""))
    found = build._measured(file, [graph], [verify.Case({}, np.arange(3.0))], True, 45)
    assert found["delegated"] is False
    assert found["reason"] == "unet.tflite on the gpu: unet.tflite is not supported"
