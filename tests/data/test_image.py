"""A single image is preprocessed as the loaders of an evaluation do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_fast.data.dataset import ArraySplit, FileSplit
from effnet_fast.data.examine import examine_file
from effnet_fast.data.image import load_image, preprocess
from effnet_fast.data.loader import LoaderSpec
from effnet_fast.data.resident import ResidentLoader
from effnet_fast.data.torch_loader import TorchLoader
from plain_spec import PLAIN

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def spec(size: int, images: int) -> LoaderSpec:
    return dataclasses.replace(PLAIN, batch_size=images, image_size=size, mean=MEAN, std=STD)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [32, 40])
def test_images_in_memory(size: int) -> None:
    images = noise(3, 32, 32, 3)
    split = ArraySplit(images, np.zeros(3, np.int64))
    batch, _ = next(iter(ResidentLoader(split, spec(size, 3)).epoch(0)))
    ours = torch.stack([preprocess(Image.fromarray(pixels), size, MEAN, STD) for pixels in images])
    assert torch.equal(ours, batch)


def test_image_files(tmp_path: Path) -> None:
    paths = (tmp_path / "wide.png", tmp_path / "turned.jpg", tmp_path / "grey.png")
    Image.fromarray(noise(40, 64, 3)).save(paths[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(noise(48, 30, 3)).save(paths[1], exif=exif)
    Image.fromarray(noise(33, 33)).save(paths[2])
    split = FileSplit(tuple(examine_file(path).file(path) for path in paths), np.zeros(3, np.int64))
    batch, _ = next(iter(TorchLoader(split, spec(24, 3)).epoch(0)))
    assert torch.equal(torch.stack([preprocess(path, 24, MEAN, STD) for path in paths]), batch)
    assert torch.equal(torch.stack([preprocess(load_image(path), 24, MEAN, STD) for path in paths]), batch)
    # An image that the caller opened still has its orientation.
    assert torch.equal(preprocess(Image.open(paths[1]), 24, MEAN, STD), batch[1])


def test_16_bit_grey_is_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8).astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: 16-bit or float grey"):
        load_image(tmp_path / "deep.png")
