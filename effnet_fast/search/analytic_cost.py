"""Parameters, MACs and activations of a scaled EfficientNet from its layout alone, without building it.

fvcore on the built model (`model/complexity.py`) takes a second a model and is what every table tells; a search over
thousands of models asks these sums, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from effnet_fast.model.scaling import Layout

SE_RATIO = 0.25  # of a block's gate


class Counts(NamedTuple):
    """Of a whole model and one image: trainable numbers, multiply-accumulates, numbers that its layers write."""

    parameters: int
    macs: int
    activations: int


class _Layer(NamedTuple):
    """A convolution or linear layer: numbers in its weight, in what follows it (BatchNorm or bias), outputs, pixels."""

    weights: int
    others: int
    channels: int
    pixels: int


def count(plan: Layout, image_size: int, num_classes: int) -> Counts:
    """The sums over all layers of a model at [3, image_size, image_size] images."""
    layers = list(_layers(plan, image_size, num_classes))
    return Counts(
        parameters=sum(layer.weights + layer.others for layer in layers),
        macs=sum(layer.weights * layer.pixels for layer in layers),
        activations=sum(layer.channels * layer.pixels for layer in layers),
    )


def _layers(plan: Layout, size: int, num_classes: int) -> Iterator[_Layer]:
    size = -(-size // plan.stem_stride)
    yield _normalised(3 * 3**2, plan.stem_channels, size)
    inputs = plan.stem_channels
    for stage in plan.stages:
        for repeat in range(stage.repeats):
            hidden, squeezed = inputs * stage.expand, max(1, int(inputs * SE_RATIO))
            if stage.expand != 1:
                yield _normalised(inputs, hidden, size)
            size = -(-size // stage.stride) if repeat == 0 else size
            yield _normalised(stage.kernel**2, hidden, size)
            yield _biased(hidden, squeezed)
            yield _biased(squeezed, hidden)
            yield _normalised(hidden, stage.channels, size)
            inputs = stage.channels
    yield _normalised(inputs, plan.head_channels, size)
    yield _biased(plan.head_channels, num_classes)


def _normalised(inputs: int, channels: int, size: int) -> _Layer:
    """A convolution of `inputs` numbers for each output, with BatchNorm behind it."""
    return _Layer(inputs * channels, 2 * channels, channels, size**2)


def _biased(inputs: int, channels: int) -> _Layer:
    """A linear layer, or a 1x1 convolution of a single pixel."""
    return _Layer(inputs * channels, channels, channels, 1)
