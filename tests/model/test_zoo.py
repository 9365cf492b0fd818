"""Models from names and options."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

from effnet_fast.model import ModelOptions, create_model, model_from_options, zoo


def test_docstring_examples() -> None:
    attempted, failed = doctest.testmod(zoo).attempted, doctest.testmod(zoo).failed
    assert (attempted, failed) == (4, 0)


def test_options_and_arguments_build_the_same_model() -> None:
    changes = {"width": 0.25, "depth": 0.3, "dropout": 0.1, "drop_path": 0.0, "padding": "same", "bn_momentum": 0.2}
    options = ModelOptions("efficientnet-b0", 10, 40, 16, bn_eps=1e-4, kernels="torch", **changes)  # type: ignore[arg-type]
    models = []
    for build in (
        lambda: model_from_options(options),
        lambda: create_model("efficientnet-b0", 10, 40, 16, bn_eps=1e-4, kernels="torch", **changes),
    ):
        torch.manual_seed(0)
        models.append(build())
    first, second = models
    assert first.architecture == second.architecture
    assert (first.architecture.padding, first.architecture.bn_eps, first.architecture.dropout) == ("same", 1e-4, 0.1)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        create_model("efficientnet-b0", widht=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path": 1.5}, "drop_path must be from 0 to below 1, not 1.5"),
        ({"dropout": -0.1}, "dropout must be from 0 to below 1, not -0.1"),
        ({"bn_momentum": 5.0}, "bn_momentum must be from 0 to 1, not 5.0"),
        ({"bn_eps": 0.0}, "bn_eps must be above 0, not 0.0"),
        ({"output_stride": 0}, "output_stride must be 32, 16, 8 or 4, not 0"),
        ({"allow_unmatched": True}, "add pretrained=FILE"),
        ({"pretrained_layout": "timm"}, "add pretrained=FILE"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("efficientnet-b0", **options)


def test_initial_values_are_refused_beside_weights(tmp_path: Path) -> None:
    torch.save(create_model("efficientnet-b0", width=0.25, depth=0.3).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="which pretrained weights replace"):
        create_model(
            "efficientnet-b0", width=0.25, depth=0.3, pretrained=tmp_path / "weights.pth", zero_init_residual=True
        )
