"""Saving a figure: whole or not at all, and with one clear line when it cannot be."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_suffix(path: Path) -> None:
    """Raise ValueError unless the path ends in .png, .svg or .pdf: worth knowing before anything is drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot tell the picture's format from {path}: end its name in {', '.join(SUFFIXES)}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format its suffix names, making the folder.

    Raises:
        ValueError: another suffix than .png, .svg or .pdf, or a path that cannot be written.
    """
    check_suffix(path)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower()[1:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise ValueError(f"cannot write the picture {path}: {error.strerror}; choose another output") from error
