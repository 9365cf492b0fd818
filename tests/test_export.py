"""Exports give the same logits as the checkpoint, and carry the metadata for their use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import effnet_fast
from command_line import mistake, run
from effnet_fast import checkpoint, create_model
from effnet_fast.config import TrainConfig
from effnet_fast.model import batch_norms
from effnet_fast.model.trained import TrainedModel
from effnet_fast.model.weights import read_safetensors
from effnet_fast.run import export as export_verb
from plain_networks import timm_b0, torchvision_b0

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose moving average differs from the raw weights, and alone is calibrated."""
    folder = tmp_path_factory.mktemp("results")
    run(
        "train --dataset synthetic --width 0.25 --depth 0.3 --limit_train 48 --limit_eval 16 --batch_size 8 "
        "--num_epochs 1 --loader resident --num_workers 1 --ema_decay 0.9 --device cpu "
        f"--save_dir {folder} --run_name tiny"
    )
    checkpoint.store_temperature(folder / "tiny" / "last.pt", "ema", 1.5)
    return folder / "tiny" / "last.pt"


def reload_safetensors(path: Path, images: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    with torch.no_grad():
        return effnet_fast.load(path, device="cpu").model(torch.from_numpy(images)).numpy(), metadata


def run_onnx(path: Path, images: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0], session.get_modelmeta().custom_metadata_map


def reload_torch_export(path: Path, images: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    metadata = dict.fromkeys(("architecture", "classes", "image_size", "mean", "std", "folded", "temperature"), "")
    program = torch.export.load(path, extra_files=metadata)
    with torch.no_grad():
        return program.module()(torch.from_numpy(images)).numpy(), metadata


RUNTIMES = {"safetensors": reload_safetensors, "onnx": run_onnx, "torch-export": reload_torch_export}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", SUFFIXES)
def test_same_logits_for_any_batch(trained: Path, tmp_path: Path, kind: str, folded: bool) -> None:
    output = tmp_path / f"model{SUFFIXES[kind]}"
    flag = "--fold_batchnorm" if folded else ""
    run(f"export --checkpoint {trained} --format {kind} --output {output} {flag}")
    model = effnet_fast.load(trained, device="cpu").model
    for batch in (1, 5):
        images = np.random.default_rng(batch).normal(size=(batch, 3, 32, 32)).astype(np.float32)
        logits, metadata = RUNTIMES[kind](output, images)
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(torch.from_numpy(images)).numpy(), rtol=1e-4, atol=1e-4)
    saved, stored = checkpoint.load(trained), {name: json.loads(value) for name, value in metadata.items()}
    assert {name: stored[name] for name in ("classes", "mean", "std", "architecture")} == {
        name: saved[name] for name in ("classes", "mean", "std", "architecture")
    }
    assert (stored["image_size"], stored["folded"], stored["temperature"]) == (32, folded, 1.5)


@pytest.mark.parametrize("flags", ["", "--fold_batchnorm", "--format hub"])
def test_float16(trained: Path, tmp_path: Path, flags: str) -> None:
    """Weights are stored as float16, BatchNorm and biases as float32; the loaded model computes in float32."""
    output = tmp_path / "hub" if "hub" in flags else tmp_path / "half.safetensors"
    run(f"export --checkpoint {trained} --output {output} --dtype float16 {flags}")
    path = output / "model.safetensors" if "hub" in flags else output
    for tensor in load_file(path).values():
        assert not tensor.is_floating_point() or tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32)
    half, full = (effnet_fast.load(file, device="cpu").model for file in (path, trained))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(half(images), full(images), rtol=1e-2, atol=1e-2)


def test_float16_cannot_hold_large_weights(trained: Path, tmp_path: Path, capsys) -> None:
    saved = checkpoint.load(trained)
    saved["ema"]["stem.conv.weight"][0] = 1e5
    torch.save(saved, tmp_path / "large.pt")
    run(f"export --checkpoint {tmp_path}/large.pt --dtype float16", expected=2)
    message = "stem.conv.weight has a weight that torch.float16 cannot hold: export with --dtype float32"
    assert message in capsys.readouterr().err


def test_weights_flag(trained: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(trained)
    for weights, group in (("auto", "ema"), ("ema", "ema"), ("raw", "model")):
        path = tmp_path / f"{weights}.safetensors"
        run(f"export --checkpoint {trained} --weights {weights} --output {path}")
        with safe_open(path, framework="pt") as file:
            assert torch.equal(file.get_tensor("stem.conv.weight"), saved[group]["stem.conv.weight"])
            assert json.loads(file.metadata()["temperature"]) == (1.5 if group == "ema" else 1)
    assert not torch.equal(saved["ema"]["stem.conv.weight"], saved["model"]["stem.conv.weight"])


def test_folding_removes_batch_norms(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "folded.safetensors"
    run(f"export --checkpoint {trained} --fold_batchnorm --output {path}")
    predictor = effnet_fast.load(path, device="cpu")
    assert isinstance(predictor, TrainedModel)
    assert not batch_norms(predictor.model)
    with pytest.raises(ValueError, match="export without --fold_batchnorm"):
        create_model("efficientnet-b0", width=0.25, depth=0.3, pretrained=path)


@pytest.mark.parametrize("flag", ["", "--fold_batchnorm"])
def test_export_of_an_export(trained: Path, tmp_path: Path, capsys, flag: str) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(f"export --checkpoint {trained} --output {first} {flag}")
    run(f"export --checkpoint {first} --output {second}")
    (tensors, metadata), (again, same) = (read_safetensors(path) for path in (first, second))
    assert metadata == same
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    run(f"export --checkpoint {first}", expected=2)
    assert "is the file to export: choose another --output" in capsys.readouterr().err


def test_exports_have_one_set_of_weights(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    run(f"export --checkpoint {trained} --output {path}")
    with pytest.raises(ValueError, match="single set of weights: use --weights auto, not raw"):
        effnet_fast.load(path, weights="raw", device="cpu")
    with pytest.raises(ValueError, match="weights 'best'"):
        effnet_fast.load(path, weights="best", device="cpu")


@pytest.mark.parametrize("form", ["safetensors", "checkpoint"])
def test_pretrained_from_a_run(trained: Path, tmp_path: Path, form: str) -> None:
    path = trained
    if form == "safetensors":
        path = tmp_path / "model.safetensors"
        run(f"export --checkpoint {trained} --output {path}")
    model = create_model("efficientnet-b0", 100, 32, width=0.25, depth=0.3, pretrained=path)
    for name, tensor in checkpoint.load(trained)["ema"].items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_mistakes(trained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for flags in ("", "--format hub"):
        run(f"export --checkpoint {tmp_path}/nowhere/last.pt {flags}", expected=2)
        assert f"there is no checkpoint at {tmp_path}/nowhere/last.pt" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    run(f"export --checkpoint {trained} --output {tmp_path}/nowhere/model.safetensors", expected=2)
    assert "cannot write" in capsys.readouterr().err
    for name in (trained, tmp_path / "weights", tmp_path / "model.onnx"):
        run(f"export --checkpoint {trained} --output {name}", expected=2)
        assert "must end in .safetensors" in capsys.readouterr().err
    checkpoint.load(trained)  # it was not overwritten
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(f"export --checkpoint {trained} --format onnx", expected=2)
    assert "pip install 'effnet-fast[export]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a B0 at output stride 32 whose BatchNorm statistics fit its activations."""
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", 10, 64, output_stride=32, bn_momentum=0.5).train()
    for _ in range(10):
        model(torch.randn(8, 3, 64, 64))
    config = TrainConfig(dataset="cifar10", output_stride=32, num_epochs=3, learning_rate=0.3)
    state = {
        "model": model.state_dict(),
        "ema": None,
        "config": dataclasses.asdict(config),
        "architecture": dataclasses.asdict(model.architecture),
        "classes": [f"class-{i}" for i in range(10)],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
        "temperatures": {"raw": 2.0},
        "result": {"split": "test", "loss": 0.51234, "top1": 87.654, "top5": 99.5},
    }
    path = tmp_path_factory.mktemp("published") / "last.pt"
    checkpoint.save(path, state)
    return path


ORACLES = {"timm": timm_b0, "torchvision": torchvision_b0}


@pytest.mark.parametrize("layout", ORACLES)
def test_layouts_of_other_libraries(published: Path, tmp_path: Path, layout: str) -> None:
    output = tmp_path / "model.safetensors"
    run(f"export --checkpoint {published} --layout {layout} --output {output}")
    tensors, images = load_file(output), torch.randn(2, 3, 64, 64)
    model = effnet_fast.load(published, device="cpu").model
    with torch.no_grad():
        expected = model(images) / 2  # at the model's temperature
        torch.testing.assert_close(ORACLES[layout](tensors, images), expected, rtol=1e-4, atol=1e-4)
    half = tmp_path / "half" / "model.safetensors"
    half.parent.mkdir()
    run(f"export --checkpoint {published} --layout {layout} --output {half} --dtype float16")
    assert {tensor.dtype for tensor in load_file(half).values() if tensor.ndim > 1} == {torch.float16}
    if layout == "torchvision":
        assert not (tmp_path / "config.json").exists()
        return
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "efficientnet_b0"
    assert (config["num_classes"], config["label_names"][3]) == (10, "class-3")
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    again = create_model("efficientnet-b0", 10, 64, output_stride=32, pretrained=output).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images), expected, rtol=1e-4, atol=1e-4)


def test_config_json_of_another_library_is_kept(published: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    run(f"export --checkpoint {published} --layout timm --output {tmp_path}/model.safetensors", expected=2)
    assert "config.json is not timm's and would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == '{"model_type": "vit"}'


def test_config_json_of_another_model_is_kept(published: Path, tmp_path: Path, capsys) -> None:
    line = f"export --checkpoint {published} --layout timm --output {tmp_path}"
    run(f"{line}/a.safetensors")
    run(f"{line}/b.safetensors")  # it has the same settings
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    run(f"{line}/b.safetensors", expected=2)
    assert "config.json would describe a.safetensors, another model" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text()) == settings
    (tmp_path / "a.safetensors").unlink()
    run(f"{line}/b.safetensors")  # it replaces itself
    assert json.loads((tmp_path / "config.json").read_text()) != settings


def test_weights_without_config_json_are_not_described_by_an_export(
    published: Path, trained: Path, tmp_path: Path, capsys
) -> None:
    """Without one, their layout and preprocessing are inferred; a config.json would change how they are read."""
    line = f"export --checkpoint {published} --layout timm --output {tmp_path}/a.safetensors"
    (tmp_path / "tf_efficientnet_b0_ns.pth").write_bytes(b"")
    assert "config.json would describe tf_efficientnet_b0_ns.pth" in mistake(capsys, line)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "tf_efficientnet_b0_ns.pth").unlink()
    run(f"export --checkpoint {trained} --output {tmp_path}/own.safetensors")  # describes itself
    run(line)


def test_a_full_disk_leaves_config_json(published: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """With another one, weights of an earlier export would be read wrongly."""

    def full(path: Path, content: bytes) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export_verb, "write_atomically", full)
    for flags, folder in (("--layout timm", tmp_path), ("--format hub", tmp_path / "hub")):
        output = tmp_path / "a.safetensors" if folder == tmp_path else folder
        assert "No space left" in mistake(capsys, f"export --checkpoint {published} {flags} --output {output}")
        assert not (folder / "config.json").exists()


def test_hub_keeps_the_readme_of_a_project(published: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "README.md").write_text("my project")
    line = f"export --checkpoint {published} --format hub --output {tmp_path}"
    assert "is no export and its README.md would be overwritten" in mistake(capsys, line)
    (tmp_path / "model.safetensors").write_bytes(b"of another library")
    assert "would be overwritten" in mistake(capsys, line)
    assert (tmp_path / "README.md").read_text() == "my project"
    run(f"{line}/hub")
    run(f"{line}/hub")  # an export is replaced


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layout timm", "timm's networks have output stride 32, this model 8"),
        ("--dtype float16 --format onnx", "--dtype float16 is for --format safetensors or hub, not onnx"),
        ("--layout timm --format onnx", "--layout timm is for --format safetensors or hub, not onnx"),
        ("--layout timm --fold_batchnorm", "--fold_batchnorm is not for --layout timm"),
        ("--format hub --fold_batchnorm", "--fold_batchnorm is not for"),
    ],
)
def test_impossible_layouts(trained: Path, tmp_path: Path, capsys, flags: str, message: str) -> None:
    assert message in mistake(capsys, f"export --checkpoint {trained} --output {tmp_path}/out.safetensors {flags}")


def test_a_folded_export_has_no_layout_of_another_library(published: Path, tmp_path: Path, capsys) -> None:
    run(f"export --checkpoint {published} --output {tmp_path}/folded.safetensors --fold_batchnorm")
    line = f"export --checkpoint {tmp_path}/folded.safetensors --output {tmp_path}/out.safetensors --layout timm"
    assert "has its BatchNorm folded, which --layout timm needs" in mistake(capsys, line)


@pytest.mark.parametrize("layout", ["effnet-fast", "timm", "torchvision"])
def test_hub_folder(published: Path, tmp_path: Path, layout: str) -> None:
    run(f"export --checkpoint {published} --format hub --layout {layout} --output {tmp_path}/hub")
    folder = tmp_path / "hub"
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    _, front_matter, card = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert metadata["library_name"] == ("timm" if layout == "timm" else "effnet_fast")
    assert metadata["datasets"] == ["cifar10"]
    (result,) = metadata["model-index"][0]["results"]
    assert (result["metrics"][0]["value"], result["dataset"]["split"]) == (87.65, "test")
    assert "| top-1 accuracy (%) | 87.65 |\n| top-5 accuracy (%) | 99.50 |\n| loss | 0.5123 |\n\n" in card
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == {
        "model": "efficientnet-b0",
        "dataset": "cifar10",
        "num_epochs": 3,
        "learning_rate": 0.3,
        "output_stride": 32,
    }
    assert ", ".join(f"class-{i}" for i in range(10)) in card
    assert "calibrated by a temperature of 2.0000:\n" in card
    if layout == "effnet-fast":
        loaded = effnet_fast.load(folder / "model.safetensors", device="cpu")
        assert (loaded.classes[9], loaded.temperature) == ("class-9", 2)


def test_hub_card_has_no_results_of_other_weights(trained: Path, tmp_path: Path) -> None:
    """A run that was stopped within an epoch, after an evaluation of earlier weights."""
    state = checkpoint.load(trained)
    state["progress"]["step"] += 1
    torch.save(state, tmp_path / "last.pt")
    run(f"export --checkpoint {tmp_path}/last.pt --format hub --output {tmp_path}/hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "These weights were not evaluated." in card
    assert "model-index" not in card


def test_hub_results(trained: Path, tmp_path: Path, capsys) -> None:
    run(f"export --checkpoint {trained} --format hub --output {tmp_path}/ema")
    run(f"export --checkpoint {trained} --format hub --weights raw --output {tmp_path}/raw")
    result = checkpoint.load(trained)["result"]
    for folder, key in (("ema", "ema_loss"), ("raw", "loss")):
        assert f"| loss | {result[key]:.4f} |" in (tmp_path / folder / "README.md").read_text()
    assert f"{result['ema_loss']:.4f}" != f"{result['loss']:.4f}"
    run(f"export --checkpoint {tmp_path}/ema/model.safetensors --format hub --output {tmp_path}/x", expected=2)
    assert "--format hub needs a run's checkpoint" in capsys.readouterr().err
