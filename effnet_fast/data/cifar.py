"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

The files are Python pickles, which can call any function when they are loaded. The unpickler in this module accepts
only the names that arrays need, and maps them to classes of this module, so that no code from a file runs.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from effnet_fast.data.archive import Archive, fetch, read
from effnet_fast.data.dataset import ArraySplit, Dataset, Superclasses

_SIZE = 32  # pixels of each side


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and how its files are laid out.

    Attributes:
        name: name of the data set.
        archive: the authors' tar.gz.
        train, test: names of the files with images.
        meta: name of the file with class names.
        label_key, classes_key: keys of labels and class names in those files.
        coarse_label_key, coarse_classes_key: the same of superclasses; None if the data set has none.
        mean, std: of each channel over the training images, for pixels scaled to 0..1.
    """

    name: str
    archive: Archive
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: str
    classes_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    coarse_label_key: str | None = None
    coarse_classes_key: str | None = None


CIFAR100 = Source(
    name="cifar100",
    archive=Archive(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
    train=("train",),
    test=("test",),
    meta="meta",
    label_key="fine_labels",
    classes_key="fine_label_names",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    coarse_label_key="coarse_labels",
    coarse_classes_key="coarse_label_names",
)

CIFAR10 = Source(
    name="cifar10",
    archive=Archive(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    label_key="labels",
    classes_key="label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


def load_cifar(name: Literal["cifar10", "cifar100"], data_dir: Path, download: bool = True) -> Dataset:
    """Load CIFAR-10, or CIFAR-100 with its fine labels and superclasses; download it if it is missing.

    Args:
        name: which of the two.
        data_dir: the unpacked folder, or a folder that contains it or the tar.gz, or where to put both.
        download: whether to use the network.

    Returns:
        Images uint8 [50000 or 10000, 32, 32, 3].

    Raises:
        ValueError, OSError: see `archive.fetch` and `archive.read`; ValueError also for files with other contents.
    """
    return load_source({"cifar10": CIFAR10, "cifar100": CIFAR100}[name], data_dir, download)


def load_source(source: Source, data_dir: Path, download: bool = True) -> Dataset:
    """Load any data set with CIFAR's layout; see `load_cifar`."""
    folder = fetch(source.archive, data_dir, download)

    @cache
    def contents(name: str) -> dict[str, Any]:
        return unpickle(read(source.archive, folder, name), folder / name)

    def names_of(key: str) -> tuple[str, ...]:
        return _class_names(contents(source.meta).get(key), folder / source.meta)

    def superclasses() -> Superclasses | None:
        if source.coarse_label_key is None or source.coarse_classes_key is None:
            return None
        names, path = names_of(source.coarse_classes_key), folder / source.test[0]
        fine = _labels(contents(path.name), source.label_key, len(classes), path)
        coarse = _labels(contents(path.name), source.coarse_label_key, len(names), path)
        return Superclasses(names, _coarse_of_fine(fine, coarse, len(classes), path))

    classes = names_of(source.classes_key)

    def split(names: tuple[str, ...]) -> ArraySplit:
        parts = [_split(contents(name), source.label_key, len(classes), folder / name) for name in names]
        images, labels = zip(*((part.images, part.labels) for part in parts), strict=True)
        return ArraySplit(np.concatenate(images), np.concatenate(labels))

    fingerprint = hashlib.sha256(" ".join(source.archive.files.values()).encode()).hexdigest()
    return Dataset(
        name=source.name,
        classes=classes,
        mean=source.mean,
        std=source.std,
        train=split(source.train),
        test=split(source.test),
        native_size=_SIZE,
        fingerprint=fingerprint,
        superclasses=superclasses(),
    )


def _class_names(names: object, path: Path) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{path} contains no class names")
    return tuple(_text(name) for name in names)


def _split(contents: dict[str, Any], label_key: str, classes: int, path: Path) -> ArraySplit:
    data, labels = contents.get("data"), _labels(contents, label_key, classes, path)
    if not isinstance(data, _Array) or data.shape != (len(labels), 3 * _SIZE * _SIZE):
        raise ValueError(
            f"{path} does not contain {len(labels)} images of {_SIZE} x {_SIZE} pixels, one for each label"
        )
    images = data.array().reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1)
    return ArraySplit(np.ascontiguousarray(images), np.array(labels, np.int64))


def _labels(contents: dict[str, Any], key: str, classes: int, path: Path) -> list[int]:
    labels = contents.get(key)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"{path} contains no {key} from 0 to {classes - 1}")
    return labels


def _coarse_of_fine(fine: list[int], coarse: list[int], classes: int, path: Path) -> tuple[int, ...]:
    """The superclass of each class, from the two labels of each image."""
    pairs = sorted(set(zip(fine, coarse, strict=True)))
    if [label for label, _ in pairs] != list(range(classes)):
        raise ValueError(f"{path} does not give each of the {classes} classes one superclass")
    return tuple(superclass for _, superclass in pairs)


def _text(value: bytes | str) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Dtype:
    """Replaces `numpy.dtype` in a pickle: checks that an array consists of single bytes."""

    def __init__(self, code: object = None, *_flags: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of {code!r} instead of bytes ('u1')")

    def __setstate__(self, _state: object) -> None:
        """Ignore byte order and alignment: they mean nothing for single bytes."""


class _Array:
    """Replaces `numpy.ndarray` in a pickle: bytes and a shape, checked against each other."""

    def __init__(self, *_empty: object) -> None:
        self.shape: tuple[int, ...] = (0,)
        self._fortran = False
        self._content = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, content = state
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of something other than bytes")
        if math.prod(shape) != len(content):
            raise pickle.UnpicklingError(f"{len(content)} bytes for an array of shape {shape}")
        self.shape, self._fortran, self._content = shape, bool(fortran), content

    def array(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._content, np.uint8).reshape(self.shape, order="F" if self._fortran else "C")


# Each class defines __setstate__, so a pickle can only create instances and set their state.
_KNOWN = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which image data does not need")
        return _KNOWN[module, name]


def unpickle(content: bytes, path: Path) -> dict[str, Any]:
    """Read a pickled dict of bytes, strings, numbers, lists, dicts and uint8 arrays; no code from the pickle runs.

    Args:
        content: the pickle, which need not be trusted.
        path: file name for error messages.

    Raises:
        ValueError: the pickle is damaged, is not a dict, or names anything but NumPy arrays of bytes.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is refused: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, bytes | str) for key in loaded):
        raise ValueError(f"{path} is refused: it is not a dict with string keys")
    return {_text(key): value for key, value in loaded.items()}
