"""What the compiler makes of every launch that the heuristics choose, for sm_80 and sm_90, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from op_launches import blocks

from effnet_kernels.bn_silu_squeeze import image_launch, image_launch_space
from effnet_kernels.depthwise_conv import backward_launch, forward_launch, launch_space
from effnet_kernels.launch import row_launch, row_launch_space
from effnet_kernels.se_gate import gate_launch, gate_launch_space

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# (kernel, sm, type, k, stride): bytes. The compiler stops at 168 registers, where three blocks fit a processor (at 128,
# where four do), and spills two rather than take more; with a higher limit (186 registers) only two blocks would fit.
SPILLS = {("_backward_kernel", 90, "float32", 3, 2): 8, ("_forward_kernel", 90, "float32", 5, 1): 8}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def compile_all(arch: int, dtype: str, models: range) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("op_launches.py"), str(arch), dtype, *map(str, models)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def check(row: dict) -> None:
    constants, arch = row["constants"], row["arch"]
    key = (row["kernel"], arch, row["type"], constants.get("K"), constants.get("STRIDE"))
    assert row["spilled"] <= SPILLS.get(key, 0), row
    assert row["shared"] <= SHARED_LIMIT[arch], row
    # 16 bytes a thread wherever the channels and the share of a thread in the tile allow; 8 in the depthwise
    # backward but for k = 3 and stride 1, whose k * k sums for 8 channels would not fit the registers.
    rows = constants.get("BLOCK_M", constants.get("BLOCK_P"))
    if rows is not None:
        share = max(rows * constants["BLOCK_C"] // (32 * constants["num_warps"]), 1)
        width = min(16, min(share, constants["VEC"]) * ITEMSIZE[row["type"]])
        assert f"ld{width}" in row["widths"], row
        assert "ld2" not in row["widths"] or constants.get("SCALE"), row  # one scale per image
        assert "st2" not in row["widths"], row


@pytest.mark.parametrize(
    ("arch", "dtype", "models"),
    [
        pytest.param(90, "bfloat16", range(0), id="sm90-bf16-two-blocks"),
        pytest.param(80, "bfloat16", range(8), id="sm80-bf16-b0-to-b7", marks=pytest.mark.slow),
        pytest.param(90, "bfloat16", range(8), id="sm90-bf16-b0-to-b7", marks=pytest.mark.slow),
        pytest.param(90, "float32", range(1), id="sm90-fp32-b0", marks=pytest.mark.slow),
    ],
)
def test_no_spills_and_wide_accesses(arch, dtype, models):
    rows = compile_all(arch, dtype, models)
    assert {"_forward_kernel", "_backward_kernel", "_five_sums_kernel"} <= {row["kernel"] for row in rows}
    for row in rows:
        check(row)


def test_blocks_of_b0():
    """The shapes that are compiled are the model's: five strides at 224 px, three at 32 px with output stride 8."""
    at_224, at_32 = blocks(0), blocks(0, 32, 8)
    assert at_224[0] == (32, 16, 112, 3, 1, 1)
    assert at_224[-1] == (192, 320, 7, 3, 1, 6)
    assert at_32[0][2] == 32
    assert at_32[-1] == (192, 320, 4, 3, 1, 6)


@pytest.mark.parametrize(("n", "c", "size", "k"), [(512, 144, 32, 3), (128, 672, 14, 5), (2, 24, 7, 3)])
def test_an_autotuner_would_try_the_heuristics_choice(n, c, size, k):
    rows = n * size * size
    assert row_launch(rows, c) in row_launch_space(rows, c)
    assert image_launch(size * size, c) in image_launch_space(size * size, c)
    assert gate_launch(c // 24) in gate_launch_space(c // 24)
    forward, backward = launch_space(n, c, size, size, k)
    assert forward_launch(n, c, size, size) in forward
    assert backward_launch(c, k, 1, size, n * size) in backward
