"""The report of `effnet-fast eval`: figures as JSON, tables, pictures, and lines for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from effnet_fast.checkpoint import write_json
from effnet_fast.data import Split
from effnet_fast.data.dataset import FileSplit, Superclasses
from effnet_fast.data.listing import printable
from effnet_fast.data.sheet import picture_at
from effnet_fast.report.table import Row, as_text
from effnet_fast.train.calibration import BINS, Reliability, reliability
from effnet_fast.train.evaluate import Predictions
from effnet_fast.train.metrics import coarsen, macro_f1

_PAIRS = 20  # most confused pairs in the JSON
_WORST = 40  # images with the highest loss
_THUMBNAIL = 256  # pixels of their longer sides in memory
_SHOWN = 5  # rows of each table on the terminal


@dataclass(frozen=True)
class Evaluated:
    """A split and a model's predictions on it.

    Attributes:
        name: test, val or train.
        split: the images.
        classes, superclasses: see `data.Dataset`.
        predictions: of the readable images.
        temperature: divides the logits; 1 if the model was not calibrated.
        fitted_to: validation images to which the temperature has just been fitted; None if it has not.
    """

    name: str
    split: Split
    classes: tuple[str, ...]
    superclasses: Superclasses | None
    predictions: Predictions
    temperature: float = 1.0
    fitted_to: int | None = None


def make_report(evaluated: Evaluated) -> dict[str, Any]:
    """Compute the content of SPLIT-evaluation.json: numbers in percent, except losses (nats) and probabilities."""
    from effnet_fast.report.confusion import confused_pairs

    result = evaluated.predictions.result()
    confusion = result.confusion.numpy()
    return {
        "split": evaluated.name,
        "images": result.images,
        "top1": result.top1,
        "top5": result.top5,
        "macro_f1": macro_f1(confusion),
        "temperature": evaluated.temperature,
        **_probabilistic(evaluated.predictions, evaluated.temperature),
        "calibration": _calibration(evaluated),
        "superclasses": _superclasses(evaluated.superclasses, confusion),
        "confusion": confusion.tolist(),
        "confused_pairs": confused_pairs(evaluated.classes, confusion, _PAIRS),
        "worst": _worst(evaluated),
    }


def _probabilistic(predictions: Predictions, temperature: float) -> dict[str, Any]:
    """Figures that depend on the temperature."""
    bins = reliability(predictions, temperature)
    return {"loss": float(predictions.losses(temperature).mean()), "ece": bins.ece, "reliability": _rows(bins)}


def _rows(bins: Reliability) -> list[Row]:
    return [
        {"low": m / BINS, "high": (m + 1) / BINS, "images": images, "confidence": confidence, "accuracy": accuracy}
        for m, (images, confidence, accuracy) in enumerate(
            zip(bins.images.tolist(), bins.confidence.tolist(), bins.accuracy.tolist(), strict=True)
        )
    ]


def _calibration(evaluated: Evaluated) -> dict[str, Any] | None:
    """The figures without the temperature, to compare with those of the report."""
    if evaluated.temperature == 1 and evaluated.fitted_to is None:
        return None
    fitted = {"fitted_to": None if evaluated.fitted_to is None else "val", "fitted_images": evaluated.fitted_to}
    return {**fitted, "before": _probabilistic(evaluated.predictions, 1.0)}


def _superclasses(superclasses: Superclasses | None, confusion: np.ndarray) -> dict[str, Any] | None:
    from effnet_fast.report.confusion import per_class

    if superclasses is None:
        return None
    coarse = coarsen(confusion, superclasses.of_class, len(superclasses.names))
    return {
        "top1": 100 * float(coarse.trace() / coarse.sum()),
        "classes": per_class(superclasses.names, coarse),
        "confusion": coarse.tolist(),
    }


def _worst(evaluated: Evaluated) -> list[Row]:
    """The images with the highest loss."""
    predictions, split = evaluated.predictions, evaluated.split
    losses = predictions.losses(evaluated.temperature)
    probabilities = predictions.probabilities(evaluated.temperature)
    rows = []
    for i in losses.argsort(descending=True, stable=True)[:_WORST].tolist():
        position, true = int(predictions.positions[i]), int(predictions.labels[i])
        predicted = int(probabilities[i].argmax())
        rows.append(
            {
                "position": position,
                "file": printable(split.files[position].path) if isinstance(split, FileSplit) else None,
                "true": evaluated.classes[true],
                "true_probability": float(probabilities[i, true]),
                "predicted": evaluated.classes[predicted],
                "probability": float(probabilities[i, predicted]),
                "loss": float(losses[i]),
            }
        )
    return rows


def write_report(evaluated: Evaluated, report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the report's files to a folder and return them.

    Raises:
        ValueError, OSError: a file cannot be written, or an image of the sheet cannot be read again.
    """
    from effnet_fast.report.confusion import plot_confusion, write_confused_pairs, write_per_class
    from effnet_fast.report.image_sheet import plot_images
    from effnet_fast.report.reliability import plot_reliability

    written: list[Path] = []

    def named(ending: str) -> Path:
        written.append(folder / f"{evaluated.name}-{ending}")
        return written[-1]

    write_json(named("evaluation.json"), report)
    confusion = np.array(report["confusion"])
    write_per_class(named("per-class.csv"), evaluated.classes, confusion)
    write_confused_pairs(named("confused-pairs.csv"), evaluated.classes, confusion)
    plot_confusion(named("confusion.png"), evaluated.classes, confusion)
    if evaluated.superclasses is not None:
        names, coarse = evaluated.superclasses.names, np.array(report["superclasses"]["confusion"])
        write_per_class(named("superclasses.csv"), names, coarse)
        plot_confusion(named("superclass-confusion.png"), names, coarse, "superclasses")
    plot_reliability(named("reliability.png"), _panels(report))
    worst = report["worst"]
    plot_images(
        named("worst.png"),
        f"Highest loss of {report['images']:,} {evaluated.name} images",
        [_thumbnail(picture_at(evaluated.split, row["position"])) for row in worst],
        [
            (f"true: {row['true']}", f"predicted: {row['predicted']}", f"{100 * row['probability']:.1f} %")
            for row in worst
        ],
    )
    return written


def _thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    """A photograph at the size of the sheet's cells, uint8 [H, W, 3]; small images stay as they are."""
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(picture)


def _panels(report: dict[str, Any]) -> dict[str, list[Row]]:
    """Title -> bins: before and after calibration, or the only ones."""
    calibrated = f"temperature {report['temperature']:.3g}: ECE {report['ece']:.2f} %"
    if report["calibration"] is None:
        return {f"ECE {report['ece']:.2f} %": report["reliability"]}
    before = report["calibration"]["before"]
    return {f"temperature 1: ECE {before['ece']:.2f} %": before["reliability"], calibrated: report["reliability"]}


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [f"macro-F1 {report['macro_f1']:.2f} %  expected calibration error {report['ece']:.2f} % ({BINS} bins)"]
    if report["calibration"] is not None:
        before, fitted = report["calibration"]["before"], report["calibration"]["fitted_images"]
        origin = "of the checkpoint" if fitted is None else f"fitted to {fitted:,} val images"
        lines.append(
            f"temperature {report['temperature']:.4f} {origin}; on {report['split']}: expected calibration error "
            f"{before['ece']:.2f} % -> {report['ece']:.2f} %, loss {before['loss']:.4f} -> {report['loss']:.4f}"
        )
    if report["superclasses"] is not None:
        rows = [row for row in report["superclasses"]["classes"] if row["images"]]
        lowest = sorted(rows, key=lambda row: row["top1"])[:_SHOWN]
        lines.append(f"superclasses: top-1 {report['superclasses']['top1']:.2f} %; the lowest:\n{as_text(lowest)}")
    if report["confused_pairs"]:
        lines.append(f"most confused (share of the true class in %):\n{as_text(report['confused_pairs'][:_SHOWN])}")
    worst = [{name: row[name] for name in ("true", "predicted", "probability", "loss")} for row in report["worst"]]
    lines.append(f"highest loss:\n{as_text(worst[:_SHOWN])}")
    return "\n".join(lines)
