"""The feature pyramid: timm's levels, the stages' own outputs, a detection-style head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import create_model
from effnet_fast.model.features import FeaturePyramid


@pytest.mark.parametrize(
    ("stride", "reduction", "channels"),
    [
        (32, [2, 4, 8, 16, 32], [16, 24, 40, 112, 320]),  # timm's efficientnet_b0
        (8, [1, 2, 4, 8], [24, 40, 112, 320]),
        (4, [1, 2, 4], [40, 112, 320]),
    ],
)
def test_levels(stride: int, reduction: list[int], channels: list[int]) -> None:
    pyramid = create_model("efficientnet-b0", output_stride=stride, features_only=True).eval()
    assert pyramid.feature_info.reduction() == reduction
    assert pyramid.feature_info.channels() == channels
    with torch.no_grad():
        maps = pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 64 // r, 96 // r) for c, r in zip(channels, reduction, strict=True)
    ]


def test_maps_are_the_outputs_of_the_stages() -> None:
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", width=0.25, depth=0.3).eval()
    pyramid = FeaturePyramid(model, [1, -1]).eval()
    outputs: dict[str, Tensor] = {}
    for name in pyramid.feature_info.module_name():
        stage = model.get_submodule(name)
        stage.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(images)
        maps = pyramid(images)
    assert [level.index for level in pyramid.feature_info] == [1, 3]
    assert all(torch.equal(m, outputs[level.module]) for m, level in zip(maps, pyramid.feature_info, strict=True))


def test_later_stages_are_dropped_and_names_stay() -> None:
    model = create_model("efficientnet-b0", width=0.25, depth=0.3)
    pyramid = FeaturePyramid(model, [0])
    expected = {name for name in model.state_dict() if name.startswith(("stem.", "stages.0.", "stages.1."))}
    assert pyramid.state_dict().keys() == expected


def test_pretrained_weights(tmp_path: Path) -> None:
    model = create_model("efficientnet-b0", 7, width=0.25, depth=0.3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    pyramid = create_model(
        "efficientnet-b0", width=0.25, depth=0.3, features_only=True, pretrained=tmp_path / "w.pth"
    ).state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in pyramid.items())


class Detector(nn.Module):
    """A top-down feature pyramid (Lin et al. 2017) with one box and one score a position."""

    def __init__(self, backbone: FeaturePyramid) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in backbone.feature_info.channels())
        self.head = nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [conv(m) for conv, m in zip(self.lateral, self.backbone(x), strict=True)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + nn.functional.interpolate(maps[i + 1], size=maps[i].shape[-2:])
        return [self.head(m) for m in maps]


def test_a_detection_head_learns() -> None:
    """It learns to point at the bright square of an image."""
    torch.manual_seed(0)
    backbone = create_model(
        "efficientnet-b0", width=0.25, depth=0.3, drop_path=0.0, features_only=True, out_indices=(1, 2)
    )
    detector = Detector(backbone)
    assert all(p.requires_grad for p in detector.parameters())
    images = torch.randn(8, 3, 32, 32) * 0.1
    targets = torch.zeros(8, 16, 16)
    for i in range(8):
        row, column = divmod(i * 23 % 196, 14)
        images[i, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += 3
        targets[i, row : row + 2, column : column + 2] = 1
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        scores = detector(images)[0][:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(scores, targets, pos_weight=torch.tensor(10.0))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in backbone.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("indices", [[], [4], [-5]])
def test_unknown_levels_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="this model has the levels 0 to 3"):
        create_model("efficientnet-b0", features_only=True, out_indices=indices)


def test_other_models_and_out_indices_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="features_only is for EfficientNets, not ResNet"):
        create_model("resnet50", features_only=True)
    with pytest.raises(ValueError, match="add features_only=True"):
        create_model("efficientnet-b0", out_indices=[0])
