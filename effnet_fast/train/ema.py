"""Exponential moving average of a model's weights and BatchNorm statistics (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Updates average = decay * average + (1 - decay) * weights on the device.

    The decay warms up as min(decay, (1 + t) / (10 + t)) at update t, which reduces the weight of the random start.

    Args:
        model: its floating-point parameters and buffers are averaged; they must not be replaced by other tensors.
        decay: per step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        entries = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
        self.names = list(entries)
        self.live: list[Tensor] = list(entries.values())
        self.average: list[Tensor] = [t.clone() for t in self.live]

    def share(self, step: int) -> float:
        """The factor of the weights, 1 - decay, in the update after optimizer step `step`."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, share: Tensor) -> None:
        """Update the average with a `share` of the weights: a 0-dim float32 tensor on the device; 0 changes nothing."""
        torch._foreach_mul_(self.average, 1 - share)
        torch._foreach_add_(self.average, torch._foreach_mul(self.live, share))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Swap the average into the model within the context; in-place changes within it apply to the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(self.live, self.average, strict=True):
            weights = live.clone()
            live.copy_(average)
            average.copy_(weights)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state[name])
