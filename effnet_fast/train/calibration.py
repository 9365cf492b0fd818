"""Calibration (Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599).

Probabilities are calibrated if, of the images that a model classifies with confidence p, a share p is classified
correctly. Temperature scaling divides the logits by one number, which changes the confidence but not the prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from effnet_fast.train.evaluate import Predictions

BINS = 15
# If all images are classified correctly, the loss falls as long as the temperature does.
_LOWEST, _HIGHEST = 0.01, 100.0


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, in M bins of equal width: bin m has confidences above (m - 1) / M, up to m / M.

    Attributes:
        images: int64 [M].
        confidence: float64 [M], mean probability of the predicted class, 0 to 1; 0 in an empty bin.
        accuracy: float64 [M], share of images classified correctly, 0 to 1; 0 in an empty bin.
    """

    images: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error (equation 3), in percent: the gap of accuracy and confidence, mean over images."""
        gaps = np.abs(self.accuracy - self.confidence)
        return 100 * float((self.images * gaps).sum() / self.images.sum())


def reliability(predictions: Predictions, temperature: float = 1.0, bins: int = BINS) -> Reliability:
    """Sort predictions into `bins` bins by the probability of the predicted class."""
    confidence = predictions.probabilities(temperature).amax(1).numpy()
    is_correct = predictions.correct.numpy()
    upper_edges = np.linspace(0, 1, bins + 1)[1:]
    places = np.searchsorted(upper_edges, confidence.clip(max=1))
    images = np.bincount(places, minlength=bins)
    divisor = np.maximum(images, 1)
    return Reliability(
        images,
        np.bincount(places, confidence, minlength=bins) / divisor,
        np.bincount(places, is_correct, minlength=bins) / divisor,
    )


def fit_temperature(predictions: Predictions) -> float:
    """The temperature from 0.01 to 100 that minimises the mean cross-entropy (section 4.2).

    The cross-entropy is convex in 1 / temperature, so Brent's bounded search finds its minimum.
    """

    def loss(log_temperature: float) -> float:
        return float(predictions.losses(math.exp(log_temperature)).mean())

    bounds = (math.log(_LOWEST), math.log(_HIGHEST))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)
