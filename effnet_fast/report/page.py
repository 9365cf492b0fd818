"""One HTML file that holds pictures and a table which sorts by a click on its head; it asks nothing of the network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnet_fast.report.table import shown

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem; color: #111 }
img { max-width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; white-space: nowrap }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: right }
th { border-bottom: 2px solid #111 }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid #0072B2 }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
td:first-child, th:first-child { text-align: left }
tr.marked td { font-weight: 700; background: #eee }
"""

_SCRIPT = """
for (const [column, head] of [...document.querySelectorAll("th")].entries()) {
  head.firstChild.onclick = () => {
    const order = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of document.querySelectorAll("th")) other.ariaSort = "none";
    head.ariaSort = order > 0 ? "ascending" : "descending";
    const body = document.querySelector("tbody");
    const key = row => row.children[column].dataset.key;
    const compare = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
      const difference = key(a) - key(b);
      return order * (Number.isNaN(difference) ? key(a).localeCompare(key(b)) : difference);
    };
    body.append(...[...body.children].sort(compare));
  };
}
"""


def page(
    title: str, rows: Sequence[dict[str, Any]], pictures: dict[str, Path], note: str, marked: str | None = None
) -> str:
    """The file's text.

    Args:
        title: of the page.
        rows: of the table, under common columns.
        pictures: SVG files by what they show, which are copied into the page.
        note: a line above the table.
        marked: first cell of the row that is set in bold, if any.
    """
    figures = "\n".join(
        f'<figure><img alt="{html.escape(label)}" src="data:image/svg+xml;base64,{_base64(path)}">'
        f"<figcaption>{html.escape(label)}</figcaption></figure>"
        for label, path in pictures.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(note)}</p>
{_table(rows, marked)}
{figures}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _table(rows: Sequence[dict[str, Any]], marked: str | None) -> str:
    heads = "".join(f'<th aria-sort="none"><button>{html.escape(name)}</button></th>' for name in rows[0])
    lines = "\n".join(
        f"<tr{' class=marked' if next(iter(row.values())) == marked else ''}>"
        + "".join(
            f'<td data-key="{html.escape(_key(value))}">{html.escape(shown(value))}</td>' for value in row.values()
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _key(value: Any) -> str:
    """What a cell sorts by: numbers at full precision, nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return repr(value) if isinstance(value, int | float) else shown(value)
