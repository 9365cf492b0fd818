"""What was found, as tables: a row for each map, for each pair of maps, and a summary of each model."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

SCORES = ("confidence", "energy_top10", "entropy", "deletion", "insertion")
OPTIONAL_SCORES = ("infidelity", "sensitivity")  # by flag

Record = dict[str, Any]
Table = list[dict[str, Any]]


def map_rows(record: Record) -> Iterator[dict[str, Any]]:
    """A row for each model's map of one image."""
    for model, facts in record["models"].items():
        yield {
            "image": record["image"],
            "class": record["label"],
            "width": record["width"],
            "height": record["height"],
            "model": model,
            **facts,
            "agreement": record["agreement_with_others"].get(model),
        }


def pair_rows(record: Record) -> Iterator[dict[str, Any]]:
    """A row for each pair of models that explained one image."""
    for first, second, value in record["pairs"]:
        yield {"image": record["image"], "first": first, "second": second, "spearman": value}


class Summary:
    """Mean and spread (standard deviation) over images, for each model; fed one record at a time."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}
        self._images: dict[str, int] = {}

    def add(self, record: Record) -> None:
        for row in map_rows(record):
            values = self._values.setdefault(row["model"], {})
            self._images[row["model"]] = self._images.get(row["model"], 0) + 1
            if row["class"] is not None:
                values.setdefault("top1", []).append(100.0 * (row["prediction"] == row["class"]))
            for name in (*SCORES, *OPTIONAL_SCORES, "agreement"):
                if row.get(name) is not None:
                    values.setdefault(name, []).append(row[name])

    def rows(self) -> Table:
        """A row for each model: images, maps with evidence, and NAME_mean and NAME_std of each score.

        A score is over the images that have it: a map without positive evidence has no focus and no agreement.
        """
        names = [
            n for n in ("top1", *SCORES, *OPTIONAL_SCORES, "agreement") if any(n in v for v in self._values.values())
        ]
        table = []
        for model, values in self._values.items():
            row: dict[str, Any] = {"model": model, "images": self._images[model]}
            row["maps_with_evidence"] = len(values.get("energy_top10", []))
            for name in names:
                found = values.get(name, [])
                row[f"{name}_mean"] = statistics.fmean(found) if found else None
                if name != "top1":
                    row[f"{name}_std"] = statistics.stdev(found) if len(found) > 1 else None
            table.append(row)
        return table


def readable(table: Table) -> list[dict[str, str]]:
    """The summary for people: a row for each model, each score as mean ± spread."""
    scores = [name.removesuffix("_mean") for name in table[0] if name.endswith("_mean")]
    return [
        {"model": row["model"], "images": str(row["images"])} | {name: _mean_and_spread(row, name) for name in scores}
        for row in table
    ]


def _mean_and_spread(row: dict[str, Any], name: str) -> str:
    mean, spread = row[f"{name}_mean"], row.get(f"{name}_std")
    if mean is None:
        return "-"
    if name == "top1":
        return f"{mean:.1f} %"
    return f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def to_csv(rows: Iterable[dict[str, Any]]) -> bytes:
    """CSV with a header; numbers rounded to six decimals, empty where there is none."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row))
            writer.writeheader()
        writer.writerow({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()})
    return text.getvalue().encode()


def finite(value: float) -> float | None:
    """NaN, which JSON and CSV cannot hold, as None."""
    return None if math.isnan(value) else value
