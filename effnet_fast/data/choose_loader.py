"""Choose the loader for a split on this machine, and create it.

`auto` follows the measurements in loader_speeds.json, which benchmarks/loader.py writes. The file maps a device (`cpu`
or the result of `torch.cuda.get_device_name()`) to the training images per second of each loader on arrays of CIFAR's
size with crop and flip, measured alternately in one run, and to the origin of these figures:

    {"cpu": {"dali": 20000, "resident": 30000, "torch": 9000, "commit": "0123456789ab", "date": "2026-01-31",
             "torch_version": "2.13.0", "dali_version": "2.4.0", "machine": "2 cores of an AMD EPYC"}}

A loader that was not measured is absent. For image files, and for devices without a record, `auto` takes DALI if it
can be imported. It takes the torch loader if Pillow must decode more than half of the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_fast.config import LoaderKind, LoaderName
from effnet_fast.data.dataset import ArraySplit, FileSplit, Split
from effnet_fast.data.loader import Loader, LoaderSpec

if TYPE_CHECKING:
    import torch

SPEEDS = Path(__file__).with_name("loader_speeds.json")
_INSTALL_DALI = "pip install nvidia-dali-cuda120"


def choose_loader(kind: LoaderName, split: Split, device: torch.device) -> tuple[LoaderKind, str]:
    """Choose the loader, and say why in one line.

    Args:
        kind: `--loader`.
        split: the images to load.
        device: where batches are delivered.

    Raises:
        ValueError: the requested loader cannot load this split on this machine.
    """
    if kind == "resident" and isinstance(split, FileSplit):
        raise ValueError("--loader resident needs images in memory and cannot load image files: use dali or torch")
    if kind == "resident" or kind == "torch":
        return kind, f"--loader {kind}"
    version = _dali_version()
    if kind == "dali" and not version:
        raise ValueError(f"--loader dali needs NVIDIA DALI: {_INSTALL_DALI}")
    if kind == "dali":
        return "dali", f"DALI {version}, by --loader dali"
    if not version:
        fallback: LoaderKind = "resident" if isinstance(split, ArraySplit) else "torch"
        return fallback, f"DALI is not installed ({_INSTALL_DALI})"
    if isinstance(split, FileSplit):
        by_pillow = sum(not file.plain for file in split.files)
        if by_pillow > len(split) / 2:
            return "torch", f"Pillow has to decode {by_pillow} of {len(split)} images"
        return "dali", f"DALI {version} is installed"
    return _recorded(_device_name(device)) or (
        "dali",
        f"DALI {version} is installed; no speeds are recorded for this device",
    )


def _recorded(device: str) -> tuple[LoaderKind, str] | None:
    """The faster of DALI and the resident loader on this device; None unless both were measured."""
    record: dict[str, Any] = json.loads(SPEEDS.read_text()).get(device, {})
    kinds: tuple[LoaderKind, ...] = ("dali", "resident")
    if not all(kind in record for kind in kinds):
        return None
    slower, faster = sorted(kinds, key=lambda kind: record[kind])
    return faster, (
        f"loader {faster}: {record[faster]:,.0f} img/s recorded on {device}, {slower} {record[slower]:,.0f} "
        f"({record['date']}, {record['commit']})"
    )


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    import torch

    return torch.cuda.get_device_name(device)


def _dali_version() -> str | None:
    try:
        import nvidia.dali
    except ImportError:
        return None
    return nvidia.dali.__version__


def make_loader(kind: LoaderKind, split: Split, spec: LoaderSpec) -> Loader:
    """Create the loader that `choose_loader` has chosen for this split.

    Raises:
        ValueError: a training batch is larger than the split.
    """
    if kind == "dali":
        from effnet_fast.data.dali import DaliLoader

        return DaliLoader(split, spec)
    if kind == "torch":
        from effnet_fast.data.torch_loader import TorchLoader

        return TorchLoader(split, spec)
    from effnet_fast.data.resident import ResidentLoader

    assert isinstance(split, ArraySplit)
    return ResidentLoader(split, spec)
