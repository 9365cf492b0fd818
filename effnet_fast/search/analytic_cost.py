"""Parameters, MACs and activations of a scaled EfficientNet, computed from its layout without building it.

Reported costs come from the built model (`model/complexity.py`), which takes a fraction of a second per model. A search
over thousands of models uses this module instead; a test checks that both agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from effnet_fast.model.scaling import SE_RATIO, Layout


class Counts(NamedTuple):
    """Trainable parameters, and multiply-accumulates and output elements of all layers for one image."""

    parameters: int
    macs: int
    activations: int


class _Layer(NamedTuple):
    """A convolution or linear layer.

    Attributes:
        weights: number of elements of the weight tensor.
        others: number of BatchNorm parameters, or of bias elements.
        channels: output channels.
        pixels: height times width of the output map.
    """

    weights: int
    others: int
    channels: int
    pixels: int


def count(layout: Layout, image_size: int, num_classes: int) -> Counts:
    """Count parameters, MACs and activations of a model for an image [3, image_size, image_size]."""
    layers = list(_layers(layout, image_size, num_classes))
    return Counts(
        parameters=sum(layer.weights + layer.others for layer in layers),
        macs=sum(layer.weights * layer.pixels for layer in layers),
        activations=sum(layer.channels * layer.pixels for layer in layers),
    )


def _layers(layout: Layout, size: int, num_classes: int) -> Iterator[_Layer]:
    size = -(-size // layout.stem_stride)
    yield _conv_norm(3 * 3**2, layout.stem_channels, size)
    inputs = layout.stem_channels
    for stage in layout.stages:
        for repeat in range(stage.repeats):
            hidden, squeezed = inputs * stage.expand, max(1, int(inputs * SE_RATIO))
            if stage.expand != 1:
                yield _conv_norm(inputs, hidden, size)
            size = -(-size // stage.stride) if repeat == 0 else size
            yield _conv_norm(stage.kernel**2, hidden, size)
            yield _linear(hidden, squeezed)
            yield _linear(squeezed, hidden)
            yield _conv_norm(hidden, stage.channels, size)
            inputs = stage.channels
    yield _conv_norm(inputs, layout.head_channels, size)
    yield _linear(layout.head_channels, num_classes)


def _conv_norm(weights_per_channel: int, channels: int, size: int) -> _Layer:
    """A convolution with `weights_per_channel` weights per output channel, followed by BatchNorm."""
    return _Layer(weights_per_channel * channels, 2 * channels, channels, size**2)


def _linear(inputs: int, channels: int) -> _Layer:
    """A linear layer with bias, or a 1x1 convolution of a single pixel."""
    return _Layer(inputs * channels, channels, channels, 1)
