"""Reading and drawing metrics.jsonl."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from effnet_fast.report import curves
from effnet_fast.report.curves import plot_curves, read_metrics


def train_row(step: int, **others: Any) -> dict[str, Any]:
    row = {"kind": "train", "step": step, "epoch": step / 10, "loss": 4.6 / step, "top1": float(step)}
    return row | {"learning_rate": 0.1, "img_per_s": 440.0 + step, "wait_share": 0.1, "grad_norm": 1.0} | others


def eval_row(step: int, **others: Any) -> dict[str, Any]:
    row = {"kind": "eval", "step": step, "epoch": step / 10, "split": "test", "loss": 5 / step, "top1": step + 1.0}
    return row | {"top5": step + 5.0, "seconds": 1.5} | others


def write_run(run_dir: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return run_dir


@pytest.fixture
def run(tmp_path) -> Path:
    rows = [train_row(5), train_row(10), eval_row(10, ema_top1=14.0, ema_loss=0.4, ema_top5=20.0), train_row(15)]
    return write_run(tmp_path / "b0", rows)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that plot_curves saves."""
    figures: list[Figure] = []
    save = curves.picture.save
    monkeypatch.setattr(curves.picture, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def lines(figure: Figure, panel: int) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[panel].get_lines()]


def test_read_metrics(run):
    metrics = read_metrics(run)
    assert (metrics.name, metrics.split) == ("b0", "test")
    assert [row["step"] for row in metrics.train] == [5, 10, 15]
    assert [row["top1"] for row in metrics.eval] == [11.0]


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', "{", "\x00\x00\x00", '{"kind": "eval"}'])
def test_incomplete_last_line_is_ignored(tmp_path, tail):
    metrics = read_metrics(write_run(tmp_path / "killed", [train_row(5), eval_row(10)], tail))
    assert [len(metrics.train), len(metrics.eval)] == [1, 1]


def test_last_line_without_line_break(tmp_path):
    metrics = read_metrics(write_run(tmp_path / "killed", [train_row(5)], json.dumps(train_row(10))))
    assert [row["step"] for row in metrics.train] == [5, 10]


def test_repeated_steps_count_once(tmp_path):
    rows = [train_row(5), train_row(10), train_row(15, loss=9.0), train_row(15, loss=1.0), train_row(20)]
    metrics = read_metrics(write_run(tmp_path / "resumed", rows))
    assert [row["step"] for row in metrics.train] == [5, 10, 15, 20]
    assert metrics.train[2]["loss"] == 1.0


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "3", '{"kind": "train"}'])
def test_invalid_line_is_reported_by_number(tmp_path, line):
    run = write_run(tmp_path / "altered", [train_row(5)], f"{line}\n{json.dumps(train_row(10))}\n")
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not a row of metrics"):
        read_metrics(run)


def test_missing_run_or_metrics(tmp_path):
    (tmp_path / "bare").mkdir()
    for path, message in ((tmp_path / "none", "no run at"), (tmp_path / "bare", r"no metrics\.jsonl in")):
        with pytest.raises(FileNotFoundError, match=message) as refused:
            read_metrics(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tail", ["", '{"kind": "tr'])
def test_empty_metrics(tmp_path, tail):
    with pytest.raises(ValueError, match="has no metrics yet"):
        read_metrics(write_run(tmp_path / "young", [], tail))


def test_every_series_is_in_its_panel(run, tmp_path, drawn):
    plot_curves([run], tmp_path / "curves.png")
    train_epochs, eval_epochs = [0.5, 1.0, 1.5], [1.0]
    assert lines(drawn[0], 0) == [
        (train_epochs, [4.6 / 5, 4.6 / 10, 4.6 / 15]),
        (eval_epochs, [0.5]),
        (eval_epochs, [0.4]),
    ]
    assert lines(drawn[0], 1) == [(train_epochs, [5.0, 10.0, 15.0]), (eval_epochs, [11.0]), (eval_epochs, [14.0])]
    assert lines(drawn[0], 2) == [(train_epochs, [0.1] * 3)]
    assert lines(drawn[0], 3) == [(train_epochs, [445.0, 450.0, 455.0])]
    assert [panel.get_ylabel() for panel in drawn[0].axes] == [
        "cross-entropy (nats)",
        "images classified correctly (%)",
        "learning rate (per step)",
        "images per second",
    ]
    assert [panel.get_xlabel() for panel in drawn[0].axes] == ["epoch"] * 4


def test_runs_and_series_are_distinguishable(run, tmp_path, drawn):
    other = write_run(tmp_path / "b1", [train_row(5), eval_row(10, split="val"), train_row(15)])
    plot_curves([run, other], tmp_path / "curves.png")
    loss_lines = list(drawn[0].axes[0].get_lines())
    first, second = loss_lines[:3], loss_lines[3:]
    assert {line.get_color() for line in first}.isdisjoint(line.get_color() for line in second)
    assert {line.get_marker() for line in first}.isdisjoint(line.get_marker() for line in second)
    assert len({(line.get_linestyle(), line.get_linewidth()) for line in first}) == 3
    texts = [[text.get_text() for text in legend.get_texts()] for legend in drawn[0].legends]
    assert texts == [
        ["training", "evaluation", "evaluation, EMA weights"],
        ["b0 (evaluated on test)", "b1 (evaluated on val)"],
    ]


def test_runs_of_a_group_look_alike(tmp_path, drawn):
    runs = [write_run(tmp_path / name, [train_row(5), eval_row(10)]) for name in ("a-0", "b-0", "a-1", "b-1", "c-0")]
    plot_curves(runs, tmp_path / "curves.png", groups=["a", "b", "a", "b", "c"])
    looks = [(line.get_color(), line.get_marker()) for line in drawn[0].axes[2].get_lines()]
    assert looks[:2] == looks[2:4]
    assert len(set(looks)) == 3
    texts = [text.get_text() for text in drawn[0].legends[1].get_texts()]
    assert texts == [f"{name} (evaluated on test)" for name in ("a, 2 runs", "b, 2 runs", "c")]


def test_rows_of_few_images_are_not_drawn(tmp_path, drawn):
    rows = [train_row(step, images=100 if step % 10 else 49) for step in (5, 9, 10, 15, 20)]
    plot_curves([write_run(tmp_path / "b0", rows)], tmp_path / "curves.png")
    assert lines(drawn[0], 2)[0][0] == [0.5, 0.9, 1.5]


def test_runs_with_equal_names_show_paths(tmp_path, drawn):
    runs = [write_run(tmp_path / folder / "b0", [train_row(5)]) for folder in ("here", "there")]
    plot_curves(runs, tmp_path / "curves.png")
    assert [text.get_text() for text in drawn[0].legends[1].get_texts()] == [str(run) for run in runs]


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_suffix_selects_format(run, tmp_path, suffix, magic):
    output = tmp_path / "new" / f"curves{suffix}"
    assert plot_curves([run], output) == output
    assert output.read_bytes().startswith(magic)


def test_picture_is_not_blank(run, tmp_path):
    with Image.open(plot_curves([run], tmp_path / "curves.png")) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1020, 1440, 3)
    blue = (pixels == (0x00, 0x72, 0xB2)).all(-1)  # the first run's colour
    halves = blue.reshape(2, 510, 2, 720).sum((1, 3))
    assert (halves > 20).all(), halves


def test_dollar_signs_in_run_name(tmp_path):
    run = write_run(tmp_path / r"$\frac$", [train_row(5)])
    assert plot_curves([run], tmp_path / "curves.png").stat().st_size > 10_000


def test_non_finite_values(tmp_path):
    run = write_run(tmp_path / "diverged", [train_row(5), train_row(10, loss=float("nan"), img_per_s=float("inf"))])
    assert plot_curves([run], tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("name", ["curves.jpeg", "curves", "curves.png.txt"])
def test_other_suffixes(run, tmp_path, name, drawn):
    with pytest.raises(ValueError, match=r"end it in \.png, \.svg, \.pdf"):
        plot_curves([run], tmp_path / name)
    assert not drawn


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="give at least one run's folder"):
        plot_curves([], tmp_path / "curves.png")


def test_unwritable_output(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write the picture .*curves\.png: .*choose another output") as refused:
        plot_curves([run], tmp_path / "file" / "curves.png")
    assert "\n" not in str(refused.value)


def test_full_disk(run, tmp_path, monkeypatch):
    """The earlier picture stays whole."""

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "curves.png").write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"curves\.png: No space left on device; choose another output"):
        plot_curves([run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".*.tmp"))
