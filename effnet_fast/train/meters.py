"""Running sums of loss, hits and norms. They stay on the device; reading them synchronises once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_fast import distributed

_LOSS, _CORRECT, _COUNT, _NORM, _STEPS, _SKIPPED, _BAD_STEP = range(7)


@dataclass(frozen=True)
class Reading:
    """Means since the last reading, over all ranks.

    Attributes:
        loss: cross-entropy per image, nats.
        top1: training accuracy in percent; a mixed image counts by the label with the larger share.
        images: number of images trained on.
        grad_norm: mean norm of the gradient before clipping.
        skipped: steps skipped because fp16 overflowed.
        bad_step: first step whose loss or gradient was not finite, or None.
    """

    loss: float
    top1: float
    images: int
    grad_norm: float
    skipped: int
    bad_step: int | None


class Meters:
    """Sums over images and steps: float64 [7] on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        self.sums[_BAD_STEP] = -1

    @property
    def healthy(self) -> Tensor:
        """Whether no bad step has occurred: 0-dim bool tensor on the device."""
        return self.sums[_BAD_STEP] < 0

    def add_batch(self, loss_sum: Tensor, correct: Tensor, count: int) -> None:
        """Add one pass: summed loss, number of hits, number of images."""
        self.sums[_LOSS] += loss_sum
        self.sums[_CORRECT] += correct
        self.sums[_COUNT] += count

    def add_step(self, norm: Tensor, skipped: Tensor, bad: Tensor, step: Tensor) -> None:
        """Add step number `step`; all arguments are 0-dim tensors on the device, `skipped` and `bad` bools."""
        self.sums[_NORM] += torch.nan_to_num(norm, 0.0, 0.0, 0.0)
        self.sums[_STEPS] += 1
        self.sums[_SKIPPED] += skipped
        self.sums[_BAD_STEP] = torch.where(bad & self.healthy, step, self.sums[_BAD_STEP])

    def read(self) -> Reading:
        """Read the means and reset the sums, except the bad step; all ranks must call this together."""
        bad = self.sums[_BAD_STEP].clone()
        totals = distributed.all_reduce_(self.sums.clone())
        totals[_BAD_STEP] = bad
        values = totals.tolist()
        self.sums[:_BAD_STEP] = 0
        count, steps = max(values[_COUNT], 1), max(values[_STEPS], 1)
        return Reading(
            loss=values[_LOSS] / count,
            top1=100 * values[_CORRECT] / count,
            images=round(values[_COUNT]),
            grad_norm=values[_NORM] / steps,
            skipped=round(values[_SKIPPED] / distributed.world_size()),
            bad_step=None if values[_BAD_STEP] < 0 else int(values[_BAD_STEP]),
        )

    def collect(self) -> Tensor:
        """The sums to save. Sums over images are added over ranks; the others are equal on all ranks."""
        sums = self.sums.clone()
        sums[: _COUNT + 1] = distributed.all_reduce_(sums[: _COUNT + 1].clone())
        return sums

    def restore(self, sums: Tensor, rank: int) -> None:
        """Load a result of `collect`. Only rank 0 takes the sums over images, so that they are counted once."""
        self.sums.copy_(sums)
        if rank > 0:
            self.sums[: _COUNT + 1] = 0
