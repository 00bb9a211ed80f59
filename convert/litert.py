"""LiteRT's CompiledModel through its C API: a .tflite file on the CPU or on the GPU accelerator.

NumPy only. The calls are those that C++ on the phone makes. The library is the one in the wheel
`litert-lm-api`, which holds the accelerator (WebGPU here, where Vulkan is; OpenCL on the phone);
that of `ai-edge-litert` 2.3.0 crashes on composites.
"""

import ctypes
import importlib.util
import os
from ctypes import byref, c_bool, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

import numpy as np

from convert import vulkan
from dreamlite_jax.errors import UserError

ACCELERATORS = {"cpu": 1, "gpu": 2}
# The accelerator's own choice is half precision where the device has it.
PRECISIONS = {"fp16": "", "fp32": "precision = 2\n"}

_LIBRARY_DIR, _STRING = 22, 8  # LiteRtEnvOptionTag, LiteRtAnyType
_READ, _WRITE = 0, 1  # LiteRtTensorBufferLockMode
_TIMED_OUT = 7  # LiteRtStatus
_ERROR = 3  # LiteRtLogSeverity
_DTYPES = {1: np.float32, 2: np.int32}  # LiteRtElementType


class LiteRtError(UserError):
    """A model that LiteRT refuses, or cannot run where it was asked to: one line."""


class StillCompilingError(LiteRtError):
    """The accelerator was not ready within its own two minutes: a software driver was still
    compiling shaders. What it compiled is kept; the next process goes on from there."""


class _Any(ctypes.Structure):
    _fields_ = (("type", c_int), ("value", c_void_p))


class _EnvOption(ctypes.Structure):
    _fields_ = (("tag", c_int), ("value", _Any))


class _Layout(ctypes.Structure):
    _fields_ = (("rank", c_uint32), ("dims", c_int32 * 8), ("strides", c_uint32 * 8))


class _TensorType(ctypes.Structure):
    _fields_ = (("element", c_int), ("layout", _Layout))


class CompiledModel:
    """A signature of a .tflite file, compiled; `model(**inputs)` gives its outputs by name."""

    def __init__(
        self,
        file: str | os.PathLike,
        signature: str | None = None,
        accelerator: str = "cpu",
        precision: str = "fp16",
    ):
        """Compiles.

        Args:
          file: the model.
          signature: its name; None: the only one.
          accelerator: "cpu", or "gpu": then every operation runs there or none does.
          precision: of the GPU, "fp16" (its default) or "fp32".

        Raises:
          LiteRtError: no such signature, an operation that the accelerator has not, no driver.
        """
        self._lib, self._file = _library(), Path(file)
        if accelerator == "gpu":
            vulkan.use()
        folder = _engine_folder()
        option = (_EnvOption * 1)(
            _EnvOption(_LIBRARY_DIR, _Any(_STRING, ctypes.cast(c_char_p(folder), c_void_p)))
        )
        self._env = self._made("LiteRtCreateEnvironment", 1, option)
        self._model = self._made("LiteRtCreateModelFromFile", self._env, os.fsencode(file))
        options = self._made("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, ACCELERATORS[accelerator])
        if accelerator == "gpu" and PRECISIONS[precision]:
            self._call("LiteRtAddOpaqueOptions", options, self._gpu_options(precision))
        self._compiled = self._made("LiteRtCreateCompiledModel", self._env, self._model, options)
        if accelerator == "gpu" and not self.fully_accelerated:
            raise LiteRtError(f"{file}: some operations do not run on the accelerator")
        self._choose(signature)

    @property
    def fully_accelerated(self) -> bool:
        """Whether every operation runs on the accelerator that was asked for."""
        answer = c_bool()
        self._call("LiteRtCompiledModelIsFullyAccelerated", self._compiled, byref(answer))
        return answer.value

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs once; arrays by the signature's names, of exactly its shapes."""
        if inputs.keys() != self.inputs.keys():
            raise LiteRtError(f"{self._file}: inputs {sorted(inputs)}, not {sorted(self.inputs)}")
        for name, (buffer, shape, dtype) in self.inputs.items():
            value = np.ascontiguousarray(inputs[name], dtype)
            if value.shape != shape:
                raise LiteRtError(f"{self._file}: {name} is {value.shape}, should be {shape}")
            self._copy(buffer, value, _WRITE)
        buffers = [
            (c_void_p * len(side))(*(buffer for buffer, _, _ in side.values()))
            for side in (self.inputs, self.outputs)
        ]
        counted = [part for side in buffers for part in (c_size_t(len(side)), side)]
        self._call("LiteRtRunCompiledModel", self._compiled, self._index, *counted)
        results = {}
        for name, (buffer, shape, dtype) in self.outputs.items():
            results[name] = np.empty(shape, dtype)
            self._copy(buffer, results[name], _READ)
        return results

    def close(self) -> None:
        """Frees the compiled model; its memory is what a phone has least of."""
        for buffer, _, _ in (*self.inputs.values(), *self.outputs.values()):
            self._lib.LiteRtDestroyTensorBuffer(buffer)
        self._lib.LiteRtDestroyCompiledModel(self._compiled)
        self._lib.LiteRtDestroyModel(self._model)
        self._lib.LiteRtDestroyEnvironment(self._env)

    def _choose(self, name: str | None) -> None:
        """Finds the signature and makes a buffer for each of its tensors."""
        count = c_size_t()
        self._call("LiteRtGetNumModelSignatures", self._model, byref(count))
        found = {}
        for index in range(count.value):
            signature = self._made("LiteRtGetModelSignature", self._model, c_size_t(index))
            found[self._text("LiteRtGetSignatureKey", signature)] = (index, signature)
        if (name or next(iter(found))) not in found or (name is None and len(found) > 1):
            raise LiteRtError(f"{self._file}: has the signatures {', '.join(found)}, not {name}")
        index, signature = found[name or next(iter(found))]
        self._index = c_size_t(index)
        self.inputs, self.outputs = (self._buffers(signature, kind) for kind in ("Input", "Output"))

    def _buffers(self, signature: c_void_p, kind: str) -> dict[str, tuple]:
        count, buffers = c_size_t(), {}
        self._call(f"LiteRtGetNumSignature{kind}s", signature, byref(count))
        for i in map(c_size_t, range(count.value)):
            name = self._text(f"LiteRtGetSignature{kind}Name", signature, i)
            tensor = self._made(f"LiteRtGetSignature{kind}TensorByIndex", signature, i)
            kept = _TensorType()
            self._call("LiteRtGetRankedTensorType", tensor, byref(kept))
            needs = self._made(
                f"LiteRtGetCompiledModel{kind}BufferRequirements", self._compiled, self._index, i
            )
            create = "LiteRtCreateManagedTensorBufferFromRequirements"
            buffer = self._made(create, self._env, byref(kept), needs)
            shape = tuple(kept.layout.dims[: kept.layout.rank & 127])
            buffers[name] = (buffer, shape, _DTYPES[kept.element])
        return buffers

    def _copy(self, buffer: c_void_p, array: np.ndarray, mode: int) -> None:
        address = c_void_p()
        status = self._lib.LiteRtLockTensorBuffer(buffer, byref(address), mode)
        if status == _TIMED_OUT:
            raise StillCompilingError(f"{self._file}: shaders are being compiled; run it again")
        if status:
            raise LiteRtError(f"{self._file}: LiteRtLockTensorBuffer failed ({status})")
        source, target = (address, array.ctypes.data)[:: 1 if mode == _READ else -1]
        ctypes.memmove(target, source, array.nbytes)
        self._call("LiteRtUnlockTensorBuffer", buffer)

    def _gpu_options(self, precision: str) -> c_void_p:
        libc = ctypes.CDLL(None)
        libc.strdup.restype = c_void_p  # LiteRT frees it
        text = c_void_p(libc.strdup(PRECISIONS[precision].encode()))
        free = ctypes.cast(libc.free, c_void_p)
        return self._made("LiteRtCreateOpaqueOptions", b"gpu_options", text, free)

    def _call(self, function: str, *arguments) -> None:
        if status := getattr(self._lib, function)(*arguments):
            raise LiteRtError(f"{self._file}: {function} failed ({status})")

    def _made(self, function: str, *arguments) -> c_void_p:
        """What a function returns through its last argument."""
        made = c_void_p()
        self._call(function, *arguments, byref(made))
        return made

    def _text(self, function: str, *arguments) -> str:
        text = c_char_p()
        self._call(function, *arguments, byref(text))
        return text.value.decode()


def _engine_folder() -> bytes:
    spec = importlib.util.find_spec("litert_lm")
    if spec is None:
        raise LiteRtError('litert-lm-api is not installed; install the extra "convert"')
    return os.fsencode(Path(spec.origin).parent)


def _library() -> ctypes.CDLL:
    """LiteRT, which from now on tells of errors alone: else dozens of lines for each file."""
    found = ctypes.CDLL(os.path.join(os.fsdecode(_engine_folder()), "liblitert-lm.so"))
    found.LiteRtGetDefaultLogger.restype = c_void_p
    found.LiteRtSetMinLoggerSeverity(c_void_p(found.LiteRtGetDefaultLogger()), _ERROR)
    return found
