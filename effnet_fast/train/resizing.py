"""Progressive resizing: train on small images first and on larger ones later.

A step costs about as many operations as its images have pixels, so the early steps are cheap. fast.ai's entry to
DAWNBench trained ImageNet this way (Howard 2018); Tan and Le (2021, arXiv 2104.00298) study it for EfficientNetV2.

The loader delivers images of the full size, augmented and normalised; the step resizes them on the device. So all
loaders train on equal images, and the size depends on the optimizer step alone: a resumed run repeats it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ImageSizes:
    """Side of the training images, in pixels, as a function of the optimizer step.

    Attributes:
        sizes: pixels, rising.
        starts: first optimizer step of each size.
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    def __call__(self, step: int) -> int:
        """The side of the images of optimizer step `step`, in pixels."""
        return self.sizes[bisect_right(self.starts, step) - 1]

    def counts(self, first: int, end: int) -> dict[int, int]:
        """Steps of each size among the optimizer steps `first` to `end` - 1; sizes without a step are left out."""
        ends = (*self.starts[1:], end)
        counts = {
            size: min(stop, end) - max(start, first)
            for size, start, stop in zip(self.sizes, self.starts, ends, strict=True)
        }
        return {size: count for size, count in counts.items() if count > 0}

    def pixels(self, first: int, end: int) -> int:
        """Pixels per image, summed over the optimizer steps `first` to `end` - 1: about proportional to their time."""
        return sum(size**2 * count for size, count in self.counts(first, end).items())


def image_sizes(stages: Sequence[tuple[int, float]], first: int, end: int) -> ImageSizes:
    """Distribute the optimizer steps `first` to `end` - 1 among the stages, in order.

    Args:
        stages: side of the images in pixels, rising, and share of the steps, which add up to 1.
        first: the first step.
        end: one more than the last step.
    """
    done, starts = 0.0, []
    for _, share in stages:
        starts.append(first + round(done * (end - first)))
        done += share
    return ImageSizes(tuple(size for size, _ in stages), tuple(starts))


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images [N, C, H, W] to [N, C, size, size], channels-last: bilinear, antialiased.

    Returns the argument if it has that size already.
    """
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return resized.contiguous(memory_format=torch.channels_last)
