"""What a compiled program costs on a TPU, from the compiler's own account: nothing is run.

Of a program that XLA has compiled for a TPU, its text gives for every instruction the cycles that
the compiler expects, and the collectives; its analyses give memory, FLOPs and bytes. Two estimates
of time come of it. The roofline takes a chip that does nothing but the arithmetic, or nothing but
the traffic with its memory, whichever takes longer; the cycles add up what the compiler plans with.
Of a Pallas kernel it expects nothing: there the roofline of what the kernel declares is added.
Neither is a measurement.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from dreamlite_jax.train.metrics import PEAK_FLOPS
from dreamlite_jax.train.update import LossFn

GIB = 2**30


class Chip(NamedTuple):
    """A device as JAX sees it; figures of cloud.google.com/tpu/docs/{v5e,v5p,v6e}."""

    hbm: float  # bytes
    bandwidth: float  # of its memory, bytes/s
    clock: float  # of the cycles that the compiler counts, 1/s


CHIPS = {  # by device_kind
    "TPU v5 lite": Chip(16 * GIB, 819e9, 1.5e9),
    "TPU v5": Chip(95 * GIB, 2765e9, 1.75e9),
    "TPU v6 lite": Chip(32 * GIB, 1640e9, 1.75e9),
}


class Costs(NamedTuple):
    """Of one step on one device."""

    arguments: int  # bytes: state, frozen parameters and batch
    temporary: int  # bytes beside them, at the worst moment
    outputs: int  # bytes that are not written over arguments
    flops: float  # as compiled: what rematerialisation repeats counts again
    bytes: float  # to and from memory
    cycles: float
    looped: bool  # whether there are loops, of which FLOPs and bytes have one turn
    unknown: bool  # whether one of them is of unknown length: one turn of it is in the cycles, too
    kernels: list[tuple[float, float, float]]  # how often a kernel runs, its FLOPs and bytes
    collectives: dict[str, tuple[float, float]]  # by kind: how many run, and their bytes

    @property
    def memory(self) -> int:
        return self.arguments + self.temporary + self.outputs

    def roofline_seconds(self, kind: str) -> float:
        return _roofline(kind, self.flops, self.bytes)

    def cycle_seconds(self, kind: str) -> float:
        kernels = sum(times * _roofline(kind, *one) for times, *one in self.kernels)
        return self.cycles / CHIPS[kind].clock + kernels


def _roofline(kind: str, flops: float, bytes_: float) -> float:
    return max(flops / PEAK_FLOPS[kind], bytes_ / CHIPS[kind].bandwidth)


def of(compiled: Any) -> Costs:
    """The costs of a `jax.stages.Compiled` for a TPU."""
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    computations = dict(_computations(compiled.as_text()))
    cycles, kernels, collectives, seen = 0.0, [], {}, set()
    turns = []
    for line, times, within in _instructions(computations):
        if loop := _LOOP.search(line):
            turns.append(_turns(line, computations[loop["condition"]]))
        if found := _CYCLES.search(line):
            cycles += times * int(found[1])
        if found := _KERNEL.search(line):
            kernels.append((times, float(found[1]), float(found[2])))
        if found := _COLLECTIVE.search(line):
            # One that overlaps with arithmetic stands in every fusion that it is spread over.
            channel = _CHANNEL.search(line)
            if channel and channel[0] in seen:
                continue
            seen.add(channel and channel[0])
            kind = "reduce-scatter" if "reduce-scatter" in within else found["kind"]
            sizes = _sizes(found["type"])
            size = max(sizes) if found["start"] else sum(sizes)  # a start has its operand beside it
            count, total = collectives.get(kind, (0.0, 0.0))
            collectives[kind] = (count + times, total + times * size)
    return Costs(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=analysis["flops"],
        bytes=analysis["bytes accessed"],
        cycles=cycles,
        looped=any(n != 1 for n in turns),
        unknown=None in turns,
        kernels=kernels,
        collectives=collectives,
    )


def gradient_flops(loss_fn: LossFn, trained: Any, frozen: Any, batch: Any) -> float:
    """FLOPs of a loss and its gradient by the trained parameters, over a whole batch, as written:
    for a loss that rematerialises nothing, what the mathematics takes.

    Arguments are arrays or shapes. Nothing is compiled; counted for a CPU, wherever it will run.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    return flops_of(jax.grad(loss_fn, has_aux=True), trained, frozen, batch, keys)


def flops_of(fn: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of a function as written, counted as `gradient_flops`; of a loop those of one turn."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.jit(fn).lower(*arguments).cost_analysis()["flops"]


# --- The compiler's text --------------------------------------------------------------------------

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(
    r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"'
)
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
# Asynchronous ones are counted where they start.
_COLLECTIVE = re.compile(rf" = (?P<type>\(.*?\)|\S+) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_CHANNEL = re.compile(r"channel_id=\d+")
_FUSION = re.compile(r" fusion\(.*calls=%([\w.\-]+)")
_BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%(?P<condition>[\w.\-]+), body=%(?P<body>[\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"(%[\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*(%[\w.\-]+)\), direction=LT")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names and lines of a program's computations; that of the entry is ""."""
    name, lines = None, []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = "" if line.startswith("ENTRY") else re.match(r"%([\w.\-]+)", line)[1]
            lines = []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        else:
            lines.append(line)


def _instructions(
    computations: Mapping[str, list[str]], name: str = "", times: float = 1
) -> Iterator[tuple[str, float, str]]:
    """Every instruction that runs, those within fusions too, how often, and the computation that it
    is in."""
    for line in computations[name]:
        yield line, times, name
        if fusion := _FUSION.search(line):
            yield from _instructions(computations, fusion[1], times)
        if loop := _LOOP.search(line):
            turns = _turns(line, computations[loop["condition"]]) or 1
            yield from _instructions(computations, loop["body"], times * turns)
        if branches := _BRANCHES.search(line):  # each as if it were taken, as the FLOPs have it
            for branch in re.findall(r"[\w.\-]+", branches[1]):
                yield from _instructions(computations, branch, times)


def _turns(loop: str, condition: list[str]) -> int | None:
    """How often a loop runs: as the compiler says, or, as it does not for TPUs, up to the constant
    that `lax.scan` counts below, from 0 and one by one; None where neither is there."""
    if said := _TURNS.search(loop):
        return int(said[1])
    text = "\n".join(condition)
    below, bounds = _BELOW.search(text), dict(_BOUND.findall(text))
    return int(bounds[below[1]]) if below and below[1] in bounds else None


def _sizes(types: str) -> list[int]:
    """Bytes of the arrays in a type such as bf16[8,128]{1,0} or a tuple of them."""
    sizes = []
    for kind, bits, shape in _ARRAY.findall(types):
        size = 1 if kind == "pred" else int(bits) / 8
        for side in filter(None, shape.split(",")):
            size *= int(side)
        sizes.append(int(size))
    return sizes
