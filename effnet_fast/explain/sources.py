"""The images to explain: files in a folder, and their true classes from folders' names or a CSV."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Source:
    """A file that may be an image.

    Attributes:
        path: where it is.
        name: its path below the images' folder, with forward slashes.
        label: its true class, where one is known.
    """

    path: Path
    name: str
    label: str | None

    @property
    def stamp(self) -> list[int]:
        """Bytes and time of change in nanoseconds, by which a changed file is known."""
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns]


def find_sources(path: Path, labels: dict[str, str] | None, leave_out: set[Path]) -> list[Source]:
    """Every file under a folder, or the one file, in the order of names; hidden ones do not count.

    The true class is what `labels` says of a name or, without labels, the name of the folder that the file is in.

    Args:
        path: a folder or a file.
        labels: name -> class.
        leave_out: folders and files that are no images to explain, such as the output.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no file in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or image at {path}")
    root = path if path.is_dir() else path.parent
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    skipped = {p.resolve() for p in leave_out}
    sources = []
    for file in files:
        relative = file.relative_to(root)
        resolved = file.resolve()
        if any(part.startswith(".") for part in relative.parts) or skipped & {resolved, *resolved.parents}:
            continue
        name = _readable(relative.as_posix())
        label = labels.get(name) if labels is not None else _readable(file.absolute().parent.name)
        sources.append(Source(file, name, label))
    if not sources:
        raise FileNotFoundError(f"{path} holds no files")
    return sources


def _readable(name: str) -> str:
    """A file's name with the bytes that are no UTF-8 spelt out, so that tables and pages can hold it."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def read_labels(path: Path) -> dict[str, str]:
    """True classes from a CSV whose header names the columns `image` and `class`; images are named below their folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such CSV.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of labels at {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV: {error}") from error
    if not rows or not {"image", "class"} <= rows[0].keys():
        raise ValueError(f"{path} must be a CSV with the header image,class and a row for each image")
    return {PurePosixPath(row["image"]).as_posix(): row["class"] for row in rows if row["image"] and row["class"]}
