"""Procedural images: ten shapes on ten textures make a hundred classes, without disk or network.

They replace real images in a first run and in the tests; accuracy on them says nothing about photographs. The colours,
position, scale, angle, phase and noise of image i depend on (seed, i) only, not on the number of images. The code uses
only +, -, *, / and square roots of float32, which every machine rounds alike, so the images are the same everywhere to
the bit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from effnet_fast.data.dataset import ArraySplit, Dataset, channel_statistics
from effnet_fast.data.rng import Purpose, stream, uniforms

Array = NDArray[np.float32]
Pattern = Callable[[Array, Array], NDArray[np.floating]]

_CHUNK = 250  # images rendered at once, so that intermediate arrays fit in the cache
# Widths of the uniform distributions of pixel noise and of a colour around its grey; black is 0 and white is 1.
_NOISE, _TINT = 0.12, 0.3
# Grey levels of the shape and of the texture's two extremes, far from each other.
_GREYS = np.array([[0.9, 0.1, 0.55], [0.9, 0.55, 0.1], [0.1, 0.9, 0.45], [0.1, 0.45, 0.9]])
_DIAGONAL = 0.5**0.5


def _radius(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


def _box(x: Array, y: Array, width: float, height: float) -> Array:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) * 0.87 - y * 0.5 - 0.5, y - 0.75)


def _plus(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0))


# Signed distance to the outline, negative inside, of shapes of radius about 1. No shape is another's mirror image.
SHAPES: dict[str, Pattern] = {
    "disc": lambda x, y: _radius(x, y) - 0.95,
    "square": lambda x, y: _box(x, y, 0.85, 0.85),
    "diamond": lambda x, y: (np.abs(x) + np.abs(y)) * _DIAGONAL - 0.8,
    "triangle": _triangle,
    "ring": lambda x, y: np.abs(_radius(x, y) - 0.75) - 0.22,
    "frame": lambda x, y: np.abs(_box(x, y, 0.7, 0.7)) - 0.22,
    "plus": _plus,
    "saltire": lambda x, y: _plus((x + y) * _DIAGONAL, (x - y) * _DIAGONAL),
    "beam": lambda x, y: _box(x, y, 1.0, 0.35),
    "pillar": lambda x, y: _box(x, y, 0.35, 1.0),
}


def _wave(x: Array) -> Array:
    """A wave of period 1 from -1 to 1, with straight flanks and flat tops."""
    return np.clip(np.abs(x - np.floor(x) - 0.5) * 8 - 2, -1, 1)


def _turn(x: Array, y: Array) -> Array:
    """Roughly the angle of (x, y): it rises from -1 to 3 over one turn."""
    slope = y / (np.abs(x) + np.abs(y) + 1e-6)
    return np.where(x < 0, 2 - slope, slope)


# Values from -1 to 1; periodic ones have period 1. No texture is another's mirror image.
TEXTURES: dict[str, Pattern] = {
    "plain": lambda x, y: np.ones_like(x),
    "rows": lambda x, y: _wave(y),
    "columns": lambda x, y: _wave(x),
    "diagonals": lambda x, y: _wave((x + y) * _DIAGONAL),
    "checks": lambda x, y: _wave(x) * _wave(y),
    "dots": lambda x, y: np.maximum(_wave(x * 0.8) + _wave(y * 0.8), 0) - 1,
    "circles": lambda x, y: _wave(_radius(x, y)),
    "quarters": lambda x, y: np.clip(x * y * 20, -1, 1),
    "rays": lambda x, y: _wave(_turn(x, y) * 1.5),
    "fade": lambda x, y: np.clip((x + y) * 0.6, -1, 1),
}

CLASSES = tuple(f"{shape} on {texture}" for shape in SHAPES for texture in TEXTURES)


@functools.lru_cache(maxsize=2)  # a search trains many models in one process; rendering takes a second each time
def load_synthetic(seed: int = 0, train_size: int = 10_000, test_size: int = 2_000, size: int = 32) -> Dataset:
    """Render a hundred classes of procedural images, as read-only arrays; image i is of class i % 100.

    Args:
        seed: key of every image.
        train_size, test_size: images in each split.
        size: side of the images in pixels.
    """
    train, test = (
        _split(seed, purpose, count, size)
        for purpose, count in ((Purpose.SYNTHETIC_TRAIN, train_size), (Purpose.SYNTHETIC_TEST, test_size))
    )
    mean, std = channel_statistics(train.images)
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(split.images.tobytes())
        digest.update(split.labels.tobytes())
    return Dataset("synthetic", CLASSES, mean, std, train, test, native_size=size, fingerprint=digest.hexdigest())


def _split(seed: int, purpose: int, count: int, size: int) -> ArraySplit:
    indices = np.arange(count)
    images = np.empty((count, size, size, 3), np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = indices[start : start + _CHUNK]
        images[chunk] = _render(seed, purpose, chunk, size)
    images.setflags(write=False)
    return ArraySplit(images, indices % len(CLASSES))


def _render(seed: int, purpose: int, indices: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Render images uint8 [N, size, size, 3]; coordinates run from -1 to 1."""
    shape, texture = np.divmod(indices % len(CLASSES), len(TEXTURES))
    draws = uniforms(seed, stream(purpose), indices, 17)
    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]

    def between(column: int, low: float, high: float) -> Array:
        return (low + (high - low) * draws[:, column, None, None]).astype(np.float32)

    # The shape: moved, scaled and rotated by 2 * atan(t); its outline is antialiased.
    radius, t = between(0, 0.6, 0.8), between(1, -0.08, 0.08)
    dx, dy = (x - between(2, -0.2, 0.2)) / radius, (y - between(3, -0.2, 0.2)) / radius
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    distance = _by_kind(SHAPES, shape, cos * dx + sin * dy, cos * dy - sin * dx)
    coverage = np.clip(0.5 - distance * radius * (size / 2), 0, 1)

    # The texture around it, from 0 to 1: moved and scaled.
    frequency = between(4, 1.6, 2.0)
    shade = _by_kind(TEXTURES, texture, x * frequency + between(5, -0.5, 0.5), y * frequency + between(6, -0.5, 0.5))
    shade = shade * 0.5 + 0.5

    greys = _GREYS[(draws[:, 7] * len(_GREYS)).astype(np.int64)]
    colours = (greys[:, :, None] + (draws[:, 8:17].reshape(-1, 3, 3) - 0.5) * _TINT).astype(np.float32)
    figure, first, second = (colours[:, i, None, None, :] for i in range(3))
    background = first + (second - first) * shade[..., None]
    image = background + (figure - background) * coverage[..., None]
    noise = (uniforms(seed, stream(purpose, 1), indices, size * size) - 0.5).astype(np.float32) * _NOISE
    return (np.clip(image + noise.reshape(-1, size, size, 1), 0, 1) * 255 + 0.5).astype(np.uint8)


def _by_kind(patterns: dict[str, Pattern], kinds: NDArray[np.int64], x: Array, y: Array) -> Array:
    """Evaluate pattern number kinds[i] on the coordinates of image i; x and y broadcast to [N, size, size]."""
    x, y = np.broadcast_arrays(x, y)
    out = np.empty(x.shape, np.float32)
    for kind, pattern in enumerate(patterns.values()):
        rows = kinds == kind
        out[rows] = pattern(x[rows], y[rows])
    return out
