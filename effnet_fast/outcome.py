"""How a training run ended or why it could not begin, and the callback that follows its evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Called on every rank after each evaluation, with the epochs done and the row; an exception ends the run.
OnEvaluation = Callable[[int, dict[str, Any]], None]


class FolderInUse(OSError):
    """Another run is at work in the run's folder."""


@dataclass(frozen=True)
class Outcome:
    """How a training run ended.

    Attributes:
        status: exit status, see `Stop.status`.
        finished: all epochs are done.
        result: row of the last evaluation: split, loss, top1, top5, and ema_* if there is a moving average; empty
            before the first evaluation.
    """

    status: int
    finished: bool
    result: dict[str, Any]

    @property
    def loss(self) -> float:
        """Mean cross-entropy per image of the last evaluation, nats; like `top1`."""
        return metric(self.result, "loss")

    @property
    def top1(self) -> float:
        """Accuracy of the last evaluation, percent; of the moving average if there is one. NaN if there is none."""
        return metric(self.result, "top1")

    @property
    def top5(self) -> float:
        """Share of images whose class is among the five most probable, percent; like `top1`."""
        return metric(self.result, "top5")


def metric(row: dict[str, Any], name: str) -> float:
    """A metric of an evaluation row: of the moving average if the run keeps one; NaN if the row lacks it."""
    return row.get(f"ema_{name}", row.get(name, math.nan))
