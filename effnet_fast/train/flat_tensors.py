"""Tensors that are read and written together, in a handful of launches however many there are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from effnet_fast import distributed


class FlatTensors:
    """Tensors of one type and device, e.g. BatchNorm's statistics, to be put back after a bad step."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.sizes = [t.numel() for t in self.tensors]

    def copy(self) -> Tensor:
        return torch.cat([t.flatten() for t in self.tensors])

    def restore(self, saved: Tensor, bad: Tensor) -> None:
        """Where `bad`, a bool on the device, put `saved` back."""
        self._set(torch.where(bad, saved, self.copy()).split(self.sizes))

    def average_over_ranks(self) -> None:
        """Give every rank the mean of all ranks' tensors."""
        if distributed.world_size() > 1:
            mean = distributed.all_reduce_(self.copy()) / distributed.world_size()
            self.load(mean)

    def load(self, values: Tensor) -> None:
        """Put back what `copy` gave."""
        self._set(values.split(self.sizes))

    def _set(self, values: Iterable[Tensor]) -> None:
        torch._foreach_copy_(self.tensors, [v.view_as(t) for v, t in zip(values, self.tensors, strict=True)])
