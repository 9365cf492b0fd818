"""Draw the plots of a search and write the HTML page that embeds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from effnet_fast.checkpoint import write_atomically
from effnet_fast.report import picture
from effnet_fast.report.fronts import feasible_set, pareto_fronts, save_both
from effnet_fast.report.page import render_page
from effnet_fast.report.table import Row
from effnet_fast.report.trial_plots import plot_trials


def draw_trials(folder: Path, output: Path | None = None) -> list[Path]:
    """Draw the trials in a search's candidates.json: history, importances and slices. Return the written paths.

    Args:
        folder: the search's folder.
        output: picture to write; None for trials.png and trials.svg in the folder.

    Raises:
        ValueError: candidates.json is damaged or too old, or the output cannot be written.
    """
    path = folder / "candidates.json"
    try:
        content = json.loads(path.read_text())
        figure = plot_trials(content["trials"], content["importances"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no list of trials: run `effnet-fast search collect` again") from error
    if output is None:
        return save_both(figure, folder, "trials")
    picture.save(figure, output)
    return [output]


def draw_search(
    folder: Path, name: str, plan: Row, rows: Sequence[Row], chosen: str | None = None, confidence: str = ""
) -> None:
    """Write feasible.*, pareto.* (PNG and SVG) and search.html.

    Args:
        folder: the search's folder.
        name: the search's name.
        plan: content of plan.json; only `candidates` and `dropped` are used.
        rows: rows of candidates.csv.
        chosen: name of the best candidate, which is highlighted; None before the stage `choose`.
        confidence: sentence about how certain the choice is.
    """
    _, feasible = save_both(feasible_set(plan["candidates"], plan["dropped"], chosen), folder, "feasible")
    _, fronts = save_both(pareto_fronts(rows, chosen), folder, "pareto")
    pictures = {"Accuracy against cost": fronts, "Trials": folder / "trials.svg", "Feasible factors": feasible}
    text = render_page(
        f"Search {name}: accuracy on held-out images",
        rows,
        {caption: path for caption, path in pictures.items() if path.exists()},
        f"Chosen: {chosen}; {confidence}." if chosen else "No candidate has been chosen yet.",
        chosen,
    )
    write_atomically(folder / "search.html", text.encode())
