"""Render one self-contained HTML file with a sortable table and pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from effnet_fast.report.table import format_value


def render_page(
    title: str, rows: Sequence[dict[str, Any]], pictures: dict[str, Path], note: str, marked: str | None = None
) -> str:
    """Render the page.

    Args:
        title: the page's title.
        rows: rows of the table, all with the same keys.
        pictures: caption -> SVG file, which is embedded.
        note: text above the table.
        marked: highlight the row whose first column has this value; None for no row.
    """
    text = resources.files("effnet_fast.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.render(
        title=title,
        note=note,
        columns=list(rows[0]),
        rows=[
            {
                "marked": next(iter(row.values())) == marked,
                "cells": [{"key": _sort_key(value), "text": format_value(value)} for value in row.values()],
            }
            for row in rows
        ],
        pictures={
            label: f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
            for label, path in pictures.items()
        },
    )


def _sort_key(value: Any) -> str:
    """Return a cell's sort key: numbers at full precision, unknown values as an empty string."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return repr(value) if isinstance(value, int | float) else format_value(value)
