"""The sums that programs leave, added up in one launch."""

import pytest
import torch
from op_cases import DEVICE

from effnet_kernels.launch import launches_go_to
from effnet_kernels.partial_sums import add_partials, add_weight_partials

# In one block of groups, in several; with few groups and many; sizes that a block of values does not divide.
SHAPES = [(1, 2, 5), (2, 2, 5), (31, 3, 40), (255, 1, 64), (256, 2, 8), (257, 2, 3), (700, 1, 13)]


def partials(groups, rows, c):
    return torch.randn(groups, rows, c, device=DEVICE) + torch.arange(c, device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_over_groups(shape):
    values = partials(*shape)
    torch.testing.assert_close(add_partials(values), values.double().sum(0).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "c", "k"), [(1, 7, 3), (5, 13, 3), (128, 3, 5), (129, 3, 3), (300, 1, 5)])
def test_gradient_of_a_weight_and_the_rows_after_it(groups, c, k, dtype, rows):
    values, weight = partials(groups, k * k + rows, c), torch.zeros(c, 1, k, k, device=DEVICE, dtype=dtype)
    gradient, others = add_weight_partials(values, weight)
    expected = values.double().sum(0)
    torch.testing.assert_close(gradient, expected[: k * k].t().reshape(weight.shape).to(dtype))
    torch.testing.assert_close(others, expected[k * k :].float(), rtol=1e-6, atol=1e-5)


def test_a_single_group_starts_no_kernel():
    with launches_go_to(lambda *_, **__: pytest.fail("started a kernel")):
        assert add_partials(torch.ones(1, 2, 3)).shape == (2, 3)
