"""Build models: by name, or from the description that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from effnet_fast.config import DepthwiseInit, LayoutName
from effnet_fast.model import reference, scaling
from effnet_fast.model.blocks import Kernels, Padding
from effnet_fast.model.efficientnet import Architecture, EfficientNet
from effnet_fast.model.features import FeaturePyramid
from effnet_fast.model.initialise import identity_depthwise, zero_residuals
from effnet_fast.model.network import Network
from effnet_fast.model.reference import DENSENETS, RESNETS, DenseNet, ReferenceArchitecture, ResNet
from effnet_fast.model.weights import Weights, find_weights, load_weights

_REFERENCES: dict[str, type[ResNet] | type[DenseNet]] = {
    **dict.fromkeys(RESNETS, ResNet),
    **dict.fromkeys(DENSENETS, DenseNet),
}


@dataclass(frozen=True)
class ModelOptions:
    """A model by name, and where its architecture differs from the variant's.

    Attributes:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        image_size: side of the input, in pixels.
        output_stride: 32, 16, 8 or 4 (reference models: 32 or 8); None is `default_output_stride`.
        width, depth: multipliers of EfficientNet's baseline; None is the variant's.
        dropout: before the classifier; None is the variant's, 0 for reference models.
        drop_path: stochastic depth of EfficientNets; None is 0.2.
        padding, bn_eps: None is what the pretrained weights need, else symmetric, and 1e-3 (reference models: 1e-5).
        bn_momentum: None is 0.01 (reference models: 0.1).
        zero_init_residual: see `initialise.zero_residuals`; EfficientNets and ResNets.
        depthwise_init: default (normal by fan-out) or identity, see `initialise.identity_depthwise`; EfficientNets.
        kernels: auto, triton, triton-block, cpp or torch, see `blocks.Style`. Not part of the architecture, so not in
            checkpoints.
    """

    name: str = "efficientnet-b0"
    num_classes: int = 100
    image_size: int = 32
    output_stride: int | None = None
    width: float | None = None
    depth: float | None = None
    dropout: float | None = None
    drop_path: float | None = None
    padding: Padding | None = None
    bn_eps: float | None = None
    bn_momentum: float | None = None
    zero_init_residual: bool = False
    depthwise_init: DepthwiseInit = "default"
    kernels: Kernels = "auto"


def list_models() -> list[str]:
    """Names that `create_model` accepts.

    >>> list_models()[:3]
    ['densenet201', 'efficientnet-b0', 'efficientnet-b1']
    """
    return sorted([*scaling.VARIANTS, *_REFERENCES])


def model_name(name: str) -> str:
    """The name as `list_models` spells it: `efficientnet_b0` becomes `efficientnet-b0`.

    Raises:
        ValueError: an unknown name; the message lists the nearest known ones.
    """
    known = list_models()
    key = name.lower()
    key = key.replace("_", "-") if key.startswith("eff") else key.replace("-", "").replace("_", "")
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(nearest)}?")
    return key


def variant(name: str) -> scaling.Variant:
    """The multipliers behind a name; those of a reference model are all 1.

    Raises:
        ValueError: an unknown name; the message lists the nearest known ones.
    """
    return scaling.VARIANTS.get(model_name(name), scaling.Variant(dropout=0.0))


def default_output_stride(name: str, image_size: int) -> int:
    """8 for small images, else 32. Small is below 128 px for EfficientNets, up to 64 px for reference models."""
    family = scaling if model_name(name) in scaling.VARIANTS else reference
    return family.default_output_stride(image_size)


@overload
def create_model(
    name: str,
    num_classes: int = ...,
    image_size: int = ...,
    output_stride: int | None = ...,
    *,
    features_only: Literal[True],
    **options: Any,
) -> FeaturePyramid: ...


@overload
def create_model(
    name: str,
    num_classes: int = ...,
    image_size: int = ...,
    output_stride: int | None = ...,
    *,
    features_only: Literal[False] = ...,
    **options: Any,
) -> Network: ...


def create_model(
    name: str,
    num_classes: int = 100,
    image_size: int = 32,
    output_stride: int | None = None,
    *,
    pretrained: str | Path | bool | Weights | None = None,
    pretrained_layout: LayoutName = "auto",
    allow_unmatched: bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options: Any,
) -> Network | FeaturePyramid:
    """Build a model by name.

    Args:
        name, num_classes, image_size, output_stride: see `ModelOptions`.
        pretrained: weights to start from, see `weights.find_weights`: a file, `hf-hub:REPOSITORY`, or True for timm's
            default weights of the model. A classifier with another number of classes keeps its initial values. A
            message on stderr says so, and which layout was read.
        pretrained_layout: layout of the file; `auto` infers it from the tensor names.
        allow_unmatched: load the tensors that fit and list the others, instead of refusing the file.
        features_only: return the feature maps of an EfficientNet instead of logits, see `FeaturePyramid`.
        out_indices: levels of the feature pyramid to return; None returns all.
        options: the other fields of `ModelOptions`: width, depth, dropout, drop_path, padding, bn_eps, bn_momentum,
            zero_init_residual, depthwise_init, kernels.

    Raises:
        ValueError: an unknown name, an impossible value, or weights that do not fit.
        OSError: the weights cannot be read.

    >>> import torch
    >>> model = create_model("efficientnet-b0", num_classes=10, image_size=32)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if not pretrained and (allow_unmatched or pretrained_layout != "auto"):
        raise ValueError("allow_unmatched and pretrained_layout apply to pretrained weights: add pretrained=FILE")
    if not isinstance(pretrained, Weights):
        pretrained = find_weights(pretrained, model_name(name), pretrained_layout) if pretrained else None
    model = model_from_options(
        ModelOptions(name, num_classes, image_size, output_stride, **options), pretrained, allow_unmatched
    )
    if features_only:
        return FeaturePyramid(model, out_indices)
    if out_indices is not None:
        raise ValueError("out_indices chooses levels of the feature pyramid: add features_only=True")
    return model


def model_from_options(options: ModelOptions, weights: Weights | None = None, allow_unmatched: bool = False) -> Network:
    """Build the model that the options describe, and load weights into it; see `create_model`."""
    key = model_name(options.name)
    _check(options, pretrained=weights is not None)
    if key in _REFERENCES:
        model: Network = _REFERENCES[key](_reference_architecture(key, options, weights), options.kernels)
    else:
        model = EfficientNet(_architecture(key, options, weights), options.kernels)
    if options.zero_init_residual:
        zero_residuals(model)
    if options.depthwise_init == "identity":
        identity_depthwise(model)
    if weights is not None:
        load_weights(model, weights, allow_unmatched)
    return model


def _check(options: ModelOptions, pretrained: bool) -> None:
    if options.num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {options.num_classes}")
    for field in ("dropout", "drop_path"):
        value = getattr(options, field)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{field} must be from 0 to below 1, not {value}")
    if options.bn_eps is not None and not options.bn_eps > 0:
        raise ValueError(f"bn_eps must be above 0, not {options.bn_eps}")
    if options.bn_momentum is not None and not 0 <= options.bn_momentum <= 1:
        raise ValueError(f"bn_momentum must be from 0 to 1, not {options.bn_momentum}")
    if pretrained and (options.zero_init_residual or options.depthwise_init != "default"):
        raise ValueError("zero_init_residual and depthwise_init set initial values, which pretrained weights replace")


def _architecture(name: str, options: ModelOptions, weights: Weights | None) -> Architecture:
    multipliers = variant(name)
    return Architecture(
        width=multipliers.width if options.width is None else options.width,
        depth=multipliers.depth if options.depth is None else options.depth,
        drop_path=0.2 if options.drop_path is None else options.drop_path,
        padding=options.padding or (weights.padding if weights else "symmetric"),
        **_shared_fields(name, options, weights),
    )


def _reference_architecture(name: str, options: ModelOptions, weights: Weights | None) -> ReferenceArchitecture:
    for field in ("width", "depth", "drop_path", "padding", "depthwise_init"):
        if getattr(options, field) not in (None, 0, "symmetric", "default"):
            raise ValueError(f"{name} has no {field}: that is EfficientNet's; leave it out")
    return ReferenceArchitecture(name, **_shared_fields(name, options, weights))


def _shared_fields(name: str, options: ModelOptions, weights: Weights | None) -> dict[str, Any]:
    """The fields that both kinds of architecture have."""
    stride, eps = options.output_stride, options.bn_eps
    fields = {
        "num_classes": options.num_classes,
        "image_size": options.image_size,
        "output_stride": default_output_stride(name, options.image_size) if stride is None else stride,
        "dropout": variant(name).dropout if options.dropout is None else options.dropout,
        "bn_eps": weights.bn_eps(name) if eps is None and weights else eps,
        "bn_momentum": options.bn_momentum,
    }
    return {name: value for name, value in fields.items() if value is not None}


def from_description(description: dict[str, Any], kernels: Kernels = "auto") -> Network:
    """Rebuild the model that a checkpoint describes (`dataclasses.asdict` of its architecture).

    Raises:
        ValueError: the description is of an unknown kind of model.
    """
    # Checkpoints that are older than the reference models have no `family`.
    family = description.get("family", "efficientnet")
    architecture = ReferenceArchitecture if family == "reference" else Architecture
    known = {field.name for field in dataclasses.fields(architecture)}
    if set(description) - known or family not in ("efficientnet", "reference"):
        raise ValueError(f"the checkpoint describes another kind of model: {sorted(set(description) - known)}")
    if family == "reference":
        return _REFERENCES[model_name(description["name"])](ReferenceArchitecture(**description), kernels)
    return EfficientNet(Architecture(**description), kernels)
