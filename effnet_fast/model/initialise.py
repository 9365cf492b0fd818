"""Initial values for training from scratch that differ from a model's own."""

from __future__ import annotations

from torch import nn

from effnet_fast.model.blocks import MBConv
from effnet_fast.model.network import Network
from effnet_fast.model.reference import Bottleneck


def zero_residuals(model: Network) -> None:
    """Set the last BatchNorm weight of each residual block to zero, so that the block starts as its shortcut.

    Goyal et al. 2017 (arXiv 1706.02677), section 5.1; torchvision's `zero_init_residual`. MBConv blocks without a
    residual keep their weights: they would be zero everywhere.

    Raises:
        ValueError: the model has no residual block.
    """
    blocks = [block.project.norm for block in model.modules() if isinstance(block, MBConv) and block.residual]
    blocks += [block.bn3 for block in model.modules() if isinstance(block, Bottleneck)]
    if not blocks:
        raise ValueError(
            "zero_init_residual needs residual blocks, of an EfficientNet or a ResNet, and this model has none: leave "
            "it out"
        )
    for norm in blocks:
        nn.init.zeros_(norm.weight)


def identity_depthwise(model: Network) -> None:
    """Set each depthwise kernel to 1 at its centre and 0 elsewhere: it starts as a copy, or every second pixel.

    The Dirac initialisation of Zagoruyko and Komodakis 2017 (arXiv 1706.00388).
    """
    for block in model.modules():
        if isinstance(block, MBConv):
            conv = block.depthwise.conv
            nn.init.dirac_(conv.weight, conv.groups)
