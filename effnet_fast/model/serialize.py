"""Fold BatchNorm, and serialize a model as safetensors, ONNX or torch.export.

All three formats carry the same metadata, a JSON string for each key; `run/export.py` writes them.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from effnet_fast.model.blocks import BatchNorm, Conv
from effnet_fast.model.network import Network

_EXAMPLE_BATCH = 2  # images of the trace; torch.export specialises on a batch of 1


@torch.no_grad()
def fold_batch_norms(model: Network) -> None:
    """Fold BatchNorm into the convolution before it, in place: W' = W gamma rstd, b' = beta - mean gamma rstd.

    The model must be built with kernels="torch". In evaluation mode it computes the same as before. A BatchNorm in
    front of a convolution, as in DenseNet, stays.
    """
    for parent in model.modules():
        for (_, conv), (name, norm) in pairwise(parent.named_children()):
            if isinstance(conv, Conv) and isinstance(norm, BatchNorm):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                setattr(parent, name, nn.Identity())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def divide_logits(model: Network, divisor: float) -> None:
    """Divide the classifier's weights by a number, in place, and so the logits."""
    for parameter in model.classifier.parameters():
        parameter.div_(divisor)


@torch.no_grad()
def cast_weights(model: Network, dtype: torch.dtype) -> None:
    """Cast the weights of convolutions and linear layers, in place; vectors, such as BatchNorm's, stay as they are.

    Raises:
        ValueError: a weight is too large for the type.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
            if not parameter.isfinite().all():
                raise ValueError(f"{name} has a weight that {dtype} cannot hold: export with --dtype float32")


def to_safetensors(model: Network, metadata: Mapping[str, str]) -> bytes:
    """Serialize the state dict and the metadata as a safetensors file."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, dict(metadata))


def to_torch_export(model: Network, metadata: Mapping[str, str]) -> bytes:
    """Serialize a program for `torch.export.load`: images [N, 3, S, S], any N; `extra_files` hold the metadata."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch warns about other strides
    program = torch.export.export(model, _example(model), dynamic_shapes=_any_batch())
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(metadata))
    return buffer.getvalue()


def to_onnx(model: Network, metadata: Mapping[str, str]) -> bytes:
    """Serialize an ONNX model: `images` [N, 3, S, S], any N -> `logits` [N, num_classes]; properties hold the metadata.

    Raises:
        ValueError: onnx or onnxscript is not installed.
    """
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise ValueError("--format onnx needs onnx and onnxscript: pip install 'effnet-fast[export]'")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # a note that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            model,
            _example(model),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_any_batch(),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def _example(model: Network) -> tuple[Tensor]:
    side = model.architecture.image_size
    return (torch.zeros(_EXAMPLE_BATCH, 3, side, side).contiguous(memory_format=torch.channels_last),)


def _any_batch() -> tuple[dict[int, object]]:
    return ({0: torch.export.Dim("batch")},)
