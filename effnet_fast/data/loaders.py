"""Which loader serves a split on this machine, and making it."""

from __future__ import annotations

from effnet_fast.config import LoaderName
from effnet_fast.data.dataset import ArraySplit, FileSplit, Split
from effnet_fast.data.loader import Loader, LoaderSpec

_INSTALL_DALI = "pip install nvidia-dali-cuda120"


def choose(kind: LoaderName, split: Split) -> tuple[LoaderName, str]:
    """Which loader serves, and the reason in one line.

    Raises:
        ValueError: the loader asked for cannot serve.
    """
    if kind == "resident" and isinstance(split, FileSplit):
        raise ValueError("--loader resident keeps the images in memory, which image files are not: use dali or torch")
    if kind == "resident" or kind == "torch":
        return kind, f"--loader {kind}"
    version = _dali_version()
    if version:
        return "dali", f"DALI {version} is installed"
    if kind == "dali":
        raise ValueError(f"--loader dali needs NVIDIA DALI: {_INSTALL_DALI}")
    serving: LoaderName = "resident" if isinstance(split, ArraySplit) else "torch"
    return serving, f"DALI is not installed ({_INSTALL_DALI})"


def _dali_version() -> str | None:
    try:
        import nvidia.dali
    except ImportError:
        return None
    return nvidia.dali.__version__


def make_loader(kind: LoaderName, split: Split, spec: LoaderSpec) -> Loader:
    """Make the loader that `choose` names.

    Raises:
        ValueError: the loader asked for cannot serve, or the batch is larger than the training split.
    """
    kind, _ = choose(kind, split)
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
