"""List the image files of a folder; train, predict, cam and data all use this module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Lower-case endings of image files; the decoder infers the format from the content, not from the ending.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
    | {".avif", ".jp2", ".ppm", ".pgm"}
)


class Listing(NamedTuple):
    """The visible files below a folder, sorted.

    Attributes:
        images: files whose name ends in one of `SUFFIXES`, in upper or lower case.
        others: all other files.
    """

    images: list[Path]
    others: list[Path]


def list_images(folder: Path) -> Listing:
    """List the files of a folder and of its sub-folders at any depth.

    Links to files and to folders are followed, except for a link that leads back to a folder it lies in. Files and
    folders whose name starts with a dot are left out. A broken link counts as a file: decoding it reports the error.

    Raises:
        OSError: the folder or a sub-folder cannot be read.
    """
    files = sorted(_visible_files(folder, ()))
    is_image = [file.suffix.lower() in SUFFIXES for file in files]
    return Listing(
        [file for file, image in zip(files, is_image, strict=True) if image],
        [file for file, image in zip(files, is_image, strict=True) if not image],
    )


def is_hidden(path: Path) -> bool:
    """Whether a name starts with a dot, such as `.ipynb_checkpoints` or `._photo.jpg`."""
    return path.name.startswith(".")


def printable(path: Path | str) -> str:
    """A file's name in which bytes that are not UTF-8 are escaped, so that any stream or page can contain it."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def _visible_files(folder: Path, parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    stat = os.stat(folder)
    identity = stat.st_dev, stat.st_ino
    if identity in parents:  # a link that leads back up
        return
    for path in folder.iterdir():
        if is_hidden(path):
            continue
        if path.is_dir():
            yield from _visible_files(path, (*parents, identity))
        else:
            yield path
