"""Evaluation compared with counting by hand."""

import pytest
import torch
from torch import nn

from effnet_fast.train.evaluate import evaluate

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
