"""Accuracy by class and the most confused pairs as CSV, and the confusion matrix as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from effnet_fast.report import picture
from effnet_fast.report.fonts import drawable, text_style
from effnet_fast.report.table import Row

MOST_NAMES = 120  # with more classes, the axis has no class names: they would be too small to read
LISTED = 20  # rows of each list beside the matrix
_LINE = 52  # characters of 9 points that fit beside the matrix


def write_per_class(path: str | Path, classes: Sequence[str], confusion: NDArray[np.int64]) -> None:
    """Write one CSV row per class: class, images, correct, top1 (percent; empty if the class has no images).

    Args:
        classes: K names.
        confusion: int64 [K, K], number of images by true class (row) and predicted class (column).

    Raises:
        ValueError: the path cannot be written.
    """
    _write_csv(path, ["class", "images", "correct", "top1"], per_class(classes, confusion))


def per_class(classes: Sequence[str], confusion: NDArray[np.int64]) -> list[Row]:
    """Return one row per class: class, images, correct, top1 (percent; None if the class has no images)."""
    _check(classes, confusion)
    return [
        {"class": name, "images": images, "correct": correct, "top1": 100 * correct / images if images else None}
        for name, images, correct in zip(classes, confusion.sum(1).tolist(), confusion.diagonal().tolist(), strict=True)
    ]


def write_confused_pairs(path: str | Path, classes: Sequence[str], confusion: NDArray[np.int64]) -> None:
    """Write a CSV row for each pair of classes that is ever confused; see `confused_pairs`.

    Raises:
        ValueError: the path cannot be written.
    """
    _write_csv(path, ["true", "predicted", "images", "share"], confused_pairs(classes, confusion, confusion.size))


def confused_pairs(classes: Sequence[str], confusion: NDArray[np.int64], count: int) -> list[Row]:
    """Return the most confused pairs: true and predicted class, images, and their share of the true class in percent.

    See `most_confused`.
    """
    _check(classes, confusion)
    shares = _shares(confusion)
    return [
        {
            "true": classes[true],
            "predicted": classes[predicted],
            "images": int(confusion[true, predicted]),
            "share": 100 * float(shares[true, predicted]),
        }
        for true, predicted in most_confused(confusion, count)
    ]


def _write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([_rounded(row[name]) for name in columns] for row in rows)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another folder") from error


def _rounded(value: Any) -> Any:
    """Percentages with two decimals."""
    return f"{value:.2f}" if isinstance(value, float) else value


def plot_confusion(
    path: str | Path, classes: Sequence[str], confusion: NDArray[np.int64], noun: str = "classes"
) -> None:
    """Draw the confusion matrix, each row divided by its sum, with the most confused pairs and classes beside it.

    The colour scale is logarithmic, because on a linear one the diagonal hides confusions of a few percent.

    Args:
        path: picture to write, .png, .svg or .pdf.
        classes: K names.
        confusion: int64 [K, K], number of images by true class (row) and predicted class (column).
        noun: what the classes are called in the title.

    Raises:
        ValueError: there are no images, or the path has another suffix or cannot be written.
    """
    _check(classes, confusion)
    path = Path(path)
    picture.check_suffix(path)
    if not confusion.any():
        raise ValueError("a confusion matrix needs at least one image: evaluate on more")
    names = [drawable(name) for name in classes]
    with text_style(names):
        picture.save(_draw(names, confusion, noun), path)


def _draw(classes: Sequence[str], confusion: NDArray[np.int64], noun: str) -> Figure:
    figure = Figure(figsize=(16, 12), dpi=140, layout="constrained")
    matrix, listing = figure.subplots(1, 2, width_ratios=(3.4, 1))
    _draw_matrix(figure, matrix, classes, confusion)
    _list_worst(listing, classes, confusion)
    images = confusion.sum()
    top1 = 100 * confusion.trace() / images
    figure.suptitle(f"Confusion matrix: {images:,} images, {len(classes)} {noun}, top-1 {top1:.2f} %", fontsize=14)
    return figure


def most_confused(confusion: NDArray[np.int64], count: int) -> list[tuple[int, int]]:
    """Return the pairs (true, predicted) of different classes with the largest shares of the true class, largest first.

    Pairs that never occur are omitted, so there may be fewer than `count`.
    """
    error_shares = _shares(confusion)
    np.fill_diagonal(error_shares, 0)
    order = np.argsort(-error_shares, axis=None, kind="stable")[:count]
    truth, predicted = np.unravel_index(order, error_shares.shape)
    return [(int(t), int(p)) for t, p in zip(truth, predicted, strict=True) if error_shares[t, p] > 0]


def _check(classes: Sequence[str], confusion: NDArray[np.int64]) -> None:
    assert confusion.shape == (len(classes), len(classes)), (confusion.shape, len(classes))


def _shares(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide each row by its sum: float64 [K, K]. A class without images stays zero."""
    return confusion / np.maximum(confusion.sum(1, keepdims=True), 1)


def _draw_matrix(figure: Figure, axes: Axes, classes: Sequence[str], confusion: NDArray[np.int64]) -> None:
    percent = 100 * _shares(confusion)
    smallest = percent[percent > 0].min()
    colormap = colormaps["magma_r"].with_extremes(bad="white")
    image = axes.imshow(
        np.ma.masked_equal(percent, 0), cmap=colormap, norm=LogNorm(min(smallest, 1), 100), interpolation="nearest"
    )
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= MOST_NAMES:
        size = min(10, 560 / len(classes))
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
        axes.set_yticks(range(len(classes)), classes, fontsize=size)
        axes.tick_params(length=0, pad=2)
    ticks = LogLocator(subs=(1, 2, 5))
    scale = figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.5, aspect=50, pad=0.01, ticks=ticks, format="%g"
    )
    scale.minorticks_off()
    scale.set_label("share of the true class's images (%); white: none")


def _list_worst(axes: Axes, classes: Sequence[str], confusion: NDArray[np.int64]) -> None:
    """List the most confused pairs and the classes with the lowest accuracy."""
    percent = 100 * _shares(confusion)
    pairs = [
        f"{percent[truth, predicted]:5.1f} %  {classes[truth]} → {classes[predicted]}"
        for truth, predicted in most_confused(confusion, LISTED)
    ]
    evaluated = np.flatnonzero(confusion.sum(1))
    lowest = evaluated[np.argsort(percent.diagonal()[evaluated], kind="stable")][:LISTED]
    accuracies = [f"{percent[k, k]:5.1f} %  {classes[k]}" for k in lowest]
    lines = ["Most confused: true → predicted", *(pairs or ["none"]), "", "Lowest top-1", *accuracies]
    size = min(9, 9 * _LINE / max(map(len, lines)))
    families = ["monospace", *rcParams["font.family"]]
    axes.text(0, 1, "\n".join(lines), va="top", family=families, fontsize=size, linespacing=1.6)
    axes.axis("off")
