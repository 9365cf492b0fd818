"""The layers of a model for which effnet_kernels chooses launches, as a training step sees them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from effnet_fast.model.blocks import BatchNorm, ConvNormAct, MBConv, tuning
from effnet_fast.model.efficientnet import EfficientNet
from effnet_fast.model.network import Network, batch_norms


def launch_layers(model: Network, images: int, pixels: int, *, products: bool = False) -> list[tuning.Layer]:
    """Distinct layers, largest map first; computes shapes only, on the meta device.

    Args:
        model: stays as it is.
        images: of one forward pass.
        pixels: height and width of the images.
        products: with the 1x1 convolutions of the blocks, for `kernels="triton-block"`.
    """
    model = copy.deepcopy(model).to("meta").eval()
    layers: dict[tuning.Layer, None] = {}
    fused = set()  # BatchNorms that run within their block's op
    head_norm = model.head.norm if isinstance(model, EfficientNet) else None

    def note_block(block: MBConv, arguments: tuple[Tensor], _: Any) -> None:
        conv, size = block.depthwise.conv, arguments[0].shape[-1]
        hidden, is_expanded = block.se.reduce.out_channels, isinstance(block.expand, ConvNormAct)
        layer = tuning.Layer(images, conv.in_channels, size, conv.kernel_size[0], conv.stride[0], hidden, is_expanded)
        layers[layer] = None
        if products:
            inputs, outputs = arguments[0].shape[1], block.project.conv.out_channels
            layers[tuning.Layer(images, layer.c, layer.out, outputs=outputs)] = None
            if is_expanded:
                layers[tuning.Layer(images, inputs, size, prologue=False, outputs=layer.c)] = None

    def note_norm(norm: BatchNorm, arguments: tuple[Tensor], _: Any) -> None:
        _, channels, size, _ = arguments[0].shape
        layers[tuning.Layer(images, channels, size, pooled=norm is head_norm)] = None

    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = "torch"  # type: ignore[assignment]  # the others have no meta form
        if isinstance(module, MBConv):
            module.register_forward_hook(note_block)
            fused |= {norm for part in (module.expand, module.depthwise) for norm in part.modules()}
    for norm in batch_norms(model):
        if norm not in fused:
            norm.register_forward_hook(note_norm)
    with torch.no_grad():
        model(torch.empty(images, 3, pixels, pixels, device="meta"))
    return sorted(layers, key=lambda layer: -layer.rows * layer.c)


def launch_keys(model: Network, images: int, pixels: int, *, products: bool) -> set[tuple[str, tuple[int, ...]]]:
    """(kernel, sizes) of every launch and op that can be tuned in a training step."""
    layers = launch_layers(model, images, pixels, products=products)
    return {(part, tuning.PARTS[part].sizes(layer)) for layer in layers for part in tuning.parts_of(layer)}
