"""A model for use elsewhere: BatchNorm folded away, and the bytes of a safetensors, ONNX or torch.export file.

All three carry the same metadata, strings each of which is JSON; `run/export.py` lists them.
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

_EXAMPLE_BATCH = 2  # images of the trace; torch.export takes 1 for a constant


@torch.no_grad()
def fold_batch_norms(model: Network) -> None:
    """Fold every BatchNorm that follows a convolution into it, in place: conv(x) W gamma rstd + beta - mean gamma rstd.

    The model must be built with kernels="torch" and computes the same in evaluation. A BatchNorm before a convolution,
    as DenseNet has, stays.
    """
    for parent in model.modules():
        for (_, conv), (name, norm) in pairwise(parent.named_children()):
            if isinstance(conv, Conv) and isinstance(norm, BatchNorm):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                setattr(parent, name, nn.Identity())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_safetensors(model: Network, metadata: Mapping[str, str]) -> bytes:
    """The state dict and the metadata."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, dict(metadata))


def to_torch_export(model: Network, metadata: Mapping[str, str]) -> bytes:
    """A program for `torch.export.load`, whose `extra_files` hold the metadata; images [N, 3, S, S] for any N."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # saving warns of other strides
    program = torch.export.export(model, _example(model), dynamic_shapes=_any_batch())
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(metadata))
    return buffer.getvalue()


def to_onnx(model: Network, metadata: Mapping[str, str]) -> bytes:
    """An ONNX model of `images` [N, 3, S, S] -> `logits` [N, num_classes] for any N; the metadata are its properties.

    Raises:
        ValueError: onnx or onnxscript is not installed.
    """
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise ValueError("--format onnx needs onnx and onnxscript: pip install 'effnet-fast[export]'")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it regrets that torchvision is not here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
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
