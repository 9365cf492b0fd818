"""Format tables as CSV or as text for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]  # column -> value


def as_csv(rows: Sequence[Row]) -> str:
    """Format rows as CSV with the first row's columns; None becomes an empty cell, and lists are joined by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _join(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def as_text(rows: Sequence[Row]) -> str:
    """Format rows in aligned columns: text left-aligned, numbers right-aligned."""
    cells = [list(rows[0]), *([format_value(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_numeric = [not isinstance(value, str) for value in rows[0].values()]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def format_value(value: Any) -> str:
    """Format one value: floats with 4 significant digits, integers with thousands separators, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(_join(value))


def _join(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
