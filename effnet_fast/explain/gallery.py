"""Render the gallery: one self-contained HTML page with all images embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from jinja2 import StrictUndefined, Template
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from effnet_fast.data.resize import central_square
from effnet_fast.explain.maps import resize_maps
from effnet_fast.explain.overlay import shrink
from effnet_fast.explain.tables import Record, Table

_PHOTO = 192  # pixels of a thumbnail's longer side
_LOSSLESS = 64  # thumbnails up to this many pixels are PNG, larger ones JPEG
_MAP = 96  # side of a map in pixels; the browser enlarges it smoothly

# Key in the record -> (column heading, tooltip).
_COLUMNS = {
    "prediction": ("prediction", "the most probable class"),
    "confidence": ("confidence", "probability of the prediction"),
    "target": ("map of", "the class that the map explains"),
    "target_probability": ("probability", "of the class that the map explains"),
    "top1": ("top-1 (%)", "share of images whose true class is the prediction"),
    "energy_top10": ("top 10 %", "share of the map in the top 10 % of its pixels; higher is more focused"),
    "entropy": ("entropy", "entropy of the map over its pixels, 1 for a flat map; lower is more focused"),
    "deletion": ("deletion", "area under the probability while the map's pixels are removed; lower is more faithful"),
    "deletion_random": ("deletion, random", "deletion of a random map; that of the map should be lower"),
    "insertion": ("insertion", "area under the probability while the map's pixels are shown; higher is more faithful"),
    "insertion_random": ("insertion, random", "insertion of a random map; that of the map should be higher"),
    "infidelity": ("infidelity", "Captum's infidelity; lower is more faithful"),
    "sensitivity": ("sensitivity", "Captum's sensitivity_max; lower is more stable"),
    "agreement": ("agreement", "mean Spearman correlation with the other models' maps"),
}


@dataclass(frozen=True)
class Card:
    """An image, its record (see `records.explain_batch`) and each model's map [h, w], 0 to 1, of its central square."""

    record: Record
    maps: dict[str, NDArray[np.float32]]
    image: Image.Image


def render_gallery(
    title: str, cards: Iterable[Card], labels: dict[str, str], summary: Table, note: str, colormap: str
) -> str:
    """Render the page.

    Args:
        title: the page's title.
        cards: the images; consumed one at a time to save memory.
        labels: model name -> heading.
        summary: see `tables.Summary`.
        note: text that describes what the page shows.
        colormap: name of a matplotlib colormap.
    """
    palette = (colormaps[colormap](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8).tobytes()
    views = [_card_view(card, labels, palette) for card in cards]
    text = resources.files("effnet_fast.explain").joinpath("gallery.html").read_text(encoding="utf-8")
    template = Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.render(
        title=title,
        note=note,
        colors=[f"#{palette[3 * i : 3 * i + 3].hex()}" for i in range(0, 256, 15)],
        classes=sorted({name for view in views for name in view["classes"]}),
        summary=_summary_view(summary, labels),
        cards=views,
    )


def _card_view(card: Card, labels: dict[str, str], palette: bytes) -> dict[str, Any]:
    """Return the template's variables for one image."""
    record = card.record
    predictions = {result["prediction"] for result in record["models"].values()}
    photo = shrink(card.image, _PHOTO)
    lossless = max(photo.size) <= _LOSSLESS
    return {
        "record": record,
        # The class filter uses predictions where the true class is unknown.
        "classes": sorted(predictions) if record["label"] is None else [record["label"]],
        "same": len(predictions) == 1,
        "photo": _data_uri(photo, "png") if lossless else _data_uri(photo, "jpeg", quality=82),
        "aspect": f"{photo.width} / {photo.height}",
        "lossless": lossless,
        "place": _place(record["width"], record["height"]),
        "maps": [
            {"label": labels[name], "source": _map_uri(card.maps[name], palette), **result}
            for name, result in record["models"].items()
        ],
        "table": _table_view(record, labels),
    }


def _place(width: int, height: int) -> str:
    """Return CSS that positions a map over the central square."""
    left, top, side = central_square(width, height)
    return (
        f"left: {100 * left / width:.3f}%; top: {100 * top / height:.3f}%; "
        f"width: {100 * side / width:.3f}%; height: {100 * side / height:.3f}%"
    )


def _table_view(record: Record, labels: dict[str, str]) -> dict[str, Any]:
    rows = {
        model: result | {"agreement": record["agreement_with_others"].get(model)}
        for model, result in record["models"].items()
    }
    names = [name for name in _COLUMNS if any(name in row for row in rows.values())]
    return {
        "columns": [_COLUMNS[name] for name in names],
        "rows": [
            {"model": labels[model], "cells": [(row.get(name), None) for name in names]} for model, row in rows.items()
        ],
    }


def _summary_view(summary: Table, labels: dict[str, str]) -> dict[str, Any]:
    names = [key.removesuffix("_mean") for key in summary[0] if key.endswith("_mean")]
    return {
        "columns": [("images", "explained by the model"), *(_COLUMNS[name] for name in names)],
        "rows": [
            {
                "model": labels[row["model"]],
                "cells": [
                    (row["images"], None),
                    *((row[f"{name}_mean"], row.get(f"{name}_std")) for name in names),
                ],
            }
            for row in summary
        ],
    }


def _map_uri(values: NDArray[np.float32], palette: bytes) -> str:
    """Encode a map as a data URI of a PNG with 256 colours."""
    square = resize_maps(torch.from_numpy(values)[None], _MAP, _MAP)[0].clamp(0, 1)
    picture = Image.fromarray((square * 255).round().byte().numpy()).convert("P")
    picture.putpalette(palette)
    return _data_uri(picture, "png", optimize=True)


def _data_uri(image: Image.Image, kind: str, **options: object) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)  # type: ignore[arg-type]
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
