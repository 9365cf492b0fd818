"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) on the device.

Image i is mixed with image N - 1 - i; batches are shuffled, so this is random. Both methods, and a batch that is not
mixed, are one formula with six numbers, which a captured step reads from one small tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Draws the mix of a batch from (seed, rank, step); the probabilities are named as in timm.

    Attributes:
        mixup, cutmix: alpha of the Beta distribution; 0 is off.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: with both on, probability that a mixed batch uses CutMix.
        seed, rank: determine the random numbers, together with the step.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    seed: int = 0
    rank: int = 0

    @property
    def active(self) -> bool:
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def draw(self, step: int, size: int) -> list[float]:
        """[share, target, top, bottom, left, right] for images of `size` pixels.

        Pixels in the box (rows top..bottom, columns left..right) are the partner's. Outside, `share` is the weight of
        the image and 1 - share that of its partner. `target` is the weight of the image's own label.
        """
        random = np.random.default_rng([self.seed, self.rank, step])
        # A number is drawn only where it decides, so that a run without the option keeps its draws.
        if self.mixup_prob < 1 and random.random() >= self.mixup_prob:
            return [1, 1, 0, 0, 0, 0]
        if self.mixup > 0 and (self.cutmix == 0 or random.random() < 1 - self.mixup_switch_prob):
            share = random.beta(self.mixup, self.mixup)
            return [share, share, 0, 0, 0, 0]
        return self._draw_box(random, size)

    def _draw_box(self, random: np.random.Generator, size: int) -> list[float]:
        side = size * np.sqrt(1 - random.beta(self.cutmix, self.cutmix))
        y, x = random.uniform(0, size, 2)
        top, bottom = (round(np.clip(y + d * side / 2, 0, size)) for d in (-1, 1))
        left, right = (round(np.clip(x + d * side / 2, 0, size)) for d in (-1, 1))
        return [1, 1 - (bottom - top) * (right - left) / size**2, top, bottom, left, right]


def mix_images(images: Tensor, numbers: Tensor) -> Tensor:
    """Mix images [N, C, H, W] with the same batch in reverse order; `numbers`: float32 [6] from `Mixing.draw`."""
    share, _, top, bottom, left, right = numbers.unbind()
    partner = images.flip(0)
    rows = torch.arange(images.shape[-2], device=images.device)[:, None]
    columns = torch.arange(images.shape[-1], device=images.device)
    box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(box, partner, torch.lerp(partner, images, share.to(images.dtype)))
