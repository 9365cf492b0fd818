"""A sheet of images with a caption below each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from effnet_fast.report import picture
from effnet_fast.report.fonts import drawable, text_style

_COLUMNS = 8
_WIDTH, _HEIGHT = 1.6, 2.1  # inches of a cell, caption included
_LONGEST = 26  # characters of a caption's line


def plot_images(
    path: str | Path, title: str, images: Sequence[NDArray[np.uint8]], captions: Sequence[Sequence[str]]
) -> None:
    """Draw images in rows of eight, each fitted into a square.

    Args:
        path: picture to write, .png, .svg or .pdf.
        title: above the sheet.
        images: N times uint8 [H, W, 3], at least one, of any sizes.
        captions: lines below each image; long ones are cut.

    Raises:
        ValueError: the path has another suffix or cannot be written.
    """
    path = Path(path)
    picture.check_suffix(path)
    texts = ["\n".join(_cut(drawable(line)) for line in lines) for lines in captions]
    with text_style(texts):
        picture.save(_draw(title, images, texts), path)


def _draw(title: str, images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> Figure:
    columns, rows = min(_COLUMNS, len(images)), -(-len(images) // _COLUMNS)
    size = (max(columns, 3) * _WIDTH, rows * _HEIGHT + 0.4)  # wide enough for the title
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    # One pair of axes for all images: laying out a pair for each takes seconds.
    for cell, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = cell % _COLUMNS * _WIDTH, cell // _COLUMNS * _HEIGHT
        height, width = (1.5 * side / max(image.shape[:2]) for side in image.shape[:2])
        middle, bottom = left + _WIDTH / 2, top + 1.5
        pixels = "nearest" if max(image.shape[:2]) < 128 else "antialiased"
        axes.imshow(
            image, extent=(middle - width / 2, middle + width / 2, bottom, bottom - height), interpolation=pixels
        )
        axes.text(middle, bottom + 0.04, text, ha="center", va="top", fontsize=7)
    axes.set(xlim=(0, columns * _WIDTH), ylim=(rows * _HEIGHT, 0), aspect="equal")
    axes.axis("off")
    return figure


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
