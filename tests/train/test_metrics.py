"""Macro-F1 and calibration compared with torchmetrics; superclasses and bins by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix, MulticlassF1Score

from effnet_fast.train.calibration import fit_temperature, reliability
from effnet_fast.train.evaluate import Predictions
from effnet_fast.train.metrics import coarsen, macro_f1


def predictions_of(logits, labels):
    return Predictions(torch.arange(len(labels)), labels, logits)


@pytest.fixture(scope="module")
def predictions() -> Predictions:
    """Overconfident predictions of 12 classes; classes 10 and 11 have no images, and class 11 is never predicted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (2000,), generator=generator)
    logits = 3 * torch.randn(2000, 12, generator=generator)
    logits[torch.arange(2000), labels] += 3
    logits[:, 11] -= 30
    return predictions_of(logits, labels)


def test_figures_of_torchmetrics(predictions):
    logits, labels, k = predictions.logits, predictions.labels, 12
    confusion = predictions.result().confusion
    assert torch.equal(confusion, MulticlassConfusionMatrix(k)(logits, labels))
    assert confusion[:, 10].any()
    assert not confusion[:, 11].any()
    expected = 100 * MulticlassF1Score(k, average="macro")(logits, labels).item()
    assert macro_f1(confusion.numpy()) == pytest.approx(expected, rel=1e-5)
    oracle = MulticlassCalibrationError(k, n_bins=15, norm="l1")
    for temperature in (1.0, 2.5):
        expected = 100 * oracle(logits / temperature, labels).item()
        assert reliability(predictions, temperature).ece == pytest.approx(expected, rel=1e-4)
    assert reliability(predictions).ece > 2 * reliability(predictions, 2.5).ece


def test_bins_contain_their_upper_edge():
    probabilities = torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0], [0.9, 0.1]])
    labels = torch.tensor([0, 0, 1, 0])
    bins = reliability(predictions_of(probabilities.log().clamp(min=-1e4), labels), bins=4)
    assert bins.images.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(bins.confidence, [0, 0.5, 0.7, 0.95], rtol=1e-6)
    np.testing.assert_allclose(bins.accuracy, [0, 1, 1, 0.5])
    assert bins.ece == pytest.approx(100 * (0.5 + 0.3 + 2 * 0.45) / 4)


def test_superclasses():
    confusion = np.array([[5, 1, 2], [0, 3, 4], [1, 0, 6]])
    assert coarsen(confusion, (1, 0, 1), 2).tolist() == [[3, 4], [1, 14]]


def test_a_known_temperature_is_recovered():
    """Labels drawn from the softmax are calibrated; logits times a factor are calibrated at that temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for factor in (0.4, 1.0, 2.5):
        scaled = predictions_of(factor * logits, labels)
        temperature = fit_temperature(scaled)
        assert temperature == pytest.approx(factor, rel=0.03)
        losses = [scaled.losses(temperature * other).mean() for other in (0.98, 1, 1.02)]
        assert losses[1] == min(losses)
        assert reliability(scaled, temperature).ece < 1.5


def test_perfect_predictions_have_a_finite_temperature():
    assert 0.009 < fit_temperature(predictions_of(5 * torch.eye(3), torch.arange(3))) < 1
