"""The reliability diagram and the sheet of images."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from effnet_fast.report import picture
from effnet_fast.report.image_sheet import plot_images
from effnet_fast.report.reliability import plot_reliability

BINS = [
    {"low": 0.0, "high": 0.5, "images": 0, "confidence": 0.0, "accuracy": 0.0},
    {"low": 0.5, "high": 1.0, "images": 4, "confidence": 0.8, "accuracy": 0.5},
]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = picture.save
    monkeypatch.setattr(picture, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_reliability(tmp_path, drawn):
    plot_reliability(tmp_path / "reliability.png", {"before": BINS, "after": BINS})
    before, after, shares, _ = drawn[0].axes
    assert (before.get_title(), after.get_title()) == ("before", "after")
    (bar,) = before.patches  # an empty bin has none
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (50, 50, 50)
    mean = next(line for line in before.lines if line.get_marker() == "o")
    assert (*mean.get_xdata(), *mean.get_ydata()) == (80, 50)
    assert [bar.get_height() for bar in shares.patches] == [0, 100]


def test_sheet(tmp_path, drawn):
    images = [np.full((32, 32, 3), 9, np.uint8)] * 8 + [np.full((300, 100, 3), 99, np.uint8)]
    plot_images(tmp_path / "sheet.png", "title", images, [("true: 猫", "x" * 90)] * 9)
    (axes,) = drawn[0].axes
    assert [image.get_array().shape for image in axes.get_images()] == [image.shape for image in images]
    assert all(len(line) <= 26 for text in axes.texts for line in text.get_text().split("\n"))
    left, right, bottom, top = axes.get_images()[8].get_extent()
    assert (bottom - top) / (right - left) == pytest.approx(3)


def test_bad_suffix(tmp_path):
    for draw in (lambda path: plot_reliability(path, {"": BINS}), lambda path: plot_images(path, "", [], [])):
        with pytest.raises(ValueError, match=r"end it in \.png"):
            draw(tmp_path / "picture.gif")
