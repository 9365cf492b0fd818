"""Compound scaling and its rounding."""

import pytest

from effnet_fast.model import scaling


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1.0, 32), (16, 1.1, 16), (24, 1.1, 24), (40, 1.1, 48), (320, 1.1, 352), (1280, 2.0, 2560), (16, 0.3, 8)],
)
def test_channels_round_to_eight_and_at_least_ninety_percent(channels, width, expected):
    assert scaling.round_channels(channels, width) == expected


def test_no_rounding_loses_more_than_ten_percent():
    for channels in range(8, 400, 8):
        for width in (0.35, 0.5, 0.75, 1.1, 1.3, 1.8, 2.2):
            rounded = scaling.round_channels(channels, width)
            assert rounded % 8 == 0
            assert rounded >= 0.9 * channels * width


def test_repeats_round_up():
    assert [scaling.round_repeats(n, 1.1) for n in (1, 2, 3, 4)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("output_stride", "strides"),
    [
        (32, [2, 1, 2, 2, 2, 1, 2, 1]),
        (16, [1, 1, 2, 2, 2, 1, 2, 1]),
        (8, [1, 1, 1, 2, 2, 1, 2, 1]),
        (4, [1, 1, 1, 1, 2, 1, 2, 1]),
    ],
)
def test_smaller_output_strides_drop_early_strides_first(output_stride, strides):
    layout = scaling.layout(1.0, 1.0, output_stride)
    assert [layout.stem_stride, *(stage.stride for stage in layout.stages)] == strides


@pytest.mark.parametrize("bad", [0, 2, 7, 64])
def test_unknown_output_stride(bad):
    with pytest.raises(ValueError, match="output_stride must be 32, 16, 8 or 4"):
        scaling.layout(1.0, 1.0, bad)


def test_image_size_scales_with_the_variant():
    sizes = [scaling.scaled_size(32, v.resolution) for v in scaling.VARIANTS.values()]
    assert sizes == [32, 34, 37, 43, 54, 65, 75, 86]


def test_default_output_stride_of_small_variants():
    assert {scaling.default_output_stride(size) for size in (32, 34, 86, 127)} == {8}
    assert {scaling.default_output_stride(size) for size in (128, 224, 600)} == {32}


def test_compound_scaling_about_doubles_the_cost():
    alpha, beta, gamma = scaling.PAPER_FACTORS
    assert 1.9 <= alpha * beta**2 * gamma**2 <= 2.1
