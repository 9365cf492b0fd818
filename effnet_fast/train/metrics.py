"""Figures from a confusion matrix: macro-F1, and the matrix of superclasses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def macro_f1(confusion: NDArray[np.int64]) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), in percent.

    Classes without images that are never predicted are left out, as in scikit-learn and torchmetrics.

    Args:
        confusion: int64 [K, K], counts by true class (row) and predicted class (column).
    """
    hits, both = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    return 100 * float((2 * hits[both > 0] / both[both > 0]).mean())


def coarsen(confusion: NDArray[np.int64], superclass_of: Sequence[int], superclasses: int) -> NDArray[np.int64]:
    """Confusion matrix of superclasses: a prediction counts for the superclass of the predicted class.

    Args:
        confusion: int64 [K, K], counts by true class (row) and predicted class (column).
        superclass_of: superclass of each of the K classes.
        superclasses: number of superclasses, S.

    Returns:
        int64 [S, S].
    """
    membership = np.eye(superclasses, dtype=np.int64)[np.asarray(superclass_of)]
    return membership.T @ confusion @ membership
