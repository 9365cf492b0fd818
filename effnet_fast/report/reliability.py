"""The reliability diagram: accuracy against confidence (DeGroot and Fienberg 1983; Guo et al. 2017, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effnet_fast.report import picture
from effnet_fast.report.curves import COLORS
from effnet_fast.report.table import Row

_SIDE = 4.5  # inches of a panel


def plot_reliability(path: str | Path, panels: Mapping[str, Sequence[Row]]) -> None:
    """Draw panels side by side: accuracy by confidence, and below it the share of images at each confidence.

    Args:
        path: picture to write, .png, .svg or .pdf.
        panels: title -> one row per bin: low, high (limits of the confidence), images, confidence (mean) and accuracy
            (share classified correctly), all from 0 to 1 except `images`.

    Raises:
        ValueError: the path has another suffix or cannot be written.
    """
    path = Path(path)
    picture.check_suffix(path)
    figure = Figure(figsize=(_SIDE * len(panels), 1.35 * _SIDE), dpi=140, layout="constrained")
    axes = figure.subplots(2, len(panels), height_ratios=(3, 1), sharex=True, sharey="row", squeeze=False)
    for column, (title, rows) in enumerate(panels.items()):
        _draw_accuracy(axes[0, column], title, rows)
        _draw_shares(axes[1, column], rows)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[1, 0].set_ylabel("images (%)")
    picture.save(figure, path)


def _draw_accuracy(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    filled = [row for row in rows if row["images"]]
    axes.bar(
        [100 * row["low"] for row in filled],
        [100 * row["accuracy"] for row in filled],
        [100 * (row["high"] - row["low"]) for row in filled],
        align="edge",
        color=COLORS[3],
        edgecolor="black",
        linewidth=0.8,
        label="accuracy in the bin",
    )
    axes.plot([0, 100], [0, 100], color="black", linestyle="--", linewidth=1, label="calibrated")
    axes.plot(
        [100 * row["confidence"] for row in filled],
        [100 * row["accuracy"] for row in filled],
        color=COLORS[4],
        marker="o",
        linestyle="none",
        label="mean confidence of the bin",
    )
    axes.set(title=title, xlim=(0, 100), ylim=(0, 100))
    axes.legend(loc="upper left", fontsize="small")


def _draw_shares(axes: Axes, rows: Sequence[Row]) -> None:
    total = sum(row["images"] for row in rows)
    axes.bar(
        [100 * row["low"] for row in rows],
        [100 * row["images"] / total for row in rows],
        [100 * (row["high"] - row["low"]) for row in rows],
        align="edge",
        color=COLORS[3],
        edgecolor="black",
        linewidth=0.8,
    )
    axes.set_xlabel("confidence: probability of the predicted class (%)")
