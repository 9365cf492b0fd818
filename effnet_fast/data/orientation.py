"""Read an image's orientation and turn the image upright; no other module reads the orientation.

Orientation is Exif's tag 0x0112, a number from 1 (upright) to 8. Pillow finds it in JPEG, PNG (eXIf and raw profiles),
WebP and TIFF, and in XMP where Exif has none. Decoders must not adjust the orientation themselves, because they
disagree about unusual metadata.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TAG = 0x0112


class Turn(NamedTuple):
    """How to turn stored pixels upright: transpose first, then mirror.

    Attributes:
        transpose: swap rows and columns.
        mirror_x: then mirror left to right.
        mirror_y: then mirror top to bottom.
    """

    transpose: bool
    mirror_x: bool
    mirror_y: bool


# Exif 2.32, section 4.6.4, tag Orientation.
TURNS = {
    1: Turn(False, False, False),
    2: Turn(False, True, False),
    3: Turn(False, True, True),
    4: Turn(False, False, True),
    5: Turn(True, False, False),
    6: Turn(True, True, False),
    7: Turn(True, True, True),
    8: Turn(True, False, True),
}
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_orientation(image: Image.Image) -> int:
    """Orientation of an image, 1 to 8; 1 if the metadata has none, another value, or cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = image.getexif().get(_TAG, 1)
        except Exception:  # damaged metadata can raise anything, and the pixels are still good
            return 1
    return int(value) if value in TURNS else 1


def turn_image(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image upright; its metadata is neither read nor rewritten."""
    return image.transpose(_METHODS[orientation]) if orientation in _METHODS else image


def turn_pixels(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn pixels [H, W, C] upright; returns a view."""
    turn = TURNS[orientation]
    if turn.transpose:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if turn.mirror_y else 1, :: -1 if turn.mirror_x else 1]


def stored_mirrors(orientation: int) -> tuple[bool, bool]:
    """Whether turning mirrors the stored y axis, and the stored x axis."""
    transpose, mirror_x, mirror_y = TURNS[orientation]
    return (mirror_x, mirror_y) if transpose else (mirror_y, mirror_x)


def turn_matrix(orientation: int, size: int) -> list[list[float]]:
    """Map [2, 3] from points (x, y, 1) of the upright image to stored points; both have `size` pixels a side."""
    transpose, mirror_x, mirror_y = TURNS[orientation]
    x = [-1.0, 0.0, float(size)] if mirror_x else [1.0, 0.0, 0.0]
    y = [0.0, -1.0, float(size)] if mirror_y else [0.0, 1.0, 0.0]
    return [y, x] if transpose else [x, y]
