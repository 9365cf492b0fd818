"""EfficientNet: stem -> seven stages of MBConv -> head -> pooled classifier (Tan and Le 2019)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.model import scaling
from effnet_fast.model.blocks import BatchNorm, ConvNormAct, Kernels, MBConv, Padding, Style


@dataclass(frozen=True)
class Architecture:
    """All that decides an EfficientNet's computation; a checkpoint keeps it beside the weights.

    Attributes:
        width, depth: multipliers of the baseline.
        num_classes: outputs of the classifier.
        image_size: pixels of the input it is meant for; any size runs.
        output_stride: input pixels per pixel of the final map: 32, 16, 8 or 4.
        dropout: before the classifier.
        drop_path: stochastic depth; block i of n has drop_path * i / n.
        padding: symmetric, or TensorFlow's SAME.
        bn_eps, bn_momentum: of every BatchNorm.
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


class EfficientNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]. Built channels-last; float32 parameters.

    Sub-modules in the order of the data: `stem`, `stages`, `head`, `classifier`. `kernels` as in `create_model`.
    """

    def __init__(self, architecture: Architecture, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.architecture = architecture
        plan = scaling.layout(architecture.width, architecture.depth, architecture.output_stride)
        style = Style(architecture.padding, architecture.bn_eps, architecture.bn_momentum, kernels)
        self.stem = ConvNormAct(3, plan.stem_channels, 3, plan.stem_stride, style=style)
        self.stages = _stages(plan, architecture.drop_path, style)
        self.head = ConvNormAct(plan.stages[-1].channels, plan.head_channels, 1, style=style)
        self.dropout = nn.Dropout(architecture.dropout)
        self.classifier = nn.Linear(plan.head_channels, architecture.num_classes)
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward_features(self, x: Tensor) -> Tensor:
        """What the global pooling sees: [N, C, H / output_stride, W / output_stride], after the activation."""
        return self.head(self.stages(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.head.pooled(self.stages(self.stem(x)))
        return self.classifier(self.dropout(pooled))


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
    """Variance scaling as the authors' code: normal by fan-out for convolutions, uniform for the classifier."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def variant(name: str) -> scaling.Variant:
    """The multipliers behind a name; `efficientnet_b0` is read as `efficientnet-b0`.

    Raises:
        ValueError: an unknown name, with the nearest known ones.
    """
    known = scaling.VARIANTS
    key = name.lower().replace("_", "-")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or list(known)
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    return known[key]


def create_model(
    name: str,
    num_classes: int = 100,
    image_size: int = 32,
    output_stride: int | None = None,
    *,
    width: float | None = None,
    depth: float | None = None,
    dropout: float | None = None,
    drop_path: float = 0.2,
    padding: Padding = "symmetric",
    bn_eps: float = 1e-3,
    bn_momentum: float = 0.01,
    kernels: Kernels = "auto",
) -> EfficientNet:
    """Build a model by name.

    Args:
        name: one of `list_models()`.
        num_classes: outputs.
        image_size: pixels of the input.
        output_stride: 32, 16, 8 or 4; None is 8 below 128 px and 32 from there on.
        width, depth: multipliers of the baseline; None is the variant's own.
        dropout: before the classifier; None is the variant's own.
        drop_path, padding, bn_eps, bn_momentum: see `Architecture`.
        kernels: auto, triton or torch, see `blocks.Style`; no part of the architecture, so a checkpoint lacks it.

    Raises:
        ValueError: an unknown name or an impossible value.
    """
    chosen = variant(name)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    architecture = Architecture(
        width=chosen.width if width is None else width,
        depth=chosen.depth if depth is None else depth,
        num_classes=num_classes,
        image_size=image_size,
        output_stride=output_stride or scaling.default_output_stride(image_size),
        dropout=chosen.dropout if dropout is None else dropout,
        drop_path=drop_path,
        padding=padding,
        bn_eps=bn_eps,
        bn_momentum=bn_momentum,
    )
    return EfficientNet(architecture, kernels)


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return sorted(scaling.VARIANTS)


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the input of each MBConv block for the backward pass, which computes the rest anew.

    Raises:
        ValueError: the model has no such block.
    """
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    if not blocks:
        raise ValueError("--activation_checkpointing is for models of MBConv blocks, which this one is not")
    for block in blocks:
        block.recompute = True


def from_description(description: dict[str, Any]) -> EfficientNet:
    """Rebuild the model a checkpoint describes (`dataclasses.asdict` of its Architecture).

    Raises:
        ValueError: the description is not of an EfficientNet.
    """
    known = {field.name for field in dataclasses.fields(Architecture)}
    if set(description) - known:
        raise ValueError(f"the checkpoint describes another kind of model: {sorted(set(description) - known)}")
    return EfficientNet(Architecture(**description))
