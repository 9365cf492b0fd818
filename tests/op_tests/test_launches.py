"""Compiles every launch that the heuristics choose for sm_80 and sm_90, and checks its resources. Needs no GPU."""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from op_launches import block_step, blocks, late_loads, longest_loop, record, values_a_turn

from effnet_kernels.depthwise_conv import backward_launch, backward_space, forward_launch, forward_space
from effnet_kernels.gate_mlp import gate_launch, gate_launch_space
from effnet_kernels.launch import row_launch, row_launch_space
from effnet_kernels.pointwise import product_launch, product_launch_space
from effnet_kernels.se_gate import image_launch, image_launch_space

SPILLED = 0 if version("triton").startswith("3.7.") else 16  # bytes; 3.9 leaves 8 in a few launches of small kernels
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# Limits on the loop's instructions per value, by (kernel, k or None), for the kernels with most arithmetic. An H100
# issues about 35 instructions while memory moves 4 bytes, the traffic per value of a pass that reads and writes bf16;
# 18 for a pass that only reads.
INSTRUCTIONS = {
    ("_forward_kernel", 3): 36,
    ("_forward_kernel", 5): 55,
    ("_backward_kernel", 3): 64,
    ("_backward_kernel", 5): 104,
    ("_squeeze_kernel", None): 14,
    ("_excite_kernel", None): 14,
    ("_five_sums_kernel", None): 26,
    ("_five_sums_kernel, gated", None): 28,  # writes a map too: memory moves 6 bytes in the time of 53
    ("_apply_sums_kernel", None): 23,
    ("_moments_kernel", None): 11,
}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@functools.cache
def compile_all(arch: int, dtype: str, models: range) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("op_launches.py"), str(arch), dtype, *map(str, models)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def check(row: dict) -> None:
    constants = row["constants"]
    assert row["spilled"] <= SPILLED, row
    assert row["late_loads"] == 0, row  # a load cannot move above a store that it may alias
    assert row["shared"] <= SHARED_LIMIT[row["arch"]], row
    # Accesses are 16 bytes wide if the number of channels and a thread's share of the tile allow. The depthwise
    # convolution is exempt: a thread holds all taps of its one or two channels.
    rows = constants.get("BLOCK_M", constants.get("BLOCK_P"))
    if row["kernel"].startswith("_silu"):
        assert set(row["widths"]) == {"ld16", "st16"}, row
    if rows is not None:
        share = max(rows * constants["BLOCK_C"] // (32 * constants["num_warps"]), 1)
        width = min(16, min(share, constants.get("VEC", share)) * ITEMSIZE[row["type"]])
        assert f"ld{width}" in row["widths"], row
        assert width == 2 or "ld2" not in row["widths"] or constants.get("SCALE"), row  # one scale per image
        assert width == 2 or "st2" not in row["widths"], row


@pytest.mark.parametrize(
    ("arch", "dtype", "models"),
    [
        pytest.param(90, "bfloat16", range(0), id="sm90-bf16-two-blocks"),
        pytest.param(80, "bfloat16", range(8), id="sm80-bf16-b0-to-b7", marks=pytest.mark.slow),
        pytest.param(90, "bfloat16", range(8), id="sm90-bf16-b0-to-b7", marks=pytest.mark.slow),
        pytest.param(90, "float32", range(1), id="sm90-fp32-b0", marks=pytest.mark.slow),
    ],
)
def test_no_register_spills_and_wide_memory_accesses(arch, dtype, models):
    rows = compile_all(arch, dtype, models)
    assert {"_forward_kernel", "_backward_kernel", "_five_sums_kernel"} <= {row["kernel"] for row in rows}
    for row in rows:
        check(row)


def test_instructions_per_value():
    """Two blocks of B0 at 32 px, in bf16 for an H100."""
    checked = set()
    for row in compile_all(90, "bfloat16", range(0)):
        constants = row["constants"]
        key = (row["kernel"] + (", gated" if constants.get("GATED") else ""), constants.get("K"))
        if key in INSTRUCTIONS:
            checked.add(key)
            assert row["loop"] / values_a_turn(constants) <= INSTRUCTIONS[key], row
    assert checked == set(INSTRUCTIONS)


def test_longest_loop_is_an_innermost_loop():
    listing = """
        /*0000*/ MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/ MOV R2, R1 ;
.L_x_1:
        /*0020*/ FADD R2, R2, R1 ;
        /*0030*/ @P0 BRA `(.L_x_1) ;
        /*0040*/ @P1 BRA `(.L_x_0) ;
        /*0050*/ EXIT ;
"""
    assert longest_loop(listing) == 2
    assert longest_loop("        /*0000*/ EXIT ;") == 0


def test_late_loads_counts_loads_after_a_store():
    loop = """
.L_x_0:
        /*0010*/ {} R2, [R4.64] ;
        /*0020*/ @P1 {} [R6.64], R2 ;
        /*0030*/ @P0 BRA `(.L_x_0) ;
"""
    assert late_loads(loop.format("LDG.E", "STG.E")) == 0
    assert late_loads(loop.format("LDG.E", "LDG.E")) == 0
    assert late_loads(loop.format("STG.E", "LDG.E.128")) == 1
    assert late_loads("        /*0010*/ STG.E [R6.64], R2 ;\n        /*0020*/ LDG.E R2, [R4.64] ;") == 0


def test_blocks_of_b0():
    """First and last block, and a map size: five strides of 2 at 224 px, three at 32 px with output stride 8."""
    at_224, at_32 = blocks(0), blocks(0, 32, 8)
    assert at_224[0] == (32, 16, 112, 3, 1, 1)
    assert at_224[-1] == (192, 320, 7, 3, 1, 6)
    assert at_32[0][2] == 32
    assert at_32[-1] == (192, 320, 4, 3, 1, 6)


@pytest.mark.parametrize(
    ("n", "c", "size", "spans"),
    [(128, 32, 112, 8), (32, 48, 190, 33), (1, 24, 7, 1), (1024, 32, 32, 1), (1, 24, 300, 157)],
)
def test_few_large_images_are_cut_into_spans(n, c, size, spans):
    """Whole tiles, at least 8 of them, and no empty span."""
    launch = image_launch(n, size * size, c)
    span = launch.span(size * size)
    assert launch.spans == spans
    assert spans == 1 or (span % launch.block_m == 0 and span >= 8 * launch.block_m)
    assert (spans - 1) * span < size * size <= spans * span


SMALL = {"_merge": 3, "_add": 2, "_gate": 1, "_dpool": 1, "_parameters_backward": 1, "_add_splits": 1}


@pytest.mark.parametrize(("shape", "more"), [((24, 24, 32, 3, 1, 6), {}), ((80, 80, 8, 3, 1, 6), {"_spans": 2})])
def test_small_launches_of_a_block(shape, more):
    """Beside its passes over maps: each takes two to four microseconds, whatever the batch."""
    launches = record(block_step, 512, shape, torch.bfloat16)
    small = Counter(kernel.__name__.removesuffix("_kernel") for kernel, _, args, _ in launches if not has_map(args))
    assert small == SMALL | more
    assert len(launches) - small.total() == 12, "passes over maps"


def has_map(args):
    return any(isinstance(a, torch.Tensor) and a.dim() == 4 and a.dtype == torch.bfloat16 for a in args)


@pytest.mark.parametrize(("n", "c", "size", "k"), [(512, 144, 32, 3), (128, 672, 14, 5), (2, 24, 7, 3)])
def test_heuristic_launch_is_in_the_autotune_space(n, c, size, k):
    rows = n * size * size
    assert row_launch(rows, c) in row_launch_space(rows, c)
    assert image_launch(n, size * size, c) in image_launch_space(n, size * size, c)
    assert product_launch(rows, c, 24) in product_launch_space(rows, c, 24)
    assert gate_launch(c, c // 24) in gate_launch_space(c // 24)
    assert forward_launch(n, c, size, size, k) in forward_space(n, c, size, size, k)
    assert backward_launch(n, c, size, size, k, 1) in backward_space(n, c, size, size, k, 1)
