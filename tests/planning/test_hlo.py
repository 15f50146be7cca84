"""The reader of compiled programs, on programs that two compilers printed (tests/golden/make_programs.py)."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sae_jax.planning import hlo

GOLDEN = Path(__file__).parents[1] / "golden"

# The program of make_programs.py: three blocks of 8192 rows of 2048, 4096 latents a device.
BLOCKS, ROWS, D, F = 3, 8192, 2048, 4096
ROW_BYTES = 4 * D


def read(kind: str) -> hlo.Program:
    return hlo.analyse((GOLDEN / f"program_{kind}.txt").read_text())


def figures(program: hlo.Program) -> dict[str, tuple[int, int]]:
    return {collective.kind: (collective.count, collective.bytes) for collective in program.collectives.values()}


def test_collectives_on_gpus_count_once_where_they_are_done_and_as_often_as_loops_run():
    found = figures(read("h200"))
    whole = BLOCKS * ROWS * ROW_BYTES
    assert found == {
        "all-gather": (BLOCKS, whole),
        "reduce-scatter": (BLOCKS, whole),
        "all-to-all": (1, ROWS // 16 * ROW_BYTES),
        "all-reduce": (1, 4),
    }


def test_collectives_on_a_torus_go_one_direction_at_a_time():
    """Rows of 4, 16 and 64 of 64 chips; the fusion that a reduce-scatter becomes is one, not an all-reduce."""
    found = figures(read("v5p"))
    lines = BLOCKS * ROWS * ROW_BYTES * (16 + 4 + 1) // 16
    assert found["all-gather"] == found["reduce-scatter"] == (3 * BLOCKS, lines)
    assert found["all-to-all"] == (1, ROWS // 64 * ROW_BYTES)
    assert found["all-reduce"] == (1, 4)
    # The seams of those fusions, which the compiler sends to a neighbour.
    assert set(found) == {"all-gather", "reduce-scatter", "all-to-all", "all-reduce", "collective-permute"}
    assert found["collective-permute"][1] < 0.02 * lines


@pytest.mark.parametrize(("kind", "n_devices", "n_sorts"), [("h200", 16, 2), ("v5p", 64, 1)])
def test_products_sorts_and_open_loops(kind, n_devices, n_sorts):
    """On GPUs the first trip of the loop stands before it."""
    program = read(kind)
    in_open_loop = 2 * (2 * ROWS // n_devices * F * D)
    assert program.matmul_flop == BLOCKS * 2 * ROWS * F * D + in_open_loop
    assert program.sorts == n_sorts
    assert program.open_loops == 1
    assert program.largest[0].shape == f"f32[{ROWS},{F}]"
    assert program.largest[0].bytes == 4 * ROWS * F


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        hlo.analyse("f32[2]")


def test_an_axis_of_the_right_side_alone_costs_what_it_makes():
    """Scores of 4 groups of 2 heads that share their keys, as a TPU's compiler writes them: 8 sequences, 128 tokens."""
    convolution = (
        "window={size=8x4x2 stride=7x3x1 pad=0_0x0_0x1_1 lhs_dilate=8x4x1 rhs_reversal=0x0x1}, "
        "dim_labels=0b1f2_0o12i->01bf2"
    )
    text = f"""ENTRY %main (keys: bf16[8,128,4,256,1], queries: bf16[8,128,4,2,256]) -> f32[8,4,128,128,2] {{
  %keys = bf16[8,128,4,256,1]{{4,3,2,1,0}} parameter(0)
  %queries = bf16[8,128,4,2,256]{{4,3,2,1,0}} parameter(1)
  ROOT %scores = f32[8,4,128,128,2]{{4,3,2,1,0}} convolution(%keys, %queries), {convolution}
}}
"""
    assert hlo.analyse(text).matmul_flop == 2 * 8 * 8 * 128 * 128 * 256


def test_sums_and_single_numbers_count_beside_products():
    text = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8,4]) -> f32[8] {
  %x = f32[8,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %squares = f32[8,4]{1,0} multiply(%x, %x)
  ROOT %norms = f32[8]{0} reduce(%squares, %zero), dimensions={1}, to_apply=%add
}
"""
    assert hlo.analyse(text).other_flop == 8 * 4 + 8 * 4 + 1  # and the addition of the sum itself


@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize(
    ("of", "n_bytes"),
    [
        (lambda a, at: a * 2 + a, 2 * 4096),  # read once, written once
        (lambda a, at: a[at], 2 * 4 * 64 + 4),  # one row, and its number
        (lambda a, at: a.at[at].set(0), 4 * 64 + 4),  # in place
        (lambda a, at: lax.fori_loop(0, 5, lambda i, a: jnp.sin(a), a), 5 * 2 * 4096),
    ],
)
def test_bytes_are_those_that_instructions_read_and_write(of, n_bytes):
    array, at = jax.ShapeDtypeStruct((16, 64), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(of, donate_argnums=0).lower(array, at).compile().as_text()
    assert n_bytes <= hlo.analyse(text).moved_bytes <= n_bytes + 500  # counters, numbers of rows


def test_the_branch_not_taken_counts_however_a_compiler_lists_it():
    """For GPUs a conditional names its two branches in two attributes; the first alone was always taken."""

    def either(is_wide, a):
        return lax.cond(is_wide, lambda: a @ a, lambda: 2 * a)

    a = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(either).lower(jax.ShapeDtypeStruct((), bool), a).compile().as_text()
    no, yes = re.search(r"branch_computations=\{%([\w.]+), %([\w.]+)\}", text).groups()
    in_two = re.sub(r"branch_computations=\{.*?\}", f"true_computation=%{yes}, false_computation=%{no}", text)
    for each in (text, in_two):
        assert hlo.analyse(each).matmul_flop == 2 * 64**3
        assert hlo.analyse(each, quietest=True).matmul_flop == 0


def test_kernels_are_what_a_device_is_told_to_do_at_once():
    """A loop's count as often as it runs; what a sum does to each number is part of it, as what is fused is."""
    text = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (w.1: f32[64,32], at.1: s32[]) -> f32[8,32] {
  %w.1 = f32[64,32]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %rows = f32[8,32]{1,0} dynamic-slice(%w.1, %at.1, %zero.1), dynamic_slice_sizes={8,32}
}

%body (held: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %held = (s32[], f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%held), index=0
  %w.2 = f32[64,32]{1,0} get-tuple-element(%held), index=1
  %few = f32[8,32]{1,0} fusion(%w.2, %i), kind=kLoop, calls=%fused
  %product = f32[8,64]{1,0} dot(%few, %w.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %next = (s32[], f32[64,32]{1,0}) tuple(%i, %w.2)
}

%condition (held.1: (s32[], f32[64,32])) -> pred[] {
  %held.1 = (s32[], f32[64,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%held.1), index=0
  %last = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %last), direction=LT
}

ENTRY %main (w: f32[64,32], n: s32[]) -> f32[64] {
  %w = f32[64,32]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = f32[] constant(0)
  %begin = (s32[], f32[64,32]{1,0}) tuple(%n, %w)
  %loop = (s32[], f32[64,32]{1,0}) while(%begin), condition=%condition, body=%body, TRIPS
  ROOT %norms = f32[64]{0} reduce(%w, %zero), dimensions={1}, to_apply=%add
}
"""
    program = hlo.analyse(text.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}'))
    kernels = {kernel.kind: kernel for kernel in program.kernels}
    assert {kind: kernel.times for kind, kernel in kernels.items()} == {"reduce": 1, "fusion": 3, "dot": 3}
    assert kernels["dot"].flop == {"f32": 2 * 8 * 64 * 32}
    whole = {
        kind: [moved.is_whole for moved in kernel.moved if moved.elements == 64 * 32]
        for kind, kernel in kernels.items()
    }
    assert whole == {"reduce": [True], "fusion": [False], "dot": [True]}
    assert kernels["fusion"].bytes == 2 * 4 * 8 * 32 + 4  # rows read and written, and which
    assert program.moved_bytes == sum(kernel.times * kernel.bytes for kernel in program.kernels)
