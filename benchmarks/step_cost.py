"""How a training step's cost grows: `python benchmarks/step_cost.py [--picture FILE] [--out FILE]`.

Varies one of batch size, resolution, width and (on a CPU) threads of a case at a time, and measures the step's
milliseconds (p20, p50, p80). Beside each stands a floor from roofline.py: for each layer the longer of its bytes at the
copy rate and its FLOPs at the rate of a large matrix product, both measured here with as many threads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import roofline
import torch
from harness import Case

from effnet_fast import provenance
from effnet_fast.model.efficientnet import EfficientNet

Row = dict[str, Any]
FACTORS = {"batch size": (0.25, 0.5, 1, 2), "resolution": (0.5, 0.75, 1, 1.5), "width": (0.5, 1, 1.5, 2)}
FIELDS = {"batch size": "batch_size", "resolution": "image_size", "width": "width"}
LABELS = {
    "batch size": "batch size, images",
    "resolution": "resolution, px",
    "width": "width, times B0's",
    "threads": "CPU threads",
}


def variants(axis: str, case: Case) -> list[Case]:
    """The case with one field multiplied by each factor of an axis."""
    value = getattr(case, FIELDS[axis])
    scaled = [type(value)(value * factor) for factor in FACTORS[axis]]
    return [dataclasses.replace(case, **{FIELDS[axis]: size}) for size in scaled]


def points(case: Case, threads: Sequence[int]) -> list[tuple[str, float, Case, int]]:
    """Axis, its value, the case and the CPU threads of every measurement."""
    most = max(threads)
    result = [(axis, getattr(c, FIELDS[axis]), c, most) for axis in FIELDS for c in variants(axis, case)]
    return result + [("threads", count, case, count) for count in threads if len(threads) > 1]


@functools.cache
def rates(threads: int, dtype: str) -> tuple[float, float]:
    """GB/s of a copy and FLOP/s of a large matrix product."""
    torch.set_num_threads(threads)
    return harness.copy_bandwidth(), harness.matrix_rate(dtype)


def floor_ms(case: Case, threads: int) -> float:
    """Least milliseconds of a step."""
    model = harness.make_model(case)
    assert isinstance(model, EfficientNet)
    return roofline.bound(roofline.layers(model, case, harness.DEVICE), *rates(threads, case.dtype)) * 1e3


def measure(case: Case, threads: int, rounds: int) -> list[float]:
    """Milliseconds of the steps of a case."""
    torch.set_num_threads(threads)
    step, batch = harness.make_step(case, "eager"), harness.make_batch(case)
    return harness.alternating({"step": lambda: step(*batch, 0)}, rounds, 2, harness.INNER)["step"]


def picture(path: Path, rows: list[Row], title: str) -> None:
    """Draw a panel per axis: milliseconds measured, with p20 to p80, and the floor; both axes logarithmic."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3 * len(axes_names), 3.4), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(axes_names), sharey=True, squeeze=False)[0], axes_names, strict=True):
        at = [row for row in rows if row["axis"] == name]
        values, p50 = [row["value"] for row in at], [row["ms p50"] for row in at]
        spread = [[m - row["ms p20"] for row, m in zip(at, p50, strict=True)],
                  [row["ms p80"] - m for row, m in zip(at, p50, strict=True)]]  # fmt: skip
        panel.errorbar(values, p50, yerr=spread, marker="o", capsize=3, label="measured, p20 to p80")
        panel.plot(values, [row["floor ms"] for row in at], marker="s", linestyle="--", label="floor")
        panel.set(xscale="log", yscale="log", xlabel=LABELS[name])
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("step, ms")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--rounds", type=int, default=7, help="steps measured at each point")
    parser.add_argument("--picture", type=Path, help="write the plot (.png, .svg or .pdf)")
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    if not case.model.startswith("efficientnet"):
        raise ValueError(f"--model {case.model}: the floor is that of EfficientNet's blocks; name one of those")
    cores = provenance.cores() if harness.DEVICE == "cpu" else 1
    threads = sorted({2**i for i in range(int(math.log2(cores)) + 1)} | {cores})
    print(harness.warning())
    settings = harness.settings_of(case, rounds=args.rounds, rates={n: rates(n, case.dtype) for n in threads})
    rows: list[Row] = []
    for axis, value, variant, count in points(case, threads):
        p20, p50, p80 = harness.quantiles(measure(variant, count, args.rounds))
        floor = floor_ms(variant, count)
        row = {"axis": axis, "value": value, "ms p20": p20, "ms p50": p50, "ms p80": p80, "floor ms": floor}
        print(f"{axis:12s} {value:6g}: {p50:8.1f} ms ({p20:.1f} to {p80:.1f}), floor {floor:.1f} ms", flush=True)
        rows.append(row)
        harness.write(args.out, harness.result("step_cost", settings, rows), quiet=True)
    if args.picture:
        picture(args.picture, rows, f"A training step of {case}, with one of these changed")


if __name__ == "__main__":
    harness.run(main)
