"""What is read from a compiled program: cycles, loops and collectives of its text, by hand."""

import types

import jax
import jax.numpy as jnp
import pytest

from dreamlite_jax.train import costs
from dreamlite_jax.train.metrics import PEAK_FLOPS

TEXT = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %fusion.1 = bf16[8,128]{1,0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"10"}
  %kernel = bf16[8,128] custom-call(%p), custom_call_target="tpu_custom_call", backend_config=\
{"cost_estimate":{"flops":"197000000","transcendentals":"5","bytes_accessed":"8","r":"0"}}
  %all-reduce.1 = f32[4,4]{1,0} all-reduce(%x), replica_groups={{0,1}}
  %inner = (s32[]) while(%t), condition=%c2, body=%body2, backend_config={"a":{"b":"c"}}
}

%body2 (p: (s32[])) -> (s32[]) {
  %fusion.2 = s32[] fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"1"}
}

%c (p: (s32[], bf16[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(5), backend_config={"a":{"b":"c"}}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%c2 (p: (s32[])) -> pred[] {
  %m = s32[]{:T(128)} get-tuple-element(%p), index=1
  %j = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%j, %m), direction=LT
}

%unused (p: s32[]) -> s32[] {
  %fusion.3 = s32[] fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"1000"}
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %ar = (f32[8]{0:T(8)}, f32[4]{0:T(8)S(1)}) all-reduce(%p, %q), channel_id=7
}

%spread (p: bf16[2,16]) -> bf16[8,16] {
  %ag.3 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=9, dimensions={0}
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %fusion.4 = bf16[8,128]{1,0} fusion(%a), kind=kOutput, backend_config={"estimated_cycles":"100"}
  %ag = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%b), dimensions={0}
  %agd = bf16[8,16]{1,0} all-gather-done(%ag)
  %f.1 = f32[2] fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  %f.2 = bf16[8,16] fusion(%c), kind=kCustom, calls=%spread
  %f.3 = bf16[8,16] fusion(%c), kind=kCustom, calls=%spread
  %w = (s32[]) while(%t), condition=%c, body=%body, metadata={op_name="jit(step)/while"}
}
"""


def test_the_text_of_a_program():
    """Loops count as often as they run (once where that is not known), starts without their dones,
    of their tuple the largest part; one that is spread over fusions counts once."""
    memory = types.SimpleNamespace(
        argument_size_in_bytes=100,
        temp_size_in_bytes=20,
        output_size_in_bytes=60,
        alias_size_in_bytes=50,
    )
    compiled = types.SimpleNamespace(
        memory_analysis=lambda: memory,
        cost_analysis=lambda: {"flops": 3e12, "bytes accessed": 4e9},
        as_text=lambda: TEXT,
    )
    found = costs.of(compiled)
    assert found.cycles == 100 + 5 * (10 + 1)
    assert found.collectives == {
        "all-gather": (2, 2 * 8 * 16 * 2),
        "reduce-scatter": (1, 12 * 4),
        "all-reduce": (5, 5 * 4 * 4 * 4),
    }
    assert found.memory == 100 + 20 + 10
    assert found.looped and found.unknown
    kind = "TPU v5 lite"
    assert found.roofline_seconds(kind) == max(3e12 / 197e12, 4e9 / 819e9)
    assert found.kernels == [(5, 197e6, 8)]
    assert found.cycle_seconds(kind) == pytest.approx(155 / 1.5e9 + 5 * 1e-6)


@pytest.mark.parametrize(
    "bound, compared, turns",
    [
        ("%n = s32[] constant(5)", "%i, %n", 5),
        ("%n = s32[]{:T(128)} constant(1), a={b}", "%i, %n", 1),
        ("%n = s32[] constant(5)", "%i, %m", None),  # below another number
    ],
)
def test_the_turns_of_a_loop(bound, compared, turns):
    lines = [f"  {bound}", f"  ROOT %lt = pred[]{{:T(512)}} compare({compared}), direction=LT"]
    line = "  %w = (s32[]) while(%t), condition=%c, body=%b"
    assert costs._turns(line, lines) == turns
    assert costs._turns(f'{line}, backend_config={{"known_trip_count":{{"n":"7"}}}}', lines) == 7


def test_every_chip_has_a_peak():
    assert costs.CHIPS.keys() <= PEAK_FLOPS.keys()


def test_gradient_flops():
    """A matmul forward and one backward: only the kernel is trained. What rematerialisation repeats
    counts again, so the caller must not ask for it."""

    def loss_fn(trained, frozen, batch, keys):
        return jnp.tanh(batch @ trained["kernel"]).sum() * frozen, {}

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, 32), (), (64, 128))]
    found = costs.gradient_flops(loss_fn, {"kernel": shapes[0]}, *shapes[1:])
    assert found == pytest.approx(2 * (2 * 64 * 128 * 32), rel=0.02)
