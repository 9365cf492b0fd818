"""Draw images beside the maps of several models, like figure 7 of the EfficientNet paper."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from effnet_fast.data.resize import central_square
from effnet_fast.explain.colormap import NAME
from effnet_fast.explain.maps import place
from effnet_fast.explain.tables import Record
from effnet_fast.report.fonts import drawable, text_style

LARGEST_SIDE = 1024  # pixels; larger images are shrunk before drawing
_CELL, _GAP, _CAPTION, _HEADING, _BAR = 1.75, 0.1, 0.5, 0.5, 0.95  # inches: an image's side and the space around it
_NAME_LENGTH = 24  # characters that fit under an image
_CORRECT, _WRONG, _UNKNOWN = "#1a7f37", "#b42318", "black"


@dataclass(frozen=True)
class Panel:
    """A model's map of an image and its prediction.

    Attributes:
        map: float32 [H, W] from 0 to 1; NaN outside the central square.
        prediction, confidence: the most probable class and its probability.
        target, target_probability: the class that the map explains and its probability.
    """

    map: NDArray[np.float32]
    prediction: str
    confidence: float
    target: str
    target_probability: float


@dataclass(frozen=True)
class Row:
    """An image uint8 [H, W, 3], its name, its true class (None if unknown), and a panel for each model."""

    name: str
    image: NDArray[np.uint8]
    label: str | None
    panels: Sequence[Panel]


def check_colormap(name: str) -> None:
    """Raise ValueError unless matplotlib knows the colormap."""
    if name not in colormaps:
        raise ValueError(f"matplotlib has no colormap {name!r}: try {NAME}, jet, viridis, turbo or another of its maps")


def shrink(image: Image.Image, largest: int = LARGEST_SIDE) -> Image.Image:
    """Return a copy with no side longer than `largest` pixels."""
    small = image.copy()
    small.thumbnail((largest, largest))
    return small


def make_row(record: Record, image: Image.Image, maps: dict[str, NDArray[np.float32]]) -> Row:
    """Combine an image with its record and each model's map [h, w] of the central square."""
    small = shrink(image)
    panels = [
        Panel(
            _over_image(maps[model], small),
            *(result[key] for key in ("prediction", "confidence", "target", "target_probability")),
        )
        for model, result in record["models"].items()
    ]
    return Row(record["image"], np.asarray(small), record["label"], panels)


def _over_image(square: NDArray[np.float32], image: Image.Image) -> NDArray[np.float32]:
    """Resize a map [h, w] of the central square to the image, with NaN outside the square."""
    whole = np.full((image.height, image.width), np.nan, np.float32)
    left, top, side = central_square(image.width, image.height)
    inside = np.s_[top : top + side, left : left + side]
    whole[inside] = place(torch.from_numpy(square), image.height, image.width).numpy()[inside]
    return whole


def draw(rows: Sequence[Row], models: Sequence[str], colormap: str = NAME, opacity: float = 0.5) -> Figure:
    """Draw a grid with one row per image: the original, then each model's map over it; predictions below each map.

    Args:
        rows: the images.
        models: headings of the models' columns.
        colormap: name of a matplotlib colormap.
        opacity: opacity of the maps, 0 to 1.
    """
    names = [name for row in rows for name in (row.name, row.label or "")]
    names += [name for row in rows for panel in row.panels for name in (panel.prediction, panel.target)]
    with text_style([*models, *names]):
        return _draw(rows, models, colormap, opacity)


def _draw(rows: Sequence[Row], models: Sequence[str], colormap: str, opacity: float) -> Figure:
    columns = len(models) + 1
    heights = [_CELL * min(1, row.image.shape[0] / row.image.shape[1]) for row in rows]
    width, height = _CELL * columns + _BAR, sum(heights) + _CAPTION * len(rows) + _HEADING
    # Manual layout: matplotlib's layout engines take twice as long, which matters for thousands of images.
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
        # Wrapped before `drawable` turns no-break spaces into spaces.
        lines = textwrap.wrap(heading, _NAME_LENGTH, break_on_hyphens=False)
        cell.set_title("\n".join(map(drawable, lines)), fontsize=9)
    _draw_colorbar(figure, colormap)
    return figure


def _draw_row(cells: Sequence[Axes], row: Row, colormap: str, opacity: float) -> None:
    for cell in cells:
        cell.imshow(row.image)
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    cells[0].set_xlabel("\n".join([_shorten(row.label or ""), _shorten(row.name)]).strip("\n"), fontsize=8)
    for cell, panel in zip(cells[1:], row.panels, strict=True):
        visible = np.ma.masked_invalid(panel.map)
        cell.imshow(visible, cmap=colormap, vmin=0, vmax=1, alpha=opacity, interpolation="bilinear")
        color = _UNKNOWN if row.label is None else _CORRECT if panel.prediction == row.label else _WRONG
        cell.set_xlabel(_caption(panel), fontsize=8, color=color)


def _draw_colorbar(figure: Figure, colormap: str) -> None:
    width, height = figure.get_size_inches()
    length = min(_CELL, height - _HEADING - _CAPTION) / height
    bar = figure.add_axes((1 - (_BAR - 0.15) / width, 1 - _HEADING / height - length, 0.13 / width, length))
    figure.colorbar(ScalarMappable(Normalize(0, 1), colormap), cax=bar)
    bar.set_ylabel("evidence for the class\n(1: the map's maximum)", fontsize=8)
    bar.tick_params(labelsize=8)


def _caption(panel: Panel) -> str:
    lines = [f"{_shorten(panel.prediction)} {panel.confidence:.0%}"]
    if panel.target != panel.prediction:
        lines.append(f"map: {_shorten(panel.target)} {panel.target_probability:.0%}")
    if not np.nanmax(panel.map) > 0:
        lines.append("no positive evidence")
    return "\n".join(lines)


def _shorten(name: str) -> str:
    name = drawable(name)
    return name if len(name) <= _NAME_LENGTH else "..." + name[3 - _NAME_LENGTH :]
