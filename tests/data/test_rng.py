"""The random number generator: published vectors, independence, uniformity."""

from __future__ import annotations

import numpy as np
import pytest

from chi_square import chi_square
from effnet_fast.data.rng import Purpose, order, philox, stream, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, the reference library of the paper's authors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_published_vectors(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert tuple(philox(np.array(counter, np.uint32), key)) == expected


def test_uniforms_depend_on_their_key_only() -> None:
    indices = np.array([5, 0, 2**32 - 1, 77])
    together = uniforms(9, stream(1, 3), indices, 7)
    assert together.shape == (4, 7)
    for row, index in zip(together, indices, strict=True):
        assert np.array_equal(uniforms(9, stream(1, 3), np.array([index]), 2)[0], row[:2])


@pytest.mark.parametrize(
    ("seed", "number"), [(8, stream(1, 3)), (9 + 2**32, stream(1, 3)), (9, stream(1, 4)), (9, stream(2, 3))]
)
def test_uniforms_depend_on_every_part_of_the_key(seed: int, number: int) -> None:
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


def test_order_is_a_new_permutation_each_epoch() -> None:
    first = order(0, 0, 1000)
    assert first.dtype == np.int64
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, order(0, 0, 1000))
    for other in (order(0, 1, 1000), order(1, 0, 1000)):
        assert np.array_equal(np.sort(other), np.arange(1000))
        assert (other == first).mean() < 0.01


def test_every_position_in_the_order_is_equally_likely() -> None:
    places = np.stack([order(0, epoch, 10) for epoch in range(2000)])
    assert all(chi_square(places[:, place], 10) < 2.5 for place in range(10))
