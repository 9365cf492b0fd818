"""List the images to explain and their true classes, from folder names or a CSV."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from effnet_fast.data.listing import list_images, printable


@dataclass(frozen=True)
class ImageFile:
    """A file that may be an image.

    Attributes:
        path: the file.
        name: its path relative to the images' folder, with forward slashes.
        label: its true class; None if unknown.
    """

    path: Path
    name: str
    label: str | None

    @property
    def stamp(self) -> list[int]:
        """Size in bytes and modification time in nanoseconds; a changed file has another stamp."""
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns]


def list_image_files(path: Path, labels: dict[str, str] | None, excluded: set[Path]) -> list[ImageFile]:
    """List the visible files under a folder sorted by name (see `data.listing`), or return the single file.

    A file's true class is `labels[name]` or, without labels, the name of its folder.

    Args:
        path: a folder or a file.
        labels: name -> class.
        excluded: folders and files to leave out, such as the output folder.

    Raises:
        FileNotFoundError: `path` does not exist or contains no file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or image at {path}")
    root = path if path.is_dir() else path.parent
    paths = sorted(itertools.chain(*list_images(path))) if path.is_dir() else [path]
    resolved_excluded = {p.resolve() for p in excluded}
    files = []
    for file in paths:
        resolved = file.resolve()
        if resolved_excluded & {resolved, *resolved.parents}:
            continue
        name = printable(file.relative_to(root).as_posix())
        label = labels.get(name) if labels is not None else printable(file.absolute().parent.name)
        files.append(ImageFile(file, name, label))
    if not files:
        raise FileNotFoundError(f"{path} contains no files")
    return files


def read_labels(path: Path) -> dict[str, str]:
    """Read true classes, image name -> class, from a CSV with the header `image,class`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a CSV.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of labels at {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    if not rows or not {"image", "class"} <= rows[0].keys():
        raise ValueError(f"{path} must be a CSV with the header image,class and one row per image")
    return {PurePosixPath(row["image"]).as_posix(): row["class"] for row in rows if row["image"] and row["class"]}
