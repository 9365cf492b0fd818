"""The networks of torchvision and timm as plain convolutions that read a state dict by its names: oracles.

The names and shapes of every tensor are in golden files beside the tests of model/.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

B0_STAGES = tuple(zip((1, 2, 2, 2, 1, 2, 1), (1, 2, 2, 3, 3, 4, 1), strict=True))  # stride, repeats


def golden(name: str) -> dict[str, list[int]]:
    return json.loads((Path(__file__).parents[1] / "model" / f"golden_{name}.json").read_text())


def random_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Random weights and BatchNorm statistics; `settled` fits the statistics to images."""
    random = torch.Generator().manual_seed(0)

    def draw(name: str, shape: list[int]) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(7)
        if len(shape) == 2:
            return torch.randn(shape, generator=random) * 0.01  # the classifier: logits of about 1
        if len(shape) == 4:
            return torch.randn(shape, generator=random) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        if name.endswith("bias"):
            return torch.randn(shape, generator=random) * 0.1
        return torch.rand(shape, generator=random) + 0.5

    return {name: draw(name, shape) for name, shape in shapes.items()}


class Plain:
    """Plain layers that read a state dict by name.

    If `settles`, BatchNorm's statistics are set near those of the batch; otherwise the signals of a random network
    vanish or explode. The variance is the mean over channels: that of one channel can be near zero, which
    amplifies rounding.
    """

    settles = False

    def __init__(self, state: dict[str, Tensor], eps: float, same: bool = False) -> None:
        self.state, self.eps, self.same = state, eps, same

    def conv(self, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        kernel = weight.shape[-1]
        pad = [kernel // 2] * 4
        if self.same:
            totals = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[-1], x.shape[-2])]
            pad = [half for total in totals for half in (total // 2, total - total // 2)]
        return F.conv2d(F.pad(x, pad), weight, self.state.get(f"{name}.bias"), stride, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.settles:
            var, mean = torch.var_mean(x, (0, 2, 3))
            self.state[f"{name}.running_mean"] = mean + 0.1 * torch.randn_like(mean) * var.sqrt()
            self.state[f"{name}.running_var"] = var.mean() * (torch.rand_like(var) + 0.5)
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + self.eps).sqrt() * weight + bias

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def gate(self, reduce: str, expand: str, x: Tensor) -> Tensor:
        squeezed = F.silu(self.conv(reduce, x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.conv(expand, squeezed))


def torchvision_b0(state: dict[str, Tensor], x: Tensor) -> Tensor:
    net = Plain(state, 1e-5)
    x = F.silu(net.norm("features.0.1", net.conv("features.0.0", x, 2)))
    for stage, (stride, repeats) in enumerate(B0_STAGES, start=1):
        for i in range(repeats):
            block, at, y, step = f"features.{stage}.{i}.block", 0, x, stride if i == 0 else 1
            if stage > 1:
                y, at = F.silu(net.norm(f"{block}.0.1", net.conv(f"{block}.0.0", y))), 1
            y = net.conv(f"{block}.{at}.0", y, step, groups=y.shape[1])
            y = F.silu(net.norm(f"{block}.{at}.1", y))
            y = net.gate(f"{block}.{at + 1}.fc1", f"{block}.{at + 1}.fc2", y)
            y = net.norm(f"{block}.{at + 2}.1", net.conv(f"{block}.{at + 2}.0", y))
            x = x + y if step == 1 and x.shape == y.shape else y
    return net.linear("classifier.1", F.silu(net.norm("features.8.1", net.conv("features.8.0", x))))


def timm_b0(state: dict[str, Tensor], x: Tensor, tf: bool = False) -> Tensor:
    net = Plain(state, 1e-3 if tf else 1e-5, same=tf)
    x = F.silu(net.norm("bn1", net.conv("conv_stem", x, 2)))
    for stage, (stride, repeats) in enumerate(B0_STAGES):
        for i in range(repeats):
            block, y, step = f"blocks.{stage}.{i}", x, stride if i == 0 else 1
            if stage > 0:
                y = F.silu(net.norm(f"{block}.bn1", net.conv(f"{block}.conv_pw", y)))
            y = net.conv(f"{block}.conv_dw", y, step, groups=y.shape[1])
            y = F.silu(net.norm(f"{block}.bn{2 if stage else 1}", y))
            y = net.gate(f"{block}.se.conv_reduce", f"{block}.se.conv_expand", y)
            y = net.conv(f"{block}.conv_pwl" if stage else f"{block}.conv_pw", y)
            y = net.norm(f"{block}.bn{3 if stage else 2}", y)
            x = x + y if step == 1 and x.shape == y.shape else y
    return net.linear("classifier", F.silu(net.norm("bn2", net.conv("conv_head", x))))


def tf_b0(state: dict[str, Tensor], x: Tensor) -> Tensor:
    return timm_b0(state, x, tf=True)


def resnet50(state: dict[str, Tensor], x: Tensor) -> Tensor:
    net = Plain(state, 1e-5)
    x = F.max_pool2d(F.relu(net.norm("bn1", net.conv("conv1", x, 2))), 3, 2, 1)
    for stage, repeats in enumerate((3, 4, 6, 3), start=1):
        for i in range(repeats):
            block, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = F.relu(net.norm(f"{block}.bn1", net.conv(f"{block}.conv1", x)))
            y = F.relu(net.norm(f"{block}.bn2", net.conv(f"{block}.conv2", y, stride)))
            y = net.norm(f"{block}.bn3", net.conv(f"{block}.conv3", y))
            if i == 0:
                x = net.norm(f"{block}.downsample.1", net.conv(f"{block}.downsample.0", x, stride))
            x = F.relu(x + y)
    return net.linear("fc", x)


def densenet201(state: dict[str, Tensor], x: Tensor) -> Tensor:
    net = Plain(state, 1e-5)
    x = F.max_pool2d(F.relu(net.norm("features.norm0", net.conv("features.conv0", x, 2))), 3, 2, 1)
    for block, layers in enumerate((6, 12, 48, 32), start=1):
        for i in range(layers):
            layer = f"features.denseblock{block}.denselayer{i + 1}"
            y = net.conv(f"{layer}.conv1", F.relu(net.norm(f"{layer}.norm1", x)))
            y = net.conv(f"{layer}.conv2", F.relu(net.norm(f"{layer}.norm2", y)))
            x = torch.cat([x, y], 1)
        if block < 4:
            transition = f"features.transition{block}"
            x = F.avg_pool2d(net.conv(f"{transition}.conv", F.relu(net.norm(f"{transition}.norm", x))), 2)
    return net.linear("classifier", F.relu(net.norm("features.norm5", x)))


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout: golden names, our model, the plain network, and a file name that identifies timm's layouts."""

    names: str
    model: str
    oracle: Callable[[dict[str, Tensor], Tensor], Tensor]
    file: str


CASES = {
    "torchvision-b0": Case("torchvision_efficientnet_b0", "efficientnet-b0", torchvision_b0, "w.pth"),
    "timm-b0": Case("timm_efficientnet_b0", "efficientnet-b0", timm_b0, "efficientnet_b0_ra.pth"),
    "timm-tf-b0": Case("timm_efficientnet_b0", "efficientnet-b0", tf_b0, "tf_efficientnet_b0_ns.pth"),
    "torchvision-resnet50": Case("torchvision_resnet50", "resnet50", resnet50, "w.pth"),
    "torchvision-densenet201": Case("torchvision_densenet201", "densenet201", densenet201, "w.pth"),
}


def settled(case: Case, images: Tensor) -> dict[str, Tensor]:
    """Random weights under a case's names, with statistics near those of the images."""
    torch.manual_seed(0)
    state = random_state(golden(case.names))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Plain, "settles", True)
        case.oracle(state, images)
    return state
