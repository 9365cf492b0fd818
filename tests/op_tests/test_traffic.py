"""Limits the bytes that a training step of an MBConv block moves."""

import pytest
import torch

from effnet_kernels import launch

if not launch.INTERPRETED:
    pytest.skip("loads and stores are counted in Triton's interpreter", allow_module_level=True)

from op_launches import blocks
from op_traffic import block_traffic, forward_bytes, recorded, report

from effnet_kernels.statistics import batch_statistics


@pytest.mark.parametrize(
    ("batch", "block"),
    [
        pytest.param(4, (16, 16, 16, 3, 1, 6), id="k3"),
        pytest.param(8, (16, 24, 8, 5, 2, 6), id="k5-stride2"),
        *(
            pytest.param(batch, blocks(0, 32, 8)[i], id=f"b0-block{i}", marks=pytest.mark.slow)
            for batch, i in ((2, 2), (2, 3), (2, 4), (8, 6))
        ),
    ],
)
def test_bytes_of_a_block(batch, block):
    """At most 1.15 times the bytes of 11 passes over E and 12 over D, plus those over the block's input and output."""
    traffic = block_traffic(batch, block)
    print(
        f"\n{block}, batch {batch}: {traffic.measured} bytes, {traffic.measured / traffic.plan(11, 12):.3f} of the plan"
    )
    assert traffic.measured <= 1.15 * traffic.plan(11, 12)
    # A lower limit, in case the count misses a pass: no plan needs fewer passes than 9 E + 11 D.
    assert traffic.measured >= traffic.plan(9, 11)


@pytest.mark.parametrize(
    ("batch", "shape"), [(8, (16, 24, 16, 3, 1, 6)), (16, (16, 24, 16, 5, 2, 6))], ids=["k3", "k5"]
)
def test_products_save_passes_in_the_forward_pass(batch, shape):
    """One over the map before the depthwise convolution, for its statistics, and two over the map after it."""
    inputs, _, size, _, stride, expansion = shape
    e = batch * inputs * expansion * size**2 * 2  # bytes
    without, with_products = (forward_bytes(batch, shape, products=products) for products in (False, True))
    assert without - with_products == pytest.approx(e + 2 * e / stride**2, rel=0.1)


def test_a_program_counts_a_sector_once():
    """Statistics of [4 * 64, 32] float32 read 32 KiB once, and every program writes its moments [3, 32]."""
    x = torch.randn(4, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    with recorded(4) as traffic:
        batch_statistics(x, 1e-3, False)
    assert 0 <= traffic.once["_moments_kernel"] - x.numel() * 4 <= 16 * 3 * 32 * 4
    assert traffic.again["_moments_kernel"] == 0


def test_report_is_a_table():
    table = report(2, (8, 8, 4, 3, 1, 6))
    assert "| `_forward_kernel` |" in table
    assert "the depthwise convolution too, 11 E + 12 D" in table
