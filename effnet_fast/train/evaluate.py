"""Evaluate a model on a split, on any number of ranks: loss, top-1, top-5, confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast import distributed
from effnet_fast.precision import autocast

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Result:
    """Result of an evaluation.

    Attributes:
        loss: mean cross-entropy per image, nats.
        top1, top5: accuracy, percent.
        confusion: int64 [K, K] on the CPU, counts by true class (row) and predicted class (column).
    """

    loss: float
    top1: float
    top5: float
    confusion: Tensor

    @property
    def images(self) -> int:
        return int(self.confusion.sum())


def evaluate(model: nn.Module, batches: Batches, *, num_classes: int, precision: str, device: torch.device) -> Result:
    """Evaluate on this rank's batches and sum over all ranks.

    Args:
        model: in training or evaluation mode; the mode is restored.
        batches: images [N, 3, H, W] and labels int64 [N]; images with label -1 are padding and not counted.
        num_classes: K.
        precision: autocast precision: bf16, fp16 or no.
        device: device of the model and the batches.

    Raises:
        ValueError: there are no images.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    with evaluating(model):
        for images, labels in batches:
            with autocast(precision, device):
                logits = model(images).float()
            losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            predicted = logits.topk(min(5, num_classes), dim=1).indices
            top5_hits = (predicted == labels[:, None]).any(1).sum()
            sums += torch.stack([losses, top5_hits])
            # Padding adds 0 to row 0.
            is_image = labels >= 0
            confusion.index_add_(0, (labels * num_classes + predicted[:, 0]).clamp(min=0), is_image.long())
    distributed.all_reduce_(sums)
    distributed.all_reduce_(confusion)
    table = confusion.view(num_classes, num_classes).cpu()
    count = int(table.sum())
    if count == 0:
        raise ValueError("there are no images to evaluate on")
    loss, top5_hits = sums.tolist()
    return Result(loss / count, 100 * int(table.trace()) / count, 100 * top5_hits / count, table)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the previous mode is restored on exit."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
