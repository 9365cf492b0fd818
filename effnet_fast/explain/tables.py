"""Tables with one row per map, one row per pair of maps, and a summary with one row per model."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator
from typing import Any

SCORES = ("confidence", "energy_top10", "entropy", "deletion", "deletion_random", "insertion", "insertion_random")
OPTIONAL_SCORES = ("infidelity", "sensitivity")  # computed with --infidelity and --sensitivity

Record = dict[str, Any]
Table = list[dict[str, Any]]


class Tables:
    """maps.csv, agreement.csv and summary.csv, filled one record at a time."""

    def __init__(self) -> None:
        self.maps, self.agreement, self.summary = CsvTable(), CsvTable(), Summary()

    def add(self, record: Record) -> None:
        """Add the record of one image."""
        for row in map_rows(record):
            self.maps.add(row)
            self.summary.add(row)
        for row in pair_rows(record):
            self.agreement.add(row)

    def files(self) -> dict[str, bytes]:
        """Return the content of each file by name."""
        summary = CsvTable()
        for row in self.summary.rows():
            summary.add(row)
        return {
            "maps.csv": self.maps.content(),
            "agreement.csv": self.agreement.content(),
            "summary.csv": summary.content(),
        }


def map_rows(record: Record) -> Iterator[dict[str, Any]]:
    """Yield a row for each model's map of one image."""
    for model, result in record["models"].items():
        yield {
            "image": record["image"],
            "class": record["label"],
            "width": record["width"],
            "height": record["height"],
            "model": model,
            **result,
            "agreement": record["agreement_with_others"].get(model),
        }


def pair_rows(record: Record) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair of models: the correlation of their maps of one image."""
    for first, second, value in record["pairs"]:
        yield {"image": record["image"], "first": first, "second": second, "spearman": value}


class CsvTable:
    """CSV text with a header. Floats are rounded to six decimals; None becomes an empty cell."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._writer: csv.DictWriter[str] | None = None

    def add(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._text, list(row))
            self._writer.writeheader()
        self._writer.writerow({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()})

    def content(self) -> bytes:
        return self._text.getvalue().encode()


class Summary:
    """Accumulate scores per model; return their mean and standard deviation over images."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}
        self._images: dict[str, int] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of `map_rows`."""
        values = self._values.setdefault(row["model"], {})
        self._images[row["model"]] = self._images.get(row["model"], 0) + 1
        if row["class"] is not None:
            values.setdefault("top1", []).append(100.0 * (row["prediction"] == row["class"]))
        for name in (*SCORES, *OPTIONAL_SCORES, "agreement"):
            if row.get(name) is not None:
                values.setdefault(name, []).append(row[name])

    def rows(self) -> Table:
        """Return a row for each model: images, maps_with_evidence, and NAME_mean and NAME_std of each score.

        Each score averages over the images that have it: a map without positive evidence has no focus or agreement.
        """
        names = [
            n for n in ("top1", *SCORES, *OPTIONAL_SCORES, "agreement") if any(n in v for v in self._values.values())
        ]
        table = []
        for model, values in self._values.items():
            row: dict[str, Any] = {"model": model, "images": self._images[model]}
            row["maps_with_evidence"] = len(values.get("energy_top10", []))
            for name in names:
                known = values.get(name, [])
                row[f"{name}_mean"] = statistics.fmean(known) if known else None
                if name != "top1":
                    row[f"{name}_std"] = statistics.stdev(known) if len(known) > 1 else None
            table.append(row)
        return table


def format_summary(table: Table) -> list[dict[str, str]]:
    """Format the summary for the terminal: one row per model, each score as mean ± standard deviation."""
    names = [name.removesuffix("_mean") for name in table[0] if name.endswith("_mean")]
    return [
        {"model": row["model"], "images": str(row["images"])} | {name: _mean_and_spread(row, name) for name in names}
        for row in table
    ]


def _mean_and_spread(row: dict[str, Any], name: str) -> str:
    mean, spread = row[f"{name}_mean"], row.get(f"{name}_std")
    if mean is None:
        return "-"
    if name == "top1":
        return f"{mean:.1f} %"
    return f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def finite(value: float) -> float | None:
    """Replace NaN by None, because JSON and CSV have no NaN."""
    return None if math.isnan(value) else value
