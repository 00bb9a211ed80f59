"""The networks as .tflite files: against JAX on the CPU and on the GPU accelerator, with planted
faults for the lint."""

import contextlib
import os
import subprocess
import sys
import time

import flatbuffers
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from ai_edge_litert import schema_py_generated as schema
from commands import ROOT, run
from flax.traverse_util import flatten_dict
from jax import lax

from convert import flatbuffer, forms, lowering, manifest, parts, phone, quantize, verify
from convert.lowering import Graph, Tensor
from dreamlite_jax import pretrained, system, tiny
from dreamlite_jax.models import blocks, unet_config
from dreamlite_jax.models.primitives import PLAIN
from dreamlite_jax.models.qwen3_vl.model import Qwen3VL

CONFIG = tiny.config(mobile=True)._replace(unet=unet_config.NANO)
SIZE = (64, 32)  # no square, so that height and width cannot be confused
LENGTHS = (12, 20)


@pytest.fixture(scope="module")
def params():
    return {
        name: tiny.random_params(component, getattr(CONFIG, name))
        for name, component in system.NETWORKS.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory, params):
    """Each part's float32 file with its graphs."""
    folder, made = tmp_path_factory.mktemp("files"), {}
    for name, network in parts.PARTS.items():
        graphs = parts.part(name, CONFIG, params[network], *SIZE, LENGTHS, prompt_length=10)
        lowering.write(graphs, folder / f"{name}.tflite")
        made[name] = (folder / f"{name}.tflite", graphs)
    return made


def cases(name, graph, params, count=2):
    return [
        verify.case(name, graph, CONFIG, params[parts.PARTS[name]], seed) for seed in range(count)
    ]


def reached(file, graph, those, *place):
    outputs = verify.run(file, graph.signature, [case.inputs for case in those], *place)
    return min(manifest.psnr(y, case.expected) for y, case in zip(outputs, those, strict=True))


# --- The files against the networks ---------------------------------------------------------------


@pytest.mark.parametrize("name", parts.PARTS)
def test_cpu_computes_what_jax_computes(name, files, params):
    """Every signature; the U-Net at [target | condition] latents with padded masks."""
    file, graphs = files[name]
    for graph in graphs:
        assert reached(file, graph, cases(name, graph, params)) >= verify.DEMANDS["cpu", "fp32"]


@pytest.mark.parametrize("name", parts.PARTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gpu_runs_every_operation_and_computes_the_same(name, precision, files, params, gpu):
    file, graphs = files[name]
    last = graphs[-1]
    demand = verify.DEMANDS["gpu", precision]
    assert reached(file, last, cases(name, last, params), "gpu", precision) >= demand


# --- The text tower in parts ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The text tower in two files, each made of its own parameters alone, with its graph."""
    folder, made = tmp_path_factory.mktemp("tower"), []
    for file in parts.files(CONFIG, 2, ["text_encoder"]):
        own = parts.parameters(CONFIG, file, None)
        (graph,) = parts.part(file.part, CONFIG, own, *SIZE, prompt_length=10, layers=file.layers)
        lowering.write([graph], folder / file.name)
        made.append((folder / file.name, graph))
    return made


def in_parts(tower, hidden, *place):
    for file, graph in tower:
        (hidden,) = verify.run(file, graph.signature, [{"inputs_embeds": hidden}], *place)
    return hidden


def from_ids(ids, params):
    """Embeddings of token ids [1, L], and what the network that trains gives behind the prefix."""
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones(ids.shape, bool),
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), (1, 3, ids.shape[1])),
    }
    hidden = Qwen3VL(CONFIG.text_encoder).apply({"params": params}, inputs)
    table = params["model"]["language_model"]["embed_tokens"]["embedding"]
    return table[ids], np.asarray(hidden)[:, CONFIG.drop.generate :]


def test_parts_of_the_text_tower_are_the_tower(tower, files, params):
    _, (whole,) = files["text_encoder"]
    length = whole.inputs[0].shape[1]
    ids = np.random.default_rng(0).integers(0, 256, (1, length))
    embeddings, expected = from_ids(ids, params["text_encoder"])
    ours = in_parts(tower, embeddings)
    assert manifest.psnr(ours, expected) >= verify.DEMANDS["cpu", "fp32"]
    # The cases that all files are checked with are of that network, too.
    (case,) = cases("text_encoder", whole, params, 1)
    theirs = in_parts(tower, case.inputs["inputs_embeds"])
    assert manifest.psnr(theirs, case.expected) >= verify.DEMANDS["cpu", "fp32"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gpu_runs_the_text_tower_in_parts(precision, tower, files, params, gpu):
    (case,) = cases("text_encoder", files["text_encoder"][1][0], params, 1)
    ours = in_parts(tower, case.inputs["inputs_embeds"], "gpu", precision)
    assert manifest.psnr(ours, case.expected) >= verify.DEMANDS["gpu", precision]


@pytest.mark.parametrize("stored", [False, True])
def test_a_file_needs_its_own_parameters_alone(stored, cache, params):
    """Those that stand in the whole network, each in one of three files."""
    model = cache / "model" if stored else None
    config = system.read_config(model) if stored else CONFIG
    everything = pretrained.read(model, pretrained.TEXT_ENCODER)[1] if stored else None
    everything = flatten_dict(everything or params["text_encoder"])
    found = [
        flatten_dict(parts.parameters(config, file, model))
        for file in parts.files(config, 3, ["text_encoder"])
    ]
    assert not found[0].keys() & found[1].keys() and not found[1].keys() & found[2].keys()
    together = {path: leaf for some in found for path, leaf in some.items()}
    assert together.keys() == {path for path in everything if path[1] == "language_model"}
    for path, leaf in together.items():
        np.testing.assert_array_equal(leaf, everything[path])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_files_share_the_layers_evenly(count):
    made = parts.files(CONFIG, count, ["unet", "text_encoder"])
    assert made[0] == parts.File("unet", "unet") and len(made) == 1 + count
    assert [i for file in made[1:] for i in file.layers] == [0, 1, 2]
    assert {len(file.layers) for file in made[1:]} <= {3 // count, 3 // count + 1}


# --- What stands in the files ---------------------------------------------------------------------


def test_signatures_are_the_authors_with_sinusoids_from_the_host(files):
    file, _ = files["unet"]
    found = flatbuffer.signatures(file)
    assert found.keys() == {"denoise", "denoise_20"}
    assert found["denoise"] == {
        "inputs": {
            "sample": (1, 4, 8, 8),
            "timestep_sinusoids": (1, 16),
            "encoder_hidden_states": (1, 12, 64),
            "encoder_attention_mask": (1, 12),
            "time_ids_sinusoids": (1, 64),
        },
        "outputs": {"noise_pred": (1, 4, 8, 8)},
    }
    assert flatbuffer.signatures(files["vae_decoder"][0])["decode"] == {
        "inputs": {"latent": (1, 4, 8, 4)},
        "outputs": {"image": (1, 3, 64, 32)},
    }


def test_signatures_share_their_weights(files, params, tmp_path):
    one = parts.part("unet", CONFIG, params["unet"], *SIZE, LENGTHS[:1])
    lowering.write(one, tmp_path / "one.tflite")
    added = files["unet"][0].stat().st_size - (tmp_path / "one.tflite").stat().st_size
    weights = sum(leaf.nbytes for leaf in _leaves(params["unet"]))
    assert added < 0.6 * weights  # the graph alone; of the released network, which is larger: 0.1 %


def _leaves(tree):
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]


def test_time_in_the_graph_is_for_the_cpu(params, tmp_path):
    """The authors' own signature, exact in float32."""
    (graph,) = parts.part("unet", CONFIG, params["unet"], *SIZE, LENGTHS[:1], time="graph")
    names = [tensor.name for tensor in graph.inputs]
    assert names[1] == "timestep" and names[4] == "time_ids"
    lowering.write([graph], tmp_path / "unet.tflite")
    those = cases("unet", graph, params)
    assert reached(tmp_path / "unet.tflite", graph, those) >= 85  # sines of angles up to 1000


def test_half_precision_ruins_sinusoids(gpu, tmp_path):
    """Why the host computes them."""

    def sinusoids(timestep):
        return blocks.sinusoids(timestep, 32, cos_first=True, shift=0)

    graph = Graph("s", sinusoids, (Tensor("t", (1, 1, 1), "NHW"),), Tensor("y", (1, 1, 1, 32), ""))
    lowering.write([graph], tmp_path / "s.tflite")
    value = np.array([[[999.2]]], np.float32)
    exact = phone.sinusoids(value.ravel(), 32)
    errors = {
        precision: np.abs(
            verify.run(tmp_path / "s.tflite", "s", [{"t": value}], "gpu", precision)[0].ravel()
            - exact
        ).max()
        for precision in ("fp32", "fp16")
    }
    assert errors["fp32"] < 1e-3 and errors["fp16"] > 0.05


@pytest.mark.parametrize("cos_first", [True, False])
def test_the_hosts_sinusoids(cos_first):
    values = np.array([1000.0, 512.3, 0.0], np.float32)
    ours = phone.sinusoids(values, 64, cos_first, 1)
    theirs = blocks.sinusoids(values, 64, cos_first=cos_first, shift=1).reshape(1, -1)
    # float32 holds an angle of 1000 to 6e-5
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, 9), (1, 1, 5, 9)])
def test_attention_of_the_phone(kv_heads, bias_shape):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, h, 4), np.float32) for n, h in _heads(kv_heads))
    bias = None if bias_shape is None else rng.standard_normal(bias_shape, np.float32)
    if kv_heads == 1 and bias is not None and bias.shape[2] > 1:
        pytest.skip("one key/value head comes without a bias of its own for each query")
    ours = forms.attention(q, k, v, bias)
    np.testing.assert_allclose(ours, PLAIN.attention(q, k, v, bias), atol=2e-6)


def _heads(kv_heads):
    return (5, 6), (9, kv_heads), (9, kv_heads)


# --- Lint -----------------------------------------------------------------------------------------


def test_lint_is_clean(files):
    for file, _ in files.values():
        assert flatbuffer.lint(file) == []


def lowered(folder, function, *shapes):
    """Findings about a function."""
    inputs = tuple(Tensor(f"x{i}", shape, "") for i, shape in enumerate(shapes))
    lowering.write([Graph("f", function, inputs, Tensor("y", (), ""))], folder / "f.tflite")
    return flatbuffer.lint(folder / "f.tflite")


def without_axes(x):
    ones = jnp.ones(8)
    return lax.composite(lambda x, g, b, **_: x * g + b, "odml.group_norm", version=1)(
        x, ones, ones, num_groups=np.int32(2), epsilon=np.float32(1e-5)
    )


def shared_keys(q, k):
    return jnp.einsum("bhtd,bhsd->bhts", q, jnp.broadcast_to(k, (1, 4, 5, 8)))


@pytest.mark.parametrize(
    ("fault", "shapes", "finding"),
    [
        (lambda x: x.reshape(1, 2, 2, 2, 2) * 2 + x[0, 0, 0], [(1, 2, 4, 2)], "5 axes"),
        (lambda x: jnp.cumsum(x, 1), [(1, 4)], "no such operation"),
        (lambda x: x[:, jnp.array([2, 0])], [(1, 4)], "no such operation|INT64"),
        (shared_keys, [(1, 4, 3, 8), (1, 1, 5, 8)], "do not broadcast|does not broadcast|no such"),
        (lambda x, y: x + y * 2, [(1, 3, 3, 8), (1, 8)], "4 and 2 axes"),
        (without_axes, [(1, 4, 4, 8)], "runs as a LayerNorm"),
        (lambda x: x @ jnp.ones((8, 3)), [(1, 4, 8)], "3 axes"),
        (lambda x: (x > 0) * 1.0, [(1, 4)], "BOOL|no such"),
    ],
)
def test_lint_finds_faults_of_a_graph(fault, shapes, finding, tmp_path):
    findings = lowered(tmp_path, fault, *shapes)
    assert any(any(part in f for part in finding.split("|")) for f in findings), findings


def edited(folder, function, shape, edit):
    """Findings about a function whose flatbuffer `edit` has changed."""
    assert lowered(folder, function, shape) == []
    content = (folder / "f.tflite").read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    edit(model.subgraphs[0])
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    (folder / "f.tflite").write_bytes(builder.Output())
    return flatbuffer.lint(folder / "f.tflite")


def softmax(x):
    return jnp.tanh(lax.exp(x) / jnp.sum(lax.exp(x), -1, keepdims=True))


def set_beta(graph):
    next(o for o in graph.operators if hasattr(o.builtinOptions, "beta")).builtinOptions.beta = 2.0


def set_corners(graph):
    graph.operators[0].builtinOptions.alignCorners = True


def set_type(graph):
    graph.tensors[graph.inputs[0]].type = schema.TensorType.INT64


def open_shape(graph):
    graph.tensors[graph.inputs[0]].shapeSignature = [1, -1, 4, 8]


def reuse_output(graph):
    graph.outputs = [graph.operators[0].outputs[0]]


def same_operand(graph):
    subtraction = graph.operators[-1]
    subtraction.inputs = [subtraction.inputs[0]] * 2


def constant_input(graph):
    operation = graph.operators[-1]
    (constant,) = set(operation.inputs) - set(graph.inputs)
    operation.inputs = [constant, constant]


@pytest.mark.parametrize(
    ("function", "edit", "finding"),
    [
        (lambda x: jnp.tanh(jnp.exp(x)), set_type, "INT64"),
        (lambda x: jnp.tanh(jnp.exp(x)), open_shape, "no fixed shape"),
        (lambda x: jnp.tanh(jnp.exp(x)), reuse_output, "read again"),
        (forms.upsample_nearest, set_corners, "corners"),
        (lambda x: jnp.exp(x) - jnp.tanh(x), same_operand, "one tensor"),
        (softmax, set_beta, "beta"),
        (lambda x: x * jnp.arange(8.0), constant_input, "constants"),
    ],
)
def test_lint_finds_faults_of_a_file(function, edit, finding, tmp_path):
    findings = edited(tmp_path, function, (1, 4, 4, 8), edit)
    assert any(finding in f for f in findings), findings


def test_lint_finds_widened_integers(files, tmp_path):
    from ai_edge_quantizer import qtyping, quantizer

    weights = quantizer.Quantizer(files["vae_decoder"][0].read_bytes())
    weights.add_weight_only_config(".*", qtyping.TFLOperationName.CONV_2D, num_bits=8)
    (tmp_path / "w.tflite").write_bytes(weights.quantize().quantized_model)
    assert any("quantise dynamically" in f for f in flatbuffer.lint(tmp_path / "w.tflite"))


# --- Variants of weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "demand"), [("fp16", 60), ("int8", 35), ("int8,attn1|ff=int4,conv_out=fp32", 18)]
)
def test_variants(text, demand, files, params, tmp_path):
    """Smaller, clean, and as near to JAX as their bits allow."""
    file, graphs = files["unet"]
    quantize.write(file, tmp_path / "q.tflite", quantize.recipe(text))
    assert flatbuffer.lint(tmp_path / "q.tflite") == []
    kinds = flatbuffer.weight_bytes(tmp_path / "q.tflite")
    wanted = {kind.split("=")[-1] for kind in text.split(",")}
    names = {"fp16": "FLOAT16", "int8": "INT8", "int4": "INT4", "fp32": "FLOAT32"}
    assert {names[kind] for kind in wanted} <= kinds.keys()
    those = cases("unet", graphs[0], params)
    assert reached(tmp_path / "q.tflite", graphs[0], those) >= demand


def test_kernels_above_32_mib_become_integers(tmp_path):
    """Of which the released text tower has three a layer; the quantiser alone stops at them."""
    kernel = np.random.default_rng(0).standard_normal((2100, 4096), np.float32)
    x = Tensor("x", (1, 1, 4, 2100), "NHWC")
    graph = Graph("f", lambda x: forms.linear(x, kernel), (x,), Tensor("y", (1, 1, 4, 4096), ""))
    lowering.write([graph], tmp_path / "f.tflite")
    quantize.write(tmp_path / "f.tflite", tmp_path / "q.tflite", quantize.recipe("int8"))
    given = np.random.default_rng(1).standard_normal(x.shape, np.float32)
    (y,) = verify.run(tmp_path / "q.tflite", "f", [{"x": given}])
    assert manifest.psnr(y, given @ kernel) >= 45


def test_int8_is_a_gpu_variant(files, params, tmp_path, gpu):
    file, graphs = files["vae_decoder"]
    quantize.write(file, tmp_path / "q.tflite", quantize.recipe("int8"))
    those = cases("vae_decoder", graphs[0], params)
    assert reached(tmp_path / "q.tflite", graphs[0], those, "gpu", "fp16") >= 30


def test_what_the_accelerator_has_not_is_refused_by_name(tmp_path, gpu):
    lowered(tmp_path, lambda x: jax.image.resize(x, (1, 8, 16, 2), "nearest"), (1, 4, 8, 2))
    with pytest.raises(verify.VerifyError, match="GATHER_ND: Operation is not supported"):
        verify.run(tmp_path / "f.tflite", "f", [{"x0": np.zeros((1, 4, 8, 2), np.float32)}], "gpu")


@pytest.mark.parametrize("text", ["int9", "fp16,(=int8", ""])
def test_recipes_that_cannot_be_read(text):
    with pytest.raises(quantize.RecipeError, match="weights"):
        quantize.recipe(text)


def test_a_file_under_way_ends_with_who_asked_for_it(tmp_path):
    """The file is a pipe, which never ends."""
    file = tmp_path / "f.tflite"
    os.mkfifo(file)
    code = "import sys; from convert import verify; verify.run(sys.argv[1], 'f', [{}])"
    with subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT) as process:
        while True:
            with contextlib.suppress(OSError):  # nobody reads yet
                pipe = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
                break
            assert process.poll() is None
            time.sleep(0.1)
        (child,) = psutil.Process(process.pid).children()
        process.kill()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.close(pipe)


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (16, 24, 3)).astype(np.uint8)
    assert manifest.psnr(x, x) == np.inf and verify.ssim(x, x) == pytest.approx(1)
    assert manifest.psnr(np.array([0.0, 1.1]), np.array([0.0, 1.0])) == pytest.approx(
        20 * np.log10(1 / (0.1 / np.sqrt(2)))
    )
    assert manifest.psnr(np.array([np.nan, 1]), np.array([0.0, 1.0])) == -np.inf
    assert verify.ssim(x, rng.integers(0, 255, x.shape).astype(np.uint8)) < 0.5


@pytest.mark.e2e
def test_the_command(tmp_path, capsys):
    flags = ["--random=nano", f"--out={tmp_path}", "--height=32", "--width=32"]
    chosen = ["--weights=fp16 int8", "--parts=vae_decoder", "--check=64"]
    earlier = tmp_path / "fp32" / "vae_decoder.tflite"
    earlier.parent.mkdir()
    earlier.write_text("of another run")
    assert run("convert.tflite", *flags, *chosen) == 0
    out = capsys.readouterr().out
    assert out.count("lint clean") == 3 and "at 64 px on the CPU" in out
    found = {os.path.relpath(file, tmp_path) for file in tmp_path.rglob("*.tflite")}
    assert found == {f"{kind}/vae_decoder.tflite" for kind in ("fp32", "fp16", "int8")}
    assert earlier.read_text() == "of another run"
    assert {one.name for one in tmp_path.iterdir()} == {"fp32", "fp16", "int8"}
    for wrong, said in (
        ("--height=40", "multiple of 16"),
        ("--text_lengths=12 20", "'12 20' is no positive whole number"),
        ("--text_lengths=0", "'0' is no positive whole number"),
        ("--weights=fp32 fp32,ff=int8", "fp32 and fp32,ff=int8 would both be in fp32/"),
        ("--weights=int8 fp16 int8,ff=int4", "int8 and int8,ff=int4 would both be in int8/"),
    ):
        assert run("convert.tflite", *flags[:2], wrong) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err, err


@pytest.mark.e2e
def test_the_command_for_the_text_tower(tmp_path, capsys):
    flags = ["--random=nano", f"--out={tmp_path}", "--parts=text_encoder", "--prompt_length=10"]
    assert run("convert.tflite", *flags, "--text_parts=2", "--check=64") == 0
    out = capsys.readouterr().out
    assert out.count("lint clean") == 4 and out.count("on the CPU") == 2
    found = {os.path.relpath(file, tmp_path) for file in tmp_path.rglob("*.tflite")}
    assert found == {"fp16/text_encoder_1.tflite", "fp16/text_encoder_2.tflite"}
    for count, said in (("4", "the text tower has 3 layers"), ("0", "positive"), ("x", "int()")):
        assert run("convert.tflite", *flags, f"--text_parts={count}") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "text_parts" in err and said in err, err
