"""Models by name, and from the description that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from effnet_fast.config import LayoutName
from effnet_fast.model import reference, scaling
from effnet_fast.model.blocks import Kernels, Padding
from effnet_fast.model.efficientnet import Architecture, EfficientNet
from effnet_fast.model.network import Network
from effnet_fast.model.reference import DENSENETS, RESNETS, DenseNet, ReferenceArchitecture, ResNet
from effnet_fast.model.weights import Weights, load_weights, read_weights

_REFERENCES: dict[str, type[ResNet] | type[DenseNet]] = {
    **dict.fromkeys(RESNETS, ResNet),
    **dict.fromkeys(DENSENETS, DenseNet),
}


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return sorted([*scaling.VARIANTS, *_REFERENCES])


def model_name(name: str) -> str:
    """The name as `list_models` has it: `efficientnet_b0` is read as `efficientnet-b0`.

    Raises:
        ValueError: an unknown name, with the nearest known ones.
    """
    known = list_models()
    key = name.lower()
    key = key.replace("_", "-") if key.startswith("eff") else key.replace("-", "").replace("_", "")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    return key


def variant(name: str) -> scaling.Variant:
    """The multipliers behind a name; those of a reference model are all 1.

    Raises:
        ValueError: an unknown name, with the nearest known ones.
    """
    return scaling.VARIANTS.get(model_name(name), scaling.Variant(dropout=0.0))


def default_output_stride(name: str, image_size: int) -> int:
    """8 for small images, 32 for others; small is below 128 px for EfficientNets, up to 64 for reference models."""
    family = scaling if model_name(name) in scaling.VARIANTS else reference
    return family.default_output_stride(image_size)


def create_model(
    name: str,
    num_classes: int = 100,
    image_size: int = 32,
    output_stride: int | None = None,
    *,
    width: float | None = None,
    depth: float | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    padding: Padding | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    kernels: Kernels = "auto",
    pretrained: str | Path | Weights | None = None,
    pretrained_layout: LayoutName = "auto",
    allow_unmatched: bool = False,
) -> Network:
    """Build a model by name.

    Args:
        name: one of `list_models()`.
        num_classes: outputs.
        image_size: pixels of the input.
        output_stride: 32, 16, 8 or 4 (reference models: 32 or 8); None is `default_output_stride`.
        width, depth: multipliers of EfficientNet's baseline; None is the variant's own.
        dropout: before the classifier; None is the variant's own, 0 for reference models.
        drop_path: of EfficientNets; None is 0.2.
        padding, bn_eps: None is what the pretrained weights need, else symmetric, and 1e-3 (reference models: 1e-5).
        bn_momentum: None is 0.01 (reference models: 0.1).
        kernels: auto, triton or torch, see `blocks.Style`; no part of the architecture, so a checkpoint lacks it.
        pretrained: weights to start from, see `weights.read_weights`. A head of another size stays new; that and
            what else is to be known is said on stderr.
        pretrained_layout: whose names the file has; auto tells by the names.
        allow_unmatched: take the tensors that fit and leave out the others, which are listed, rather than refuse.

    Raises:
        ValueError: an unknown name, an impossible value, or weights that do not fit.
        OSError: the weights cannot be read.
    """
    key = model_name(name)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if isinstance(pretrained, str | Path):
        pretrained = read_weights(Path(pretrained), pretrained_layout)
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "image_size": image_size,
        "output_stride": output_stride or default_output_stride(key, image_size),
        "dropout": variant(key).dropout if dropout is None else dropout,
    }
    if pretrained is not None:
        bn_eps = bn_eps or pretrained.bn_eps(key)
    common |= {k: v for k, v in (("bn_eps", bn_eps), ("bn_momentum", bn_momentum)) if v is not None}
    if key in _REFERENCES:
        _refuse_flags(key, width=width, depth=depth, drop_path=drop_path, padding=padding)
        model: Network = _REFERENCES[key](ReferenceArchitecture(key, **common), kernels)
    else:
        chosen = variant(key)
        architecture = Architecture(
            width=chosen.width if width is None else width,
            depth=chosen.depth if depth is None else depth,
            drop_path=0.2 if drop_path is None else drop_path,
            padding=padding or (pretrained.padding if pretrained else "symmetric"),
            **common,
        )
        model = EfficientNet(architecture, kernels)
    if pretrained is not None:
        load_weights(model, pretrained, allow_unmatched)
    return model


def _refuse_flags(name: str, **flags: object) -> None:
    for flag, value in flags.items():
        if value not in (None, 0, "symmetric"):
            raise ValueError(f"{name} has no {flag}: that is EfficientNet's; leave it out")


def from_description(description: dict[str, Any], kernels: Kernels = "auto") -> Network:
    """Rebuild the model a checkpoint describes (`dataclasses.asdict` of its architecture).

    Raises:
        ValueError: the description is of no model known here.
    """
    # Checkpoints from before there were reference models name no family.
    family = description.get("family", "efficientnet")
    architecture = ReferenceArchitecture if family == "reference" else Architecture
    known = {field.name for field in dataclasses.fields(architecture)}
    if set(description) - known or family not in ("efficientnet", "reference"):
        raise ValueError(f"the checkpoint describes another kind of model: {sorted(set(description) - known)}")
    if family == "reference":
        return _REFERENCES[model_name(description["name"])](ReferenceArchitecture(**description), kernels)
    return EfficientNet(Architecture(**description), kernels)
