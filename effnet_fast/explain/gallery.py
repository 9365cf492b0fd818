"""A gallery of maps: one HTML page that holds all it shows, opens from the disk and asks no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from effnet_fast.data.resize import central_square
from effnet_fast.explain.maps import resize_maps
from effnet_fast.explain.overlay import reduced
from effnet_fast.explain.tables import Record, Table

_PHOTO = 192  # pixels of a thumbnail's longer side
_EXACT = 64  # pixels up to which a thumbnail is kept without loss
_MAP = 96  # pixels of a map's side; the page enlarges it smoothly

# Column of the record -> heading and, on hovering, its meaning.
_COLUMNS = {
    "prediction": ("prediction", "the most probable class"),
    "confidence": ("confidence", "its probability"),
    "target": ("map of", "the class whose evidence the map shows"),
    "target_probability": ("probability", "of that class"),
    "energy_top10": ("top 10 %", "share of the map in the top 10 % of its pixels: higher is more focused"),
    "entropy": ("entropy", "of the map over its pixels, 1 is flat: lower is more focused"),
    "deletion": ("deletion", "area under the probability as the map's pixels are removed: lower is more faithful"),
    "insertion": ("insertion", "area under the probability as the map's pixels are shown: higher is more faithful"),
    "infidelity": ("infidelity", "Captum's: lower is more faithful"),
    "sensitivity": ("sensitivity", "Captum's sensitivity_max: lower is steadier"),
    "agreement": ("agreement", "mean Spearman correlation with the other models' maps"),
}


@dataclass(frozen=True)
class Card:
    """An image with its record (see tables.map_rows) and each model's map [h, w] of its central square, 0 to 1."""

    record: Record
    image: Image.Image
    maps: dict[str, NDArray[np.float32]]


def page(title: str, cards: Iterable[Card], labels: dict[str, str], summary: Table, note: str, colormap: str) -> str:
    """The page's HTML.

    Args:
        title: of the page.
        cards: what to show; taken one at a time.
        labels: name of each model -> how people call it.
        summary: mean and spread of each model, see `tables.Summary`.
        note: what the page holds, in words.
        colormap: a matplotlib colour map.
    """
    palette = (colormaps[colormap](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8).tobytes()
    classes: set[str] = set()
    articles = []
    for card in cards:
        shown = _classes(card.record)
        classes.update(shown)
        articles.append(_article(card, labels, palette, shown))
    template = resources.files("effnet_fast.explain").joinpath("gallery.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(title),
        note=escape(note),
        colours=", ".join(f"#{palette[3 * i : 3 * i + 3].hex()}" for i in range(0, 256, 15)),
        options="".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in sorted(classes)),
        summary=_summary(summary, labels),
        articles="\n".join(articles),
    )


def _classes(record: Record) -> list[str]:
    """What the class filter finds an image by: its true class or, where none is known, what the models predict."""
    if record["label"] is not None:
        return [record["label"]]
    return sorted({facts["prediction"] for facts in record["models"].values()})


def _article(card: Card, labels: dict[str, str], palette: bytes, classes: Sequence[str]) -> str:
    record = card.record
    predictions = {facts["prediction"] for facts in record["models"].values()}
    agreement = record["agreement"]
    facts = [
        *([f"class {escape(record['label'])}"] if record["label"] is not None else []),
        f"{record['width']} x {record['height']} px",
        *([f"agreement {agreement:.2f}"] if agreement is not None else []),
    ]
    small = reduced(card.image, _PHOTO)
    figures = "".join(_figure(name, card, labels, palette) for name in record["models"])
    return (
        f'<article data-classes="{escape("|".join(classes))}" '
        f'data-agreement="{"" if agreement is None else round(agreement, 4)}" '
        f'data-alike="{int(len(predictions) == 1)}" style="--photo: url({_photo(small)}); '
        f'--aspect: {small.width} / {small.height}"{" class=exact" if max(small.size) <= _EXACT else ""}>'
        f"<header><b>{escape(record['image'])}</b> <span>{' · '.join(facts)}</span></header>"
        f'<div class="strip"><figure><div class="stack"></div><figcaption>original</figcaption></figure>{figures}</div>'
        f"<details><summary>numbers</summary>{_table(record, labels)}</details></article>"
    )


def _figure(name: str, card: Card, labels: dict[str, str], palette: bytes) -> str:
    record, facts = card.record, card.record["models"][name]
    width, height = record["width"], record["height"]
    left, top, side = central_square(width, height)
    place = (
        f"left: {100 * left / width:.3f}%; top: {100 * top / height:.3f}%; "
        f"width: {100 * side / width:.3f}%; height: {100 * side / height:.3f}%"
    )
    verdict = ""
    if record["label"] is not None:
        verdict = ' class="right"' if facts["prediction"] == record["label"] else ' class="wrong"'
    of = "" if facts["target"] == facts["prediction"] else f"<br>map of {escape(facts['target'])}"
    return (
        f'<figure><div class="stack"><img alt="map of {escape(name)}" src="{_heat(card.maps[name], palette)}" '
        f'style="{place}"></div><figcaption>{escape(labels[name])}<br>'
        f"<span{verdict}>{escape(facts['prediction'])} {facts['confidence']:.0%}</span>{of}</figcaption></figure>"
    )


def _table(record: Record, labels: dict[str, str]) -> str:
    columns = [name for name in _COLUMNS if name == "agreement" or any(name in m for m in record["models"].values())]
    rows = [
        [escape(labels[model])]
        + [_cell((facts | {"agreement": record["agreement_with_others"].get(model)}).get(name)) for name in columns]
        for model, facts in record["models"].items()
    ]
    headings = [f'<th title="{escape(_COLUMNS[name][1])}">{_COLUMNS[name][0]}</th>' for name in columns]
    return _html_table(["<th>model</th>", *headings], rows)


def _summary(summary: Table, labels: dict[str, str]) -> str:
    scores = [key.removesuffix("_mean") for key in summary[0] if key.endswith("_mean")]
    headings = []
    for name in scores:
        heading, meaning = _COLUMNS.get(name, ("top-1 (%)", "share of images whose true class is the most probable"))
        headings.append(f'<th title="{escape(meaning)}">{heading}</th>')
    rows = []
    for row in summary:
        cells = [escape(labels[row["model"]]), str(row["images"])]
        for name in scores:
            spread = row.get(f"{name}_std")
            cells.append(_cell(row[f"{name}_mean"]) + (f" <small>± {spread:.3f}</small>" if spread is not None else ""))
        rows.append(cells)
    return _html_table(["<th>model</th>", "<th>images</th>", *headings], rows)


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(headings)}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if value is None:
        return "–"  # noqa: RUF001 (the sign for an empty cell)
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _photo(image: Image.Image) -> str:
    exact = max(image.size) <= _EXACT
    return _data_uri(image, "png") if exact else _data_uri(image, "jpeg", quality=82)


def _heat(values: NDArray[np.float32], palette: bytes) -> str:
    """A map as a picture of 256 colours."""
    side = resize_maps(torch.from_numpy(values)[None], _MAP, _MAP)[0].clamp(0, 1)
    picture = Image.fromarray((side * 255).round().byte().numpy()).convert("P")
    picture.putpalette(palette)
    return _data_uri(picture, "png", optimize=True)


def _data_uri(image: Image.Image, kind: str, **options: object) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)  # type: ignore[arg-type]
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
