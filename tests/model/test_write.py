"""Models under other libraries' names: the tensors they expect, and the same logits in their networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effnet_fast import create_model
from effnet_fast.model import Network
from effnet_fast.model.weights.write import to_foreign
from plain_networks import CASES, golden, settled

LIBRARIES = {
    "torchvision-b0": "torchvision",
    "timm-b0": "timm",
    "timm-tf-b0": "timm",
    "torchvision-resnet50": "torchvision",
    "torchvision-densenet201": "torchvision",
}
ARCHITECTURES = {"timm-tf-b0": "tf_efficientnet_b0", "timm-b0": "efficientnet_b0", "torchvision-b0": "efficientnet_b0"}


def scaled(name: str, tmp_path: Path, eps: float | None) -> tuple[Network, torch.Tensor]:
    """A model of a case, whose statistics fit random images, and these images."""
    case, images = CASES[name], torch.randn(2, 3, 64, 64)
    path = tmp_path / case.file
    torch.save(settled(case, images), path)
    return create_model(case.model, 1000, 64, output_stride=32, pretrained=path, bn_eps=eps).eval(), images


@pytest.mark.parametrize("eps", [None, 1e-3, 1e-5])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_a_plain_network(tmp_path: Path, name: str, eps: float | None) -> None:
    """For any eps of the model; the library's is fixed."""
    model, images = scaled(name, tmp_path, eps)
    foreign = to_foreign(model, LIBRARIES[name])
    expected = model(images)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(CASES[name].oracle(foreign.tensors, images), expected, rtol=1e-4, atol=1e-4)
    shapes = {key: list(tensor.shape) for key, tensor in foreign.tensors.items()}
    assert shapes == golden(CASES[name].names)
    assert foreign.architecture == ARCHITECTURES.get(name, CASES[name].model)


@pytest.mark.parametrize(
    ("settings", "library", "message"),
    [
        ({"output_stride": 8}, "timm", "timm's networks have output stride 32, this model 8: train with --output_str"),
        ({"width": 1.3}, "torchvision", "torchvision has no EfficientNet of width 1.3 and depth 1"),
        ({"padding": "same"}, "torchvision", "torchvision's EfficientNets have no TensorFlow SAME padding: use --layo"),
    ],
)
def test_models_that_a_library_lacks(settings: dict, library: str, message: str) -> None:
    model = create_model("efficientnet-b0", **{"output_stride": 32} | settings)
    with pytest.raises(ValueError, match=message):
        to_foreign(model, library)


@pytest.mark.parametrize(("width", "depth", "name"), [(1.0, 1.1, "efficientnet_b1"), (2.0, 3.1, "efficientnet_b7")])
def test_published_name_by_shape(width: float, depth: float, name: str) -> None:
    with torch.device("meta"):
        model = create_model("efficientnet-b0", output_stride=32, width=width, depth=depth)
    assert to_foreign(model, "timm").architecture == name
