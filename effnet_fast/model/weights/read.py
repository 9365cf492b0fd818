"""Read weights from .safetensors, .pth or .pt files; no code in them can run."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnet_fast import checkpoint
from effnet_fast.config import LayoutName
from effnet_fast.faults import is_out_of_memory
from effnet_fast.model.weights import efficientnet_pytorch, own, timm, torchvision
from effnet_fast.model.weights.layout import IMAGENET_MEAN, IMAGENET_STD, Layout, Weights, listed
from effnet_fast.model.weights.normalisation import checked_normalisation

LAYOUTS: dict[str, Layout] = {
    "effnet-fast": own.LAYOUT,
    "torchvision": torchvision.LAYOUT,
    "timm": timm.LAYOUT,
    "timm-tf": timm.TF_LAYOUT,
    "efficientnet-pytorch": efficientnet_pytorch.LAYOUT,
}
_REFERENCE_LAYOUTS = (torchvision.RESNET, torchvision.DENSENET)
_HALF = (0.5, 0.5, 0.5)

# Keys under which trainers keep a state dict. A moving average is preferred, as in timm.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict")
_WRAPPERS = (*_AVERAGES, "state_dict", "model", "model_state_dict", "net")
_COUNTERS = ("num_batches_tracked", "n_averaged")  # of BatchNorm, and of torch's AveragedModel

_NUMBERS = "?bBhHiIlLqQefdgFDG"  # NumPy's type characters
_scalar: Any = np.float64(0).__reduce__()[0]
# What trainers store beside the tensors: their arguments, and NumPy scalars such as the best accuracy.
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    Namespace,
    np.dtype,
    *sorted({type(np.dtype(character)) for character in _NUMBERS}, key=str),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # NumPy 1, NumPy 2
]


def read_weights(path: Path, layout: LayoutName = "auto") -> Weights:
    """Read EfficientNet weights of torchvision, timm, EfficientNet-PyTorch or this project, or torchvision's ResNet or
    DenseNet weights.

    A state dict may be wrapped as trainers do: `{"state_dict": ...}`, `{"model": ...}`, `{"net": ...}`, `module.` or
    Lightning's `model.` in front of every name. If the file holds a moving average too, the average is read.

    Args:
        path: a .safetensors file, or a .pth or .pt file, which is loaded with `weights_only=True`.
        layout: of the file; auto infers it from the tensor names. timm's two layouts have the same tensor names; an
            architecture name chooses between them. It is looked for in the file, in config.json beside it, in the
            file's name, then in the names of its folders, the nearest first.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file holds no weights, or their layout is unknown or ambiguous; `layout` is unknown; or
            config.json has an impossible value.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"unknown layout {layout!r} of weights: choose one of auto, {', '.join(LAYOUTS)}")
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    content, metadata = _read_exported(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = {_unwrapped(name): tensor for name, tensor in content.items() if not name.endswith(_COUNTERS)}
    tensors = _without_prefix(path, tensors)
    names = [*metadata.get("architectures", ()), *reversed(path.absolute().parts)]
    is_half = timm.is_half_normalised(names)
    return Weights(
        str(path),
        LAYOUTS[layout] if layout != "auto" else _infer_layout(path, tensors, names),
        {torchvision.undotted(name): tensor for name, tensor in tensors.items()},
        mean=metadata.get("mean", _HALF if is_half else IMAGENET_MEAN),
        std=metadata.get("std", _HALF if is_half else IMAGENET_STD),
        description=metadata.get("description"),
        classes=tuple(metadata.get("classes", ())),
        average=metadata.get("average"),
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a file and the metadata that `effnet-fast export` writes ({} if it did not write the file).

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged, or lacks some of that metadata.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    path.open("rb").close()  # safetensors reports a file without read permission as missing
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if "effnet_fast" not in header:
        return tensors, {}
    try:
        metadata = {name: json.loads(value) for name, value in header.items()}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its metadata is not what effnet-fast export writes ({error})") from error
    _require(path, metadata, "architecture", "classes", "mean", "std", "folded")
    return tensors, metadata


def _read_exported(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_safetensors(path)
    if not metadata:
        return tensors, timm.read_config(path.parent)
    if metadata["folded"]:
        raise ValueError(f"{path} has its BatchNorm folded, for inference only: export without --fold_batchnorm")
    return tensors, _metadata_of_run(path, metadata)


def _read_run(path: Path, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _require(path, state, "model", "ema", "classes", "mean", "std")
    average = _tensors_by_name(path, state["ema"]) if state["ema"] else {}
    metadata = _metadata_of_run(path, state) | ({"average": "ema"} if average else {})
    return _tensors_by_name(path, state["model"]) | average, metadata


def _metadata_of_run(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    for name, kind in (("architecture", dict), ("classes", list)):
        if not isinstance(metadata[name], kind):
            raise ValueError(f"{path} is damaged: {name} is {metadata[name]!r}")
    return {
        "description": metadata["architecture"],
        "classes": metadata["classes"],
        **checked_normalisation(path, metadata),
    }


def _require(path: Path, metadata: Mapping[str, Any], *names: str) -> None:
    if missing := [name for name in names if name not in metadata]:
        raise ValueError(f"{path} is damaged or of another version: it lacks {', '.join(missing)}; take another file")


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = _unpickle(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict")
    if "architecture" in state and "format" in state:
        return _read_run(path, checkpoint.load(path))  # with its checksums verified
    metadata = timm.read_config(path.parent)
    if isinstance(state.get("arch"), str):  # timm's trainer
        metadata["architectures"] = [state["arch"], *metadata.get("architectures", ())]
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), dict) and state[wrapper]:
            state = state[wrapper]
            metadata |= {"average": wrapper} if wrapper in _AVERAGES else {}
    return _tensors_by_name(path, state), metadata


def _unpickle(path: Path) -> object:
    import pickle

    with path.open("rb") as file, torch.serialization.safe_globals(_ALLOWED):  # type: ignore[arg-type]
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"(?:GLOBAL|type) ([\w.]+)", str(error))
            raise ValueError(
                f"{path} is damaged, or holds more than tensors{f' ({refused[1]})' if refused else ''}, which could "
                "run code: save its state dict alone, torch.save(model.state_dict(), FILE)"
            ) from error
        except Exception as error:  # damaged bytes can raise anything
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{path} is damaged or holds no weights") from error


def _tensors_by_name(path: Path, state: object) -> dict[str, Tensor]:
    content = state if isinstance(state, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        entries = f" but {listed(map(str, content))}" if content else ""
        raise ValueError(
            f"{path} holds no state dict (tensors by name){entries}: save the state dict alone, "
            "torch.save(model.state_dict(), FILE)"
        )
    return tensors


def _unwrapped(name: str) -> str:
    """Drop what DistributedDataParallel and torch.compile insert into a name."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _without_prefix(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the attribute that holds the network in a LightningModule or another wrapper, such as `model.`."""
    signs = {layout.sign for layout in (*LAYOUTS.values(), *_REFERENCE_LAYOUTS)}
    if signs & tensors.keys():
        return tensors
    prefixes = {name.removesuffix(sign) for name in tensors for sign in signs if name.endswith(f".{sign}")}
    if len(prefixes) > 1:
        raise ValueError(f"{path} holds several networks ({listed(sorted(prefixes))}): save one of them alone")
    prefix = prefixes.pop() if prefixes else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _infer_layout(path: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Layout:
    # ResNet and DenseNet first: they share no sign with EfficientNet's layouts.
    matching = [layout for layout in (*_REFERENCE_LAYOUTS, *LAYOUTS.values()) if layout.sign in tensors]
    if not matching:
        raise ValueError(
            f"{path} has names of no known layout (torchvision, timm, EfficientNet-PyTorch, effnet_fast): "
            f"{listed(tensors)}"
        )
    return timm.which_layout(path, names) if matching == [timm.LAYOUT, timm.TF_LAYOUT] else matching[0]
