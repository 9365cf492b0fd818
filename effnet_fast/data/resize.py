"""Antialiased bilinear resizing (NumPy)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_CHUNK = 16  # images resized at once, so that intermediate arrays fit in the cache

# Results halfway between two integers are common (32 px to 40: multiples of 1/6400), and the order of summation depends
# on the number of images. Adding this in float64 rounds them alike in every batch.
_NUDGE = 2.0**-30


@lru_cache(maxsize=8)
def _weights(source: int, target: int) -> NDArray[np.float64]:
    """Bilinear weights [target, source]; borders repeat the outermost pixel, as in DALI.

    Pixel centres are at half integers. Shrinking widens the triangle by the scale, which averages the covered pixels.
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
    """Weights [source * channels, target * channels] that resize whole rows of interleaved channels."""
    return np.kron(_weights(source, target).T, np.eye(channels)).astype(np.float64, copy=False)


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize uint8 [N, H, W, C] to [N, size, size, C]; returns the argument if it has that size already."""
    n, height, width, channels = images.shape
    if height == width == size:
        return images
    rows, columns = _weights(height, size), _interleaved_weights(width, size, channels)
    resized = np.empty((n, size, size, channels), np.uint8)
    for start in range(0, n, _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.float64).reshape(-1, height, width * channels)
        values = (rows @ chunk).reshape(-1, width * channels) @ columns
        values += _NUDGE
        resized[start : start + _CHUNK] = np.rint(values, out=values).reshape(-1, size, size, channels)
    return resized


def central_square(width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the central square of the shorter side, in pixels."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def resize_strips(strips: Iterable[NDArray[np.uint8]], side: int, size: int) -> NDArray[np.uint8]:
    """Resize a square picture that arrives in strips of rows, as `resize` would.

    Args:
        strips: uint8 [rows, side, 3] each, from top to bottom, `side` rows in all.
        side: pixels of the picture's side.
        size: pixels of the result's side.

    Returns:
        uint8 [size, size, 3]. Memory is that of a strip and of [size, side, 3] in float64.
    """
    weights = _weights(side, size)
    resized_rows = np.zeros((size, side * 3))
    top = 0
    for strip in strips:
        rows = strip.astype(np.float64).reshape(-1, side * 3)
        strip_weights = weights[:, top : top + len(rows)]
        touched = np.flatnonzero(strip_weights.any(axis=1))
        if len(touched):
            targets = slice(touched[0], touched[-1] + 1)
            resized_rows[targets] += strip_weights[targets] @ rows
        top += len(rows)
    # [side, size * 3] rather than [size, side, 3]: one large matrix product.
    by_column = resized_rows.reshape(size, side, 3).transpose(1, 0, 2).reshape(side, size * 3)
    resized = (weights @ by_column).reshape(size, size, 3).transpose(1, 0, 2)
    return np.rint(resized + _NUDGE).astype(np.uint8)
