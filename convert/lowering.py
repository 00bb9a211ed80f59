"""From a JAX function to a TFLite flatbuffer: jax.export, StableHLO, litert-converter. No
TensorFlow, no PyTorch.

A `Graph` is a function with names and meanings for its inputs and outputs, which become a signature
of the .tflite file.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export

from dreamlite_jax.data.pictures import replaced_file


class Tensor(NamedTuple):
    """An input or output, float32: its name, shape, axes ("NCHW", ...), range and meaning."""

    name: str
    shape: tuple[int, ...]
    layout: str
    range: tuple[float | None, float | None] = (None, None)
    meaning: str = ""


class Graph(NamedTuple):
    """A signature to be: `function(*inputs)` of arrays in the order of `inputs` gives one array."""

    signature: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    output: Tensor


def write(graphs: Sequence[Graph], file: str | os.PathLike) -> None:
    """Lowers graphs into one .tflite file, a signature each; it appears whole or not at all.

    Parameters are constants of the function. Those that several graphs share are stored once.
    """
    from litert_converter.mlir import ir
    from litert_converter.mlir._mlir_libs import converter_api_ext as converter

    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        modules = [_module(graph) for graph in graphs]
        module = modules[0] if len(modules) == 1 else converter.merge_modules(modules)
        with replaced_file(file) as stream:
            stream.write(converter.export_flatbuffer_to_bytes(module.operation))


def _module(graph: Graph) -> Any:
    """The graph in the converter's TFLite dialect."""
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as converter

    arguments = [jax.ShapeDtypeStruct(t.shape, np.float32) for t in graph.inputs]
    exported = export.export(jax.jit(graph.function), platforms=["cpu"])(*arguments)
    module = ir.Module.parse(exported.mlir_module_serialized)
    del exported  # it holds the parameters, too
    passmanager.PassManager.parse(
        "builtin.module(vhlo-legalize-stablehlo,reconcile-unrealized-casts,inline)"
    ).run(module.operation)
    converter.set_signature(
        module.operation,
        signature_name=graph.signature,
        input_names=[tensor.name for tensor in graph.inputs],
        output_names=[graph.output.name],
    )
    settings = converter.ConvertToTFLConfig()
    settings.unsafe_fuse_dynamic_shaped_broadcast = True  # all shapes are static
    converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), settings)
    return module
