"""The interface of all models: features, a linear classifier, and layers from input to output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from effnet_fast.model.blocks import BatchNorm


class Network(nn.Module, ABC):
    """[N, 3, H, W] -> logits [N, num_classes].

    Attributes:
        architecture: a frozen dataclass that fixes the computation; checkpoints hold it.
        dropout, classifier: the layers after the pooling.
    """

    architecture: Any
    dropout: nn.Dropout
    classifier: Any
    _frozen: Sequence[nn.Module] = ()

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """The input of the global pooling: [N, C, H / output_stride, W / output_stride], after the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.forward_features(x).mean((2, 3)))

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits [N, num_classes] of the pooled features [N, C]."""
        return self.classifier(self.dropout(pooled))

    @abstractmethod
    def layers(self) -> dict[str, list[nn.Module]]:
        """Map layer names to modules, from input to output: stem, stages.0, stages.1, ..., (head,) classifier.

        Only EfficientNets have a head.
        """

    def freeze(self, until: str) -> None:
        """Freeze the layers up to and including `until`: no gradients, and evaluation mode even while training.

        Args:
            until: a name of `layers()`, or `backbone` for all layers but the classifier.

        Raises:
            ValueError: there is no such layer, or nothing would be left to train.
        """
        layers = self.layers()
        names = list(layers)[:-1]
        if until not in (*names, "backbone"):
            raise ValueError(f"cannot freeze up to {until!r}; choose one of {', '.join(names)}, backbone")
        frozen = names if until == "backbone" else names[: names.index(until) + 1]
        self._frozen = [module for name in frozen for module in layers[name]]
        for module in self._frozen:
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]
