"""EfficientNet: stem -> seven stages of MBConv -> head -> pooled classifier (Tan and Le 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from effnet_fast.model import scaling
from effnet_fast.model.blocks import ConvNormAct, Kernels, MBConv, Padding, Style
from effnet_fast.model.network import Network


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes an EfficientNet's computation; checkpoints hold it beside the weights.

    Attributes:
        width, depth: multipliers of the baseline.
        num_classes: outputs of the classifier.
        image_size: intended side of the input, in pixels; any size runs.
        output_stride: input pixels per pixel of the final map: 32, 16, 8 or 4.
        dropout: before the classifier.
        drop_path: stochastic depth; block i of n is skipped with probability drop_path * i / n.
        padding: of the convolutions, see `blocks.Conv`.
        bn_eps, bn_momentum: of every BatchNorm.
        family: kind of model that this describes.
    """

    width: float = 1.0
    depth: float = 1.0
    num_classes: int = 100
    image_size: int = 32
    output_stride: int = 8
    dropout: float = 0.2
    drop_path: float = 0.2
    padding: Padding = "symmetric"
    bn_eps: float = 1e-3
    bn_momentum: float = 0.01
    family: Literal["efficientnet"] = "efficientnet"


class EfficientNet(Network):
    """[N, 3, H, W] -> logits [N, num_classes]. Parameters are float32 and channels-last.

    Sub-modules, from input to output: `stem`, `stages`, `head`, `classifier`. For `kernels` see `blocks.Style`.
    """

    def __init__(self, architecture: Architecture, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.architecture = architecture
        self.layout = plan = scaling.layout(architecture.width, architecture.depth, architecture.output_stride)
        style = Style(architecture.padding, architecture.bn_eps, architecture.bn_momentum, kernels)
        self.stem = ConvNormAct(3, plan.stem_channels, 3, plan.stem_stride, style=style)
        self.stages = _stages(plan, architecture.drop_path, style)
        self.head = ConvNormAct(plan.stages[-1].channels, plan.head_channels, 1, style=style)
        self.dropout = nn.Dropout(architecture.dropout)
        self.classifier = nn.Linear(plan.head_channels, architecture.num_classes)
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.head.pooled(self.stages(self.stem(x))))

    def layers(self) -> dict[str, list[nn.Module]]:
        stages = {f"stages.{i}": [stage] for i, stage in enumerate(self.stages)}
        return {"stem": [self.stem], **stages, "head": [self.head], "classifier": [self.classifier]}


def _stages(plan: scaling.Layout, drop_path: float, style: Style) -> nn.Sequential:
    total = sum(stage.repeats for stage in plan.stages)
    inputs, index = plan.stem_channels, 0
    stages = nn.Sequential()
    for stage in plan.stages:
        blocks = nn.Sequential()
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            rate = drop_path * index / total
            blocks.append(
                MBConv(inputs, stage.channels, stage.kernel, stride, stage.expand, drop_path=rate, style=style)
            )
            inputs, index = stage.channels, index + 1
        stages.append(blocks)
    return stages


def _initialise(module: nn.Module) -> None:
    """Initialise as the authors' code does: normal by fan-out for convolutions, uniform for the classifier."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def recompute_blocks(model: nn.Module) -> None:
    """Save only the input of each MBConv block for the backward pass, which recomputes the rest.

    Raises:
        ValueError: the model has no MBConv block.
    """
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    if not blocks:
        raise ValueError("--activation_checkpointing needs a model of MBConv blocks, an EfficientNet")
    for block in blocks:
        block.recompute = True
