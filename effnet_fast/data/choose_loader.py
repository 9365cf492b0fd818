"""Which loader serves a split on this machine, and making it.

`auto` follows what was measured: loader_speeds.json beside this file, which benchmarks/loader.py writes. It maps a
device, `cpu` or what `torch.cuda.get_device_name()` says, to the training images per second that each loader delivered
there in one run, both alternating, on arrays of CIFAR's size with crop and flip, and to where that comes from:

    {"cpu": {"dali": 20000, "resident": 30000, "torch": 9000, "commit": "0123456789ab", "date": "2026-01-31",
             "torch_version": "2.13.0", "dali_version": "2.4.0", "machine": "2 cores of an AMD EPYC"}}

A loader that was not measured is left out. For files, and where nothing was recorded, it is DALI where that can be
imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_fast.config import LoaderName
from effnet_fast.data.augment_params import Augment
from effnet_fast.data.dataset import ArraySplit, FileSplit, Split
from effnet_fast.data.loader import Loader, LoaderSpec

if TYPE_CHECKING:
    import torch

SPEEDS = Path(__file__).with_name("loader_speeds.json")
_INSTALL_DALI = "pip install nvidia-dali-cuda120"


def choose_loader(
    kind: LoaderName, split: Split, device: torch.device, augment: Augment | None = None
) -> tuple[LoaderName, str]:
    """Which loader serves, and the reason in one line.

    Args:
        kind: what was asked for.
        split: what is to be loaded.
        device: where batches are delivered.
        augment: of training; RandAugment and TrivialAugment are DALI's.

    Raises:
        ValueError: the loader asked for cannot serve.
    """
    if kind == "resident" and isinstance(split, FileSplit):
        raise ValueError("--loader resident keeps the images in memory, which image files are not: use dali or torch")
    if kind == "resident" or kind == "torch":
        return kind, f"--loader {kind}"
    version = _dali_version()
    if kind == "dali" and not version:
        raise ValueError(f"--loader dali needs NVIDIA DALI: {_INSTALL_DALI}")
    if kind == "dali":
        return "dali", f"DALI {version}, by --loader dali"
    if not version:
        serving: LoaderName = "resident" if isinstance(split, ArraySplit) else "torch"
        return serving, f"DALI is not installed ({_INSTALL_DALI})"
    if isinstance(split, FileSplit):
        return "dali", f"DALI {version} is installed"
    if augment is not None and augment.auto_augment != "none":
        return "dali", f"DALI {version}, whose own --auto_augment {augment.auto_augment} is"
    return _recorded(_device_name(device)) or ("dali", f"DALI {version} is installed; no speeds are recorded here")


def _recorded(device: str) -> tuple[LoaderName, str] | None:
    """The faster of DALI and the resident loader by the record of this device, if both are in it."""
    record: dict[str, Any] = json.loads(SPEEDS.read_text()).get(device, {})
    kinds: tuple[LoaderName, ...] = ("dali", "resident")
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


def make_loader(kind: LoaderName, split: Split, spec: LoaderSpec) -> Loader:
    """Make the loader that `choose_loader` names.

    Raises:
        ValueError: the loader asked for cannot serve, or the batch is larger than the training split.
    """
    kind, _ = choose_loader(kind, split, spec.device, spec.augment)
    if kind == "dali":
        from effnet_fast.data.dali import DaliLoader

        return DaliLoader(split, spec)
    if spec.augment is not None and spec.augment.auto_augment != "none":
        raise ValueError(f"--auto_augment {spec.augment.auto_augment} is done by DALI: {_INSTALL_DALI}")
    if kind == "torch":
        from effnet_fast.data.torch_loader import TorchLoader

        return TorchLoader(split, spec)
    from effnet_fast.data.resident import ResidentLoader

    assert isinstance(split, ArraySplit)
    return ResidentLoader(split, spec)
