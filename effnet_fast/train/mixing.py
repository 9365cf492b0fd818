"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) on the device.

The partner of an image is its mirror place in the batch; batches are shuffled anyway. Both mixes are one formula over
the same five numbers, so that a captured step can be fed through one small tensor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Mixing:
    """Draws a batch's mix from (seed, rank, step) alone and applies it.

    Args:
        mixup, cutmix: alphas of the Beta distribution; 0 is off. With both, each batch draws one of them evenly.
    """

    def __init__(self, mixup: float, cutmix: float, *, seed: int, rank: int) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.seed = seed
        self.rank = rank

    @property
    def active(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, step: int, size: int) -> list[float]:
        """[share, target, top, bottom, left, right] for images of `size` pixels.

        `share` weighs the image's own pixels outside the box (rows top..bottom, columns left..right), where the
        partner's stand; `target` weighs its own label.
        """
        random = np.random.default_rng([self.seed, self.rank, step])
        if self.mixup > 0 and (self.cutmix == 0 or random.random() < 0.5):
            share = random.beta(self.mixup, self.mixup)
            return [share, share, 0, 0, 0, 0]
        side = size * np.sqrt(1 - random.beta(self.cutmix, self.cutmix))
        y, x = random.uniform(0, size, 2)
        top, bottom = (round(np.clip(y + d * side / 2, 0, size)) for d in (-1, 1))
        left, right = (round(np.clip(x + d * side / 2, 0, size)) for d in (-1, 1))
        return [1, 1 - (bottom - top) * (right - left) / size**2, top, bottom, left, right]


def mix_images(images: Tensor, numbers: Tensor) -> Tensor:
    """Mix [N, C, H, W] with its mirror image along N; `numbers` float32 [6] as `Mixing.draw` gives them."""
    share, _, top, bottom, left, right = numbers.unbind()
    partner = images.flip(0)
    rows = torch.arange(images.shape[-2], device=images.device)[:, None]
    columns = torch.arange(images.shape[-1], device=images.device)
    box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(box, partner, torch.lerp(partner, images, share.to(images.dtype)))
