"""Decode image files with Pillow: whole and upright, or only the square that the model sees."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from effnet_fast.data.listing import printable
from effnet_fast.data.orientation import read_orientation, stored_mirrors, turn_image, turn_pixels
from effnet_fast.data.resize import resize_strips
from effnet_fast.faults import is_out_of_memory

# Formats are recognised by content. EPS is not among them: Pillow runs Ghostscript on it.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_STRIP = 1 << 18  # pixels decoded to RGB at once
# A larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but not below `_DRAFT_MARGIN` times the model's size. This
# saves memory but changes the resized pixels by a few levels of 255, so smaller pictures are decoded at full size.
DRAFT_PIXELS = 1 << 25
_DRAFT_MARGIN = 8


@contextlib.contextmanager
def open_image(file: Path | bytes) -> Iterator[Image.Image]:
    """Open an image file, or the bytes of one, without decoding its pixels.

    Raises:
        ValueError: the file cannot be opened, or the body fails to decode it; the message gives the reason only.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures and odd metadata, which do no harm
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
                # TIFF and 16-bit PNG; decoders disagree about the conversion to 8 bits.
                if image.mode.startswith(("I", "F")):
                    raise ValueError("16-bit or float grey: convert it to 8 bits")
                yield image
    except UnidentifiedImageError as error:
        is_empty = len(file) == 0 if isinstance(file, bytes) else file.stat().st_size == 0
        raise ValueError("the file is empty" if is_empty else "not an image in a format that can be decoded") from error
    except Exception as error:  # a damaged image can raise anything
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason) from error


def load_image(path: Path) -> Image.Image:
    """Decode an image file: the whole picture, upright, RGB, without metadata.

    Raises:
        ValueError: the file cannot be read or decoded.
    """
    with named(path), open_image(path) as image:
        return upright(image)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the file's name to the ValueErrors of the body."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot read the image {printable(path)}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Turn an image upright and convert it to RGB without metadata; the argument is not changed."""
    turned = turn_image(image, read_orientation(image)).convert("RGB")
    turned.info.clear()  # or a second call would turn it again
    return turned


def read_square(image: Image.Image, size: int, orientation: int) -> NDArray[np.uint8]:
    """Crop the central square, resize it and turn it upright: uint8 [size, size, 3].

    The square is central in the upright picture. If the margin is odd, one side has an extra pixel, and a turn that
    mirrors the axis moves it to the other side.
    """
    width, height = image.size
    side = min(width, height)
    mirror_y, mirror_x = stored_mirrors(orientation)
    left, top = (width - side + mirror_x) // 2, (height - side + mirror_y) // 2
    strips = (np.asarray(strip) for strip in rgb_strips(image, (left, top, left + side, top + side)))
    return turn_pixels(resize_strips(strips, side, size), orientation)


def rgb_strips(image: Image.Image, box: tuple[int, int, int, int]) -> Iterator[Image.Image]:
    """The rows of a box (left, top, right, bottom) in strips of RGB, so that large pictures need little memory."""
    left, top, right, bottom = box
    height = max(1, _STRIP // (right - left))
    for y in range(top, bottom, height):
        yield image.crop((left, y, right, min(y + height, bottom))).convert("RGB")


def read_image(path: Path, size: int, orientation: int | None = None) -> NDArray[np.uint8]:
    """Decode an image file as the model sees it: the central square, resized and upright, uint8 [size, size, 3].

    Args:
        path: the file.
        size: pixels of the model's input.
        orientation: 1 to 8 where it is known; None reads it from the file.

    Raises:
        ValueError: the file cannot be read or decoded.
    """
    with named(path), open_image(path) as image:
        if image.width * image.height > DRAFT_PIXELS:
            image.draft(None, (_DRAFT_MARGIN * size,) * 2)  # does nothing for other formats than JPEG
        return read_square(image, size, read_orientation(image) if orientation is None else orientation)
