"""Test-time augmentation (TTA): classify an image and its mirror image, and average."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Tempered(nn.Module):
    """[N, 3, H, W] -> the model's logits divided by a temperature (Guo et al. 2017), float32 [N, K]."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).float() / self.temperature


class FlipAverage(nn.Module):
    """[N, 3, H, W] -> logarithm of the mean of each image's and its mirror image's probabilities, float32 [N, K].

    The softmax of the result is that mean. Probabilities rather than logits are averaged, as in Krizhevsky et al. 2012
    (section 4.1) and Simonyan and Zisserman 2015 (section 3.2).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        plain, mirrored = (self.model(x).float().log_softmax(1) for x in (images, images.flip(-1)))
        return torch.logaddexp(plain, mirrored) - math.log(2)


def with_tta(model: nn.Module, tta: str) -> nn.Module:
    """The model with test-time augmentation: `none` is the model itself, `flip` is `FlipAverage`.

    Raises:
        ValueError: another name.
    """
    if tta not in ("none", "flip"):
        raise ValueError(f"tta {tta!r}: choose none or flip")
    return FlipAverage(model) if tta == "flip" else model
