"""Plot curves of one or several runs, read from their metrics.jsonl.

Each run, or group of runs, has a colour and a marker, each series a line style, so the picture also works in greyscale.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from effnet_fast.report import picture
from effnet_fast.report.fonts import drawable, text_style
from effnet_fast.report.table import Row

Style = dict[str, Any]  # keyword arguments of matplotlib

# Okabe and Ito's palette, which colour-blind readers can distinguish, alternating dark and light. The combinations of
# seven colours and eight markers repeat after 56 runs.
COLORS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MARKS_PER_LINE = 12

TRAINING, EVALUATION, EMA = "training", "evaluation", "evaluation, EMA weights"
SERIES: dict[str, Style] = {
    TRAINING: {"linestyle": "-", "linewidth": 0.8, "markersize": 3.5, "fillstyle": "none", "zorder": 2},
    EVALUATION: {"linestyle": "-", "linewidth": 2.0, "markersize": 5.5, "zorder": 3},
    EMA: {"linestyle": "--", "linewidth": 1.6, "markersize": 5.5, "fillstyle": "none", "zorder": 4},
}


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics.jsonl, in order of steps.

    Attributes:
        name: the run's folder name.
        train: one row per logging period: step, epoch, loss (nats), top1 (percent), learning_rate, img_per_s, ...
        eval: one row per evaluation: step, epoch, split, loss, top1, top5, and ema_loss, ... if the run keeps an EMA.
    """

    name: str
    train: list[Row]
    eval: list[Row]

    @property
    def split(self) -> str | None:
        """The split of the latest evaluation, test or val; None before the first evaluation."""
        return self.eval[-1].get("split") if self.eval else None

    def series(self, label: str, key: str) -> tuple[list[float], list[float]]:
        """Return epochs and values of one quantity; `label` is one of SERIES. Rows without it are omitted.

        So are training rows of less than half as many images as usual, which an epoch's end can leave: a mean over two
        steps is noise.
        """
        rows = _long_rows(self.train) if label == TRAINING else self.eval
        rows = [row for row in rows if row.get(key) is not None]
        return [row["epoch"] for row in rows], [row[key] for row in rows]


def read_metrics(run_dir: str | Path) -> Metrics:
    """Read the metrics.jsonl of a run.

    An incomplete last line, left by a killed run, is ignored. If a resumed run repeats a step, the later row is used.

    Raises:
        FileNotFoundError: the folder does not exist or has no metrics.jsonl.
        ValueError: the file has no row, or an invalid line.
    """
    run_dir = Path(run_dir)
    path = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run at {run_dir}: give the folder of a run, e.g. results/RUN")
    if not path.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {run_dir}: give a folder that `effnet-fast train` wrote")
    rows = {(row["kind"], row["step"]): row for row in _rows(path)}
    if not rows:
        raise ValueError(f"{path} has no metrics yet: train until the first row is logged")
    by_kind = {kind: [rows[key] for key in sorted(rows) if key[0] == kind] for kind in ("train", "eval")}
    return Metrics(name=run_dir.resolve().name, **by_kind)


def plot_curves(run_dirs: Sequence[str | Path], output: str | Path, groups: Sequence[str] | None = None) -> Path:
    """Draw loss, top-1, learning rate and throughput of runs against epochs, and return the picture's path.

    Args:
        run_dirs: folders of runs.
        output: picture to write, .png, .svg or .pdf.
        groups: a name for each run; runs of one name share a colour, a marker and a line of the legend.

    Raises:
        FileNotFoundError: a run or its metrics.jsonl is missing.
        ValueError: there are no runs or no metrics, or the output has another suffix or cannot be written.
    """
    output = Path(output)
    picture.check_suffix(output)
    if not run_dirs:
        raise ValueError("no runs to plot: give at least one run's folder")
    runs = [read_metrics(run_dir) for run_dir in run_dirs]
    styles = _styles(groups or range(len(runs)))
    labels = _labels(runs, run_dirs) if groups is None else _group_labels(runs, groups)
    labels = [drawable(label) for label in labels]
    with text_style(labels):
        picture.save(_draw_panels(runs, styles, labels), output)
    return output


def _draw_panels(runs: Sequence[Metrics], styles: Sequence[Style], labels: Sequence[str]) -> Figure:
    figure = Figure(figsize=(12, 8.5), dpi=120, layout="constrained")
    loss, top1, learning_rate, throughput = figure.subplots(2, 2).flat
    _draw(loss, runs, styles, {TRAINING: "loss", EVALUATION: "loss", EMA: "ema_loss"})
    _draw(top1, runs, styles, {TRAINING: "top1", EVALUATION: "top1", EMA: "ema_top1"})
    _draw(learning_rate, runs, styles, {TRAINING: "learning_rate"})
    _draw(throughput, runs, styles, {TRAINING: "img_per_s"})
    loss.set(title="Loss", ylabel="cross-entropy (nats)")
    top1.set(title="Top-1 accuracy", ylabel="images classified correctly (%)")
    learning_rate.set(title="Learning rate", ylabel="learning rate (per step)")
    throughput.set(title="Training throughput", ylabel="images per second")
    throughput.update_datalim([(0, 0)])
    throughput.autoscale_view(scalex=False)
    throughput.set_ylim(bottom=0)
    throughput.yaxis.set_major_formatter(EngFormatter())
    _legend(figure, runs, dict(zip(labels, styles, strict=True)))
    return figure


def _rows(path: Path) -> Iterator[Row]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
            valid = row is None or {"kind", "step", "epoch"} <= row.keys()
        except (ValueError, AttributeError):
            valid = False
        if not valid and number == len(lines):  # a killed run leaves an incomplete last line
            return
        if not valid:
            raise ValueError(f"line {number} of {path} is not a row of metrics: restore the file or remove the line")
        if row is not None:
            yield row


def _long_rows(rows: list[Row]) -> list[Row]:
    """Rows of at least half the median number of images; rows of older versions have no number."""
    usual = statistics.median(row.get("images", 0) for row in rows) if rows else 0
    return [row for row in rows if row.get("images", usual) >= usual / 2]


def _styles(groups: Sequence[object]) -> list[Style]:
    """The colour and the marker of each run."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [
        {"color": COLORS[numbers[group] % len(COLORS)], "marker": MARKERS[numbers[group] % len(MARKERS)]}
        for group in groups
    ]


def _draw(axes: Axes, runs: Sequence[Metrics], styles: Sequence[Style], keys: dict[str, str]) -> None:
    for number, (run, style) in enumerate(zip(runs, styles, strict=True)):
        for label, key in keys.items():
            epochs, values = run.series(label, key)
            interval = max(1, len(values) // MARKS_PER_LINE)
            offset = number * interval // len(runs)  # keeps the markers of coinciding curves apart
            axes.plot(epochs, values, **style, **SERIES[label], markevery=(offset, interval))
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _labels(runs: Sequence[Metrics], run_dirs: Sequence[str | Path]) -> list[str]:
    """Return the runs' names, or their paths if two have the same name, with the split of their evaluation."""
    counts = Counter(run.name for run in runs)
    names = [run.name if counts[run.name] == 1 else str(run_dir) for run, run_dir in zip(runs, run_dirs, strict=True)]
    return [f"{name} (evaluated on {run.split})" if run.split else name for name, run in zip(names, runs, strict=True)]


def _group_labels(runs: Sequence[Metrics], groups: Sequence[str]) -> list[str]:
    """Return each run's group, with the number of its runs and the split of their evaluation."""
    counts = Counter(groups)
    names = [group if counts[group] == 1 else f"{group}, {counts[group]} runs" for group in groups]
    return [f"{name} (evaluated on {run.split})" if run.split else name for name, run in zip(names, runs, strict=True)]


def _legend(figure: Figure, runs: Sequence[Metrics], entries: dict[str, Style]) -> None:
    series = [label for label in SERIES if label != EMA or any(run.series(EMA, "ema_loss")[0] for run in runs)]
    lines = [Line2D([], [], color="0.3", marker="o", **SERIES[label]) for label in series]
    figure.legend(lines, series, loc="outside upper center", ncols=len(series), frameon=False)
    run_lines = [Line2D([], [], linewidth=2, **style) for style in entries.values()]
    columns = min(3, len(entries))
    figure.legend(run_lines, entries, loc="outside lower center", ncols=columns, title="Runs", frameon=False)
