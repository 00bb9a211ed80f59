"""Model directories in diffusers' layout: `unet/`, `vae/`, ... with safetensors and a
`config.json`.

Modules carry the names of the reference's modules, so a parameter's path *is* its tensor's name but
for list indices, the leaf and the order of the axes (`tensor_name`). Reading and writing walk the
same table that this rule gives for a network's parameters (`tensor_table`): what is written is what
is read.
"""

import functools
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  teaches NumPy the name "bfloat16", which safetensors asks it for
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dreamlite_jax.errors import UserError
from dreamlite_jax.models import autoencoder, unet, unet_config
from dreamlite_jax.models.qwen3_vl import config as qwen_config
from dreamlite_jax.models.qwen3_vl import model as qwen_model

Params = dict[str, Any]
Path_ = tuple[str, ...]

MAX_SHARD_BYTES = 5 * 10**9


class ModelDirectoryError(UserError):
    """A model directory that cannot be used: one line with the file and what is wrong with it."""


# --- The table of tensor names --------------------------------------------------------------------

# Modules that stand in a list in the reference: their `name_3` is the tensor's `name.3`. (Others
# end in a digit by name: linear_1.)
_LISTS = (
    "down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out"
    "|encoder_hid_proj|layers|conv|blocks|deepstack_merger_list"
)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Axes of a kernel in the file, counted in JAX's order: IO -> OI, HWIO -> OIHW, THWIO -> OITHW.
_KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}


class Tensor(NamedTuple):
    """A row of the table: a parameter, its tensor, and the axes that turn one into the other."""

    path: Path_
    name: str
    shape: tuple[int, ...]  # in the file
    axes: tuple[int, ...]  # file = parameter.transpose(axes)

    def to_file(self, parameter: Any, dtype: Any = None) -> np.ndarray:
        """The tensor as it stands in the file: contiguous NumPy, of `dtype` or the parameter's."""
        return np.ascontiguousarray(np.asarray(parameter).transpose(self.axes), dtype)

    def to_parameter(self, tensor: np.ndarray, dtype: Any = None) -> np.ndarray:
        """The parameter as the network takes it: contiguous NumPy, of `dtype` or the tensor's."""
        return np.ascontiguousarray(tensor.transpose(np.argsort(self.axes)), dtype)


def tensor_name(path: Path_) -> str:
    """("down_blocks_0", "resnets_1", "norm1", "scale") ->
    "down_blocks.0.resnets.1.norm1.weight"."""
    *modules, leaf = path
    modules = [re.sub(rf"^({_LISTS})_(\d+)$", r"\1.\2", module) for module in modules]
    return ".".join((*modules, _LEAVES[leaf]))


def tensor_table(shapes: Params) -> list[Tensor]:
    """The rows of a network, by name, from its parameters or their shapes."""
    rows = []
    for path, leaf in flatten_dict(shapes).items():
        rank = len(leaf.shape)
        axes = _KERNEL_AXES.get(rank) if path[-1] == "kernel" else tuple(range(rank))
        if path[-1] not in _LEAVES or axes is None:
            raise ValueError(
                f"no tensor is named after a parameter {'/'.join(path)} of rank {rank}"
            )
        shape = tuple(leaf.shape[axis] for axis in axes)
        rows.append(Tensor(path, tensor_name(path), shape, axes))
    return sorted(rows, key=lambda row: row.name)


# --- The networks of a model directory ------------------------------------------------------------


class Component(NamedTuple):
    """One folder of a model directory and the network it holds."""

    folder: str
    stem: str  # the weights' file name without ".safetensors"
    config: Any  # a dataclass with from_dict and to_dict
    module: Callable[..., Any]  # config -> linen module
    example: Callable[[Any], tuple]  # config -> arguments that the module can be traced with
    ignored: str = r"(?!)"  # regex of tensors in the file that the network has no use for


def _unet_example(config: unet_config.UNetConfig) -> tuple:
    side = 2 ** (config.levels - 1)
    return (
        jnp.zeros((1, side, 2 * side, config.in_channels)),
        jnp.zeros(1),
        jnp.zeros((1, 1, config.context_dim)),
        jnp.ones((1, 1)),
        jnp.zeros((1, 2)),
    )


def _autoencoder_example(config: autoencoder.AutoencoderConfig) -> tuple:
    return (jnp.zeros((1, config.factor, config.factor, config.in_channels)),)


UNET = Component(
    "unet", "diffusion_pytorch_model", unet_config.UNetConfig, unet.UNet, _unet_example
)
AUTOENCODER = Component(
    "vae",
    "diffusion_pytorch_model",
    autoencoder.AutoencoderConfig,
    autoencoder.Autoencoder,
    _autoencoder_example,
)
TEXT_ENCODER = Component(
    "text_encoder",
    "model",
    qwen_config.Qwen3VLConfig,
    qwen_model.Qwen3VL,
    lambda config: (qwen_model.blank_inputs(config),),
    ignored=r"lm_head\.weight",  # some files hold the tied output layer a second time
)


@functools.cache
def param_shapes(component: Component, config: Any) -> Params:
    """Shapes and dtypes of a network's parameters; nothing is computed. Not to be changed."""
    module, example = component.module(config), component.example(config)
    return jax.eval_shape(lambda key: module.init(key, *example), jax.random.key(0))["params"]


def init_params(component: Component, config: Any, seed: int) -> Params:
    """Fresh random parameters, float32 NumPy: those of the modules' own initialisers.

    Drawn on the host, so that nothing is compiled (XLA takes a minute for a thousand draws) and any
    number of devices and hosts begins alike: a leaf depends on the seed and its path alone.
    """

    def draw(path: Path_, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = path[-1], leaf.shape
        if name in ("bias", "scale"):
            return np.full(shape, name == "scale", np.float32)
        rng = np.random.default_rng((seed, zlib.crc32("/".join(path).encode())))
        if name == "embedding":
            return rng.standard_normal(shape, np.float32) * np.float32(_EMBEDDING_STD)
        reach = math.prod(shape[:-1]) ** -0.5  # `layers.uniform_fan_in`
        return rng.uniform(-reach, reach, shape).astype(np.float32)

    shapes = flatten_dict(param_shapes(component, config))
    return unflatten_dict({path: draw(path, leaf) for path, leaf in shapes.items()})


_EMBEDDING_STD = 0.02  # the default of Qwen3-VL's `initializer_range`


# --- Reading --------------------------------------------------------------------------------------


def read(
    model_dir: str | os.PathLike,
    component: Component,
    dtype: Any = jnp.float32,
    put: Callable[[Path_, np.ndarray], Any] = lambda path, array: jnp.asarray(array),
    wanted: Callable[[Path_], bool] = lambda path: True,
) -> tuple[Any, Params]:
    """Reads one network of a model directory.

    Tensors are read one by one: beside the parameters themselves, at most one more copy of the
    largest tensor is ever held.

    Args:
      model_dir: a diffusers model directory.
      component: UNET, AUTOENCODER, ...
      dtype: of the parameters; None keeps each tensor's own.
      put: places a parameter, e.g. on devices by a sharding: (path, NumPy array) -> array.
      wanted: whether the parameter at a path is to be read; all must be in the files.

    Returns:
      The network's config and its parameters.

    Raises:
      ModelDirectoryError: no such directory or folder, an unusable config.json, a damaged file;
        tensors that are missing, not the network's, of the wrong shape or not finite (all named).
    """
    config = read_config(model_dir, component)
    folder = Path(model_dir) / component.folder
    table = tensor_table(param_shapes(component, config))
    files = _weight_files(folder, component.stem)
    found = _found(folder, files, component.ignored)
    _compare(folder, table, found, component.ignored)

    params, bad = {}, []
    for file in files:
        with _opened(file) as tensors:
            for row in table:
                if found[row.name][0] != file or not wanted(row.path):
                    continue
                parameter = row.to_parameter(tensors.get_tensor(row.name), dtype)
                if not np.isfinite(parameter).all():
                    bad.append(row.name)
                params[row.path] = put(row.path, parameter)
                del parameter  # or it would be held, too, while the next one is read
    if bad:
        raise ModelDirectoryError(f"{folder}: not a number or infinite: {', '.join(bad)}")
    return config, unflatten_dict(params)


def read_config(model_dir: str | os.PathLike, component: Component) -> Any:
    """The config of one network of a model directory; raises as `read` does."""
    folder = Path(model_dir) / component.folder
    if not Path(model_dir).is_dir():
        raise ModelDirectoryError(f"{model_dir}: no such directory")
    if not folder.is_dir():
        raise ModelDirectoryError(
            f"{model_dir}: has no folder {component.folder}/; expected a diffusers model directory"
        )
    settings = read_json(folder / "config.json")
    try:
        return component.config.from_dict(settings)
    except (ValueError, TypeError) as error:
        raise ModelDirectoryError(f"{folder / 'config.json'}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory; ModelDirectoryError if it is none."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ModelDirectoryError(f"{file}: no such file") from error
    except OSError as error:
        raise ModelDirectoryError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelDirectoryError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelDirectoryError(f"{file}: not a JSON object")
    return value


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The one safetensors file of a network, or the shards that its index names."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelDirectoryError(
            f"{folder}: holds neither {single.name} nor {index.name}; save other formats "
            "(.bin, .ckpt) as safetensors first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise ModelDirectoryError(f"{index}: has no weight_map from tensors to files beside it")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelDirectoryError(
            f"{folder}: {index.name} names missing files: {', '.join(missing)}"
        )
    return files


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


class _opened:
    """`safe_open` whose errors name the file and say what to do."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self):
        try:
            self.handle = safe_open(self.file, framework="numpy")
            return self.handle.__enter__()
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    def __exit__(self, kind, error, trace):
        self.handle.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError | OSError):
            raise self._damaged(error) from error
        if isinstance(error, AttributeError | TypeError):  # a dtype that NumPy does not know
            raise ModelDirectoryError(
                f"{self.file}: a tensor's dtype is not supported ({error}); save it as float32, "
                "float16 or bfloat16"
            ) from error

    def _damaged(self, error) -> ModelDirectoryError:
        return ModelDirectoryError(
            f"{self.file}: damaged or cut short ({error}); copy or download it again"
        )


def _headers(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  a safetensors file, no dict
            yield name, tuple(tensors.get_slice(name).get_shape())


def _found(folder: Path, files: list[Path], ignored: str) -> dict[str, tuple]:
    """Every tensor's file and shape; a tensor that stands in two files is an error."""
    found, twice = {}, []
    for file in files:
        for name, shape in _headers(file):
            if name in found and not re.fullmatch(ignored, name):
                twice.append(f"{name} ({found[name][0].name}, {file.name})")
            found[name] = (file, shape)
    if twice:
        raise ModelDirectoryError(f"{folder}: tensors in more than one file: {', '.join(twice)}")
    return found


def _compare(folder: Path, table: list[Tensor], found: Mapping[str, tuple], ignored: str) -> None:
    expected = {row.name: row.shape for row in table}
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(n for n in found.keys() - expected.keys() if not re.fullmatch(ignored, n))
    misshaped = [
        f"{name} {list(found[name][1])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name][1] != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (
            ("missing tensors", missing),
            ("tensors that this network does not have", surplus),
            ("tensors of another shape", misshaped),
        )
        if names
    ]
    if problems:
        raise ModelDirectoryError(f"{folder} does not fit its config.json: {'; '.join(problems)}")


# --- Writing --------------------------------------------------------------------------------------


def write(
    model_dir: str | os.PathLike,
    component: Component,
    config: Any,
    params: Params,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes one network into a model directory, in place of what the folder held before.

    The folder appears whole or not at all: it is written beside its place and renamed.

    Args:
      model_dir: created where it does not exist.
      params: arrays that this process can read whole; on several hosts one process writes.
      dtype: of the tensors in the file, e.g. jnp.bfloat16; None keeps each parameter's own.
      max_shard_bytes: above this the weights are split over several files with an index.

    Raises:
      ValueError: params are not those of this config's network.
    """
    table = tensor_table(param_shapes(component, config))
    if problems := _strangers(table, params):
        raise ValueError(f"{component.folder}: parameters do not fit the config: {problems}")
    leaves = flatten_dict(params)
    with replaced_folder(Path(model_dir) / component.folder) as folder:
        write_json(folder / "config.json", config.to_dict())
        shards = _split(table, leaves, dtype, max_shard_bytes)
        names = [_shard_name(component.stem, i, len(shards)) for i in range(len(shards))]
        for name, rows in zip(names, shards, strict=True):
            tensors = {row.name: row.to_file(leaves[row.path], dtype) for row in rows}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod((folder / "config.json").stat().st_mode)  # it would be 0600
        if len(shards) > 1:
            weight_map = {
                row.name: name for name, rows in zip(names, shards, strict=True) for row in rows
            }
            total = sum(_bytes(row, leaves, dtype) for row in table)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / f"{component.stem}.safetensors.index.json", index)


def _strangers(table: list[Tensor], params: Params) -> str:
    expected = {row.name: row.shape for row in table}
    given = {row.name: row.shape for row in tensor_table(params)}
    names = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
    return ", ".join(f"{n} {given.get(n)} instead of {expected.get(n)}" for n in names)


def _bytes(row: Tensor, leaves: Mapping[Path_, Any], dtype: Any) -> int:
    return leaves[row.path].size * np.dtype(dtype or leaves[row.path].dtype).itemsize


def _split(table: list[Tensor], leaves, dtype, limit: int) -> list[list[Tensor]]:
    """The rows in order, in runs of at most `limit` bytes (a larger tensor is a run of its own)."""
    shards, room = [[]], limit
    for row in table:
        size = _bytes(row, leaves, dtype)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(row)
        room -= size
    return shards


def _shard_name(stem: str, i: int, n: int) -> str:
    return f"{stem}.safetensors" if n == 1 else f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors"


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


class replaced_folder:
    """A fresh folder to fill; on leaving without an error it takes the place of `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()  # a link stays a link

    def __enter__(self) -> Path:
        if self.folder.exists() and not self.folder.is_dir():
            raise ModelDirectoryError(f"{self.folder}: is a file, should be a folder")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(
            tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent)
        )
        self.new = self.scratch / "new"
        self.new.mkdir()
        return self.new

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._swap()
        finally:
            shutil.rmtree(self.scratch)

    def _swap(self) -> None:
        old = self.scratch / "old"
        if not self.folder.exists():
            self.new.rename(self.folder)
            return
        self.folder.rename(old)
        try:
            self.new.rename(self.folder)
        except OSError:
            old.rename(self.folder)
            raise
