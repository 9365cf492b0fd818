"""Load weights of any layout into a model of the same architecture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effnet_fast import distributed
from effnet_fast.model.efficientnet import EfficientNet
from effnet_fast.model.network import Network
from effnet_fast.model.weights.layout import Weights, listed
from effnet_fast.model.weights.read import LAYOUTS


@torch.no_grad()
def load_weights(model: Network, weights: Weights, allow_unmatched: bool = False) -> None:
    """Copy weights into a model of the same architecture.

    A classifier of another size keeps its initial values. Rank 0 reports on stderr which layout was read and whether
    the classifier was loaded.

    Args:
        allow_unmatched: load the tensors that fit; the others are listed on stderr.

    Raises:
        ValueError: tensors are missing, unexpected, mis-shaped or not finite.
    """
    if not isinstance(model, EfficientNet) and any(layout.sign in weights.tensors for layout in LAYOUTS.values()):
        raise ValueError(
            f"{weights.source} holds an EfficientNet's weights ({weights.layout.title} names) and does not fit this "
            f"{type(model).__name__}: name the --model it was saved from"
        )
    tensors, names = dict(weights.tensors), weights.layout.tensor_names(model)
    lines = _notes(model, weights)
    head = {key: names[key] for key in _head_keys(model)}
    if _differs_in_classes_only(model, [tensors.get(name) for name in head.values()]):
        classes = len(tensors[next(iter(head.values()))])
        lines.append(f"its head of {classes} classes is replaced by a new one of {model.architecture.num_classes}")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head.values()}
        names = {key: name for key, name in names.items() if key not in head}
    fitting, misfits = _matched(model, names, tensors)
    if weights.classes and head.keys() <= fitting.keys():
        lines.append(f"its head is kept, for its {len(weights.classes)} classes: {listed(map(str, weights.classes))}")
    if any(misfits.values()) and not (allow_unmatched and fitting):
        raise ValueError(_refusal(model, weights, misfits))
    lines += [f"{kind}: {name}" for kind, unmatched in misfits.items() for name in unmatched]
    model.load_state_dict(fitting, strict=False)
    if distributed.is_main():
        print(*(f"{weights.source}: {line}" for line in lines), sep="\n", file=sys.stderr)


def _matched(
    model: Network, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The tensors that fit, by our names; the others' names, by what is wrong with them."""
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    present = {key: name for key, name in names.items() if name in tensors}
    misshapen = [name for key, name in present.items() if tensors[name].shape != shapes[key]]
    broken = [name for name in present.values() if not _is_finite(tensors[name])]
    fitting = {key: tensors[name] for key, name in present.items() if name not in {*misshapen, *broken}}
    return fitting, {
        "missing": [name for name in names.values() if name not in tensors],
        "unexpected": sorted(set(tensors) - set(names.values())),
        "mis-shaped": misshapen,
        "not finite floating-point numbers": broken,
    }


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _head_keys(model: Network) -> list[str]:
    """Names of the classifier's weight and bias."""
    parameters = [id(p) for p in model.classifier.parameters()]
    return [name for name, p in model.named_parameters() if id(p) in parameters]


def _differs_in_classes_only(model: Network, head: Sequence[Tensor | None]) -> bool:
    """Whether a file's weight and bias of the classifier fit except for the number of classes."""
    weight, bias = head
    classes, features = model.classifier.weight.shape
    return weight is not None and bias is not None and weight.shape[1:] == (features,) and len(weight) != classes


def _notes(model: Network, weights: Weights) -> list[str]:
    architecture = model.architecture
    padding = "TensorFlow's SAME" if getattr(architecture, "padding", None) == "same" else "symmetric"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (weights.mean, weights.std))
    return [
        f"{weights.layout.title} names; {padding} padding, BatchNorm eps {architecture.bn_eps:g}",
        f"images normalised with mean {mean} and std {std}",
        *([f"its moving average ({weights.average}) is loaded, not the raw weights"] if weights.average else []),
    ]


def _refusal(model: Network, weights: Weights, misfits: Mapping[str, list[str]]) -> str:
    parts = [f"{len(names)} {kind} ({listed(names)})" for kind, names in misfits.items() if names]
    return (
        f"{weights.source} ({weights.layout.title} names) does not fit this {type(model).__name__}; tensors: "
        f"{'; '.join(parts)}. Name the --model it was saved from (with --output_stride 32 for a published stem), or "
        "load what fits with --allow_unmatched"
    )
