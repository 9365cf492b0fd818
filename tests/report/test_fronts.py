"""Pictures, page and tables of searches and studies."""

import base64
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from effnet_fast.report.fronts import feasible_set, pareto_fronts, save_both, scaling_curves
from effnet_fast.report.page import render_page
from effnet_fast.report.progress import summary, trial_table
from effnet_fast.report.table import as_csv, as_text
from effnet_fast.search.trials import State

ROWS = [
    {
        "name": f"c{i}",
        "alpha": 1.2,
        "beta": 1.0 + i / 10,
        "gamma": 1.1,
        "same_as": [[1.3, 1.0 + i / 10, 1.1]],
        "macs": 10_000_000 * (i + 1),
        "parameters": 4_000_000 + i,
        "latency_ms": None if i == 2 else 2.5 - i,
        "top1_mean": 10.0 + i % 2,
        "top1_std": 0.5 if i else None,
        "pareto_macs": i < 2,
        "pareto_parameters": i < 2,
        "pareto_latency": i == 1,
    }
    for i in range(3)
]
DROPPED = [{"alpha": 1.5, "beta": 1.2, "gamma": 1.0, "reason": "large"}]
MODELS = [
    {"model": model, "depth": 1.0, "macs": 1e7 * (1 + i), "top1_mean": 20.0 + i, "top1_std": None}
    for i, model in enumerate(["baseline", "deeper", "wider", "higher-resolution", "compound"])
]
REFERENCES = [
    {"model": model, "depth": None, "macs": 1e9, "top1_mean": 30.0, "top1_std": None} for model in ("resnet50", "other")
]


@pytest.mark.parametrize(
    "figure",
    [
        feasible_set(ROWS, DROPPED, "c1"),
        feasible_set(ROWS[:1], []),
        pareto_fronts(ROWS, "c1"),
        pareto_fronts(ROWS[2:]),
        scaling_curves(MODELS, "test"),
        scaling_curves(MODELS[:1], "val"),
    ],
    ids=["feasible", "one-point", "pareto", "no-latency", "study", "baseline-alone"],
)
def test_png_and_svg(tmp_path, figure):
    png, svg = save_both(figure, tmp_path, "picture")
    assert min(Image.open(png).size) > 400
    assert svg.read_text().startswith("<?xml")


def test_reference_models_are_single_points():
    axes = scaling_curves([*MODELS, *REFERENCES], "test").axes[0]
    points = {line.get_label(): (line.get_xdata(), line.get_marker()) for line in axes.get_lines()}
    assert [len(points[name][0]) for name in ("resnet50", "other")] == [1, 1]
    assert points["resnet50"][1] != points["other"][1]


def test_lines_are_distinguishable_without_color():
    lines = [line for line in scaling_curves(MODELS, "test").axes[0].get_lines() if len(line.get_xdata()) == 2]
    styles = {(line.get_linestyle(), line.get_marker()) for line in lines if line.get_linestyle() != "None"}
    assert len(styles) == 4


def test_baseline_has_a_color_and_a_bar_of_its_own():
    axes = scaling_curves(with_spread(MODELS), "test").axes[0]
    assert len({bars.lines[0].get_color() for bars in axes.containers}) == 5
    drawn = [sum(len(bar) > 0 for bar in bars.lines[2][0].get_segments()) for bars in axes.containers]
    assert drawn == [1] * 5


def with_spread(rows):
    return [row | {"top1_std": 0.5} for row in rows]


def test_accuracy_axis_starts_at_zero_unless_spread_is_drawn():
    for figure in (scaling_curves(MODELS, "test"), pareto_fronts(ROWS)):
        low, high = figure.axes[0].get_ylim()
        assert low == 0
        assert high > 1.05 * max(y for line in figure.axes[0].get_lines() for y in line.get_ydata()), "whole marks"
    for figure, lowest in ((scaling_curves(with_spread(MODELS), "test"), 20.0), (pareto_fronts(with_spread(ROWS)), 10)):
        low, high = figure.axes[0].get_ylim()
        assert 0 < low < lowest - 0.5
        assert high > lowest


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.rows = [], 0

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.targets += [value for name, value in attrs if name in ("src", "href")]


def test_page_is_self_contained(tmp_path):
    _, svg = save_both(scaling_curves(MODELS, "test"), tmp_path, "study")
    text = render_page("A <title>", MODELS, {"Study": svg}, "a note", marked="deeper")
    read = Links()
    read.feed(text)
    (picture,) = read.targets
    assert base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,")) == svg.read_bytes()
    assert not re.search(r"https?://|@import|fetch\(", text)
    assert read.rows == 1 + len(MODELS)
    assert "A &lt;title&gt;" in text
    assert '<tr class="marked"><td data-key="deeper">' in text
    assert '<td data-key="20000000.0">2e+07</td>' in text


def test_tables():
    rows = [
        {"name": "a", "macs": 1234567, "list": [1, 2], "top1": None},
        {"name": "bc", "macs": 1, "list": [3], "top1": 2.5},
    ]
    assert as_csv(rows) == "name,macs,list,top1\na,1234567,1 2,\nbc,1,3,2.5\n"
    assert as_text(rows).splitlines()[1:] == ["a     1,234,567   1 2     -", "bc            1     3   2.5"]


def test_live_table_and_time_left():
    states = [
        State("a", "COMPLETE", 4, 30.0, 40.0, {}),
        State("b", "RUNNING", 2, 20.0, 20.0, {}),
        State("c", "FAIL", 0, None, 1.0, {"reason": "out of memory"}),
        State("d", "WAITING", 0, None, None, {}),
    ]
    assert summary(states, 4) == "2 of 4 done, 1 running, 1 fail, ETA 0:01:00"
    table = trial_table(states, 4)
    assert list(table.columns[0].cells) == ["b", "a", "c"]
    assert list(table.columns[5].cells) == ["", "", "out of memory"]
