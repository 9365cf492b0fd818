"""The colormap `efficientnet`, measured with CIEDE2000 (Sharma et al. 2005), which its definition does not use."""

import numpy as np
import pytest
from matplotlib import colormaps

from effnet_fast.config import CamConfig
from effnet_fast.explain import colormap


def cielab(name):
    """256 colours of a colormap: [256, 3]."""
    srgb = colormaps[name](np.linspace(0, 1, 256))[:, :3]
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    f = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def ciede2000(first, second):
    l1, a1, b1 = first.T
    l2, a2, b2 = second.T
    chroma = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1 + 0.5 * (1 - np.sqrt(chroma / (chroma + 25**7)))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, stretch * a1)), np.degrees(np.arctan2(b2, stretch * a2))
    turn = (h2 - h1 + 180) % 360 - 180
    hue, mean_c, mean_l = np.radians((h1 + turn / 2) % 360), (c1 + c2) / 2, (l1 + l2) / 2
    t = 1 - 0.17 * np.cos(hue - np.radians(30)) + 0.24 * np.cos(2 * hue)
    t += 0.32 * np.cos(3 * hue + np.radians(6)) - 0.2 * np.cos(4 * hue - np.radians(63))
    lightness = (l2 - l1) / (1 + 0.015 * (mean_l - 50) ** 2 / np.sqrt(20 + (mean_l - 50) ** 2))
    chroma_part = (c2 - c1) / (1 + 0.045 * mean_c)
    hue_part = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * mean_c * t)
    angle = np.radians(60 * np.exp(-(((np.degrees(hue) - 275) / 25) ** 2)))
    rotation = -np.sin(angle) * 2 * np.sqrt(mean_c**7 / (mean_c**7 + 25**7))
    return np.sqrt(lightness**2 + chroma_part**2 + hue_part**2 + rotation * chroma_part * hue_part)


def test_ciede2000_of_published_pairs():
    """Rows 1, 7 and 25 of Sharma et al. (2005), table 1."""
    first = np.array([[50, 2.6772, -79.7751], [50, 0, 0], [60.2574, -34.0099, 36.2677]])
    second = np.array([[50, 0, -82.7485], [50, -1, 2], [60.4626, -34.1751, 39.4387]])
    assert ciede2000(first, second) == pytest.approx([2.0425, 2.3669, 1.2644], abs=1e-4)


def unevenness(name):
    """Standard deviation of the steps between neighbouring colours, divided by their mean."""
    colors = cielab(name)
    steps = ciede2000(colors[:-1], colors[1:])
    return steps.std() / steps.mean()


def test_steps_are_even():
    assert unevenness("efficientnet") < 0.2
    assert unevenness("jet") > 0.4


def test_blue_to_red_and_default():
    red, _, blue = np.array(colormaps["efficientnet"](0.0)[:3])
    assert blue > 2 * red
    red, _, blue = np.array(colormaps["efficientnet"](1.0)[:3])
    assert red > 2 * blue
    assert 100 < cielab("efficientnet")[:, 0].argmax() < 200, "the brightest colour, yellow, is in the middle"
    assert CamConfig(images_path="", output_path="", checkpoints="run").colormap == colormap.NAME == "efficientnet"
