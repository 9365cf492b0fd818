"""Count what a built model costs: parameters, MACs, activations, memory and minimum bytes per step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.internals import internal
from effnet_fast.model.blocks import Conv
from effnet_fast.model.network import Network, batch_norms
from effnet_fast.model.zoo import create_model

TorchDispatchMode: Any = internal("torch.utils._python_dispatch.TorchDispatchMode")

FP32, BF16 = 4, 2  # bytes of an element
EXAMPLE_BATCH = 256  # images of the step whose traffic `model_costs` reports


@dataclass(frozen=True)
class Complexity:
    """The costs of a model, per image unless stated otherwise.

    Attributes:
        parameters: number of trainable parameters.
        macs: multiply-accumulates of the convolutions and linear layers of one forward pass, which
            fvcore calls "flops"; a multiply-accumulate is two floating-point operations, so `flops` is 2 * macs.
        activations: elements that convolutions and linear layers write in one forward pass (fvcore's convention).
        inputs_read: elements that these layers read in one forward pass, without weights.
        saved: elements that autograd keeps for the backward pass.
        final_map: (C, H, W) of the input of the global pooling.
    """

    parameters: int
    macs: int
    activations: int
    inputs_read: int
    saved: int
    final_map: tuple[int, int, int]

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass: two per multiply-accumulate."""
        return 2 * self.macs

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and SGD's momentum: float32 each, under mixed precision too.

        AdamW and the paper's RMSprop keep one more copy; so does an EMA of the weights.
        """
        return 3 * self.parameters * FP32

    def training_bytes_per_image(self, element_bytes: int) -> int:
        """Bytes of memory that each image of a batch takes in training: `saved` elements of `element_bytes` each.

        This estimates the uncompiled PyTorch path. A compiled or fused path recomputes some of these elements;
        workspaces and transient gradients are not included.
        """
        return self.saved * element_bytes

    def minimum_step_bytes(self, batch_size: int, element_bytes: int) -> int:
        """The fewest bytes that one training step can move to and from memory without fusing layers.

        Training cannot fuse two layers: BatchNorm needs the whole output of a layer before the next layer starts.

        Per image, with x a layer's input, y its output and dx, dy their gradients, each tensor moves once per pass:
        forward reads x and writes y; backward reads x and dy and writes dx: 3 * inputs_read + 2 * activations.
        BatchNorm, Swish, gate and residual are assumed to be fused into these passes. Per step, the forward and the
        backward pass read the float32 weights, the backward pass writes their gradients, then SGD reads weight,
        gradient and momentum and writes weight and momentum: 8 passes. Divided by the memory bandwidth, these bytes
        are a lower bound of a step's time.
        """
        per_image = 3 * self.inputs_read + 2 * self.activations
        return batch_size * per_image * element_bytes + 8 * self.parameters * FP32


def complexity(model: Network, image_size: int) -> Complexity:
    """Count what a model costs on [3, image_size, image_size] images. The model is not changed.

    One training pass of a copy on the meta device is counted: nothing is computed.
    """
    model = copy.deepcopy(model).to("meta").train()
    for norm in batch_norms(model):
        norm.synchronised = False  # so that one rank can count without the others
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # What is saved once per batch, weights and BatchNorm statistics, is then less than one element per image.
    batch_size = parameters + 1
    images = torch.empty(batch_size, 3, image_size, image_size, device="meta")
    with _ShapesOnly(), _saved_storages() as storages, _layer_counts(model) as counts:
        features = model.forward_features(images)
        model.classify(features.mean((2, 3)))
    channels, height, width = features.shape[1:]
    return Complexity(
        parameters=parameters,
        macs=counts["macs"] // batch_size,
        activations=counts["activations"] // batch_size,
        inputs_read=counts["inputs_read"] // batch_size,
        saved=sum(elements // batch_size for _, elements in storages.values()),
        final_map=(channels, height, width),
    )


def model_costs(
    name: str,
    num_classes: int,
    image_size: int,
    output_stride: int | None,
    *,
    width: float | None = None,
    depth: float | None = None,
) -> dict[str, Any]:
    """Count what `effnet-fast info` prints about a model: numbers and lists that JSON can hold.

    Args:
        output_stride: None is `default_output_stride`.
        width, depth: multipliers of the baseline; None is the variant's.

    Raises:
        ValueError: an unknown model or an impossible value.
    """
    with torch.device("meta"):  # no values are needed
        model = create_model(name, num_classes, image_size, output_stride, width=width, depth=depth)
    cost = complexity(model, image_size)
    return {
        "model": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "output_stride": model.architecture.output_stride,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "flops": cost.flops,
        "activations": cost.activations,
        "final_map": list(cost.final_map),
        "state_bytes": cost.state_bytes,
        "training_bytes_per_image": {
            "bf16": cost.training_bytes_per_image(BF16),
            "fp32": cost.training_bytes_per_image(FP32),
        },
        "minimum_step_bytes": {
            "batch_size": EXAMPLE_BATCH,
            "bf16": cost.minimum_step_bytes(EXAMPLE_BATCH, BF16),
            "fp32": cost.minimum_step_bytes(EXAMPLE_BATCH, FP32),
        },
    }


def costs_table(costs: dict[str, Any]) -> str:
    """Format `model_costs` as a table: one quantity a line, at most 80 characters wide."""
    side = costs["image_size"]
    memory, traffic = costs["training_bytes_per_image"], costs["minimum_step_bytes"]
    rows = [
        ("parameters", f"{costs['parameters']:,}", "trainable numbers"),
        ("MACs", f"{costs['macs']:,}", "multiply-accumulates, one image forward"),
        ("FLOPs", f"{costs['flops']:,}", '2 x MACs (fvcore\'s "flops" are MACs)'),
        ("activations", f"{costs['activations']:,}", "numbers its layers write, one image"),
        ("final map", " x ".join(map(str, costs["final_map"])), "channels x height x width"),
        ("training state", _size(costs["state_bytes"]), "weights, gradients, momentum; fp32"),
        ("memory per image", f"{_size(memory['bf16'])} / {_size(memory['fp32'])}", "kept for backward; bf16 / fp32"),
        (
            "traffic per step",
            f"{_size(traffic['bf16'])} / {_size(traffic['fp32'])}",
            f"least for {traffic['batch_size']} images; bf16 / fp32",
        ),
    ]
    title = (
        f"{costs['model']}, {costs['num_classes']} classes, {side} x {side} px, output stride {costs['output_stride']}"
    )
    return "\n".join([title, *(f"  {name:16}  {value:>19}  {meaning}" for name, value, meaning in rows)])


def _size(count: int) -> str:
    """Format bytes in decimal units, such as 42.09 MB."""
    scale, unit = next(row for row in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (0, "MB")) if count >= row[0])
    return f"{count / (scale or 1e6):.4g} {unit}"


class _ShapesOnly(TorchDispatchMode):
    """On the meta device torch composes BatchNorm of many small operators, which takes most of the time."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.native_batch_norm.default:
            x = args[0]
            return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def _layer_counts(model: Network) -> Iterator[Counter[str]]:
    """In this context, a pass counts the MACs and the elements read and written of convolutions and linear layers."""
    counts: Counter[str] = Counter()

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x, weight = inputs[0], layer.get_parameter("weight")
        if isinstance(layer, Conv) and layer.asymmetric:
            x = F.pad(x, layer.pads(x))
        # weight: [outputs, inputs of a group, kernel, kernel], or [outputs, inputs]
        counts.update(macs=output.numel() * weight[0].numel(), inputs_read=x.numel(), activations=output.numel())

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(count))
        yield counts


@contextmanager
def _saved_storages() -> Iterator[dict[int, tuple[Tensor, int]]]:
    """In this context, the floating-point storages that autograd saves are collected, with their number of elements."""
    storages: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            storage = tensor.untyped_storage()
            storages[storage._cdata] = (tensor, storage.nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages
