"""Initial values other than a model's own: zeroed residual blocks, identity depthwise kernels."""

from __future__ import annotations

import pytest
import torch

from effnet_fast.config import TrainConfig
from effnet_fast.model import create_model
from effnet_fast.model.blocks import MBConv
from effnet_fast.model.reference import Bottleneck


def test_residual_blocks_start_as_their_shortcut() -> None:
    model = create_model("efficientnet-b0", zero_init_residual=True, kernels="torch")
    blocks = [block for block in model.modules() if isinstance(block, MBConv)]
    residuals = [block for block in blocks if block.residual]
    assert len(residuals) == 9
    for block in residuals:
        x = torch.randn(2, block.project.conv.out_channels, 4, 4)
        torch.testing.assert_close(block.train()(x), x, rtol=0, atol=0)
    assert all(block.project.norm.weight.eq(1).all() for block in blocks if not block.residual)


def test_resnets_bottlenecks_start_as_their_shortcut() -> None:
    model = create_model("resnet50", zero_init_residual=True)
    blocks = [block for block in model.modules() if isinstance(block, Bottleneck)]
    assert len(blocks) == 16
    assert not any(block.bn3.weight.any() for block in blocks)
    assert all(block.bn2.weight.eq(1).all() for block in blocks)


def test_depthwise_convolutions_start_as_the_identity() -> None:
    model = create_model("efficientnet-b0", width=0.25, depthwise_init="identity")
    for block in model.modules():
        if isinstance(block, MBConv):
            conv = block.depthwise.conv
            x, stride = torch.randn(2, conv.in_channels, 9, 9), conv.stride[0]
            torch.testing.assert_close(conv(x), x[:, :, ::stride, ::stride], rtol=0, atol=0)


def test_other_values_are_the_models_own() -> None:
    torch.manual_seed(0)
    plain = create_model("efficientnet-b0", width=0.25, depth=0.3)
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", width=0.25, depth=0.3, zero_init_residual=True, depthwise_init="identity")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    blocks = {name: block for name, block in plain.named_modules() if isinstance(block, MBConv)}
    zeroed = {f"{name}.project.norm.weight" for name, block in blocks.items() if block.residual}
    assert changed == zeroed | {f"{name}.depthwise.conv.weight" for name in blocks}
    assert model.architecture == plain.architecture


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("densenet201", {"zero_init_residual": True}, "zero_init_residual needs residual blocks"),
        ("efficientnet-b0", {"zero_init_residual": True, "depth": 0.1}, "zero_init_residual needs residual blocks"),
        ("resnet50", {"depthwise_init": "identity"}, "resnet50 has no depthwise_init"),
    ],
)
def test_models_without_such_layers_are_refused(name: str, options: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize("options", [{"zero_init_residual": True}, {"depthwise_init": "identity"}])
def test_pretrained_weights_exclude_them(options: dict) -> None:
    with pytest.raises(ValueError, match="applies to training from scratch"):
        TrainConfig(pretrained="weights.pth", **options)
