"""The feature maps of an EfficientNet at every resolution, for detection and segmentation heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from effnet_fast.model.efficientnet import EfficientNet
from effnet_fast.model.network import Network


@dataclass(frozen=True)
class Level:
    """A feature map: its position in the pyramid, channels, input pixels per pixel, and the module that computes it.

    The field names are timm's.
    """

    index: int
    num_chs: int
    reduction: int
    module: str


class FeatureInfo(tuple[Level, ...]):
    """The levels that a `FeaturePyramid` returns, with timm's accessors."""

    def channels(self) -> list[int]:
        return [level.num_chs for level in self]

    def reduction(self) -> list[int]:
        return [level.reduction for level in self]

    def module_name(self) -> list[str]:
        return [level.module for level in self]


class FeaturePyramid(nn.Module):
    """[N, 3, H, W] -> for each level, the finest first, [N, C, H / reduction, W / reduction].

    A level is the output of the last stage at a resolution, as in timm. The forward pass collects the maps without
    hooks, so the fused blocks still run. Stages after the last level, the head and the classifier are dropped.

    Args:
        model: an EfficientNet.
        out_indices: levels to return, from 0; negative ones count from the coarsest. None is all.

    Attributes:
        feature_info: channels, reduction and module of each returned level.

    Raises:
        ValueError: another kind of model, or no such level.
    """

    def __init__(self, model: Network, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        if not isinstance(model, EfficientNet):
            raise ValueError(f"features_only is for EfficientNets, not {type(model).__name__}")
        levels = _levels(model)
        indices = range(len(levels)) if out_indices is None else out_indices
        if not indices or not all(-len(levels) <= i < len(levels) for i in indices):
            raise ValueError(f"out_indices {list(indices)}: this model has the levels 0 to {len(levels) - 1}")
        returned = sorted({i % len(levels) for i in indices})
        self.feature_info = FeatureInfo(levels[i] for i in returned)
        last = int(self.feature_info[-1].module.removeprefix("stages."))
        self.stem = model.stem
        self.stages = model.stages[: last + 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        returned = set(self.feature_info.module_name())
        maps, x = [], self.stem(x)
        for name, stage in self.stages.named_children():
            x = stage(x)
            if f"stages.{name}" in returned:
                maps.append(x)
        return maps


def _levels(model: EfficientNet) -> list[Level]:
    """The last stage at each resolution; the stem's resolution is the first stage's."""
    layout = model.layout
    reduction, last_stages = layout.stem_stride, {}
    for i, stage in enumerate(layout.stages):
        reduction *= stage.stride
        last_stages[reduction] = (stage.channels, f"stages.{i}")
    return [Level(i, channels, size, module) for i, (size, (channels, module)) in enumerate(last_stages.items())]
