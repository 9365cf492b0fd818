"""Plot the trials of a search in the style of Optuna: history, importances and slices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effnet_fast.report.curves import COLORS
from effnet_fast.report.table import Row

FACTORS = {"alpha": r"$\alpha$ (depth)", "beta": r"$\beta$ (width)", "gamma": r"$\gamma$ (resolution)"}


def plot_trials(trials: Sequence[Row], importances: Mapping[str, float]) -> Figure:
    """Draw the history of the trials, the importances of the factors, and a slice for each factor.

    Args:
        trials: rows with number, alpha, beta, gamma, state (complete, pruned, ...) and top1 (percent or None).
        importances: factor -> importance, 0 to 1; may be empty.
    """
    figure = Figure(figsize=(13, 8), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 6)
    _draw_history(figure.add_subplot(grid[0, :4]), trials)
    _draw_importances(figure.add_subplot(grid[0, 4:]), importances)
    completed = _select(trials, "complete")
    first: Axes | None = None
    for i, (factor, label) in enumerate(FACTORS.items()):
        axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2], sharey=first)
        first = first or axes
        points = axes.scatter(
            [row[factor] for row in completed],
            [row["top1"] for row in completed],
            c=[row["number"] for row in completed],
            cmap="Blues",
            edgecolors="0.35",
            linewidths=0.6,
        )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    assert first is not None
    first.set_ylabel("validation top-1 (%)")
    figure.colorbar(points, ax=axes, label="number of the trial")
    return figure


def _select(trials: Sequence[Row], state: str) -> list[Row]:
    return [row for row in trials if row["state"] == state and row["top1"] is not None]


def _draw_history(axes: Axes, trials: Sequence[Row]) -> None:
    completed, pruned = _select(trials, "complete"), _select(trials, "pruned")
    for rows, marker, color, label in ((completed, "o", COLORS[0], "complete"), (pruned, "x", COLORS[4], "pruned")):
        if rows:
            axes.plot([row["number"] for row in rows], [row["top1"] for row in rows], marker, color=color, label=label)
    best = list(itertools.accumulate((row["top1"] for row in completed), max))
    axes.plot([row["number"] for row in completed], best, color="0.2", drawstyle="steps-post", label="best so far")
    axes.set(title="History", xlabel="number of the trial", ylabel="validation top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_importances(axes: Axes, importances: Mapping[str, float]) -> None:
    axes.set(title="Importance of the factors (PED-ANOVA)", xlim=(0, 1.15))
    ordered = sorted(importances.items(), key=lambda item: item[1])
    bars = axes.barh([FACTORS[factor] for factor, _ in ordered], [value for _, value in ordered], color=COLORS[3])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    if not ordered:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "needs two trials that differ", ha="center", transform=axes.transAxes)
