"""A baseline and everything it can be scaled to, for one data set: sizes, layouts and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from effnet_fast.model import Network, create_model, scaling
from effnet_fast.model.complexity import Complexity, complexity
from effnet_fast.model.scaling import Layout
from effnet_fast.search.analytic_cost import Counts, count

BASELINE = "efficientnet-b0"


@dataclass(frozen=True)
class Scale:
    """Multipliers of the baseline's depth (repeats), width (channels) and resolution (pixels)."""

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0

    def to_the(self, phi: float) -> Scale:
        """Equation 3 of the paper: each factor to the power of phi."""
        return Scale(self.depth**phi, self.width**phi, self.resolution**phi)


@dataclass(frozen=True)
class Family:
    """EfficientNet-B0 at every scale.

    Attributes:
        num_classes: outputs.
        base_size: pixels of the input at resolution 1.
        output_stride: input pixels per pixel of the final map, the same at every scale: by default a model of 128 px
            and more has another one, which would be a fourth way to scale.
    """

    num_classes: int
    base_size: int
    output_stride: int
    _counted: dict[tuple[Layout | str, int], Complexity] = field(default_factory=dict, repr=False, compare=False)

    def image_size(self, scale: Scale) -> int:
        """Pixels of the input, rounded."""
        return scaling.scaled_size(self.base_size, scale.resolution)

    def shape(self, scale: Scale) -> tuple[Layout, int]:
        """What is left of a scale after rounding: two scales of one shape are one model."""
        return scaling.layout(scale.width, scale.depth, self.output_stride), self.image_size(scale)

    def counts(self, scale: Scale) -> Counts:
        """Parameters, MACs and activations by arithmetic, at once; the same numbers as `cost` has."""
        plan, size = self.shape(scale)
        return count(plan, size, self.num_classes)

    def cost(self, scale: Scale) -> Complexity:
        """What the model costs, counted by fvcore on the built model, once a shape."""
        return self._count(self.shape(scale), lambda: self.build(scale))

    def reference_cost(self, name: str) -> Complexity:
        """What a model of another kind costs at the baseline's size.

        Raises:
            ValueError: an unknown name.
        """
        return self._count((name, self.base_size), lambda: create_model(name, self.num_classes, self.base_size))

    def _count(self, shape: tuple[Layout | str, int], build: Callable[[], Network]) -> Complexity:
        if shape not in self._counted:
            with torch.device("meta"):  # the values of the weights do not matter
                model = build()
            self._counted[shape] = complexity(model.to_empty(device="cpu"), shape[1])
        return self._counted[shape]

    def build(self, scale: Scale) -> Network:
        """The model itself."""
        return create_model(
            BASELINE,
            self.num_classes,
            self.image_size(scale),
            self.output_stride,
            width=scale.width,
            depth=scale.depth,
        )

    def settings(self, scale: Scale) -> dict[str, Any]:
        """The fields of a training config that name the model."""
        return {
            "model": BASELINE,
            "width": scale.width,
            "depth": scale.depth,
            "image_size": self.image_size(scale),
            "output_stride": self.output_stride,
        }

    def reference_settings(self, name: str) -> dict[str, Any]:
        """The same for a model of another kind, whose strides and stochastic depth are its own."""
        return dict.fromkeys(("width", "depth", "output_stride", "drop_path")) | {
            "model": name,
            "image_size": self.base_size,
        }
