"""Reference models: ResNet-50, ResNet-152 and DenseNet-201, with torchvision's state-dict names.

He et al., Deep Residual Learning for Image Recognition, 2016 (with the stride in the 3x3 convolution, as Goyal et al.
2017), and Huang et al., Densely Connected Convolutional Networks, 2017. At output stride 32 they are the published
networks. At output stride 8, for small images, the stem is a 3x3 convolution of stride 1 without the max-pool.

Every ReLU is a separate module, used once and not in place, so that a hook on it sees one tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from effnet_fast.model.blocks import BatchNorm, Conv, Kernels, norm_relu
from effnet_fast.model.network import Network

SMALL_IMAGE = 64  # pixels; largest image for the small stem
EXPANSION = 4  # ratio of a bottleneck's output channels to its width
GROWTH = 32  # channels that each dense layer adds
DENSE_BOTTLENECK = 4 * GROWTH

RESNETS = {"resnet50": (3, 4, 6, 3), "resnet152": (3, 8, 36, 3)}
DENSENETS = {"densenet201": (6, 12, 48, 32)}


@dataclass(frozen=True)
class ReferenceArchitecture:
    """Everything that fixes a reference model's computation; checkpoints hold it beside the weights.

    Attributes:
        name: resnet50, resnet152 or densenet201.
        num_classes: outputs of the classifier.
        image_size: intended side of the input, in pixels; any size runs.
        output_stride: input pixels per pixel of the final map: 8 with the small stem, 32 with the published one.
        dropout: before the classifier.
        bn_eps, bn_momentum: of every BatchNorm.
        family: kind of model that this describes.
    """

    name: str
    num_classes: int = 100
    image_size: int = 32
    output_stride: int = 8
    dropout: float = 0.0
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    family: Literal["reference"] = "reference"

    def __post_init__(self) -> None:
        if self.output_stride not in (8, 32):
            raise ValueError(
                f"{self.name} has output_stride 8 (3x3 stem, for small images) or 32, not {self.output_stride}"
            )

    def norm(self, channels: int) -> BatchNorm:
        return BatchNorm(channels, self.bn_eps, self.bn_momentum)


def default_output_stride(image_size: int) -> int:
    """8 (the small stem) up to 64 px, else 32 (the published stem)."""
    return 8 if image_size <= SMALL_IMAGE else 32


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual: [N, inputs, H, W] -> [N, 4 width, H / stride, W / stride]."""

    def __init__(
        self, inputs: int, width: int, stride: int, architecture: ReferenceArchitecture, kernels: Kernels
    ) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.kernels = kernels
        self.conv1, self.bn1, self.relu1 = Conv(inputs, width, 1), architecture.norm(width), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = Conv(width, width, 3, stride), architecture.norm(width), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = Conv(width, outputs, 1), architecture.norm(outputs), nn.ReLU()
        self.downsample = (
            nn.Sequential(Conv(inputs, outputs, 1, stride), architecture.norm(outputs))
            if stride > 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.conv1(x), self.bn1, self.relu1, self.kernels)
        y = norm_relu(self.conv2(y), self.bn2, self.relu2, self.kernels)
        return norm_relu(self.conv3(y), self.bn3, self.relu3, self.kernels, residual=self.downsample(x))


class ResNet(Network):
    """ResNet of bottlenecks. Parameters are float32 and channels-last. For `kernels` see `blocks.Style`."""

    def __init__(self, architecture: ReferenceArchitecture, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.architecture = architecture
        self.kernels = kernels
        small = architecture.output_stride == 8
        self.conv1 = Conv(3, 64, 3) if small else Conv(3, 64, 7, 2)
        self.bn1, self.relu = architecture.norm(64), nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for i, repeats in enumerate(RESNETS[architecture.name]):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            blocks = nn.Sequential()
            for repeat in range(repeats):
                blocks.append(Bottleneck(inputs, width, stride if repeat == 0 else 1, architecture, kernels))
                inputs = EXPANSION * width
            self.add_module(f"layer{i + 1}", blocks)
        self.dropout = nn.Dropout(architecture.dropout)
        self.fc = nn.Linear(inputs, architecture.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.conv1(x), self.bn1, self.relu, self.kernels))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x

    def layers(self) -> dict[str, list[nn.Module]]:
        stages = {f"stages.{i}": [self.get_submodule(f"layer{i + 1}")] for i in range(4)}
        return {"stem": [self.conv1, self.bn1], **stages, "classifier": [self.fc]}


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3: [N, inputs, H, W] -> [N, 32, H, W]."""

    def __init__(self, inputs: int, architecture: ReferenceArchitecture, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.norm1, self.relu1 = architecture.norm(inputs), nn.ReLU()
        self.conv1 = Conv(inputs, DENSE_BOTTLENECK, 1)
        self.norm2, self.relu2 = architecture.norm(DENSE_BOTTLENECK), nn.ReLU()
        self.conv2 = Conv(DENSE_BOTTLENECK, GROWTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(norm_relu(x, self.norm1, self.relu1, self.kernels))
        return self.conv2(norm_relu(y, self.norm2, self.relu2, self.kernels))


class DenseBlock(nn.ModuleDict):
    """Layers that each read the block's input and all earlier layers: [N, C, H, W] -> [N, C + 32 layers, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.values():
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1, average pooling: [N, C, H, W] -> [N, C / 2, H / 2, W / 2]."""

    def __init__(self, inputs: int, architecture: ReferenceArchitecture, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.norm, self.relu = architecture.norm(inputs), nn.ReLU()
        self.conv = Conv(inputs, inputs // 2, 1)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(norm_relu(x, self.norm, self.relu, self.kernels)))


class DenseNet(Network):
    """DenseNet-BC of growth 32. Parameters are float32 and channels-last. For `kernels` see `blocks.Style`."""

    def __init__(self, architecture: ReferenceArchitecture, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.architecture = architecture
        self.kernels = kernels
        channels = 2 * GROWTH
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        small = architecture.output_stride == 8
        parts["conv0"] = Conv(3, channels, 3) if small else Conv(3, channels, 7, 2)
        parts["norm0"], parts["relu0"] = architecture.norm(channels), nn.ReLU()
        parts["pool0"] = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        for i, repeats in enumerate(DENSENETS[architecture.name], start=1):
            layers = range(repeats)
            parts[f"denseblock{i}"] = DenseBlock(
                {f"denselayer{j + 1}": DenseLayer(channels + j * GROWTH, architecture, kernels) for j in layers}
            )
            channels += repeats * GROWTH
            if i < 4:
                parts[f"transition{i}"] = Transition(channels, architecture, kernels)
                channels //= 2
        parts["norm5"], parts["relu5"] = architecture.norm(channels), nn.ReLU()
        self.features = nn.ModuleDict(parts)
        self.dropout = nn.Dropout(architecture.dropout)
        self.classifier = nn.Linear(channels, architecture.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward_features(self, x: Tensor) -> Tensor:
        parts = self.features
        x = parts["pool0"](self._norm_relu(parts["conv0"](x), 0))
        for i in (1, 2, 3):
            x = parts[f"transition{i}"](parts[f"denseblock{i}"](x))
        return self._norm_relu(parts["denseblock4"](x), 5)

    def _norm_relu(self, x: Tensor, number: int) -> Tensor:
        norm, relu = self.features[f"norm{number}"], self.features[f"relu{number}"]
        return norm_relu(x, norm, relu, self.kernels)  # type: ignore[arg-type]

    def layers(self) -> dict[str, list[nn.Module]]:
        parts = self.features
        stages = {f"stages.{i - 1}": [parts[f"denseblock{i}"], parts[f"transition{i}"]] for i in (1, 2, 3)}
        return {
            "stem": [parts["conv0"], parts["norm0"]],
            **stages,
            "stages.3": [parts["denseblock4"], parts["norm5"]],
            "classifier": [self.classifier],
        }
