"""A data set: two or three splits, class names, channel statistics.

Holding out validation images and limiting a split are stratified and depend on the seed only, so that every rank, every
resumed run and `eval` see the same images.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from effnet_fast.data.rng import Purpose, stream, uniforms

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class ArraySplit:
    """Images in memory.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int64 [N].
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> ArraySplit:
        return ArraySplit(self.images[indices], self.labels[indices])


class ImageFile(NamedTuple):
    """An image file, and the results of its examination.

    Attributes:
        path: the file.
        orientation: how to turn it upright, 1 to 8; see orientation.py.
        plain: whether DALI decodes it as Pillow does: a JPEG or PNG without defects. Pillow decodes all others.
    """

    path: Path
    orientation: int = 1
    plain: bool = True


@dataclass(frozen=True)
class FileSplit:
    """Images as files of any size.

    Attributes:
        files: N image files.
        labels: int64 [N].
        skip_unreadable: whether to report and replace a file that has become unreadable, rather than raise an error.
    """

    files: tuple[ImageFile, ...]
    labels: NDArray[np.int64]
    skip_unreadable: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self.files)

    def take(self, indices: NDArray[np.int64]) -> FileSplit:
        files = tuple(self.files[i] for i in indices)
        return dataclasses.replace(self, files=files, labels=self.labels[indices])


Split = ArraySplit | FileSplit


class Superclasses(NamedTuple):
    """A coarser grouping of the classes.

    Attributes:
        names: names of the superclasses.
        of_class: superclass of each class, indexed by label.
    """

    names: tuple[str, ...]
    of_class: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """A data set, with everything that training and inference need to know about it.

    Attributes:
        name: cifar100, cifar10, synthetic, or the folder's name.
        classes: class names, indexed by label.
        mean, std: of each channel, for pixels scaled to 0..1.
        train, test: the published splits.
        val: images held out of train, or the data set's own validation split, or None.
        superclasses: the 20 of CIFAR-100; None if the data set has none.
        native_size: side of the original images in pixels (32 for CIFAR); `--image_size auto` scales it.
        fingerprint: hex digest of all images and labels in order, before images are held out or limited.
    """

    name: str
    classes: tuple[str, ...]
    mean: Channels
    std: Channels
    train: Split
    test: Split
    native_size: int
    fingerprint: str
    val: Split | None = None
    superclasses: Superclasses | None = None


def stratified(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose `count` images so that every class keeps its share.

    Shares are rounded by largest remainder, and the seed breaks ties. Within a class, a larger count only adds images,
    except for rounding.

    Args:
        labels: int64 [N].
        count: number of images, 0 to N.
        seed: selects the images.

    Returns:
        Sorted positions of the images, int64 [count].

    Raises:
        ValueError: count is negative or more than N.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot choose {count} of {len(labels)} images: ask for 0 to {len(labels)}")
    draws = uniforms(seed, stream(Purpose.SUBSET), np.arange(len(labels)), 1)[:, 0]
    _, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    quota, remainder = np.divmod(sizes * count, len(labels)) if len(labels) else (sizes, sizes)
    quota[np.lexsort((draws[first], -remainder))[: count - quota.sum()]] += 1
    by_class = np.lexsort((draws, labels))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[rank < np.repeat(quota, sizes)])


def limit(split: Split, count: int | None, seed: int, flag: str) -> Split:
    """Keep a stratified part of a split, in the split's order; all of it if `count` is None.

    Args:
        flag: the flag that gave the count, for the message.

    Raises:
        ValueError: count is below 1 or above the size of the split.
    """
    if count is None:
        return split
    if not 1 <= count <= len(split):
        raise ValueError(f"{flag} {count} does not fit a split of {len(split)} images: use 1 to {len(split)}")
    return split.take(stratified(split.labels, count, seed))


def balanced_weights(labels: NDArray[np.int64], classes: tuple[str, ...]) -> tuple[float, ...]:
    """Weight of each class, n / (k n_c) for n images, n_c of them of the class, and k classes (King and Zeng 2001).

    These are scikit-learn's `class_weight="balanced"`. Their mean over the images is 1.

    Raises:
        ValueError: a class has no image.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if len(empty := np.flatnonzero(counts == 0)):
        raise ValueError(
            f"--class_weights balanced: class {classes[empty[0]]} has no training image, so it has no weight; use a "
            "larger --limit_train, or leave --class_weights out"
        )
    return tuple((len(labels) / (len(classes) * counts)).tolist())


def hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Move a stratified share of the training images to `val`.

    Raises:
        ValueError: the data set has a val already, the share is empty, or a class would keep no training image.
    """
    if dataset.val is not None:
        raise ValueError(f"{dataset.name} has its own validation split: use --val_fraction 0")
    labels = dataset.train.labels
    count = round(fraction * len(labels))
    if count < 1:
        raise ValueError(f"--val_fraction {fraction} of {len(labels)} training images is no image: use a larger one")
    held_out = stratified(labels, min(count, len(labels)), seed)
    kept = np.setdiff1d(np.arange(len(labels)), held_out, assume_unique=True)
    empty = np.flatnonzero(np.bincount(labels[kept], minlength=len(dataset.classes)) == 0)
    if len(empty):
        name = dataset.classes[empty[0]]
        raise ValueError(f"--val_fraction {fraction} leaves class {name} no training image: use a smaller one")
    return dataclasses.replace(dataset, train=dataset.train.take(kept), val=dataset.train.take(held_out))


def channel_statistics(images: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel over all pixels of uint8 [N, H, W, 3], for pixels scaled to 0..1."""
    counts = np.stack([np.bincount(images[..., channel].reshape(-1), minlength=256) for channel in range(3)])
    shares, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels
    return channels(mean), deviation(mean, shares @ levels**2)


def deviation(mean: NDArray[np.float64], square: NDArray[np.float64]) -> Channels:
    """Standard deviation from the means [3] of values and of squares; at least 1 / 255, so that it can divide."""
    std = np.sqrt(np.maximum(square - mean**2, 255.0**-2))
    return channels(std)


def channels(values: NDArray[np.float64]) -> Channels:
    """An array [3] as plain floats, which a checkpoint can store."""
    red, green, blue = values.tolist()
    return red, green, blue
