"""torchvision's EfficientNet, ResNet and DenseNet. The last two have the names of our reference models."""

from __future__ import annotations

import re

from effnet_fast.model.weights.layout import Layout, Names


def _numbered(first: int) -> dict[str, str]:
    """The layers after the expansion, which torchvision numbers from `first`."""
    return {
        "depthwise.conv": f"{first}.0",
        "depthwise.norm": f"{first}.1",
        "se.reduce": f"{first + 1}.fc1",
        "se.expand": f"{first + 1}.fc2",
        "project.conv": f"{first + 2}.0",
        "project.norm": f"{first + 2}.1",
    }


def _bn_eps(model: str) -> float:
    """torchvision builds B0 to B4 with torch's default and B5 to B7 with the authors' eps."""
    return 1e-3 if model in ("efficientnet-b5", "efficientnet-b6", "efficientnet-b7") else 1e-5


def undotted(name: str) -> str:
    """Rename `norm.1` of torchvision's first DenseNet files to `norm1`."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


LAYOUT = Layout(
    "torchvision's",
    "features.0.0.weight",
    bn_eps=_bn_eps,
    names=Names(
        ends={
            "stem.conv": "features.0.0",
            "stem.norm": "features.0.1",
            "head.conv": "features.8.0",
            "head.norm": "features.8.1",
            "classifier": "classifier.1",
        },
        block="features.{stage1}.{place}.block",
        plain=_numbered(0),
        expanded={"expand.conv": "0.0", "expand.norm": "0.1", **_numbered(1)},
    ),
)
RESNET = Layout("torchvision's ResNet's", "layer1.0.conv1.weight")
DENSENET = Layout("torchvision's DenseNet's", "features.conv0.weight")
