"""Compares the 1x1 convolutions' products with float64: values and statistics."""

import pytest
import torch
from op_cases import DEVICE, TOLERANCE, relative_rms
from op_races import shuffled_programs

from effnet_kernels import launch
from effnet_kernels.launch import launches_used
from effnet_kernels.pointwise import Prologue, product, product_choice, product_launch, product_reference
from effnet_kernels.statistics import merge_moments

# images, input channels, output channels, height, width
CASES = {
    "expansion": (2, 24, 144, 8, 8),
    "projection": (2, 144, 24, 8, 8),
    "no-vector": (3, 13, 20, 5, 7),
    "wide": (3, 40, 260, 3, 3),
    "narrow": (1, 100, 7, 9, 11),
    "one-pixel": (70, 96, 16, 1, 1),
}


def make_inputs(case, dtype, mean=0.0):
    n, k, c, h, w = case
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    x = (normal(n, k, h, w) + mean).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    stats = torch.stack([0.1 * normal(k) + mean, 1 + 0.2 * normal(k).tanh(), normal(k), normal(k)]).to(DEVICE)
    affine = (1 + 0.2 * normal(k).to(DEVICE), normal(k).to(DEVICE))
    weight = (normal(c, k, 1, 1) / k**0.5).to(DEVICE)
    return x, weight, Prologue(stats, affine, normal(n, k).sigmoid().to(DEVICE))


def exact(x, weight, prologue):
    """The float64 result on the weight as the product rounds it."""
    if prologue is not None:
        affine = tuple(v.double() for v in prologue.affine)
        prologue = Prologue(prologue.stats.double(), affine, prologue.gate.double())
    return product_reference(x.double(), weight.to(x.dtype).double(), prologue)


def check(case, dtype, fused, mean=0.0):
    x, weight, prologue = make_inputs(case, dtype, mean)
    prologue = prologue if fused else None
    y, moments = product(x, weight, prologue, moments=True)
    want = exact(x, weight, prologue)
    limit = TOLERANCE[dtype] * (1.5 if fused else 1.0)  # also rounds the product's input
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_rms(y, want) <= limit
    # The statistics are those of y as stored.
    var, center = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    mean_, rstd, unbiased, count = merge_moments(moments, 1e-3, sync=False)
    assert (count == y[:, 0].numel()).all()
    assert ((mean_ - center).abs() <= 1e-5 * (center.abs() + var.sqrt())).all()
    assert relative_rms(rstd, torch.rsqrt(var + 1e-3)) <= 1e-4
    assert relative_rms(unbiased * (count - 1) / count, var) <= 2e-4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case, fused, dtype):
    check(case, dtype, fused)


def test_mean_of_1000_standard_deviations():
    """An input whose mean is large: neither the BatchNorm before the product nor the statistics after it cancel."""
    check(CASES["projection"], torch.float32, fused=True, mean=1000.0)
    x, weight, _ = make_inputs(CASES["expansion"], torch.float32)
    y, moments = product(x + 1000, weight, moments=True)
    var = torch.var(y.double(), dim=(0, 2, 3))
    assert relative_rms(merge_moments(moments, 1e-3, sync=False)[2], var) <= 1e-3


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "prologue"])
def test_every_tile_size_gives_the_result(fused):
    """Several tiles a program, tiles that span images and those that do not, several blocks of output channels."""
    x, weight, prologue = make_inputs((3, 40, 70, 8, 8), torch.float32)
    prologue = prologue if fused else None
    want = exact(x, weight, prologue)
    for block_m, rows in ((16, 64), (32, 192), (64, 128), (128, 128)):
        config = product_launch(192, 40, 70)
        config = type(config)(block_m, 32, 16, rows, config.num_warps)
        with launches_used({("product", (192, 40, 70)): config}):
            assert product_choice(192, 40, 70) == config
            y, moments = product(x, weight, prologue, moments=True)
        assert relative_rms(y, want) <= TOLERANCE[torch.float32]
        mean = merge_moments(moments, 1e-3, sync=False)[0]
        torch.testing.assert_close(mean.double(), want.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_nan_in_gives_nan_out():
    x, weight, prologue = make_inputs(CASES["projection"], torch.float32)
    x[1, 3, 2, 2] = float("nan")
    y, moments = product(x, weight, prologue, moments=True)
    assert y[1, :, 2, 2].isnan().all()
    assert not y[1, :, 2, 3].isnan().any()
    assert merge_moments(moments, 1e-3, sync=False)[0].isnan().all()


@pytest.mark.skipif(not launch.INTERPRETED, reason="programs are shuffled in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_no_races(dtype):
    for seed, case in enumerate(CASES.values()):
        for fused in (False, True):
            with shuffled_programs(seed) as races:
                check(case, dtype, fused)
            assert not races, (case, races)
