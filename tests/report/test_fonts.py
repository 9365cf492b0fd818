"""Names in any script are drawn without missing glyphs."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from effnet_fast.explain import overlay
from effnet_fast.report import fonts
from effnet_fast.report.confusion import plot_confusion
from effnet_fast.report.curves import plot_curves

NAMES = ["中文", "한국어", "日本語", "ไทย", "🎉", "tab\there", "$x$", "Größe", "\U0001d49c"]


@pytest.fixture(autouse=True)
def no_warnings():
    """Missing glyphs and fonts are user warnings and log records."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def only_default_font(monkeypatch):
    """An installation without any fallback font."""
    default = [entry for entry in fonts.fontManager.ttflist if entry.name == "DejaVu Sans"]
    monkeypatch.setattr(fonts.fontManager, "ttflist", default)
    fonts._family_with.cache_clear()
    fonts._drawable_character.cache_clear()
    yield
    fonts._family_with.cache_clear()
    fonts._drawable_character.cache_clear()


def test_transliteration_without_a_font(only_default_font):
    drawn = [fonts.drawable(name) for name in NAMES]
    assert drawn == ["ZhongWen", "HanGugEo", "RiBenYu", "aithy", ":tada:", "tab?here", "$x$", "Größe", "A"]
    assert fonts.fallback_families(drawn) == []


def test_fallback_font():
    """matplotlib ships DejaVu Sans as its default and STIX, which has this script A."""
    assert fonts.drawable("\U0001d49c") == "\U0001d49c"
    assert len(fonts.fallback_families(["\U0001d49c"])) == 1
    figure = Figure()
    with fonts.text_style(["\U0001d49c"]):
        figure.text(0.5, 0.5, "\U0001d49c")
    figure.canvas.draw()


def test_pictures_draw_all_names(tmp_path, caplog):
    plot_confusion(tmp_path / "confusion.png", NAMES, np.ones((len(NAMES), len(NAMES)), np.int64))
    run = tmp_path / NAMES[0]
    run.mkdir()
    row = {"kind": "train", "step": 5, "epoch": 1.0, "loss": 1.0, "top1": 5.0, "learning_rate": 0.1, "img_per_s": 9.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    plot_curves([run], tmp_path / "curves.png")
    panels = [overlay.Panel(np.ones((8, 8), np.float32), name, 0.5, NAMES[0], 0.5) for name in NAMES]
    rows = [overlay.Row(name, np.zeros((8, 8, 3), np.uint8), name, panels) for name in NAMES]
    overlay.draw(rows, NAMES).savefig(tmp_path / "grid.png")
    assert not caplog.records
