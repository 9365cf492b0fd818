"""The pictures, and the gallery in a browser without network."""

import html.parser
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from effnet_fast.explain import gallery, overlay, tables

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def record(name, label, agreement, predictions=("bear", "cat"), size=(60, 40)):
    scores = {"target_probability": 0.6, "energy_top10": 0.3, "entropy": 0.8, "deletion": 0.2, "insertion": 0.7}
    models = {
        model: {"prediction": prediction, "confidence": 0.6, "target": prediction, **scores}
        for model, prediction in zip(("baseline", "wider"), predictions, strict=True)
    }
    return {
        "image": name,
        "label": label,
        "width": size[0],
        "height": size[1],
        "models": models,
        "pairs": [("baseline", "wider", agreement)],
        "agreement_with_others": {"baseline": agreement, "wider": agreement},
        "agreement": agreement,
    }


def render():
    records = [
        record("bear/1.png", "bear", 0.9, ("bear", "bear")),
        record("cat/2.png", "cat", -0.4),
        record("<b>&\"'.png", None, None),
    ]
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    cards = [
        gallery.Card(
            r, {"baseline": ramp, "wider": 0 * ramp}, Image.new("RGB", (r["width"], r["height"]), (40, 160, 40))
        )
        for r in records
    ]
    summary = tables.Summary()
    for row in (row for r in records for row in tables.map_rows(r)):
        summary.add(row)
    labels = {"baseline": "the baseline", "wider": "wider (w 1.4)"}
    return gallery.render_gallery("Where", cards, labels, summary.rows(), "A note.", "jet")


@pytest.fixture
def address(tmp_path):
    path = tmp_path / "gallery.html"
    path.write_text(render(), encoding="utf-8")
    return path.as_uri()


def browse(address, *flags):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags, address]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-1000:]
    return finished.stdout


def visible(dom):
    articles = re.findall(r"<article[^>]*>", dom)
    assert len(articles) == 3
    return [number for number, article in enumerate(articles, 1) if ' hidden=""' not in article]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_gallery_is_valid_escaped_and_loads_nothing():
    text = render()
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    for tag, attributes in parser.tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text
    assert len([tag for tag, _ in parser.tags if tag == "img"]) == 6
    assert "<b><b>" not in text
    assert "<b>&\"'.png" in parser.text


def test_map_covers_central_square():
    assert "left: 16.667%; top: 0.000%; width: 66.667%; height: 100.000%" in render()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("class=cat", [2, 3]),
        ("low=0.5", [1]),
        ("same=0&high=0", [2]),
        ("low=0.95", []),
    ],
)
def test_filters(address, state, expected):
    dom = browse(f"{address}#{state}", "--dump-dom")
    assert visible(dom) == expected
    assert f"{len(expected)} of 3 images" in dom


def test_order_opacity_and_tables(address):
    dom = browse(f"{address}#order=1&opacity=30&tables=1", "--dump-dom")
    assert re.findall(r'data-agreement="([^"]*)"', dom) == ["-0.4", "0.9", ""]
    assert re.search(r"<html[^>]*--opacity: 0.3", dom)
    assert len(re.findall(r'<details open="">', dom)) == 3


def test_opacity_slider(address, tmp_path):
    def screenshot(opacity):
        path = tmp_path / f"{opacity}.png"
        browse(f"{address}#opacity={opacity}", "--window-size=1000,900", f"--screenshot={path}")
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    none, full = screenshot(0), screenshot(100)
    green, blue = (40, 160, 40), (0, 0, 127)  # the photo's colour, and jet's colour for no evidence
    assert count(none, green) > 30_000
    assert count(none, blue) == 0
    assert count(full, blue) > 5_000
    assert count(none, green) - count(full, green) > 20_000


def count(pixels, colour):
    return int((np.abs(pixels - colour).max(-1) <= 6).sum())


# -- the pictures


def row(size=(32, 32), label="bear", empty=False, target="bear"):
    width, height = size
    values = np.zeros((height, width), np.float32) if empty else np.ones((height, width), np.float32)
    return overlay.Row(
        "bear/1.png",
        np.full((height, width, 3), 128, np.uint8),
        label,
        [overlay.Panel(values, "bear", 0.83, target, 0.5)] * 2,
    )


def labels_of(figure):
    return [axes.get_xlabel() for axes in figure.axes]


def test_grid_layout():
    figure = overlay.draw([row(), row((90, 40))], ["baseline", "wider"])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["original", "baseline", "wider"]
    assert labels_of(figure)[:3] == ["bear\nbear/1.png", "bear 83%", "bear 83%"]
    assert len(figure.axes) == 2 * 3 + 1
    assert "evidence for the class" in figure.axes[-1].get_ylabel()


def test_caption_of_other_target_without_evidence():
    figure = overlay.draw([row(target="eel", empty=True)], ["a", "b"])
    assert labels_of(figure)[1] == "bear 83%\nmap: eel 50%\nno positive evidence"


def test_caption_colors():
    def color(label):
        return overlay.draw([row(label=label)], ["a", "b"]).axes[1].xaxis.label.get_color()

    assert len({color("bear"), color("cat"), color(None)}) == 3


@pytest.mark.parametrize(("colormap", "expected"), [("jet", (128, 0, 0)), ("viridis", (253, 231, 37))])
def test_map_colors_and_opacity(colormap, expected):
    def middle(opacity):
        figure = overlay.draw([row()], ["a", "b"], colormap, opacity)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        box = figure.axes[1].get_window_extent()
        return pixels[pixels.shape[0] - int((box.y0 + box.y1) / 2), int((box.x0 + box.x1) / 2)]

    np.testing.assert_allclose(middle(1.0), expected, atol=2)
    np.testing.assert_allclose(middle(0.5), (np.array(expected) + 128) / 2, atol=3)
    np.testing.assert_allclose(middle(0.0), (128, 128, 128), atol=1)


def test_long_names_and_dollar_signs():
    strange = overlay.Row("a" * 80 + "$x$.png", np.zeros((8, 8, 3), np.uint8), "$_class_$", row((8, 8)).panels)
    figure = overlay.draw([strange], ["$w$", "b"])
    figure.canvas.draw()
    assert labels_of(figure)[0].endswith("$x$.png")
    assert len(labels_of(figure)[0].split("\n")[1]) <= 24


def test_unknown_colormap():
    with pytest.raises(ValueError, match="no colormap 'jett'"):
        overlay.check_colormap("jett")
