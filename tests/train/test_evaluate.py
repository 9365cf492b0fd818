"""Evaluation compared with counting by hand; re-estimated BatchNorm statistics."""

import pytest
import torch
from torch import nn

from effnet_fast.model.blocks import BatchNorm
from effnet_fast.train.evaluate import evaluate, recalibrate

CPU = {"precision": "no", "device": torch.device("cpu")}


class Echo(nn.Module):
    """Logits are the input."""

    def forward(self, x):
        return x.flatten(1)


def test_figures_and_padding():
    logits = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4, 3],
            [9.0, 8, 7, 6, 5, 4, 3],
            [9.0, 8, 7, 6, 5, 4, 3],
            [0.0, 0, 0, 0, 0, 0, 9],
        ]
    )
    labels = torch.tensor([0, 4, 6, -1])
    result = evaluate(Echo(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])], num_classes=7, **CPU)
    assert result.images == 3
    assert result.top1 == pytest.approx(100 / 3)
    assert result.top5 == pytest.approx(200 / 3)
    expected = nn.functional.cross_entropy(logits[:3], labels[:3])
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    table = torch.zeros(7, 7, dtype=torch.int64)
    table[0, 0] = table[4, 0] = table[6, 0] = 1
    assert torch.equal(result.confusion, table)


def test_fewer_than_five_classes():
    result = evaluate(Echo(), [(torch.eye(3), torch.tensor([0, 1, 0]))], num_classes=3, **CPU)
    assert (result.top1, result.top5) == (pytest.approx(200 / 3), 100)


def test_no_images():
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate(Echo(), [(torch.eye(2), torch.tensor([-1, -1]))], num_classes=2, **CPU)


def test_mode_is_restored():
    model = Echo().train()
    evaluate(model, [(torch.eye(2), torch.tensor([0, 1]))], num_classes=2, **CPU)
    assert model.training


def test_recalibrated_statistics_are_means():
    torch.manual_seed(0)
    model = nn.Sequential(BatchNorm(3, momentum=0.01), nn.Dropout(0.5))
    batches = [(torch.randn(16, 3, 4, 4) * (i + 1) + i, None) for i in range(5)]
    recalibrate(model, batches, 4, **CPU)
    means = torch.stack([x.mean((0, 2, 3)) for x, _ in batches[:4]]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x, _ in batches[:4]]).mean(0)
    torch.testing.assert_close(model[0].running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].running_var, variances, rtol=1e-4, atol=1e-5)
    assert model[0].momentum == 0.01
    assert model.training
