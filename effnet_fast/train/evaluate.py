"""Evaluate a model on a split, on any number of ranks: loss, top-1, top-5, confusion matrix, or the logits."""

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


@dataclass(frozen=True)
class Predictions:
    """The logits of the readable images of a split, in the split's order, on the CPU.

    Attributes:
        positions: int64 [N], of the images in the split.
        labels: int64 [N].
        logits: float32 [N, K].
    """

    positions: Tensor
    labels: Tensor
    logits: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether the most probable class is the true one, bool [N]."""
        return self.logits.argmax(1) == self.labels

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """softmax(logits / temperature), float64 [N, K]."""
        return (self.logits.double() / temperature).softmax(1)

    def losses(self, temperature: float = 1.0) -> Tensor:
        """Cross-entropy of each image at a temperature, nats, float64 [N]."""
        return F.cross_entropy(self.logits.double() / temperature, self.labels, reduction="none")

    def result(self) -> Result:
        """What `evaluate` returns for these images."""
        sums = _Sums(self.logits.shape[1], self.logits.device)
        sums.add(self.logits, self.labels)
        return sums.result()


class _Sums:
    """Running sums over images: loss and top-5 hits, and counts by true and predicted class. They stay on the device.

    Images with label -1 are padding and not counted.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.loss_and_hits = torch.zeros(2, dtype=torch.float64, device=device)
        self.confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        predicted = logits.topk(min(5, self.num_classes), dim=1).indices
        top5_hits = (predicted == labels[:, None]).any(1).sum()
        self.loss_and_hits += torch.stack([losses, top5_hits])
        # Padding adds 0 to row 0.
        is_image = labels >= 0
        pairs = (labels * self.num_classes + predicted[:, 0]).clamp(min=0)
        self.confusion.index_add_(0, pairs, is_image.long())

    def add_other_ranks(self) -> None:
        distributed.all_reduce_(self.loss_and_hits)
        distributed.all_reduce_(self.confusion)

    def result(self) -> Result:
        table = self.confusion.view(self.num_classes, self.num_classes).cpu()
        count = int(table.sum())
        if count == 0:
            raise ValueError("there are no images to evaluate on")
        loss, top5_hits = self.loss_and_hits.tolist()
        return Result(loss / count, 100 * int(table.trace()) / count, 100 * top5_hits / count, table)


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
    sums = _Sums(num_classes, device)
    with evaluating(model):
        for images, labels in batches:
            sums.add(_logits(model, images, precision, device), labels)
    sums.add_other_ranks()
    return sums.result()


def predict_logits(
    model: nn.Module, batches: Batches, *, images: int, precision: str, device: torch.device
) -> Predictions:
    """Compute the logits of a split on all ranks; every rank gets all of them.

    Args:
        model: see `evaluate`.
        batches: this rank's batches of the split, which the ranks share as `data.loader.Shard` says.
        images: images of the split.
        precision, device: see `evaluate`.

    Raises:
        ValueError: there are no images.
    """
    with evaluating(model):
        passes = [(_logits(model, x, precision, device), labels) for x, labels in batches]
    mine = [torch.cat(parts).cpu() for parts in zip(*passes, strict=True)]
    # Rank r has images r, r + world, ...; padding follows the last one.
    ranks = distributed.gather_objects(mine)
    logits, labels = (torch.stack(parts, 1).flatten(0, 1)[:images] for parts in zip(*ranks, strict=True))
    (positions,) = (labels >= 0).nonzero(as_tuple=True)
    if len(positions) == 0:
        raise ValueError("there are no images to evaluate on")
    return Predictions(positions, labels[positions], logits[positions])


def _logits(model: nn.Module, images: Tensor, precision: str, device: torch.device) -> Tensor:
    with autocast(precision, device):
        return model(images).float()


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
