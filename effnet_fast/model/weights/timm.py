"""timm's two layouts, and what its file names and config.json say about a file.

`efficientnet_b*` and `tf_efficientnet_b*` have the same tensor names but differ in padding and eps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effnet_fast.data.dataset import Channels
from effnet_fast.model.weights.layout import Layout, Names
from effnet_fast.model.weights.normalisation import checked_normalisation

LAYOUT = Layout(
    "timm's",
    "conv_stem.weight",
    names=Names(
        ends={
            "stem.conv": "conv_stem",
            "stem.norm": "bn1",
            "head.conv": "conv_head",
            "head.norm": "bn2",
            "classifier": "classifier",
        },
        block="blocks.{stage}.{place}",
        plain={
            "depthwise.conv": "conv_dw",
            "depthwise.norm": "bn1",
            "se.reduce": "se.conv_reduce",
            "se.expand": "se.conv_expand",
            "project.conv": "conv_pw",
            "project.norm": "bn2",
        },
        expanded={
            "expand.conv": "conv_pw",
            "expand.norm": "bn1",
            "depthwise.conv": "conv_dw",
            "depthwise.norm": "bn2",
            "se.reduce": "se.conv_reduce",
            "se.expand": "se.conv_expand",
            "project.conv": "conv_pwl",
            "project.norm": "bn3",
        },
    ),
)
TF_LAYOUT = replace(LAYOUT, title="timm's (tf_)", padding="same", bn_eps=lambda model: 1e-3)

# Weights trained on pixels from -1 to 1: AdvProp's (timm, EfficientNet-PyTorch) and those of timm's recipe ra4.
_HALF_NORMALISED = re.compile(
    r"tf_efficientnet_b\d[._]ap(?![a-z0-9])|adv-efficientnet-b\d|efficientnet_b\d[._]ra4(?![a-z0-9])"
)


def which_layout(path: Path, names: Sequence[str]) -> Layout:
    """Choose between timm's layouts: the first name that contains a model of just one of them decides.

    Args:
        path: of the file, for the message.
        names: the architectures that the file or its config.json names, then its own name, then its folders'.

    Raises:
        ValueError: no name decides.
    """
    for name in names:
        layouts = set(re.findall(r"(tf_)?efficientnet_b\d", name))
        if len(layouts) == 1:
            return TF_LAYOUT if layouts.pop() else LAYOUT
    raise ValueError(
        f"{path}: timm's efficientnet_b* and tf_efficientnet_b* have the same names but other padding and eps, and "
        "neither the file nor its name says which it is: add --pretrained_layout timm or timm-tf"
    )


def is_half_normalised(names: Sequence[str]) -> bool:
    """Whether the first name of an EfficientNet belongs to weights whose images had mean and std 0.5."""
    nearest = next((name for name in names if re.search(r"efficientnet[-_]b\d", name)), "")
    return bool(_HALF_NORMALISED.search(nearest))


def read_config(folder: Path) -> dict[str, Any]:
    """Read architecture, mean and std from timm's config.json in a folder; return {} if there is none.

    Raises:
        ValueError: a field has an impossible value.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        return {}
    if not isinstance(config, dict) or "architecture" not in config:  # of another library
        return {}
    if not isinstance(config["architecture"], str):
        raise ValueError(f"{file}: architecture must be a name, not {config['architecture']!r}")
    settings = config.get("pretrained_cfg", config) or {}  # older files have mean and std beside the architecture
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: pretrained_cfg must hold mean and std, not be {settings!r}")
    return {"architectures": [config["architecture"]], **checked_normalisation(file, settings)}


def make_config(
    architecture: str, features: int, classes: Sequence[str], image_size: int, mean: Channels, std: Channels
) -> dict[str, Any]:
    """The config.json that `timm.create_model("local-dir:FOLDER")` reads."""
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": features,
        "label_names": list(classes),
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": [3, image_size, image_size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
        },
    }
