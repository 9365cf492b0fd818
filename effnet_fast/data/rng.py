"""A counter-based random number generator: (seed, purpose, epoch, image index) -> numbers.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The generator has
no state, so a number is the same in any batch, on any rank, with any number of workers, and after any interruption.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    ORDER = 0
    AUGMENT = 1
    AUTO_AUGMENT = 2
    SUBSET = 0x100
    SYNTHETIC_TRAIN = 0x200
    SYNTHETIC_TEST = 0x201


def stream(purpose: int, epoch: int = 0) -> int:
    """Number of the stream for a purpose and an epoch, both from 0 to 2**32 - 1."""
    return purpose << 32 | epoch


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: counter uint32 [..., 4] and two 32-bit key words -> uint32 [..., 4]."""
    x0, x1, x2, x3 = (counter[..., i].astype(np.uint64) for i in range(4))
    for i in range(_ROUNDS):
        k0, k1 = (np.uint64((word + i * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, _WEYL, strict=True))
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (product1 >> _HALF) ^ x1 ^ k0, product1 & _LOW, (product0 >> _HALF) ^ x3 ^ k1, product0 & _LOW
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def _words(seed: int, stream: int, indices: NDArray[np.integer], count: int) -> NDArray[np.uint32]:
    """Random words uint32 [N, count]; word j of an index depends neither on `count` nor on the other indices."""
    indices = np.asarray(indices)
    assert indices.size == 0 or 0 <= indices.min() <= indices.max() < 2**32
    blocks = -(-count // 4)
    counter = np.empty((len(indices), blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = indices[:, None]
    counter[..., 2] = stream & 0xFFFFFFFF
    counter[..., 3] = stream >> 32
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return words.reshape(len(indices), 4 * blocks)[:, :count]


def uniforms(seed: int, stream: int, indices: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """Uniform numbers for each index.

    Args:
        seed: its lowest 64 bits are used.
        stream: from `stream(purpose, epoch)`.
        indices: integers [N] from 0 to 2**32 - 1.
        count: numbers for each index.

    Returns:
        float64 [N, count] in [0, 1), in steps of 2**-32. Row i depends on (seed, stream, indices[i]) only, and a
        larger count appends columns without changing the first ones.
    """
    return _words(seed, stream, indices, count).astype(np.float64) * 2.0**-32


def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The permutation int64 [n] in which an epoch visits n images."""
    words = _words(seed, stream(Purpose.ORDER, epoch), np.arange(n), 2).astype(np.uint64)
    return np.argsort(words[:, 0] << _HALF | words[:, 1], kind="stable").astype(np.int64)
