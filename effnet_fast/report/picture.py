"""Save figures; raise a one-line error on failure."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from effnet_fast.checkpoint import write_atomically

SUFFIXES = (".png", ".svg", ".pdf")


def check_suffix(path: Path) -> None:
    """Raise ValueError unless the path ends in .png, .svg or .pdf. Call it before drawing."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is not a picture's name: end it in {', '.join(SUFFIXES)}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, creating the folder if necessary.

    Raises:
        ValueError: the suffix is not .png, .svg or .pdf, or the path cannot be written.
    """
    check_suffix(path)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower()[1:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error  # write_atomically wraps it
        raise ValueError(f"cannot write the picture {path}: {reason.strerror}; choose another output") from error
