"""Summarize a data set: a sheet of sample images with class names, and a text with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from effnet_fast.data.dataset import ArraySplit, Dataset, Split
from effnet_fast.data.decode import load_image

_CELL = 96  # pixels of a picture's side
_CAPTION = 16  # pixels below it
_GAP = 4
_NAMES = 8  # classes that `summarize` lists by name


def sample_sheet(dataset: Dataset, path: Path, rows: int = 4, columns: int = 10) -> None:
    """Write a PNG with one training image of each of up to rows * columns classes, spread evenly over all classes.

    Raises:
        OSError: the path cannot be written.
    """
    labels, first = np.unique(dataset.train.labels, return_index=True)
    shown = np.unique(np.linspace(0, len(labels) - 1, rows * columns).round().astype(np.int64))
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _CAPTION + _GAP) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for cell, i in enumerate(shown):
        x, y = _GAP + cell % columns * (_CELL + _GAP), _GAP + cell // columns * (_CELL + _CAPTION + _GAP)
        sheet.paste(_square(picture_at(dataset.train, int(first[i]))), (x, y))
        caption = dataset.classes[labels[i]]
        while draw.textlength(caption, font) > _CELL:
            caption = caption[:-1]
        draw.text((x, y + _CELL + 1), caption, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def save_images(split: Split, classes: Sequence[str], folder: Path) -> None:
    """Write the images of a split as PNG files: FOLDER/CLASS/NUMBER.png, numbered in the split's order.

    Raises:
        OSError: the folder cannot be written.
    """
    for index, label in enumerate(split.labels):
        path = folder / classes[label] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_at(split, index).save(path)


def summarize(dataset: Dataset) -> str:
    """List splits, counts, sizes, classes, channel statistics and fingerprint, one per line."""
    splits = [(name, getattr(dataset, name)) for name in ("train", "val", "test")]
    rows = [
        (dataset.name, f"{len(dataset.classes)} classes: {_names(dataset.classes)}"),
        *((name, _counts(split)) for name, split in splits if split is not None),
        ("mean", " ".join(f"{value:.4f}" for value in dataset.mean)),
        ("std", " ".join(f"{value:.4f}" for value in dataset.std)),
        ("fingerprint", dataset.fingerprint[:16]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def picture_at(split: Split, index: int) -> Image.Image:
    """The image at a position of a split, whole and upright.

    Raises:
        ValueError: its file cannot be read.
    """
    if isinstance(split, ArraySplit):
        return Image.fromarray(split.images[index])
    return load_image(split.files[index].path)


def _square(picture: Image.Image) -> Image.Image:
    """Fit an image into a cell; the pixels of small images stay visible."""
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _names(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:_NAMES]) + (", ..." if len(classes) > _NAMES else "")


def _counts(split: Split) -> str:
    sizes = np.unique(split.labels, return_counts=True)[1]
    per_class = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    shape = f", {split.images.shape[2]} x {split.images.shape[1]} px" if isinstance(split, ArraySplit) else " in files"
    return f"{len(split)} images{shape}, {per_class} of each class"
