"""Pictures: an image and the maps of several models side by side, as figure 7 of the EfficientNet paper."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

LARGEST_SIDE = 1024  # pixels of an image as it is drawn
_CELL, _GAP, _CAPTION, _HEADING, _BAR = 1.75, 0.1, 0.5, 0.5, 0.95  # inches: an image's side, and what is around it
_NAME = 24  # letters of a name that fit under an image
_RIGHT, _WRONG, _PLAIN = "#1a7f37", "#b42318", "black"


@dataclass(frozen=True)
class Panel:
    """A model's map of an image, and what the model says.

    Attributes:
        map: float32 [H, W] from 0 to 1; NaN where the model saw nothing.
        prediction, confidence: the most probable class and its probability.
        target, target_probability: the class whose evidence the map shows.
    """

    map: NDArray[np.float32]
    prediction: str
    confidence: float
    target: str
    target_probability: float


@dataclass(frozen=True)
class Row:
    """An image uint8 [H, W, 3], its name, its true class where one is known, and a panel for each model."""

    name: str
    image: NDArray[np.uint8]
    label: str | None
    panels: Sequence[Panel]


def check_colormap(name: str) -> None:
    """Raise ValueError unless matplotlib has the colour map."""
    if name not in colormaps:
        raise ValueError(
            f"matplotlib has no colour map {name!r}: try jet, viridis, magma, turbo or another of its maps"
        )


def reduced(image: Image.Image, largest: int = LARGEST_SIDE) -> Image.Image:
    """The image, made smaller where a side passes `largest` pixels."""
    small = image.copy()
    small.thumbnail((largest, largest))
    return small


@rc_context({"text.parse_math": False})  # a file or a class name may hold dollar signs
def draw(rows: Sequence[Row], models: Sequence[str], colormap: str = "jet", opacity: float = 0.5) -> Figure:
    """A grid: a row for each image, the original first, then each model's map over it; predictions below; a colour bar.

    Args:
        rows: the images.
        models: headings of the panels.
        colormap: a matplotlib colour map.
        opacity: of the maps, 0 to 1.
    """
    columns = len(models) + 1
    heights = [_CELL * min(1, row.image.shape[0] / row.image.shape[1]) for row in rows]
    width, height = _CELL * columns + _BAR, sum(heights) + _CAPTION * len(rows) + _HEADING
    # Laid out by hand: matplotlib's own layout engines take twice as long, which counts over thousands of images.
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw={
            "left": _GAP / width,
            "right": 1 - _BAR / width,
            "top": 1 - _HEADING / height,
            "bottom": _CAPTION / height,
            "wspace": _GAP / (_CELL - _GAP),
            "hspace": _CAPTION * len(rows) / sum(heights),
            "height_ratios": heights,
        },
    )
    for cells, row in zip(axes, rows, strict=True):
        _draw_row(cells, row, colormap, opacity)
    for cell, heading in zip(axes[0], ["original", *models], strict=True):
        cell.set_title(textwrap.fill(heading, _NAME), fontsize=9)
    length = min(_CELL, height - _HEADING - _CAPTION) / height
    bar = figure.add_axes((1 - (_BAR - 0.15) / width, 1 - _HEADING / height - length, 0.13 / width, length))
    figure.colorbar(ScalarMappable(Normalize(0, 1), colormap), cax=bar)
    bar.set_ylabel("evidence for the class\n(1: the map's largest)", fontsize=8)
    bar.tick_params(labelsize=8)
    return figure


def _draw_row(cells: Sequence[Axes], row: Row, colormap: str, opacity: float) -> None:
    for cell in cells:
        cell.imshow(row.image)
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    cells[0].set_xlabel("\n".join([_short(row.label or ""), _short(row.name)]).strip("\n"), fontsize=8)
    for cell, panel in zip(cells[1:], row.panels, strict=True):
        shown = np.ma.masked_invalid(panel.map)
        cell.imshow(shown, cmap=colormap, vmin=0, vmax=1, alpha=opacity, interpolation="bilinear")
        colour = _PLAIN if row.label is None else _RIGHT if panel.prediction == row.label else _WRONG
        cell.set_xlabel(_caption(panel), fontsize=8, color=colour)


def _caption(panel: Panel) -> str:
    lines = [f"{_short(panel.prediction)} {panel.confidence:.0%}"]
    if panel.target != panel.prediction:
        lines.append(f"map: {_short(panel.target)} {panel.target_probability:.0%}")
    if not np.nanmax(panel.map) > 0:
        lines.append("no positive evidence")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else "..." + name[3 - _NAME :]
