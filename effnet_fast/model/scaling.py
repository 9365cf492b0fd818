"""Compound scaling: from multipliers of depth, width and resolution to a network's channels, strides and repeats.

Source: Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks,
ICML 2019 (arXiv 1905.11946), table 1 (the baseline), equation 3 (the compound rule), and the authors' code for the
rounding of channels and repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

PAPER_FACTORS = (1.2, 1.1, 1.15)  # alpha, beta, gamma: depth, width, resolution
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
BASE_RESOLUTION = 224
SMALL_IMAGE = 128  # pixels; for smaller images the final map at stride 32 is too small


@dataclass(frozen=True)
class Stage:
    """A sequence of MBConv blocks; the stride is that of the first one."""

    kernel: int
    stride: int
    expand: int
    channels: int
    repeats: int


SE_RATIO = 0.25  # squeeze-and-excitation channels / the block's input channels
BASELINE = (
    Stage(kernel=3, stride=1, expand=1, channels=16, repeats=1),
    Stage(kernel=3, stride=2, expand=6, channels=24, repeats=2),
    Stage(kernel=5, stride=2, expand=6, channels=40, repeats=2),
    Stage(kernel=3, stride=2, expand=6, channels=80, repeats=3),
    Stage(kernel=5, stride=1, expand=6, channels=112, repeats=3),
    Stage(kernel=5, stride=2, expand=6, channels=192, repeats=4),
    Stage(kernel=3, stride=1, expand=6, channels=320, repeats=1),
)

# Strides of the stem, the 24-channel stage and the 40-channel stage, by output stride.
_EARLY_STRIDES = {32: (2, 2, 2), 16: (1, 2, 2), 8: (1, 1, 2), 4: (1, 1, 1)}


@dataclass(frozen=True)
class Variant:
    """Multipliers of the baseline's width, depth and input resolution, and the variant's dropout."""

    width: float = 1.0
    depth: float = 1.0
    resolution: float = 1.0
    dropout: float = 0.2


VARIANTS = {
    "efficientnet-b0": Variant(1.0, 1.0, 224 / BASE_RESOLUTION, 0.2),
    "efficientnet-b1": Variant(1.0, 1.1, 240 / BASE_RESOLUTION, 0.2),
    "efficientnet-b2": Variant(1.1, 1.2, 260 / BASE_RESOLUTION, 0.3),
    "efficientnet-b3": Variant(1.2, 1.4, 300 / BASE_RESOLUTION, 0.3),
    "efficientnet-b4": Variant(1.4, 1.8, 380 / BASE_RESOLUTION, 0.4),
    "efficientnet-b5": Variant(1.6, 2.2, 456 / BASE_RESOLUTION, 0.4),
    "efficientnet-b6": Variant(1.8, 2.6, 528 / BASE_RESOLUTION, 0.5),
    "efficientnet-b7": Variant(2.0, 3.1, 600 / BASE_RESOLUTION, 0.5),
}


@dataclass(frozen=True)
class Layout:
    """A network's channels, strides and repeats after scaling and rounding."""

    stem_channels: int
    stem_stride: int
    stages: tuple[Stage, ...]
    head_channels: int


def round_channels(channels: int, width: float, divisor: int = 8) -> int:
    """Scale and round to the nearest multiple of `divisor`, never below 90 % of the scaled value."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Scale and round up."""
    return math.ceil(repeats * depth)


def scaled_size(native: int, resolution: float) -> int:
    """Input pixels for a data set with images of `native` pixels (for 32: B1 34, B7 86)."""
    return round(native * resolution)


def default_output_stride(image_size: int) -> int:
    """8 below 128 px, else 32 as in the paper."""
    return 8 if image_size < SMALL_IMAGE else 32


def layout(width: float, depth: float, output_stride: int) -> Layout:
    """Scale the baseline.

    Args:
        width, depth: multipliers, above 0.
        output_stride: input pixels per pixel of the final map: 32, 16, 8 or 4.

    Raises:
        ValueError: output_stride is another value, or a multiplier is not above 0.
    """
    if output_stride not in _EARLY_STRIDES:
        raise ValueError(f"output_stride must be 32, 16, 8 or 4, not {output_stride}")
    if width <= 0 or depth <= 0:
        raise ValueError(f"width and depth multipliers must be above 0, not {width} and {depth}")
    stem_stride, *early = _EARLY_STRIDES[output_stride]
    strides = {1: early[0], 2: early[1]}
    stages = tuple(
        replace(
            stage,
            stride=strides.get(i, stage.stride),
            channels=round_channels(stage.channels, width),
            repeats=round_repeats(stage.repeats, depth),
        )
        for i, stage in enumerate(BASELINE)
    )
    scaled = Layout(round_channels(STEM_CHANNELS, width), stem_stride, stages, round_channels(HEAD_CHANNELS, width))
    assert stem_stride * math.prod(stage.stride for stage in stages) == output_stride
    return scaled
