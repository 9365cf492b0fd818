"""Running sums of a training run that stay on the device until they are read, one synchronisation per reading."""

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
        loss: per image, natural log.
        top1: percent; of a mixed image the label with the larger share counts.
        images: how many were learnt from.
        grad_norm: of the whole gradient before clipping.
        skipped: steps that fp16's scale was too large for.
        bad_step: the first step whose loss or gradient was not finite, or None.
    """

    loss: float
    top1: float
    images: int
    grad_norm: float
    skipped: int
    bad_step: int | None


class Meters:
    """Sums of loss, hits, images and gradient norms; float64 [7] on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        self.sums[_BAD_STEP] = -1

    @property
    def healthy(self) -> Tensor:
        """True until a bad step was seen; a bool of no dimension, on the device."""
        return self.sums[_BAD_STEP] < 0

    def add_batch(self, loss_sum: Tensor, correct: Tensor, count: int) -> None:
        self.sums[_LOSS] += loss_sum
        self.sums[_CORRECT] += correct
        self.sums[_COUNT] += count

    def add_step(self, norm: Tensor, skipped: Tensor, bad: Tensor, step: Tensor) -> None:
        """Count step number `step`, all on the device; `skipped` and `bad` are bools. The first bad one is kept."""
        self.sums[_NORM] += torch.nan_to_num(norm, 0.0, 0.0, 0.0)
        self.sums[_STEPS] += 1
        self.sums[_SKIPPED] += skipped
        self.sums[_BAD_STEP] = torch.where(bad & self.healthy, step, self.sums[_BAD_STEP])

    def read(self) -> Reading:
        """Read and start anew."""
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
        """The sums to save, on all ranks: those over a rank's own images are added up, the others are equal anyway."""
        sums = self.sums.clone()
        sums[: _COUNT + 1] = distributed.all_reduce_(sums[: _COUNT + 1].clone())
        return sums

    def restore(self, sums: Tensor, rank: int) -> None:
        """Put back what `collect` gave; the sums over images go to one rank, however many there are now."""
        self.sums.copy_(sums)
        if rank > 0:
            self.sums[: _COUNT + 1] = 0
