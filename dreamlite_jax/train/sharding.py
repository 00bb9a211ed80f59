"""Where arrays live: a mesh of two axes, rules for parameters, rows of batches.

`data` goes across slices and `fsdp` within one: rows of a batch are spread over both, parameters
(with their averages and moments) over `fsdp` alone. A rule is (regex, spec): the first regex found
in a leaf's path decides. A spec names a mesh axis or `-` for each of the *last* axes of the array:
"fsdp,-" spreads the second to last, whatever its rank. An axis that cannot be divided stays whole.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.primitives import PLAIN, Primitives
from dreamlite_jax.models.tpu import TPU
from dreamlite_jax.train.optim import path_name

AXES = ("data", "fsdp")
ROWS = PartitionSpec(AXES)
Rule = tuple[str, str]

# Kernels [..., in, out] are spread along `in`, which a matmul contracts: a gathered kernel is then
# what XLA chooses, and activations stay where their rows are. Depthwise ones have no `in`.
RULES: tuple[Rule, ...] = (
    (r"/depthwise/kernel$", "fsdp"),
    (r"/kernel$", "fsdp,-"),
    (r"/embedding$", "fsdp,-"),
)


class ShardingError(UserError):
    """A mesh or a rule that cannot be used: one line."""


def make_mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh; -1 for one of the axes takes what the other leaves.

    Raises:
      ShardingError: the axes do not multiply to the number of devices; or `fsdp` would go across
        slices, whose connections are slow.
    """
    devices = jax.devices() if devices is None else list(devices)
    n, sizes = len(devices), [data, fsdp]
    if -1 in sizes and min(sizes) == -1 and sizes.count(-1) == 1:
        other = max(sizes)
        sizes[sizes.index(-1)] = n // other if other > 0 and n % other == 0 else -1
    if min(sizes) < 1 or sizes[0] * sizes[1] != n:
        raise ShardingError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not fit {n} devices; one may be -1, which "
            "takes the rest"
        )
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if sizes[0] % slices:
        raise ShardingError(
            f"mesh.data is {sizes[0]} on {slices} slices, should be a multiple of them, such as "
            f"mesh.data={slices} and mesh.fsdp=-1"
        )
    # An axis may take a part of one of the chips' own: 4 x 16 of 8 x 8 chips.
    split = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:
        within = sizes[0] // slices, sizes[1]
        placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1), **split)
    else:
        placed = mesh_utils.create_device_mesh(sizes, **split)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 2)


def spec_of(
    path: str, shape: Sequence[int], rules: Sequence[Rule], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an array lies, by the first rule that knows its path; by none: whole everywhere."""
    for regex, spec in rules:
        if re.search(regex, path):
            names = [
                None if name.strip() in ("-", "") else name.strip() for name in spec.split(",")
            ]
            break
    else:
        return PartitionSpec()
    names = [None] * (len(shape) - len(names)) + names[max(len(names) - len(shape), 0) :]
    fitting = [
        name if name is None or size % mesh.shape[name] == 0 else None
        for name, size in zip(names, shape, strict=True)
    ]
    return PartitionSpec(*fitting)


def shardings(tree: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """A tree of NamedShardings for a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, rules, mesh)), tree
    )


def unspread(tree: Any, rules: Sequence[Rule], mesh: Mesh | AbstractMesh) -> float:
    """The share of a tree's numbers, of arrays or shapes, that lie whole on all devices."""
    sizes, whole = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        spec = spec_of(path_name(path), leaf.shape, rules, mesh)
        sizes += leaf.size
        whole += leaf.size * all(name is None or mesh.shape[name] == 1 for name in spec)
    return whole / sizes


def advice(tree: Any, rules: Sequence[Rule], mesh: Mesh) -> list[str]:
    """A line where a divisor of `fsdp` would leave a device less of a tree, as that divides more
    of its axes."""
    size = mesh.shape["fsdp"]

    def held(n: int) -> float:
        whole = unspread(tree, rules, AbstractMesh((1, n), AXES))
        return whole + (1 - whole) / n

    best = min((n for n in range(1, size + 1) if size % n == 0), key=held)
    if held(best) >= held(size):
        return []
    return [
        f"of the parameters every device holds {100 * held(size):.0f} %, as mesh.fsdp={size} "
        f"divides few of them; with mesh.fsdp={best} and mesh.data=-1 {100 * held(best):.1f} %"
    ]


def rule_problems(rules: Sequence[Rule]) -> list[str]:
    """What is wrong with rules, a line each."""
    found = []
    for regex, spec in rules:
        try:
            re.compile(regex)
        except re.error as error:
            found.append(f"sharding: {regex!r} is no regex: {error}")
        names = [name.strip() for name in spec.split(",")]
        if any(names.count(axis) > 1 for axis in AXES):
            found.append(f"sharding: {spec!r} names an axis of the mesh more than once")
        unknown = set(names) - {*AXES, "-", ""}
        if unknown:
            found.append(
                f"sharding: {spec!r} names {', '.join(sorted(unknown))}; known are data, fsdp, -"
            )
    return found


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, in order."""
    places = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in places.values() for row in range(batch_size)[rows]})


def spread(batch: Any, mesh: Mesh, batch_size: int) -> Any:
    """Global arrays [B, ...] from this process's rows (`own_rows`) as NumPy."""
    rows = NamedSharding(mesh, ROWS)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, x, (batch_size, *x.shape[1:])), batch
    )


def place(tree: Any, where: Any) -> Any:
    """Puts host arrays, the same on every process, where `where` (a tree of shardings) says."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda i, x=x: np.asarray(x)[i]),
        tree,
        where,
    )


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Whole copies on every device, as small evaluations use them."""
    if mesh.size == 1:
        return tree
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)


def pinned(mesh: Mesh) -> Primitives:
    """The primitives for a mesh: every device gathers a kernel whole and applies it to its rows.

    Left alone, XLA lets the sharding of kernels spread into activations and moves those about; or
    it sends a kernel's parts round and multiplies by each as it comes, a few channels at a time,
    which reads and writes the results as often. Programs of our own it cannot divide at all.
    """
    ops = TPU if mesh.devices.flat[0].platform == "tpu" else PLAIN
    if mesh.size == 1:
        return ops
    rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())

    def whole(kernel: Array) -> Array:
        # So is its gradient, before it is spread as the kernel is: XLA would make it in the parts
        # that devices keep, 56 channels at a time, and read its factors anew for each.
        return jax.lax.with_sharding_constraint(kernel, everywhere)

    def pin(operation):
        def pinned_operation(x: Array, kernel: Array, *args) -> Array:
            y = operation(x, whole(kernel), *args)
            return jax.lax.with_sharding_constraint(y, rows)

        return operation and pinned_operation

    def by_device(operation, arrays: int):
        """On every device for its own rows of the first arguments and all of the others."""

        def mapped(*args, **kw) -> Array:
            specs = tuple(ROWS if i < arrays else PartitionSpec() for i in range(len(args)))
            run = functools.partial(operation, **kw)
            return jax.shard_map(
                run, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False
            )(*args)  # fmt: skip

        return operation and mapped

    of_kernels = ("linear", "conv", "depthwise_conv", "geglu", "upsample_conv")
    return ops._replace(
        normed_attention=by_device(ops.normed_attention, 4),
        norm_silu_depthwise=by_device(ops.norm_silu_depthwise, 2),
        **{name: pin(getattr(ops, name)) for name in of_kernels},
    )
