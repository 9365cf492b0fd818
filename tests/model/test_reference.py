"""ResNet and DenseNet: sizes, names, stems, freezing, precise BN, folding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from effnet_fast import create_model, list_models
from effnet_fast.model import Network, batch_norms, default_output_stride, from_description
from effnet_fast.model.blocks import Conv, ConvNormAct, Kernels, MBConv, Style
from effnet_fast.model.complexity import model_costs
from effnet_fast.model.reference import Bottleneck, ReferenceArchitecture
from effnet_fast.model.serialize import fold_batch_norms
from effnet_fast.train.precise_bn import precise_bn

pytestmark = pytest.mark.interpreted

KERNELS: tuple[Kernels, ...] = ("triton", "torch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMETERS = {"resnet50": 25_557_032, "resnet152": 60_192_808, "densenet201": 20_013_928}


def on_meta(name: str, *arguments: int, **settings: object) -> Network:
    with torch.device("meta"):
        return create_model(name, *arguments, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_with_1000_classes(name: str) -> None:
    assert sum(p.numel() for p in on_meta(name, 1000, 224).parameters()) == PARAMETERS[name]
    assert name in list_models()


@pytest.mark.parametrize("name", ["resnet50", "densenet201"])
def test_names_and_shapes_match_torchvision(name: str) -> None:
    golden = json.loads((Path(__file__).parent / f"golden_torchvision_{name}.json").read_text())
    ours = {key: list(value.shape) for key, value in on_meta(name, 1000, 224).state_dict().items()}
    assert ours == {key: shape for key, shape in golden.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("size", "kernel", "stride", "pools"), [(32, 3, 1, 0), (64, 3, 1, 0), (65, 7, 2, 1)])
def test_small_images_get_a_small_stem(name: str, size: int, kernel: int, stride: int, pools: int) -> None:
    model = on_meta(name, 10, size)
    stem = next(module for module in model.modules() if isinstance(module, Conv))
    assert (stem.kernel_size, stem.stride) == ((kernel, kernel), (stride, stride))
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == pools
    assert model.architecture.output_stride == default_output_stride(name, size) == (32 if pools else 8)


@pytest.mark.parametrize("name", PARAMETERS)
def test_final_map_and_classifier(name: str) -> None:
    model = on_meta(name, 7, 64)
    features = model.forward_features(torch.zeros(2, 3, 64, 64, device="meta"))
    assert features.shape == (2, model.classifier.in_features, 8, 8)
    assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 7)


def test_macs_match_the_published_ones() -> None:
    costs = model_costs("resnet50", 1000, 224, None)
    assert costs["parameters"] == PARAMETERS["resnet50"]
    assert costs["macs"] == pytest.approx(4.09e9, rel=0.01)  # torchvision's table
    assert costs["final_map"] == [2048, 7, 7]


@pytest.mark.parametrize("name", PARAMETERS)
def test_rebuild_from_description(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, 7, 48, bn_momentum=0.2, dropout=0.1)
        twin = from_description(json.loads(json.dumps(dataclasses.asdict(model.architecture))))
    assert twin.architecture == model.architecture
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_descriptions_without_family_are_efficientnets() -> None:
    model = create_model("efficientnet-b0", width=0.25, depth=0.3)
    description = dataclasses.asdict(model.architecture)
    assert description.pop("family") == "efficientnet"
    assert from_description(description).architecture == model.architecture


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 1.1}, "resnet50 has no width"),
        ({"depth": 1.1}, "resnet50 has no depth"),
        ({"drop_path": 0.2}, "resnet50 has no drop_path"),
        ({"padding": "same"}, "resnet50 has no padding"),
        ({"output_stride": 16}, "output_stride 8 .* or 32, not 16"),
    ],
)
def test_inapplicable_options(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("resnet50", **settings)


@pytest.mark.parametrize("name", ["resnet50", "densenet201"])
def test_each_relu_runs_once_and_not_in_place(name: str) -> None:
    """Guided backpropagation and DeepLift replace gradients by hooks on ReLU modules."""
    model = create_model(name, 5, 32, output_stride=32, kernels="torch").eval()
    calls: list[nn.Module] = []
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    for relu in relus:
        relu.register_forward_hook(lambda module, inputs, output: calls.append(module))
    model(torch.randn(1, 3, 32, 32))
    assert calls
    assert len(calls) == len(relus) == len({id(module) for module in calls})
    assert not any(relu.inplace for relu in relus)


def test_triton_equals_torch() -> None:
    torch.manual_seed(0)
    fused, plain = (Bottleneck(32, 8, 1, ReferenceArchitecture("resnet50"), kernels).to(DEVICE) for kernels in KERNELS)
    plain.load_state_dict(fused.state_dict())
    images = torch.randn(2, 32, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    for block in (fused, plain):
        block(images).square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-4)


def test_precise_bn_with_both_kernels() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    models = []
    for kernels in KERNELS:
        style = Style(kernels=kernels)
        layers = ConvNormAct(3, 4, 3, style=style), MBConv(4, 4, 3, 1, 2, style=style)
        models.append(nn.Sequential(*layers).to(DEVICE))
        models[-1].load_state_dict(models[0].state_dict())
    for model in models:
        precise_bn(model, [(images, torch.zeros(2))], precision="no", device=torch.device(DEVICE))
    assert all(norm.running_mean.any() for norm in batch_norms(models[0]))
    for (name, ours), theirs in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_precise_bn_skips_frozen_layers() -> None:
    model = create_model("efficientnet-b0", 5, 16, width=0.25, depth=0.3)
    model.freeze("stages.0")
    batches = [(torch.randn(4, 3, 16, 16), torch.zeros(4))]
    precise_bn(model, batches, precision="no", device=torch.device("cpu"))
    moved = [bool(norm.running_mean.any()) for norm in batch_norms(model)]
    frozen = len(batch_norms(model.stem)) + len(batch_norms(model.stages[0]))
    assert moved == [False] * frozen + [True] * (len(moved) - frozen)


@pytest.mark.parametrize("name", ["efficientnet-b0", "resnet50", "densenet201"])
def test_freezing(name: str) -> None:
    model = create_model(name, 5, 32, output_stride=32).train()
    names = list(model.layers())
    assert names[0] == "stem"
    assert names[-1] == "classifier"
    owned = [id(p) for modules in model.layers().values() for module in modules for p in module.parameters()]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())  # every parameter is in one layer
    model.freeze("stages.1")
    model.eval().train()
    frozen = [module for name in names[:3] for module in model.layers()[name]]
    assert not any(module.training or any(p.requires_grad for p in module.parameters()) for module in frozen)
    assert all(p.requires_grad for p in model.layers()["stages.2"][0].parameters())
    assert model.layers()["stages.2"][0].training
    model.freeze("backbone")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.classifier.parameters()}
    with pytest.raises(ValueError, match=r"cannot freeze up to 'stages.9'; choose one of stem, stages.0"):
        model.freeze("stages.9")


@pytest.mark.parametrize("name", ["efficientnet-b0", "resnet50", "densenet201"])
def test_folding_keeps_the_logits(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 5, 32, output_stride=32, kernels="torch").eval()
    for norm in batch_norms(model):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.4, 1.0)
    images = torch.randn(2, 3, 64, 64)
    count = len(batch_norms(model))
    with torch.no_grad():
        before = model(images)
        fold_batch_norms(model)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
    # In DenseNet, the first BatchNorm of a layer, of a transition and the last of all do not follow a convolution.
    assert len(batch_norms(model)) == (98 + 3 + 1 if name == "densenet201" else 0) < count
