"""Accuracy by class, and the picture of the confusion matrix."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from effnet_fast.report import confusion as report
from effnet_fast.report.confusion import most_confused, plot_confusion, write_per_class

CLASSES = ("apple", "sea, deep", "unseen", 'a "quoted" $one$')
CONFUSION = np.array([[7, 2, 1, 0], [0, 3, 0, 1], [0, 0, 0, 0], [0, 0, 3, 0]], dtype=np.int64)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that plot_confusion saves."""
    figures: list[Figure] = []
    save = report.picture.save
    monkeypatch.setattr(report.picture, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_per_class_table(tmp_path):
    path = tmp_path / "new" / "per_class.csv"
    write_per_class(path, CLASSES, CONFUSION)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["class", "images", "correct", "top1"],
            ["apple", "10", "7", "70.00"],
            ["sea, deep", "4", "3", "75.00"],
            ["unseen", "0", "0", ""],
            ['a "quoted" $one$', "3", "0", "0.00"],
        ]


def test_unwritable_table(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write .*choose another folder"):
        write_per_class(tmp_path / "file" / "per_class.csv", CLASSES, CONFUSION)


def test_most_confused():
    assert most_confused(CONFUSION, 10) == [(3, 2), (1, 3), (0, 1), (0, 2)]
    assert most_confused(CONFUSION, 2) == [(3, 2), (1, 3)]
    assert most_confused(np.eye(3, dtype=np.int64), 5) == []


def test_matrix_shows_row_shares(tmp_path, drawn):
    plot_confusion(tmp_path / "confusion.png", CLASSES, CONFUSION)
    matrix = drawn[0].axes[0]
    shown = matrix.get_images()[0].get_array()
    percent = [[70, 20, 10, 0], [0, 75, 0, 25], [0, 0, 0, 0], [0, 0, 100, 0]]
    np.testing.assert_allclose(shown.filled(0), percent)
    assert [label.get_text() for label in matrix.get_yticklabels()] == list(CLASSES)
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted class", "true class")
    listing = "\n".join(text.get_text() for text in drawn[0].axes[1].texts)
    assert 'a "quoted" $one$ → unseen' in listing
    assert " 25.0 %  sea, deep → a" in listing
    assert "top-1 58.82 %" in drawn[0].get_suptitle()


def test_hundred_class_names_in_order(tmp_path, drawn):
    names = [f"class_{k}" for k in range(100)]
    confusion = np.diag(np.full(100, 90, dtype=np.int64))
    confusion[:, 99] += 10
    plot_confusion(tmp_path / "confusion.png", names, confusion)
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == names
    shown = drawn[0].axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(shown.diagonal(), [90] * 99 + [100])
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) >= 1500  # at least ten pixels per class, or the names overlap
        dark = (np.asarray(image.convert("L")) < 60).sum()
    assert dark > 100 * 10 * 10  # the cells of the diagonal


def test_unreadable_names_are_omitted(tmp_path, drawn):
    plot_confusion(tmp_path / "confusion.png", [f"class_{k}" for k in range(200)], np.eye(200, dtype=np.int64))
    assert "class_0" not in [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"end it in \.png"):
        plot_confusion(tmp_path / "confusion.gif", CLASSES, CONFUSION)
    with pytest.raises(ValueError, match="needs at least one image"):
        plot_confusion(tmp_path / "confusion.png", CLASSES, np.zeros((4, 4), dtype=np.int64))
    with pytest.raises(AssertionError):
        plot_confusion(tmp_path / "confusion.png", CLASSES[:3], CONFUSION)
