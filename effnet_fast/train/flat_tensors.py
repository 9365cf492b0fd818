"""Read and write many tensors together, in a few kernel launches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from effnet_fast import distributed


class FlatTensors:
    """Tensors of one dtype and device, e.g. BatchNorm statistics, addressed as one flat tensor.

    Args:
        tensors: of any shapes; they are changed in place.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.sizes = [t.numel() for t in self.tensors]

    def copy(self) -> Tensor:
        """All values, flattened: [total number of elements]."""
        return torch.cat([t.flatten() for t in self.tensors])

    def restore(self, saved: Tensor, bad: Tensor) -> None:
        """Write back `saved`, a result of `copy`, if `bad` is true: a 0-dim bool tensor on the device."""
        self._set(torch.where(bad, saved, self.copy()).split(self.sizes))

    def average_over_ranks(self) -> None:
        """Replace the tensors by their mean over all ranks."""
        if distributed.world_size() > 1:
            mean = distributed.all_reduce_(self.copy()) / distributed.world_size()
            self.load(mean)

    def load(self, values: Tensor) -> None:
        """Write a result of `copy` back."""
        self._set(values.split(self.sizes))

    def _set(self, values: Iterable[Tensor]) -> None:
        torch._foreach_copy_(self.tensors, [v.view_as(t) for v, t in zip(values, self.tensors, strict=True)])
