"""Read image files that passed their examination but may be unreadable now: report them and replace their images."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from effnet_fast.data.dataset import FileSplit
from effnet_fast.data.decode import read_image

_ATTEMPTS = 16  # files in a row that may be unreadable before the folder counts as lost


class Reading(NamedTuple):
    """What was read for one index of a split.

    Attributes:
        pixels: uint8 [S, S, 3].
        label: class of the pixels, or -1 if evaluation must not count them.
        error: why the file itself cannot be read; empty if it can.
    """

    pixels: NDArray[np.uint8]
    label: int
    error: str = ""


def read_or_replace(split: FileSplit, index: int, size: int, training: bool) -> Reading:
    """Read an image. Training replaces an unreadable one by the split's next readable image, evaluation by black.

    Raises:
        ValueError: the file cannot be read, and the split does not skip such files or the ones after it fail too.
    """
    file = split.files[index]
    try:
        return Reading(read_image(file.path, size, file.orientation), int(split.labels[index]))
    except ValueError as error:
        if not split.skip_unreadable:
            raise
        message = str(error)
    for other in (np.arange(index + 1, index + _ATTEMPTS) % len(split)).tolist():
        file = split.files[other]
        try:
            pixels = read_image(file.path, size, file.orientation)
        except ValueError:
            continue
        if training:
            return Reading(pixels, int(split.labels[other]), message)
        return Reading(np.zeros_like(pixels), -1, message)
    raise ValueError(f"{message}; nor can the files after it: is the folder still there?")


class SkippedFiles:
    """Reports each file that a loader skips once, and counts them."""

    def __init__(self) -> None:
        self._errors: set[str] = set()

    def report(self, errors: Iterable[str]) -> None:
        for error in errors:
            if error and error not in self._errors:
                self._errors.add(error)
                print(f"warning: skipped: {error} ({len(self._errors)} so far)", file=sys.stderr)
