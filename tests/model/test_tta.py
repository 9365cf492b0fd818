"""Test-time augmentation compared with averaging by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effnet_fast.model.tta import with_tta
from effnet_fast.train.evaluate import evaluate

WEIGHT = torch.randn(3 * 4 * 6, 6, generator=torch.Generator().manual_seed(1)) / 3


class Linear(nn.Module):
    """Logits of six classes, which differ for an image and its mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ WEIGHT


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(64, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def averaged(images: Tensor) -> np.ndarray:
    """The mean probabilities, in float64 by NumPy."""
    pixels, weight = images.double().numpy(), WEIGHT.double().numpy()
    return np.mean([softmax(x.reshape(len(x), -1) @ weight) for x in (pixels, pixels[..., ::-1])], axis=0)


def test_probabilities_are_the_mean_of_both_views(images: Tensor) -> None:
    actual = with_tta(Linear(), "flip")(images).softmax(1)
    np.testing.assert_allclose(actual.numpy(), averaged(images), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(with_tta(Linear(), "flip")(images.flip(-1)).softmax(1), actual)


def test_evaluation_of_both_views(images: Tensor) -> None:
    labels = torch.arange(64) % 6
    result = evaluate(
        with_tta(Linear(), "flip"), [(images, labels)], num_classes=6, precision="no", device=torch.device("cpu")
    )
    expected = averaged(images)
    assert result.loss == pytest.approx(-np.log(expected[np.arange(64), labels]).mean(), rel=1e-5)
    assert result.top1 == 100 * np.mean(expected.argmax(1) == labels.numpy())


def test_no_augmentation_is_the_model_itself_and_others_are_refused() -> None:
    model = Linear()
    assert with_tta(model, "none") is model
    with pytest.raises(ValueError, match="tta 'crop': choose none or flip"):
        with_tta(model, "crop")
