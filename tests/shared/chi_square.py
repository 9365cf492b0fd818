"""A statistic of uniformity."""

from __future__ import annotations

import numpy as np


def chi_square(values: np.ndarray, bins: int) -> float:
    """Chi-square statistic per degree of freedom of integers 0..bins-1 that should be equally frequent."""
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum() / (bins - 1))
