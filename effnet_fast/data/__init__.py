"""Load a data set by name and select its splits; the loaders in this package turn splits into batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from effnet_fast.config import DatasetName
from effnet_fast.data.dataset import ArraySplit, Dataset, FileSplit, Split, hold_out, limit

__all__ = ["ArraySplit", "Dataset", "FileSplit", "Split", "load_dataset"]


def load_dataset(
    name: DatasetName,
    data_dir: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.0,
    limit_train: int | None = None,
    limit_eval: int | None = None,
    on_bad_image: Literal["skip", "fail"] = "skip",
    download: bool = True,
) -> Dataset:
    """Load a data set, hold out validation images, then limit the splits.

    Args:
        name: name of the data set; the images of `synthetic` do not depend on the seed.
        data_dir: folder of the data set; see `load_cifar` and `load_folder`.
        seed: selects the images that are held out, and those that remain within the limits.
        val_fraction: share of the training images to hold out as `val`; 0 holds out none.
        limit_train: number of training images to keep, after holding out.
        limit_eval: number of images to keep of `test`, and of `val`.
        on_bad_image: see `load_folder`.
        download: whether to use the network.

    Raises:
        ValueError: an unknown name, or a limit or fraction that does not fit the data set.
        ValueError, OSError: see `load_cifar` and `load_folder`.
    """
    dataset = _load(name, Path(data_dir), on_bad_image, download)
    if val_fraction:
        dataset = hold_out(dataset, val_fraction, seed)
    return dataclasses.replace(
        dataset,
        train=limit(dataset.train, limit_train, seed, "--limit_train"),
        test=limit(dataset.test, limit_eval, seed, "--limit_eval"),
        val=None if dataset.val is None else limit(dataset.val, limit_eval, seed, "--limit_eval"),
    )


def _load(name: DatasetName, data_dir: Path, on_bad_image: Literal["skip", "fail"], download: bool) -> Dataset:
    # Imported only when needed: archives need urllib and file locks, folders need Pillow.
    if name == "cifar100" or name == "cifar10":
        from effnet_fast.data.cifar import load_cifar

        return load_cifar(name, data_dir, download)
    if name == "folder":
        from effnet_fast.data.folder import load_folder

        return load_folder(data_dir, on_bad_image)
    if name == "synthetic":
        from effnet_fast.data.synthetic import load_synthetic

        return load_synthetic()
    raise ValueError(f"unknown data set {name!r}: use cifar100, cifar10, folder or synthetic")
