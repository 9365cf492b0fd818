"""The programs of every op's launches do not race; and the race check itself detects races."""

import pytest
import torch

from effnet_kernels import launch

if not launch.INTERPRETED:
    pytest.skip("programs are shuffled in Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from op_cases import OPS, QUICK_CASES, Case, compare
from op_races import shuffled_programs

CASES = [Case(2, 24, 9, 7, 3, 1), Case(3, 40, 8, 8, 5, 2), Case(2, 264, 5, 4, 3, 1)]  # a wide gate has a kernel more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", OPS)
def test_no_races(name, dtype):
    """Programs in random order give the reference's results and do not race."""
    cases = CASES if dtype == torch.bfloat16 else CASES[:1]
    for seed, case in enumerate(cases):
        with shuffled_programs(seed) as races:
            compare(OPS[name], case, dtype)
        assert not races, (case.id, races)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", OPS)
def test_no_races_in_odd_shapes(name, dtype):
    for seed, case in enumerate(QUICK_CASES):
        with shuffled_programs(seed) as races:
            compare(OPS[name], case, dtype)
        assert not races, (case.id, races)


@triton.jit
def _shift(x_ptr, y_ptr, DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i + DISTANCE, mask=i >= 0), mask=i >= 0)


@pytest.mark.parametrize("seed", range(3))
def test_finds_races(seed):
    x, y = torch.zeros(64), torch.zeros(64)
    with shuffled_programs(seed) as races:
        _shift[(2,)](x, y, DISTANCE=0, BLOCK=16)
    assert not races
    with shuffled_programs(seed) as races:
        _shift[(2,)](x, x, DISTANCE=0, BLOCK=16)  # a program may load what it stores itself
    assert not races
    with shuffled_programs(seed) as races:
        _shift[(2,)](x, x, DISTANCE=1, BLOCK=16)
    assert races == ["a program loads what another one stores"]
    with shuffled_programs(seed) as races:
        _overlap[(2,)](y, BLOCK=16)
    assert races == ["two programs store to one address"]


@triton.jit
def _overlap(y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i.to(tl.float32), mask=i >= 0)
