"""Compares every op with float64 on every layer of B0 to B7; runs only on a GPU, where it takes minutes."""

import pytest
import torch
from op_cases import OPS, TOLERANCE, Case, compare
from op_launches import blocks

from marks import on_gpu


def layers(model: int) -> list[Case]:
    """Every distinct depthwise layer of a model, at its own resolution and at 32 px with output stride 8."""
    shapes = [*blocks(model), *blocks(model, 32, 8)]
    return list(dict.fromkeys(Case(2, c * expand, size, size, k, stride) for c, _, size, k, stride, expand in shapes))


def test_case_table_has_the_layers_of_b0():
    cases = layers(0)
    assert len(cases) == len(set(cases)) > 20
    assert {case.c for case in cases} == {32, 96, 144, 240, 480, 672, 1152}
    assert {case.h for case in cases} >= {112, 56, 28, 14, 7, 16, 8, 4}


@pytest.mark.slow
@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("model", range(8), ids=lambda model: f"b{model}")
@pytest.mark.parametrize("name", OPS)
def test_every_layer_against_float64(name: str, model: int, dtype: torch.dtype):
    for case in layers(model):
        compare(OPS[name], case, dtype)
