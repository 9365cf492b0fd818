"""Weights of other libraries give the logits that those libraries' networks give.

EfficientNet-PyTorch is installed. For torchvision and timm, golden files hold the names and shapes of all tensors, and
`plain_networks` holds the networks as plain convolutions that read the tensors by those names.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_pytorch import EfficientNet as EfficientNetPyTorch
from safetensors.torch import save_file
from torch import Tensor

from effnet_fast import create_model
from effnet_fast.model.weights import IMAGENET_MEAN, IMAGENET_STD, read_weights
from plain_networks import CASES, golden, random_state, settled, timm_b0

PADDINGS = {"timm-tf-b0": "same"}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def named(golden_name: str) -> dict[str, Tensor]:
    """A file's names with a zero each, where the shapes do not matter."""
    return {name: torch.zeros(1) for name in golden(golden_name)}


@torch.no_grad()
def assert_same_logits(model: torch.nn.Module, expected: Tensor, images: Tensor) -> None:
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_a_plain_network(tmp_path: Path, name: str, suffix: str) -> None:
    case = CASES[name]
    images = torch.randn(2, 3, 64, 64)
    state = settled(case, images)
    path = write((tmp_path / case.file).with_suffix(suffix), state)
    model = create_model(case.model, 1000, 64, output_stride=32, pretrained=path)
    assert getattr(model.architecture, "padding", "symmetric") == PADDINGS.get(name, "symmetric")
    assert_same_logits(model, case.oracle(state, images), images)


def settle(norm: torch.nn.Module, inputs: tuple[Tensor]) -> None:
    """Set the statistics as `Plain.norm` does when it settles."""
    var, mean = torch.var_mean(inputs[0], (0, 2, 3))
    norm.running_mean.copy_(mean + 0.1 * torch.randn_like(mean) * var.sqrt())
    norm.running_var.copy_(var.mean() * (torch.rand_like(var) + 0.5))


@pytest.mark.parametrize("name", [f"efficientnet-b{number}" for number in range(8)])
def test_logits_equal_efficientnet_pytorch(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    oracle = EfficientNetPyTorch.from_name(name, image_size=64, drop_connect_rate=0.0)
    images, settling = torch.randn(2, 3, 64, 64), []
    for module in oracle.eval().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            settling.append(module.register_forward_pre_hook(settle))
    with torch.no_grad():
        oracle(images)
    for hook in settling:
        hook.remove()
    model = create_model(name, 1000, 64, output_stride=32, pretrained=write(tmp_path / "w.pth", oracle.state_dict()))
    assert (model.architecture.padding, model.architecture.bn_eps) == ("same", 1e-3)
    with torch.no_grad():
        assert_same_logits(model, oracle(images), images)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    state = random_state(golden("torchvision_efficientnet_b0"))
    halves = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = write(tmp_path / f"w{suffix}", halves)
    model = create_model("efficientnet-b0", 1000, 64, output_stride=32, pretrained=path)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.classifier.weight, halves["classifier.1.weight"].float())


def test_padding_and_eps_of_the_wrong_layout_give_other_logits(tmp_path: Path) -> None:
    """Padding and eps are the only difference between timm's two layouts, and the tests above can see it."""
    images = torch.randn(2, 3, 64, 64)
    state = settled(CASES["timm-b0"], images)
    for tf in (False, True):
        layout = "timm" if tf else "timm-tf"
        model = create_model(
            "efficientnet-b0",
            1000,
            64,
            output_stride=32,
            pretrained=write(tmp_path / "w.pth", state),
            pretrained_layout=layout,
        )
        with torch.no_grad():
            assert (model.eval()(images) - timm_b0(state, images, tf)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("model", "eps"), [("efficientnet-b0", 1e-5), ("efficientnet-b4", 1e-5), ("efficientnet-b5", 1e-3)]
)
def test_torchvision_eps_by_variant(tmp_path: Path, model: str, eps: float) -> None:
    weights = read_weights(write(tmp_path / "w.pth", {"features.0.0.weight": torch.zeros(1)}))
    assert weights.bn_eps(model) == eps


@pytest.mark.parametrize("layout", ["auto", "effnet-fast", "torchvision"])
def test_reference_models_have_torchs_eps_in_any_layout(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "w.pth", random_state(golden("torchvision_resnet50")))
    model = create_model("resnet50", 1000, 64, output_stride=32, pretrained=path, pretrained_layout=layout)
    assert model.architecture.bn_eps == 1e-5


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'tf'.*choose one of auto, effnet-fast, torchvision, timm, timm-tf, eff"):
        read_weights(write(tmp_path / "w.pth", {"conv_stem.weight": torch.zeros(1)}), "tf")


def timm_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, {"conv_stem.weight": torch.zeros(1)})


def test_timms_layout_by_config_trainer_and_names(tmp_path: Path, capsys) -> None:
    paddings = {
        timm_file(tmp_path / "efficientnet_b0_ra-3dd342df.pth"): "symmetric",
        timm_file(tmp_path / "tf_efficientnet_b0_aa-827b6e33.pth"): "same",
        timm_file(tmp_path / "models--timm--tf_efficientnet_b0.ns_jft_in1k" / "model.safetensors"): "same",
    }
    beside = timm_file(tmp_path / "hub" / "model.safetensors")
    config = {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.4] * 3}}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    paddings[beside] = "same"
    trainer = tmp_path / "model_best.pth.tar"
    torch.save({"arch": "efficientnet_b0", "state_dict": {"module.conv_stem.weight": torch.zeros(1)}}, trainer)
    paddings[trainer] = "symmetric"
    for path, padding in paddings.items():
        assert read_weights(path).padding == padding, path
    assert read_weights(beside).mean == (0.5, 0.5, 0.5)
    unknown = timm_file(tmp_path / "unknown.pth")
    with pytest.raises(ValueError, match="--pretrained_layout timm or timm-tf"):
        read_weights(unknown)
    assert read_weights(unknown, "timm-tf").padding == "same"


def test_timms_layout_by_the_nearest_name(tmp_path: Path) -> None:
    paddings = {
        "tf_efficientnet_b0/efficientnet_b0.pth": "symmetric",
        "efficientnet_b0/tf_efficientnet_b0.pth": "same",
        "tf_efficientnet_b0/efficientnet_b0/w.pth": "symmetric",
        "tf_efficientnet_b0/efficientnet_b0-or-tf_efficientnet_b0.pth": "same",  # ambiguous, so the folder decides
    }
    for name, padding in paddings.items():
        assert read_weights(timm_file(tmp_path / name)).padding == padding, name
    trainer = tmp_path / "tf_efficientnet_b0" / "trainer.pth"
    torch.save({"arch": "efficientnet", "state_dict": {"conv_stem.weight": torch.zeros(1)}}, trainer)  # names no layout
    assert read_weights(trainer).padding == "same"
    (trainer.parent / "config.json").write_text(json.dumps({"architecture": "efficientnet_b0"}))
    assert read_weights(trainer).padding == "symmetric"


@pytest.mark.parametrize(
    ("name", "centred"),
    [
        ("tf_efficientnet_b0_ap-f262efe1.pth", True),
        ("models--timm--tf_efficientnet_b7.ap_in1k/model.safetensors", True),
        ("models--timm--efficientnet_b0.ra4_e3600_r224_in1k/model.safetensors", True),
        ("adv-efficientnet-b0-b64d5a18.pth", True),
        ("tf_efficientnet_b0_ns-c0e6a31c.pth", False),
        ("tf_efficientnet_b0_apart.pth", False),
        ("efficientnet_b0_ra-3dd342df.pth", False),
        ("efficientnet-b0-355c32eb.pth", False),
        ("tf_efficientnet_b0_ap/tf_efficientnet_b0_ns.pth", False),  # the nearest name decides
    ],
)
def test_normalisation_by_name(tmp_path: Path, name: str, centred: bool) -> None:
    sign = "_conv_stem.weight" if "efficientnet-b" in name else "conv_stem.weight"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    weights = read_weights(write(tmp_path / name, {sign: torch.zeros(1)}))
    half = (0.5, 0.5, 0.5)
    assert (weights.mean, weights.std) == ((half, half) if centred else (IMAGENET_MEAN, IMAGENET_STD))


def test_mean_and_std_of_config_json_override_the_name(tmp_path: Path) -> None:
    path = timm_file(tmp_path / "tf_efficientnet_b0_ap.pth")
    config = {"architecture": "tf_efficientnet_b0_ap", "pretrained_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(path)
    assert (weights.mean, weights.std) == ((0.4,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": 5}, "architecture must be a name, not 5"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg must hold mean and std, not be 'x'"),
        ({"pretrained_cfg": {"mean": 0.5}}, "mean must be three finite numbers, not 0.5"),
        ({"pretrained_cfg": {"mean": None}}, "mean must be three finite numbers, not None"),
        ({"pretrained_cfg": {"mean": [0.5]}}, r"mean must be three finite numbers, not \[0.5\]"),
        ({"pretrained_cfg": {"mean": ["0.5"] * 3}}, "mean must be three finite numbers"),
        ({"pretrained_cfg": {"mean": [float("nan")] * 3}}, "mean must be three finite numbers"),
        ({"pretrained_cfg": {"std": [0.2, 0.2, 0]}}, r"std must be three positive numbers, not \[0.2, 0.2, 0\]"),
        ({"std": [0.2, 0.2, -0.2]}, "std must be three positive numbers"),
    ],
)
def test_invalid_fields_of_config_json(tmp_path: Path, fields: dict, message: str) -> None:
    path = timm_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "efficientnet_b0"} | fields))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        read_weights(path)


@pytest.mark.parametrize(
    "content",
    ["[]", "5", "torn {", "\xff", '{"mean": 0.5}', '{"architecture": "efficientnet_b0", "pretrained_cfg": null}'],
)
def test_config_json_of_other_libraries_is_ignored(tmp_path: Path, content: str) -> None:
    path = timm_file(tmp_path / "efficientnet_b0.safetensors")
    (tmp_path / "config.json").write_text(content, "latin-1")
    assert read_weights(path).mean == IMAGENET_MEAN


def test_older_config_json(tmp_path: Path) -> None:
    path = timm_file(tmp_path / "model.safetensors")
    config = {"architecture": "efficientnet_b0", "mean": [0.5] * 3, "std": [1, 1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (read_weights(path).mean, read_weights(path).std) == ((0.5,) * 3, (1,) * 3)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict", "net"])
def test_wrappers_and_old_densenet_names(tmp_path: Path, wrapper: str | None) -> None:
    state = named("torchvision_densenet201")
    old = {re.sub(r"(denselayer\d+\.(norm|conv))([12])", r"\1.\3", key): value for key, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    if wrapper:
        old = {wrapper: {f"module.{key}": value for key, value in old.items()}}
    torch.save(old, tmp_path / "w.pth")
    weights = read_weights(tmp_path / "w.pth")
    assert weights.tensors.keys() == {key for key in state if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("average", "raw"), [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("ema_state_dict", "state_dict")]
)
def test_moving_average_of_a_trainer(tmp_path: Path, average: str, raw: str) -> None:
    """Files as timm's and torchvision's trainers save them, with their arguments."""
    state = named("torchvision_resnet50")
    averaged = {f"module.{name}": tensor + 1 for name, tensor in state.items()} | {"n_averaged": torch.tensor(3)}
    path, arguments = tmp_path / "w.pth", argparse.Namespace(ema=True)
    torch.save({raw: state, average: averaged, "args": arguments}, path)
    weights = read_weights(path)
    assert (weights.tensors["fc.weight"].item(), weights.average) == (1, average)
    for nothing in (None, {}):
        torch.save({raw: state, average: nothing, "args": arguments}, path)
        weights = read_weights(path)
        assert (weights.tensors["fc.weight"].item(), weights.average) == (0, None)


def test_moving_average_in_a_model(tmp_path: Path, capsys) -> None:
    state = random_state(golden("torchvision_efficientnet_b0"))
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "w.pth")
    model = create_model("efficientnet-b0", 1000, 64, output_stride=32, pretrained=tmp_path / "w.pth")
    assert torch.equal(model.classifier.weight, averaged["classifier.1.weight"])
    assert "its moving average (state_dict_ema) is loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "scalar", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)], ids=lambda scalar: scalar.dtype.name
)
def test_numpy_scalars_beside_the_tensors(tmp_path: Path, scalar: np.generic) -> None:
    torch.save({"state_dict": {"stem.conv.weight": torch.zeros(1)}, "best_acc1": scalar}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").tensors.keys() == {"stem.conv.weight"}


def test_numpy_scalars_of_numpy_1(tmp_path: Path) -> None:
    """NumPy 1 pickles them under numpy.core, which NumPy 2 renamed to numpy._core."""
    path = tmp_path / "w.pth"
    torch.save({"stem.conv.weight": torch.zeros(1), "best_acc1": np.float64(0.5)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    renamed = {name: data.replace(b"numpy._core.multi", b"numpy.core.multi") for name, data in records.items()}
    assert renamed != records
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in renamed.items():
            archive.writestr(name, data)
    assert read_weights(path).tensors.keys() == {"stem.conv.weight"}


@pytest.mark.parametrize("prefix", ["model.", "net.", "model._orig_mod.", "module.backbone."])
def test_prefix_of_a_lightning_module(tmp_path: Path, prefix: str) -> None:
    """As a LightningModule saves it, with its other tensors and settings."""
    state = named("torchvision_resnet50")
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(2)}
    torch.save({"state_dict": wrapped, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, tmp_path / "w.ckpt")
    weights = read_weights(tmp_path / "w.ckpt")
    expected = {name for name in state if not name.endswith("num_batches_tracked")}
    assert weights.tensors.keys() == expected | {"loss.weight"}


def test_two_networks_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", {f"{name}.conv_stem.weight": torch.zeros(1) for name in ("student", "teacher")})
    with pytest.raises(ValueError, match=r"holds several networks \(student\., teacher\.\): save one"):
        read_weights(path)


def test_head_of_another_size_is_replaced(tmp_path: Path, capsys) -> None:
    state = random_state(golden("torchvision_efficientnet_b0"))
    path = write(tmp_path / "w.pth", state)
    model = create_model("efficientnet-b0", 10, 64, pretrained=path)
    stderr = capsys.readouterr().err
    assert "its head of 1000 classes is replaced by a new one of 10" in stderr
    assert "torchvision's names; symmetric padding, BatchNorm eps 1e-05\n" in stderr
    assert "images normalised with mean 0.485 0.456 0.406 and std 0.229 0.224 0.225\n" in stderr
    assert model.classifier.weight.shape == (10, 1280)
    assert torch.equal(model.head.conv.weight, state["features.8.0.weight"])


def test_unmatched_tensors(tmp_path: Path, capsys) -> None:
    state = random_state(golden("timm_efficientnet_b0"))
    del state["conv_head.weight"]
    state["blocks.0.0.conv_pw.weight"] = torch.zeros(3, 3, 1, 1)
    state["extra.weight"] = torch.zeros(1)
    state["bn1.weight"] = torch.full_like(state["bn1.weight"], float("nan"))
    state["bn1.bias"] = state["bn1.bias"].to(torch.int8)
    path = write(tmp_path / "efficientnet_b0.pth", state)
    with pytest.raises(ValueError, match="does not fit this EfficientNet") as refused:
        create_model("efficientnet-b0", 1000, 64, pretrained=path)
    for message in (
        "1 missing (conv_head.weight)",
        "1 unexpected (extra.weight)",
        "1 mis-shaped (blocks.0.0.conv_pw.weight)",
        "2 not finite floating-point numbers (bn1.weight, bn1.bias)",
        "--allow_unmatched",
    ):
        assert message in str(refused.value)
    model = create_model("efficientnet-b0", 1000, 64, pretrained=path, allow_unmatched=True)
    assert torch.equal(model.stem.conv.weight, state["conv_stem.weight"])
    stderr = capsys.readouterr().err
    for message in (
        "missing: conv_head.weight",
        "unexpected: extra.weight",
        "mis-shaped: blocks.0",
    ):
        assert message in stderr


@pytest.mark.parametrize("model", ["efficientnet-b1", "resnet50"])
def test_weights_of_another_model(tmp_path: Path, model: str) -> None:
    path = write(tmp_path / "w.pth", random_state(golden("torchvision_efficientnet_b0")))
    with pytest.raises(ValueError, match="does not fit this"):
        create_model(model, 1000, 64, output_stride=32, pretrained=path, allow_unmatched=False)


@pytest.mark.parametrize("file", ["efficientnet_b0.pth", "tf_efficientnet_b0.pth"])
def test_efficientnet_weights_in_a_reference_model(tmp_path: Path, file: str) -> None:
    """Not even timm's classifier.bias, which has the name and shape of DenseNet's."""
    path = write(tmp_path / file, random_state(golden("timm_efficientnet_b0")))
    with pytest.raises(ValueError, match=r"holds an EfficientNet's weights .* does not fit this DenseNet: "):
        create_model("densenet201", 1000, 64, output_stride=32, pretrained=path, allow_unmatched=True)


def test_published_weights_in_a_small_stem(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", random_state(golden("torchvision_resnet50")))
    with pytest.raises(ValueError, match=r"1 mis-shaped \(conv1.weight\).*--output_stride 32"):
        create_model("resnet50", 1000, 32, pretrained=path)


def test_explicit_padding_and_eps(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", random_state(golden("torchvision_efficientnet_b0")))
    model = create_model("efficientnet-b0", 1000, 64, pretrained=path, padding="same", bn_eps=1e-4)
    assert (model.architecture.padding, model.architecture.bn_eps) == ("same", 1e-4)


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_without_weights(tmp_path: Path, capsys) -> None:
    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    torch.save({"weights": {}}, tmp_path / "empty.pth")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    torch.save({1: torch.zeros(1), "conv_stem.weight": torch.zeros(1)}, tmp_path / "numbered.pth")
    expected = {
        "code.pth": r"more than tensors \(print\), which could run code",
        "torn.pth": "damaged",
        "torn.safetensors": "damaged",
        "empty.pth": r"holds no state dict .* but weights: save the state dict alone",
        "numbered.pth": "holds no state dict",
        "foreign.pth": "no known layout",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read_weights(tmp_path / "nowhere.pth")
    assert "must not run" not in capsys.readouterr().out


OWN = {
    "format": 1,
    "architecture": {"padding": "same", "bn_eps": 1e-4},
    "model": {"stem.conv.weight": torch.zeros(1)},
    "ema": None,
    "classes": ["a"],
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
}
CHANGES = [
    ({"mean": 5}, "mean must be three finite numbers, not 5"),
    ({"std": [0, 1, 1]}, "std must be three positive numbers"),
    ({"architecture": 5}, "architecture is 5"),
    ({"classes": "a"}, "classes is 'a'"),
]


def without(state: dict, *names: str) -> dict:
    return {name: value for name, value in state.items() if name not in names}


def test_moving_average_of_a_run(tmp_path: Path) -> None:
    torch.save(OWN | {"ema": {"stem.conv.weight": torch.ones(1)}}, tmp_path / "last.pt")
    weights = read_weights(tmp_path / "last.pt")
    assert (weights.tensors["stem.conv.weight"].item(), weights.average) == (1, "ema")


def test_flipped_bits_of_a_checkpoint(tmp_path: Path) -> None:
    """torch.load does not compare the checksums that torch.save writes."""
    path = tmp_path / "last.pt"
    torch.save(OWN | {"model": {"stem.conv.weight": torch.full((1000,), 1.5)}}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x00\x00\xc0\x3f", b"\x00\x00\xc0\xbf"))
    assert torch.load(path, weights_only=True)["model"]["stem.conv.weight"][0] == -1.5
    with pytest.raises(ValueError, match="is damaged"):
        read_weights(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        *((without(OWN, name), f"it lacks {name};") for name in ("model", "ema", "classes", "mean", "std")),
        (without(OWN, "model", "std"), "it lacks model, std;"),
        *((OWN | change, message) for change, message in CHANGES),
        *((OWN | {name: 5}, "no state") for name in ("model", "ema")),
    ],
)
def test_damaged_checkpoint(tmp_path: Path, state: dict, message: str) -> None:
    path = tmp_path / "last.pt"
    torch.save(OWN, path)
    assert (read_weights(path).padding, read_weights(path).mean) == ("same", (0.5,) * 3)
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"last\.pt.* {message}"):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: None}, f"it lacks {name};") for name in ("architecture", "classes", "mean", "std", "folded")),
        ({"classes": "torn ["}, "metadata is not what effnet-fast export writes"),
        *(({name: json.dumps(value) for name, value in change.items()}, message) for change, message in CHANGES),
    ],
)
def test_damaged_export(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "model.safetensors"
    settings = without(OWN, "format", "model", "ema") | {"effnet_fast": "1.0", "folded": False}
    metadata = {name: json.dumps(value) for name, value in settings.items()}
    save_file(OWN["model"], path, metadata)
    assert (read_weights(path).padding, read_weights(path).mean) == ("same", (0.5,) * 3)
    save_file(OWN["model"], path, {name: value for name, value in (metadata | change).items() if value is not None})
    with pytest.raises(ValueError, match=rf"model\.safetensors.* {message}"):
        read_weights(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_file_without_read_permission(tmp_path: Path, monkeypatch, name: str) -> None:
    path = write(tmp_path / name, {"stem.conv.weight": torch.zeros(1)})

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # as the system does for users other than root
    with pytest.raises(PermissionError, match=f"Permission denied.*{name}"):
        read_weights(path)
