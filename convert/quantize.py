"""Smaller weights for a lowered network: half floats, or 8 and 4 bits.

A recipe is a list of (regex, kind), e.g. [(".*", "int8"), ("time_emb_proj|proj_out", "fp16")]:
the last regex that is found in an operation's name says how its weights are kept. Names are the
parameters' paths: `.../up_blocks_0/attentions_1/transformer_blocks_0/ff/net_2/...`.

Integers are *dynamic*: the CPU multiplies integers, the accelerator widens the weights. (Integers
that a DEQUANTIZE operation widens do not compile on the accelerator.)
"""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence

from dreamlite_jax.data.pictures import replaced_file
from dreamlite_jax.errors import UserError

KINDS = ("fp32", "fp16", "int8", "int4")
Recipe = Sequence[tuple[str, str]]


class RecipeError(UserError):
    """A recipe that cannot be read: one line."""


def recipe(text: str) -> Recipe:
    """From a flag: "fp16", or "int8,REGEX=int4,REGEX=fp16" with later ones first.

    Raises:
      RecipeError: an unknown kind or an unusable regex.
    """
    parts = []
    for part in text.split(","):
        regex, _, kind = part.rpartition("=")
        if kind not in KINDS:
            raise RecipeError(f"weights {part!r}: {kind!r} is none of {', '.join(KINDS)}")
        try:
            re.compile(regex)
        except re.error as error:
            raise RecipeError(f"weights {part!r}: {regex!r} is no regex ({error})") from error
        parts.append((regex or ".*", kind))
    return parts


def write(source: str | os.PathLike, target: str | os.PathLike, parts: Recipe) -> None:
    """The .tflite file `source` with its weights kept as the recipe says, as `target`."""
    from ai_edge_quantizer import quantizer as aeq

    with open(source, "rb") as stream:
        content = stream.read()
    if any(kind != "fp32" for _, kind in parts):
        quantizer = aeq.Quantizer(content)
        for regex, kind in parts:
            _add(quantizer, regex if regex == ".*" else f".*(?:{regex}).*", kind)
        with _large_kernels(), _silence():
            content = quantizer.quantize().quantized_model
    with replaced_file(target) as stream:
        stream.write(content)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """For the quantiser, which reports its progress at length."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _large_kernels() -> Iterator[None]:
    """The quantiser takes kernels above 32 MiB for a while: it rounds those in pieces, and can do
    so with two axes only. A kernel [O, H, W, I] with a scale for each output is as good as
    [O, H W I]."""
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as theirs

    original = theirs.uniform_quantize

    def uniform_quantize(kernel, params, *blockwise):
        if kernel.ndim < 3 or params.quantized_dimension or any(blockwise):
            return original(kernel, params, *blockwise)
        scale, zero = (x.reshape(-1, 1) for x in (params.scale, params.zero_point))
        flat = dataclasses.replace(params, scale=scale, zero_point=zero)
        return original(kernel.reshape(len(kernel), -1), flat).reshape(kernel.shape)

    theirs.uniform_quantize = uniform_quantize
    try:
        yield
    finally:
        theirs.uniform_quantize = original


def _add(quantizer, regex: str, kind: str) -> None:
    from ai_edge_quantizer import qtyping

    everything = qtyping.TFLOperationName.ALL_SUPPORTED
    if kind == "fp32":
        quantizer.update_quantization_recipe(regex, everything, algorithm_key="no_quantize")
    elif kind == "fp16":
        quantizer.update_quantization_recipe(
            regex,
            everything,
            op_config=qtyping.OpQuantizationConfig(
                weight_tensor_config=qtyping.TensorQuantizationConfig(
                    num_bits=16, dtype=qtyping.TensorDataType.FLOAT
                ),
                compute_precision=qtyping.ComputePrecision.FLOAT,
            ),
            algorithm_key="float_casting",
        )
    else:
        quantizer.add_dynamic_config(regex, everything, num_bits=int(kind.removeprefix("int")))
