"""Rename a model's tensors to the layout of torchvision or timm, so that their network gives the same logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_fast.model.blocks import BatchNorm
from effnet_fast.model.efficientnet import EfficientNet
from effnet_fast.model.network import Network
from effnet_fast.model.scaling import VARIANTS, layout
from effnet_fast.model.weights import timm, torchvision
from effnet_fast.model.weights.layout import Layout


@dataclass(frozen=True)
class Foreign:
    """A model under another library's names.

    Attributes:
        architecture: the library's name for the model, such as efficientnet_b0.
        tensors: its state dict, in the dtypes of the model, with BatchNorm's batch counters.
    """

    architecture: str
    tensors: dict[str, Tensor]


def to_foreign(model: Network, library: str) -> Foreign:
    """Convert a model to torchvision's or timm's names.

    Their networks have a fixed eps. Where it differs from the model's, the difference is added to the running variance,
    which leaves variance + eps, and so the logits, as they are.

    Args:
        model: with BatchNorm layers that are not folded.
        library: torchvision or timm.

    Raises:
        ValueError: the library has no such network; the message gives the reason.
    """
    name, names = _published_name(model, library), _layout(model, library)
    theirs = names.tensor_names(model)
    shift = model.architecture.bn_eps - names.bn_eps(name)
    tensors = {theirs[key]: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    for key, module in model.named_modules():
        if isinstance(module, BatchNorm):
            variance = theirs[f"{key}.running_var"]
            tensors[variance] = (tensors[variance].double() + shift).float()
            tensors[variance.replace("running_var", "num_batches_tracked")] = torch.zeros((), dtype=torch.int64)
    prefix = "tf_" if names is timm.TF_LAYOUT else ""
    return Foreign(prefix + name.replace("-", "_"), tensors)


def _layout(model: Network, library: str) -> Layout:
    if not isinstance(model, EfficientNet):
        return torchvision.RESNET  # both libraries use our names for ResNet and DenseNet, and torch's eps
    same = model.architecture.padding == "same"
    if library == "timm":
        return timm.TF_LAYOUT if same else timm.LAYOUT
    if same:
        raise ValueError("torchvision's EfficientNets have no TensorFlow SAME padding: use --layout timm")
    return torchvision.LAYOUT


def _published_name(model: Network, library: str) -> str:
    """Our name for the published model with these channels, repeats and strides."""
    architecture = model.architecture
    if architecture.output_stride != 32:
        raise ValueError(
            f"{library}'s networks have output stride 32, this model {architecture.output_stride}: train with "
            "--output_stride 32, or export without --layout"
        )
    if not isinstance(model, EfficientNet):
        return architecture.name
    for name, variant in VARIANTS.items():
        if layout(variant.width, variant.depth, 32) == model.layout:
            return name
    raise ValueError(
        f"{library} has no EfficientNet of width {architecture.width:g} and depth {architecture.depth:g}: "
        "export without --layout"
    )
