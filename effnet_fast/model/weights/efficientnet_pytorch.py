"""The layout of EfficientNet-PyTorch (lukemelas), whose weights were converted from TensorFlow."""

from effnet_fast.model.weights.layout import Layout, Names

_BLOCK = {
    "depthwise.conv": "_depthwise_conv",
    "depthwise.norm": "_bn1",
    "se.reduce": "_se_reduce",
    "se.expand": "_se_expand",
    "project.conv": "_project_conv",
    "project.norm": "_bn2",
}

LAYOUT = Layout(
    "EfficientNet-PyTorch's",
    "_conv_stem.weight",
    padding="same",
    bn_eps=lambda model: 1e-3,
    names=Names(
        ends={
            "stem.conv": "_conv_stem",
            "stem.norm": "_bn0",
            "head.conv": "_conv_head",
            "head.norm": "_bn1",
            "classifier": "_fc",
        },
        block="_blocks.{index}",
        plain=_BLOCK,
        expanded={"expand.conv": "_expand_conv", "expand.norm": "_bn0", **_BLOCK},
    ),
)
