"""Resizing, and decoding single files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from effnet_fast.data.decode import read_image
from effnet_fast.data.resize import resize


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_same_size_returns_the_input() -> None:
    images = noise(2, 32, 32, 3)
    assert resize(images, 32) is images


@pytest.mark.parametrize("size", [5, 24, 37, 100])
def test_a_flat_image_stays_flat(size: int) -> None:
    assert (resize(np.full((1, 32, 20, 3), 137, np.uint8), size) == 137).all()


@pytest.mark.parametrize("size", [34, 37, 86])
def test_enlarging_agrees_with_torch(size: int) -> None:
    images = noise(70, 32, 32, 3)  # more than a chunk
    theirs = F.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2).float(), size, mode="bilinear")
    error = np.abs(resize(images, size) - theirs.permute(0, 2, 3, 1).numpy())
    assert error.max() < 0.501  # rounding alone


def test_shrinking_weights() -> None:
    """Halving, away from the border: weights 1/8, 3/8, 3/8, 1/8 along each axis."""
    image = noise(1, 16, 16, 1)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    expected = (image[0, 5:9, 7:11, 0] * kernel).sum()
    assert abs(resize(image, 8)[0, 3, 4, 0] - expected) <= 0.501


def test_central_square_of_a_file(tmp_path: Path) -> None:
    pixels = noise(20, 33, 3)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert np.array_equal(read_image(tmp_path / "wide.png", 20), pixels[:, 6:26])


def test_grey_palette_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA"):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(noise(8, 8, 3)).convert(mode).save(path)
        assert read_image(path, 8).shape == (8, 8, 3)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nbroken"])
def test_an_unreadable_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png") as caught:
        read_image(path, 8)
    assert "\n" not in str(caught.value)
