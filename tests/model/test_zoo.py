"""Models from names and options."""

from __future__ import annotations

import doctest

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
