"""Images brought to the model's size: decoding (Pillow) and antialiased bilinear resizing (NumPy)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 16  # images at a time, so that the intermediates stay in the cache

# Half values are common (32 px to 40: multiples of 1/6400), and the order in which a product is summed varies with its
# shape. In float64, nudged up by this much, they are rounded alike however many images there are.
_NUDGE = 2.0**-30


@lru_cache(maxsize=8)
def _weights(source: int, target: int) -> NDArray[np.float64]:
    """Rows of bilinear weights [target, source]; borders repeat the outermost pixel, as in DALI.

    Pixel centres are at half integers. Shrinking widens the triangle by the scale, which averages what it covers.
    """
    scale = source / target
    radius = max(1.0, scale)
    centres = (np.arange(target) + 0.5) * scale
    reach = int(np.ceil(radius)) + 1
    taps = np.floor(centres)[:, None] + np.arange(-reach, reach + 1)
    weight = np.maximum(0.0, 1 - np.abs(taps + 0.5 - centres[:, None]) / radius)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], taps.clip(0, source - 1).astype(int)), weight)
    return matrix / matrix.sum(axis=1, keepdims=True)


@lru_cache(maxsize=8)
def _interleaved_weights(source: int, target: int, channels: int) -> NDArray[np.float64]:
    """[source * channels, target * channels]: one product resizes whole rows of interleaved channels."""
    return np.kron(_weights(source, target).T, np.eye(channels)).astype(np.float64, copy=False)


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize uint8 [N, H, W, C] to [N, size, size, C]; images of that size are returned as they are."""
    n, height, width, channels = images.shape
    if height == width == size:
        return images
    rows, columns = _weights(height, size), _interleaved_weights(width, size, channels)
    resized = np.empty((n, size, size, channels), np.uint8)
    for at in range(0, n, _CHUNK):
        chunk = images[at : at + _CHUNK].astype(np.float64).reshape(-1, height, width * channels)
        wide = (rows @ chunk).reshape(-1, width * channels) @ columns
        wide += _NUDGE
        resized[at : at + _CHUNK] = np.rint(wide, out=wide).reshape(-1, size, size, channels)
    return resized


def central_square(width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the central square of the shorter side, in pixels."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def load_image(path: Path) -> Image.Image:
    """Decode an image file and turn it as its EXIF tag says: RGB.

    Raises:
        ValueError: the file cannot be read or decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            return upright(file)
    except Exception as error:  # a broken image can raise anything
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the image {path}: {reason}") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says, in RGB; such an image is left as it is.

    Raises:
        ValueError: grey of 16 bits, about which decoders disagree.
    """
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError("grey of 16 bits: save it with 8")
    return ImageOps.exif_transpose(image).convert("RGB")


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square of an RGB image's shorter side, resized: uint8 [size, size, 3]."""
    left, top, side = central_square(*image.size)
    return resize(np.asarray(image.crop((left, top, left + side, top + side)))[None], size)[0]


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """`load_image`, then `square`.

    Raises:
        ValueError: the file cannot be read or decoded.
    """
    return square(load_image(path), size)
