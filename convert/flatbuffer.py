"""What stands in a .tflite file, and what the GPU accelerator makes of it.

`lint` knows the graphs that LiteRT's accelerator (ML Drift) refuses, and those that it runs, and
reports as fully accelerated, with wrong results. The rules were found by running such graphs.
"""

import collections
import mmap
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# What the accelerator has. Composites: by their names.
_OPERATIONS = """
    ABS ADD AVERAGE_POOL_2D BATCH_MATMUL CAST CONCATENATION CONV_2D COS DEPTHWISE_CONV_2D DEQUANTIZE
    DIV ELU EXP FULLY_CONNECTED GELU HARD_SWISH LEAKY_RELU LOG LOGISTIC MAXIMUM MAX_POOL_2D MEAN
    MINIMUM MUL NEG PAD POW PRELU RELU RELU6 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT
    SELECT_V2 SIN SLICE SOFTMAX SPACE_TO_DEPTH SPLIT SQRT SQUARE SQUARED_DIFFERENCE STRIDED_SLICE
    SUB SUM TANH TRANSPOSE TRANSPOSE_CONV odml.group_norm odml.rms_norm
"""
OPERATIONS = frozenset(_OPERATIONS.split())
_BINARY = ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "POW", "SQUARED_DIFFERENCE")
_TYPES = ("FLOAT32", "FLOAT16", "INT32", "INT8", "INT4")
_MATMULS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: str  # "FLOAT32", ...
    constant: bool
    static: bool  # no size is left to run time


class Operation(NamedTuple):
    kind: str  # of a composite its name
    inputs: list[Tensor]
    outputs: list[Tensor]
    options: Any  # of the schema; of a composite its attributes, a dict


class Subgraph(NamedTuple):
    """What a signature runs; decompositions of composites are left out."""

    signature: str
    operations: list[Operation]
    outputs: list[Tensor]


def read(file: str | os.PathLike) -> list[Subgraph]:
    """The subgraphs of a file's signatures."""
    from ai_edge_litert import schema_py_generated as schema

    with open(file, "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    kinds = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    types = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    return [_subgraph(model, signature, kinds, types) for signature in model.signatureDefs or []]


def signatures(file: str | os.PathLike) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """Of each signature the shapes of its "inputs" and "outputs" by name."""
    from ai_edge_litert import schema_py_generated as schema

    with open(file, "rb") as stream:
        model = schema.Model.GetRootAs(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    found = {}
    for i in range(model.SignatureDefsLength()):
        signature = model.SignatureDefs(i)
        graph = model.Subgraphs(signature.SubgraphIndex())
        entries = {
            "inputs": [signature.Inputs(k) for k in range(signature.InputsLength())],
            "outputs": [signature.Outputs(k) for k in range(signature.OutputsLength())],
        }
        found[signature.SignatureKey().decode()] = {
            side: {
                e.Name().decode(): tuple(map(int, graph.Tensors(e.TensorIndex()).ShapeAsNumpy()))
                for e in those
            }
            for side, those in entries.items()
        }
    return found


def _subgraph(model: Any, signature: Any, kinds: dict, types: dict) -> Subgraph:
    graph = model.subgraphs[signature.subgraphIndex]

    def tensor(i):
        t = graph.tensors[i]
        shape = tuple(int(n) for n in t.shape) if t.shape is not None else ()
        buffer = model.buffers[t.buffer]
        constant = (buffer.data is not None and len(buffer.data) > 0) or buffer.size > 0
        open_ends = t.shapeSignature is not None and -1 in t.shapeSignature
        name = t.name.decode() if t.name else f"tensor {i}"
        return Tensor(name, shape, types[t.type], constant, not open_ends)

    def operation(o):
        code = model.operatorCodes[o.opcodeIndex]
        kind, options = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)], o.builtinOptions
        if kind == "STABLEHLO_COMPOSITE":
            kind, options = o.builtinOptions2.name.decode(), _attributes(o.builtinOptions2)
        inputs = [tensor(i) for i in o.inputs if i >= 0]
        return Operation(kind, inputs, [tensor(i) for i in o.outputs], options)

    return Subgraph(
        signature.signatureKey.decode(),
        [operation(o) for o in graph.operators],
        [tensor(i) for i in graph.outputs],
    )


def _attributes(options: Any) -> dict[str, Any]:
    from flatbuffers import flexbuffers

    raw = options.compositeAttributes
    return flexbuffers.Loads(bytes(raw)) if raw is not None and len(raw) else {}


def counts(file: str | os.PathLike) -> dict[str, dict[str, int]]:
    """How many operations of each kind every signature runs."""
    return {
        graph.signature: dict(collections.Counter(o.kind for o in graph.operations).most_common())
        for graph in read(file)
    }


def lint(file: str | os.PathLike) -> list[str]:
    """What would go wrong on the accelerator, a line each; nothing: clean."""
    return [
        f"{graph.signature}: {finding}"
        for graph in read(file)
        for finding in dict.fromkeys(_findings(graph))
    ]


def _findings(graph: Subgraph) -> Iterator[str]:
    consumed = {tensor.name for o in graph.operations for tensor in o.inputs}
    for tensor in graph.outputs:
        if tensor.name in consumed:
            yield f"output {tensor.name} is read again within the graph, which may overwrite it"
    for operation in graph.operations:
        where = f"{operation.kind} {operation.outputs[0].name}"
        for tensor in (*operation.inputs, *operation.outputs):
            if len(tensor.shape) > 4:
                yield f"{where}: {tensor.name} has {len(tensor.shape)} axes, at most 4 run"
            if tensor.type not in _TYPES:
                yield f"{where}: {tensor.name} is {tensor.type}, no GPU type"
            if not tensor.static:
                yield f"{where}: {tensor.name} has no fixed shape"
        yield from (f"{where}: {problem}" for problem in _problems(operation))


def _problems(operation: Operation) -> Iterator[str]:
    kind, inputs, options = operation.kind, operation.inputs, operation.options
    ranks = [len(tensor.shape) for tensor in inputs]
    if kind not in OPERATIONS:
        yield "the accelerator has no such operation"
    elif kind != "DEQUANTIZE" and all(tensor.constant for tensor in inputs):
        yield "all inputs are constants"
    if kind in _BINARY:
        if all(not t.constant for t in inputs) and len(set(ranks)) > 1:
            yield f"operands of {' and '.join(map(str, ranks))} axes are aligned at the wrong end"
        if kind not in ("ADD", "MUL") and len({t.name for t in inputs}) == 1:
            yield "both operands are one tensor"
    if kind == "BATCH_MATMUL" and inputs[0].shape[:-2] != inputs[1].shape[:-2]:
        batches = [list(tensor.shape[:-2]) for tensor in inputs]
        yield f"batches {batches[0]} and {batches[1]} differ; the accelerator does not broadcast"
    if kind == "FULLY_CONNECTED" and ranks[0] == 3:
        yield "the input has 3 axes, which fails with quantised weights on some GPUs; use 4"
    if kind == "SOFTMAX" and options.beta != 1:
        yield f"beta is {options.beta}, only 1 runs"
    if kind == "RESIZE_NEAREST_NEIGHBOR":
        before, after = (tensor.shape[1:3] for tensor in (inputs[0], operation.outputs[0]))
        if options.alignCorners or any(b % a for a, b in zip(before, after, strict=True)):
            yield "corners are aligned or the factor is no whole number: GPUs round differently"
    if kind == "DEQUANTIZE" and (inputs[0].type != "FLOAT16" or not inputs[0].constant):
        yield f"widens {inputs[0].type} weights, which does not compile; quantise dynamically"
    grouped = kind == "odml.group_norm" and "num_groups" in options
    if grouped and ("sub_type" in options or "_TENSOR_V1_reduction_axes" not in options):
        yield "a GroupNorm without reduction_axes (or with sub_type) runs as a LayerNorm"


def weight_bytes(file: str | os.PathLike) -> dict[str, int]:
    """Bytes of constants that convolutions and matmuls read, by their type."""
    bits = {"FLOAT32": 32, "FLOAT16": 16, "INT8": 8, "INT4": 4}
    found = {
        (t.name, t.type): int(np.prod(t.shape)) * bits.get(t.type, 32) // 8
        for graph in read(file)
        for o in graph.operations
        if o.kind in (*_MATMULS, "DEQUANTIZE")
        for t in o.inputs
        if t.constant
    }
    total: collections.Counter = collections.Counter()
    for (_, kind), size in found.items():
        total[kind] += size
    return dict(total)
