"""DALI against the resident loader, image by image: only rounding may differ.

Tolerances are in steps of 1/255. Each augmentation rounds to whole values, so pixels near a half can differ by one;
`most` bounds how far later augmentations amplify that, `share` bounds how many pixels differ.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch

from effnet_fast.data.augment_params import Augment
from effnet_fast.data.choose_loader import make_loader
from effnet_fast.data.dataset import ArraySplit
from effnet_fast.data.loader import LoaderSpec
from marks import on_gpu
from plain_spec import PLAIN

N = 96
PIXELS = np.random.default_rng(3).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
SPLIT = ArraySplit(PIXELS, np.arange(N))
SPEC = dataclasses.replace(
    PLAIN, batch_size=32, mean=(0.51, 0.49, 0.44), std=(0.26, 0.25, 0.27), seed=11, num_workers=1
)
ALL = Augment(rotation=15, color_jitter=0.4, random_erasing=0.5)
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=on_gpu)]


def pixels(kind: str, spec: LoaderSpec) -> torch.Tensor:
    """Two epochs of images, in steps of 1/255."""
    loader = make_loader(kind, SPLIT, spec)
    images = torch.cat([images for epoch in (0, 1) for images, _ in loader.epoch(epoch)]).float().cpu()
    loader.close()
    return images if spec.dtype == torch.uint8 else images * 255 * torch.tensor(spec.std).view(3, 1, 1)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    ("name", "augment", "size", "most", "share"),
    [
        ("evaluation", None, 32, 0.001, 0.0),
        ("crop and flip", Augment(), 32, 0.001, 0.0),
        ("crop", Augment(flip=False), 32, 0.001, 0.0),
        ("flip", Augment(crop=False), 32, 0.001, 0.0),
        ("alternating flip", Augment(alternating_flip=True), 32, 0.001, 0.0),
        ("erasing", Augment(random_erasing=0.7), 32, 0.001, 0.0),
        ("rotation", Augment(rotation=15), 32, 1.001, 0.001),
        ("rotation alone", Augment(crop=False, flip=False, rotation=180), 32, 1.001, 0.001),
        ("colour", Augment(color_jitter=0.4), 32, 1.001, 0.001),
        ("enlarging", None, 37, 1.001, 0.002),
        ("shrinking", None, 25, 1.001, 0.002),
        ("RandAugment", Augment(auto_augment="rand"), 32, 0.001, 0.0),
        ("TrivialAugment", Augment(auto_augment="trivial"), 32, 0.001, 0.0),
        ("all", ALL, 32, 3.001, 0.002),
        ("all, enlarging", ALL, 37, 4.001, 0.003),
    ],
)
def test_dali_and_resident_agree(
    name: str, augment: Augment | None, size: int, most: float, share: float, device: torch.device
) -> None:
    pytest.importorskip("nvidia.dali")
    spec = dataclasses.replace(SPEC, augment=augment, image_size=size, device=device)
    error = (pixels("dali", spec) - pixels("resident", spec)).abs()
    print(f"{name}: at most {error.max():.4f}, mean {error.mean():.6f}, differing {(error > 0.5).float().mean():.6f}")
    assert error.max() <= most
    assert (error > 0.5).float().mean() <= share


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 3.3), (torch.uint8, 3.0)])
def test_dali_and_resident_agree_in_every_dtype(dtype: torch.dtype, most: float, device: torch.device) -> None:
    pytest.importorskip("nvidia.dali")
    spec = dataclasses.replace(SPEC, augment=ALL, dtype=dtype, device=device)
    error = (pixels("dali", spec) - pixels("resident", spec)).abs()
    assert error.max() <= most
    assert (error > 0.5).float().mean() <= 0.002


@pytest.mark.parametrize("auto_augment", ["none", "rand", "trivial"])
def test_torch_equals_resident(auto_augment: Literal["none", "rand", "trivial"]) -> None:
    augment = dataclasses.replace(ALL, auto_augment=auto_augment, alternating_flip=auto_augment == "rand")
    spec = dataclasses.replace(SPEC, augment=augment, image_size=37)
    assert torch.equal(pixels("torch", spec), pixels("resident", spec))


def test_the_comparison_detects_other_parameters() -> None:
    """Another seed is far outside the tolerances."""
    plain = pixels("resident", dataclasses.replace(SPEC, augment=ALL))
    other = pixels("resident", dataclasses.replace(SPEC, augment=ALL, seed=12))
    assert (plain - other).abs().mean() > 20


@on_gpu
@pytest.mark.parametrize("kind", ["resident", "torch"])
@pytest.mark.parametrize("augment", [None, ALL], ids=["evaluation", "all"])
def test_a_gpu_gives_the_images_of_the_cpu(kind: str, augment: Augment | None) -> None:
    spec = dataclasses.replace(SPEC, augment=augment, image_size=37)
    on_cpu, on_cuda = (pixels(kind, dataclasses.replace(spec, device=torch.device(d))) for d in ("cpu", "cuda:0"))
    error = (on_cuda - on_cpu).abs()
    assert error.max() <= 4.001
    assert (error > 0.5).float().mean() <= 0.003
