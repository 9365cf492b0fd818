"""The colormap `efficientnet`: blue to red like jet in figure 7 of the EfficientNet paper, but perceptually uniform.

The colours are equally spaced along a path through the Oklab space (Ottosson 2020).
Importing this module registers the colormap with matplotlib.
"""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

NAME = "efficientnet"

# Lightness, chroma and hue (degrees) in Oklab: blue, light blue, cyan, green, yellow, orange, red; all within sRGB.
_ANCHORS = (
    (0.38, 0.19, 264),
    (0.60, 0.135, 250),
    (0.78, 0.13, 200),
    (0.83, 0.19, 150),
    (0.92, 0.185, 108),
    (0.76, 0.17, 65),
    (0.58, 0.21, 28),
)
_LMS_FROM_OKLAB = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
)
_RGB_FROM_LMS = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def _colors(count: int = 256) -> NDArray[np.float64]:
    """Return `count` colours at equal distances along the path through the anchors: sRGB [count, 3], 0 to 1."""
    lightness, chroma, degrees = np.array(_ANCHORS).T
    hue = np.radians(degrees)
    anchors = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    path = PchipInterpolator(np.linspace(0, 1, len(anchors)), anchors)(np.linspace(0, 1, 16 * count))
    distance = np.concatenate([[0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
    samples = np.linspace(0, distance[-1], count)
    return _srgb_from_oklab(np.stack([np.interp(samples, distance, axis) for axis in path.T], axis=1))


def _srgb_from_oklab(colors: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = ((colors @ _LMS_FROM_OKLAB.T) ** 3 @ _RGB_FROM_LMS.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


colormaps.register(ListedColormap(_colors(), NAME), force=True)  # force: this module may be reloaded
