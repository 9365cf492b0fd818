"""EfficientNet-B0 at every scale, for one data set: sizes, layouts and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from effnet_fast.model import Network, create_model, scaling
from effnet_fast.model.blocks import Kernels
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
        """Equation 3 of the paper: each multiplier to the power of phi."""
        return Scale(self.depth**phi, self.width**phi, self.resolution**phi)


@dataclass(frozen=True)
class Family:
    """EfficientNet-B0 at every scale.

    Attributes:
        num_classes: number of classes.
        base_size: side of the input image in pixels at resolution 1.
        output_stride: input pixels per pixel of the final map. It is the same at every scale, because the default,
            which changes at 128 px, would be a fourth scaling dimension.
        kernels: of the models that `build` returns.
    """

    num_classes: int
    base_size: int
    output_stride: int
    kernels: Kernels = "auto"
    _costs: dict[tuple[Layout | str, int], Complexity] = field(default_factory=dict, repr=False, compare=False)

    def image_size(self, scale: Scale) -> int:
        """Return the side of the input image in pixels, rounded."""
        return scaling.scaled_size(self.base_size, scale.resolution)

    def shape(self, scale: Scale) -> tuple[Layout, int]:
        """Return the rounded layout and image size. Scales with the same shape give the same model."""
        return scaling.layout(scale.width, scale.depth, self.output_stride), self.image_size(scale)

    def counts(self, scale: Scale) -> Counts:
        """Compute parameters, MACs and activations from the layout: the same values as `cost`, without building."""
        layout, size = self.shape(scale)
        return count(layout, size, self.num_classes)

    def cost(self, scale: Scale) -> Complexity:
        """Build the model and count its cost; cached by shape."""
        return self._cached_cost(self.shape(scale), lambda: self.build(scale))

    def reference_cost(self, name: str) -> Complexity:
        """Count the cost of another architecture at the baseline's image size.

        Raises:
            ValueError: the name is unknown.
        """
        return self._cached_cost((name, self.base_size), lambda: create_model(name, self.num_classes, self.base_size))

    def _cached_cost(self, shape: tuple[Layout | str, int], build: Callable[[], Network]) -> Complexity:
        if shape not in self._costs:
            with torch.device("meta"):  # skips weight initialisation: the cost does not depend on the values
                model = build()
            self._costs[shape] = complexity(model, shape[1])
        return self._costs[shape]

    def build(self, scale: Scale) -> Network:
        """Build the scaled model with newly initialised weights."""
        return create_model(
            BASELINE,
            self.num_classes,
            self.image_size(scale),
            self.output_stride,
            width=scale.width,
            depth=scale.depth,
            kernels=self.kernels,
        )

    def settings(self, scale: Scale) -> dict[str, Any]:
        """Return the fields of a training config that select the scaled model."""
        return {
            "model": BASELINE,
            "width": scale.width,
            "depth": scale.depth,
            "image_size": self.image_size(scale),
            "output_stride": self.output_stride,
        }

    def reference_settings(self, name: str) -> dict[str, Any]:
        """Return the same fields for another architecture; it keeps its own strides, depth and initial values."""
        return dict.fromkeys(("width", "depth", "output_stride", "drop_path")) | {
            "model": name,
            "image_size": self.base_size,
            "zero_init_residual": False,
            "depthwise_init": "default",
        }
