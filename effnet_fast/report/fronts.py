"""Plots of a search and a study: candidates, costs and accuracies, readable in greyscale too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from effnet_fast.report import picture
from effnet_fast.report.curves import COLORS, MARKERS, Style
from effnet_fast.report.table import Row

COSTS = {
    "pareto_macs": ("macs", "multiply-accumulates per image"),
    "pareto_parameters": ("parameters", "parameters"),
    "pareto_latency": ("latency_ms", "measured latency of one image (ms)"),
}
BASELINE_COLOR = COLORS[0]
LINES = ("-", "--", "-.", ":")
REFERENCE_MARKERS = ("P", "X", "*", "h", "p")


def save_both(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg and return their paths.

    Raises:
        ValueError: the folder cannot be written.
    """
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        picture.save(figure, path)
    return paths


def feasible_set(candidates: Sequence[Row], dropped: Sequence[Row], chosen: str | None = None) -> Figure:
    """Plot candidates by beta and gamma, each labelled with its alpha.

    Args:
        candidates: rows with name, alpha, beta, gamma and same_as.
        dropped: rows with alpha, beta and gamma of the factors that exceed a limit.
        chosen: name of the best candidate, if known.
    """
    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    merged = [{"alpha": a, "beta": b, "gamma": g} for row in candidates for a, b, g in row["same_as"]]
    best = [row for row in candidates if row["name"] == chosen]
    groups: tuple[tuple[str, Sequence[Row], Style], ...] = (
        ("candidate", candidates, {"marker": "o", "color": COLORS[0], "s": 60, "zorder": 3}),
        ("rounds to a candidate", merged, {"marker": "o", "facecolors": "none", "edgecolors": "0.35", "s": 110}),
        ("over a limit", dropped, {"marker": "x", "color": COLORS[4], "s": 60, "zorder": 3}),
        (f"chosen: {chosen}", best, {"marker": "*", "color": COLORS[2], "s": 260, "zorder": 4}),
    )
    for label, rows, style in groups:
        if rows:
            axes.scatter([row["beta"] for row in rows], [row["gamma"] for row in rows], label=label, **style)
    _label_alphas(axes, [*candidates, *merged, *dropped])
    _contours_of_alpha(axes)
    axes.set(
        xlabel=r"$\beta$ (width)",
        ylabel=r"$\gamma$ (resolution)",
        title=r"Feasible ($\alpha$, $\beta$, $\gamma$); beside each point its $\alpha$; "
        r"lines: $\alpha\,\beta^2\gamma^2 = 2$",
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _label_alphas(axes: Axes, rows: Sequence[Row]) -> None:
    alphas_at: dict[tuple[float, float], set[float]] = {}
    for row in rows:
        alphas_at.setdefault((row["beta"], row["gamma"]), set()).add(row["alpha"])
    for point, alphas in alphas_at.items():
        text = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        axes.annotate(text, point, xytext=(8, 5), textcoords="offset points", fontsize=8)


def _contours_of_alpha(axes: Axes) -> None:
    """Draw the lines alpha * beta^2 * gamma^2 = 2 for alpha = 1, 1.1, ..."""
    axes.margins(0.12)
    axes.autoscale_view()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    beta, gamma = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    alpha = 2 / (beta**2 * gamma**2)
    levels = [level for level in np.arange(1, 2.05, 0.1) if alpha.min() < level < alpha.max()]
    if levels:
        lines = axes.contour(beta, gamma, alpha, levels=levels, colors="0.7", linewidths=0.8)
        axes.clabel(lines, fmt=lambda level: rf"$\alpha$ = {level:.1f}", fontsize=7)


def pareto_fronts(rows: Sequence[Row], chosen: str | None = None) -> Figure:
    """Plot validation accuracy against MACs, parameters and latency; a line joins the Pareto front.

    Args:
        rows: the result of `search.collect`.
        chosen: name of the best candidate, if known.
    """
    figure = Figure(figsize=(15, 5), dpi=120, layout="constrained")
    for axes, (flag, (cost, label)) in zip(figure.subplots(1, 3, sharey=True), COSTS.items(), strict=True):
        known = [row for row in rows if row[cost] is not None and row["top1_mean"] is not None]
        front = sorted((row for row in known if row[flag]), key=lambda row: row[cost])
        others = [row for row in known if not row[flag]]
        axes.plot(*_points(front, cost), color="0.2", linewidth=1.2, zorder=1, label="Pareto front")
        _error_bars(axes, others, cost, color="0.55", fillstyle="none", label="dominated")
        _error_bars(axes, front, cost, color=COLORS[0], label="on the front")
        best = [row for row in known if row["name"] == chosen]
        axes.plot(*_points(best, cost), "*", color=COLORS[2], markersize=17, zorder=4, label="chosen")
        for row in front:
            point = (row[cost], row["top1_mean"])
            axes.annotate(row["name"], point, xytext=(6, -12), textcoords="offset points", fontsize=8)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.margins(x=0.3, y=0.15)
        axes.grid(alpha=0.3)
    _start_at_zero_without_spread(figure.axes[0], [row for row in rows if row["top1_mean"] is not None])
    figure.axes[0].set_ylabel("validation top-1 (%), mean and standard deviation")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _points(rows: Sequence[Row], cost: str) -> tuple[list[float], list[float]]:
    return [row[cost] for row in rows], [row["top1_mean"] for row in rows]


def _error_bars(axes: Axes, rows: Sequence[Row], cost: str, **style: Any) -> None:
    spreads = [row["top1_std"] or 0 for row in rows]
    axes.errorbar(*_points(rows, cost), yerr=spreads, fmt="o", capsize=3, elinewidth=0.9, **{"markersize": 8} | style)


def _start_at_zero_without_spread(axes: Axes, rows: Sequence[Row]) -> None:
    """Start the accuracy axis at zero unless error bars show the spread of every point.

    A cropped axis without error bars makes differences within the noise look large.
    """
    if any(row["top1_std"] is None for row in rows):
        axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1))  # with room for the highest mark


def scaling_curves(rows: Sequence[Row], split: str) -> Figure:
    """Plot accuracy against MACs for each way to scale the baseline (figure 8 of the EfficientNet paper).

    Args:
        rows: rows with model, depth, macs, top1_mean and top1_std. A line joins the baseline to the models of each way;
            reference models (depth None) are single points.
        split: split of the evaluation, val or test.
    """
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    known = [row for row in rows if row["top1_mean"] is not None]
    baseline = [row for row in known if row["model"] == "baseline"]
    ways = list(dict.fromkeys(row["model"] for row in known if row["model"] != "baseline" and row["depth"]))
    colors = [color for color in COLORS if color != BASELINE_COLOR]
    for number, way in enumerate(ways):  # the baseline draws its own spread
        line = sorted((row for row in known if row["model"] == way), key=lambda row: row["macs"])
        points = [*baseline, *line]
        style: Style = {"color": colors[number], "linestyle": LINES[number % len(LINES)]}
        axes.errorbar(
            *_points(points, "macs"),
            yerr=[*(math.nan for _ in baseline), *(row["top1_std"] or 0 for row in line)],
            marker=MARKERS[number + 1],
            markersize=8,
            capsize=3,
            label=way,
            **style,
        )
    references = (row for row in known if row["depth"] is None)
    for marker, row in zip(itertools.cycle(REFERENCE_MARKERS), references):
        axes.plot(*_points([row], "macs"), marker, color="0.35", markersize=9, label=row["model"])
    _error_bars(axes, baseline, "macs", color=BASELINE_COLOR, markersize=11, zorder=4, label="baseline (B0)")
    _start_at_zero_without_spread(axes, known)
    spread = ", mean and standard deviation" if any(row["top1_std"] for row in known) else ""
    axes.set(xlabel="multiply-accumulates per image", ylabel=f"{split} top-1 (%){spread}", title="Ways to scale B0")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
