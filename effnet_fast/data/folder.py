"""A folder of images, one folder per class: DATA_DIR/{train,test}/CLASS/IMAGE.

Class folders may contain further folders. README.md lists which image files are read, turned, converted or left out.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from effnet_fast.data.dataset import Dataset, FileSplit, channels, deviation
from effnet_fast.data.examine import Examined, examine
from effnet_fast.data.listing import Listing, is_hidden, list_images, printable

_LARGEST_NATIVE_SIZE = 224
_VALIDATION_NAMES = ("val", "valid")
_NAMED = 5  # files that a message lists by name

Classes = dict[str, Listing]


def load_folder(data_dir: Path, on_bad_image: Literal["skip", "fail"] = "skip") -> Dataset:
    """Load a data set of image files.

    The classes are the folders in train/, sorted by name. The test images are in test/, or in val/ (or valid/) if there
    is no test/; with both, val/ is the validation split. Mean and standard deviation give every training image the
    same weight; native_size is the median of their shorter sides, at most 224.

    Args:
        data_dir: contains train/ and test/ or val/.
        on_bad_image: `skip` lists unreadable images on stderr and leaves them out, also those that become unreadable
            during training; `fail` raises an error.

    Raises:
        FileNotFoundError: train/ is missing, or both test/ and val/.
        ValueError: no classes; a class without a training image; test classes that are not in train/; a bad image; val/
            beside valid/.
    """
    folders = _split_folders(data_dir)
    listings = {split: _list_classes(folder) for split, folder in folders.items()}
    classes = tuple(sorted(listings["train"]))
    for split, listing in listings.items():
        if unknown := sorted(set(listing) - set(classes)):
            raise ValueError(
                f"{folders[split] / unknown[0]} is a class without a folder in {folders['train']}: remove it"
            )
    _report_left_out(data_dir, folders.values(), listings.values())
    examined = examine(
        data_dir, [path for split in listings.values() for names in split.values() for path in names.images]
    )
    _report_unreadable(examined, on_bad_image)
    splits = {split: _split(listing, classes, examined, on_bad_image == "skip") for split, listing in listings.items()}
    _check(splits, classes, folders)

    train = [examined[path] for path in splits["train"].paths]
    mean, square = np.mean([row.mean for row in train], axis=0), np.mean([row.square for row in train], axis=0)
    return Dataset(
        name=data_dir.resolve().name,
        classes=classes,
        mean=channels(mean),
        std=deviation(mean, square),
        native_size=min(_LARGEST_NATIVE_SIZE, int(np.median([row.short_side for row in train]))),
        fingerprint=_fingerprint(classes, splits.values(), examined),
        train=splits["train"],
        test=splits["test"],
        val=splits.get("val"),
    )


def _split_folders(data_dir: Path) -> dict[str, Path]:
    train, test = data_dir / "train", data_dir / "test"
    validation = [folder for name in _VALIDATION_NAMES if (folder := data_dir / name).is_dir()]
    if not train.is_dir() or not (test.is_dir() or validation):
        raise FileNotFoundError(
            f"{data_dir} must contain train/ and test/ (or val/ or valid/), each with one folder per class"
        )
    if len(validation) > 1:
        raise ValueError(f"{data_dir} contains both val/ and valid/: remove one of them")
    if not test.is_dir():
        return {"train": train, "test": validation[0]}
    return {"train": train, "test": test} | ({"val": validation[0]} if validation else {})


def _list_classes(folder: Path) -> Classes:
    """Map each class to its files; hidden files and folders are left out."""
    classes = {path.name: list_images(path) for path in folder.iterdir() if path.is_dir() and not is_hidden(path)}
    if not classes:
        raise ValueError(f"{folder} contains no folder: put the images of each class into one")
    return classes


def _split(
    classes: Classes, names: tuple[str, ...], examined: dict[Path, Examined], skip_unreadable: bool
) -> FileSplit:
    readable = [
        (examined[path].file(path), label)
        for label, name in enumerate(names)
        if name in classes
        for path in classes[name].images
        if not examined[path].error
    ]
    labels = np.array([label for _, label in readable], np.int64)
    return FileSplit(tuple(file for file, _ in readable), labels, skip_unreadable)


def _check(splits: dict[str, FileSplit], classes: tuple[str, ...], folders: dict[str, Path]) -> None:
    for split, images in splits.items():
        if not len(images):
            raise ValueError(f"{folders[split]} contains no readable image in its class folders")
    empty = np.flatnonzero(np.bincount(splits["train"].labels, minlength=len(classes)) == 0)
    if len(empty):
        raise ValueError(f"{folders['train'] / classes[empty[0]]} contains no readable image: add some or remove it")


def _fingerprint(classes: tuple[str, ...], splits: Iterable[FileSplit], examined: dict[Path, Examined]) -> str:
    digest = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))
    for images in splits:
        digest.update("".join(examined[path].digest for path in images.paths).encode())
        digest.update(images.labels.tobytes())
    return digest.hexdigest()


def _report_left_out(data_dir: Path, folders: Iterable[Path], listings: Iterable[Classes]) -> None:
    """Warn about the files that are left out: other endings, and files outside of class folders."""
    others = sorted(path for classes in listings for listing in classes.values() for path in listing.others)
    if others:
        endings = Counter(path.suffix.lower() or "no ending" for path in others)
        counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
        _warn(f"left out {len(others)} file(s) that are not images ({counts})", data_dir, others)
    outside = [
        path for folder in folders for path in sorted(folder.iterdir()) if path.is_file() and not is_hidden(path)
    ]
    if outside:
        _warn(f"left out {len(outside)} file(s) in no class folder", data_dir, outside)


def _warn(what: str, data_dir: Path, paths: list[Path]) -> None:
    if not _is_first_rank():
        return
    names = ", ".join(printable(path.relative_to(data_dir)) for path in paths[:_NAMED])
    print(f"warning: {what}: {names}{', ...' if len(paths) > _NAMED else ''}", file=sys.stderr)


def _is_first_rank() -> bool:
    """Whether to warn: all ranks read the same folder. `distributed` knows too, but needs torch."""
    return os.environ.get("RANK", "0") == "0"


def _report_unreadable(examined: dict[Path, Examined], on_bad_image: str) -> None:
    errors = {path: row.error for path, row in examined.items() if row.error}
    if errors and on_bad_image == "fail":
        path, error = next(iter(errors.items()))
        raise ValueError(
            f"{printable(path)} is unreadable ({error}), one of {len(errors)} bad among {len(examined)} images: remove "
            f"them, or leave them out with --on_bad_image skip"
        )
    if not errors or not _is_first_rank():
        return
    for path, error in errors.items():
        print(f"warning: skipped {printable(path)}: {error}", file=sys.stderr)
    print(f"warning: skipped {len(errors)} unreadable of {len(examined)} images", file=sys.stderr)
