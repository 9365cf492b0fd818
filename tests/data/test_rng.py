"""The generator against its authors' vectors, its uniformity, and the meaning of what is drawn from it."""

from __future__ import annotations

import numpy as np
import pytest

from effnet_fast.data.rng import Augment, Draws, Purpose, draw, order, philox, stream, uniforms

FULL = Augment(rotation=15, color_jitter=0.4, random_erasing=0.5)


def chi_square(values: np.ndarray, bins: int) -> float:
    """Chi-square statistic per degree of freedom of integers 0..bins-1 that should be equally frequent."""
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum() / (bins - 1))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, the authors' library
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert tuple(philox(np.array(counter, np.uint32), key)) == expected


def test_uniforms_depend_on_nothing_but_their_key() -> None:
    indices = np.array([5, 0, 2**32 - 1, 77])
    together = uniforms(9, stream(1, 3), indices, 7)
    assert together.shape == (4, 7)
    for row, index in zip(together, indices, strict=True):
        assert np.array_equal(uniforms(9, stream(1, 3), np.array([index]), 2)[0], row[:2])


@pytest.mark.parametrize(
    ("seed", "number"), [(8, stream(1, 3)), (9 + 2**32, stream(1, 3)), (9, stream(1, 4)), (9, stream(2, 3))]
)
def test_every_part_of_the_key_counts(seed: int, number: int) -> None:
    indices = np.arange(100)
    assert not np.isin(uniforms(seed, number, indices, 4), uniforms(9, stream(1, 3), indices, 4)).any()


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = uniforms(1, stream(Purpose.AUGMENT, 2), np.arange(50_000), 8)
    assert u.min() >= 0
    assert u.max() < 1
    assert all(chi_square((column * 100).astype(int), 100) < 1.4 for column in u.T)
    columns = np.corrcoef(u.T) - np.eye(8)
    neighbours = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert max(abs(columns).max(), abs(neighbours)) < 5 / np.sqrt(50_000)


def test_order_is_a_permutation_that_changes() -> None:
    first = order(0, 0, 1000)
    assert first.dtype == np.int64
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, order(0, 0, 1000))
    for other in (order(0, 1, 1000), order(1, 0, 1000)):
        assert np.array_equal(np.sort(other), np.arange(1000))
        assert (other == first).mean() < 0.01


def test_every_place_of_the_order_is_equally_likely() -> None:
    places = np.stack([order(0, epoch, 10) for epoch in range(2000)])
    assert all(chi_square(places[:, place], 10) < 2.5 for place in range(10))


def test_draws_do_not_depend_on_the_batch() -> None:
    whole = draw(FULL, 3, 1, np.arange(50), 32)
    part = draw(FULL, 3, 1, np.arange(20, 30), 32)
    for name, values in vars(whole.take(slice(20, 30))).items():
        assert np.array_equal(values, getattr(part, name)), name


def test_what_is_off_is_neutral_and_disturbs_nothing() -> None:
    off = draw(Augment(crop=False, flip=False), 0, 0, np.arange(9), 32)
    assert np.array_equal(off.matrices(32, 0), np.broadcast_to(np.eye(2, 3, dtype=np.float32), (9, 2, 3)))
    assert not off.erase.any()
    assert all((factor == 1).all() for factor in (off.brightness, off.contrast, off.saturation))
    plain, full = (draw(augment, 0, 0, np.arange(99), 32) for augment in (Augment(), FULL))
    for name in ("crop_y", "crop_x", "flip"):
        assert np.array_equal(getattr(plain, name), getattr(full, name))


def test_draws_cover_their_ranges() -> None:
    drawn = draw(FULL, 0, 0, np.arange(50_000), 32)
    assert chi_square(drawn.crop_y, 9) < 2.5
    assert chi_square(drawn.crop_x, 9) < 2.5
    assert abs(drawn.flip.mean() - 0.5) < 0.01
    assert -15 <= drawn.angle.min() < -14.9 < 14.9 < drawn.angle.max() <= 15
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert 0.6 <= factor.min() < 0.61 < 1.39 < factor.max() <= 1.4


@pytest.mark.parametrize(("size", "pad"), [(32, 4), (34, 4), (86, 11), (224, 28)])
def test_padding_scales_with_the_image(size: int, pad: int) -> None:
    assert Augment().pad(size) == pad
    assert draw(Augment(), 0, 0, np.arange(5000), size).crop_x.max() == 2 * pad


def test_rectangles_are_inside_with_the_papers_areas_and_ratios() -> None:
    size = 200  # large, so that rounding to pixels matters little
    rectangles = draw(FULL, 0, 0, np.arange(20_000), size).erase
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


def one(**values: object) -> Draws:
    """Draws of one image, neutral but for `values`."""
    neutral: dict[str, object] = dict.fromkeys(("crop_y", "crop_x", "flip", "angle"), 0)
    neutral |= dict.fromkeys(("brightness", "contrast", "saturation"), 1)
    return Draws(**{name: np.array([value]) for name, value in (neutral | {"erase": [0] * 4} | values).items()})


@pytest.mark.parametrize(
    ("drawn", "point", "source"),
    [
        (one(crop_y=4, crop_x=4), (1.5, 2.5), (1.5, 2.5)),  # the middle crop: nothing moves
        (one(crop_y=0, crop_x=6), (10.0, 10.0), (12.0, 6.0)),
        (one(crop_y=4, crop_x=4, flip=True), (1.0, 2.0), (31.0, 2.0)),
        (one(crop_y=4, crop_x=4, angle=90.0), (1.0, 1.0), (31.0, 1.0)),  # counter-clockwise: top right to top left
        (one(crop_y=4, crop_x=4, angle=90.0, flip=True), (1.0, 1.0), (1.0, 1.0)),
    ],
)
def test_matrices_move_points_as_said(drawn: Draws, point: tuple[float, float], source: tuple[float, float]) -> None:
    assert drawn.matrices(32, 4)[0] @ [*point, 1.0] == pytest.approx(source, abs=1e-5)
