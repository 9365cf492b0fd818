"""Augmentation parameters: keyed by image, in their ranges, and what their matrices mean."""

from __future__ import annotations

import numpy as np
import pytest

from chi_square import chi_square
from effnet_fast.data.augment_params import Augment, AugmentParams, draw_params

FULL = Augment(rotation=15, color_jitter=0.4, random_erasing=0.5)


def test_parameters_do_not_depend_on_the_batch() -> None:
    whole = draw_params(FULL, 3, 1, np.arange(50), 32)
    part = draw_params(FULL, 3, 1, np.arange(20, 30), 32)
    for name, values in vars(whole).items():
        assert np.array_equal(values[20:30], getattr(part, name)), name


def test_augmentations_that_are_off_are_neutral() -> None:
    off = draw_params(Augment(crop=False, flip=False), 0, 0, np.arange(9), 32)
    assert np.array_equal(off.matrices(32, 0), np.broadcast_to(np.eye(2, 3, dtype=np.float32), (9, 2, 3)))
    assert not off.erase.any()
    assert all((factor == 1).all() for factor in (off.brightness, off.contrast, off.saturation))
    plain, full = (draw_params(augment, 0, 0, np.arange(99), 32) for augment in (Augment(), FULL))
    for name in ("crop_y", "crop_x", "flip"):
        assert np.array_equal(getattr(plain, name), getattr(full, name))


def test_parameters_cover_their_ranges() -> None:
    params = draw_params(FULL, 0, 0, np.arange(50_000), 32)
    assert chi_square(params.crop_y, 9) < 2.5
    assert chi_square(params.crop_x, 9) < 2.5
    assert abs(params.flip.mean() - 0.5) < 0.01
    assert -15 <= params.angle.min() < -14.9 < 14.9 < params.angle.max() <= 15
    for factor in (params.brightness, params.contrast, params.saturation):
        assert 0.6 <= factor.min() < 0.61 < 1.39 < factor.max() <= 1.4


def test_alternating_flip_shows_every_image_both_ways() -> None:
    flips = [draw_params(Augment(alternating_flip=True), 0, epoch, np.arange(1000), 32).flip for epoch in range(4)]
    assert abs(flips[0].mean() - 0.5) < 0.05
    assert np.array_equal(flips[1], ~flips[0])
    assert np.array_equal(flips[2], flips[0])
    assert np.array_equal(flips[3], flips[1])
    plain = [draw_params(Augment(), 0, epoch, np.arange(1000), 32) for epoch in range(2)]
    assert np.array_equal(plain[0].flip, flips[0])
    assert 0.4 < (plain[0].flip == plain[1].flip).mean() < 0.6
    alternating = draw_params(Augment(alternating_flip=True), 0, 1, np.arange(1000), 32)
    assert np.array_equal(alternating.crop_x, plain[1].crop_x)
    assert not draw_params(Augment(flip=False, alternating_flip=True), 0, 1, np.arange(9), 32).flip.any()


@pytest.mark.parametrize(("size", "pad"), [(32, 4), (34, 4), (86, 11), (224, 28)])
def test_padding_scales_with_the_image(size: int, pad: int) -> None:
    assert Augment().pad(size) == pad
    assert draw_params(Augment(), 0, 0, np.arange(5000), size).crop_x.max() == 2 * pad


def test_erased_rectangles_match_the_paper() -> None:
    size = 200  # large, so that rounding to pixels matters little
    rectangles = draw_params(FULL, 0, 0, np.arange(20_000), size).erase
    present = rectangles[rectangles[:, 2] > 0]
    assert abs(len(present) / 20_000 - 0.5) < 0.01
    y, x, height, width = present.T
    assert (present >= [0, 0, 1, 1]).all()
    assert (y + height <= size).all()
    assert (x + width <= size).all()
    area, ratio = height * width / size**2, height / width
    assert 0.019 < area.min() < 0.021 < 0.325 < area.max() < 0.334
    assert 0.28 < ratio.min() < 0.32 < 3.1 < ratio.max() < 3.55
    assert abs(np.log(ratio).mean()) < 0.02  # tall as often as wide


def one_image(**values: object) -> AugmentParams:
    """Parameters of one image, neutral except for `values`."""
    neutral: dict[str, object] = dict.fromkeys(("crop_y", "crop_x", "flip", "angle"), 0)
    neutral |= dict.fromkeys(("brightness", "contrast", "saturation"), 1)
    return AugmentParams(**{name: np.array([value]) for name, value in (neutral | {"erase": [0] * 4} | values).items()})


@pytest.mark.parametrize(
    ("params", "point", "source"),
    [
        (one_image(crop_y=4, crop_x=4), (1.5, 2.5), (1.5, 2.5)),  # the middle crop: nothing moves
        (one_image(crop_y=0, crop_x=6), (10.0, 10.0), (12.0, 6.0)),
        (one_image(crop_y=4, crop_x=4, flip=True), (1.0, 2.0), (31.0, 2.0)),
        (
            one_image(crop_y=4, crop_x=4, angle=90.0),
            (1.0, 1.0),
            (31.0, 1.0),
        ),  # top right to top left
        (one_image(crop_y=4, crop_x=4, angle=90.0, flip=True), (1.0, 1.0), (1.0, 1.0)),
    ],
)
def test_matrices_move_points(params: AugmentParams, point: tuple[float, float], source: tuple[float, float]) -> None:
    assert params.matrices(32, 4)[0] @ [*point, 1.0] == pytest.approx(source, abs=1e-5)
