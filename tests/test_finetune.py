"""Fine-tuning from weights of other libraries; training of reference models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from efficientnet_pytorch import EfficientNet as EfficientNetPyTorch

from command_line import mistake, run, run_ranks
from effnet_fast import checkpoint, cli
from effnet_fast.config import TrainConfig

TINY = (
    "train --dataset synthetic --limit_train 24 --limit_eval 8 --batch_size 8 --num_epochs 1 --output_stride 32 "
    "--loader resident --num_workers 1 --log_every_steps 1 --device cpu"
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in EfficientNet-PyTorch's layout, with ImageNet's 1000 classes."""
    path = tmp_path_factory.mktemp("weights") / "efficientnet-b0.pth"
    torch.manual_seed(0)
    torch.save(EfficientNetPyTorch.from_name("efficientnet-b0").state_dict(), path)
    return path


def test_freeze_and_layer_decay(foreign: Path, tmp_path: Path, capsys) -> None:
    line = f"{TINY} --pretrained {foreign} --freeze stages.2 --layer_decay 0.5 --save_dir {tmp_path} --run_name tuned"
    run(line)
    assert "its head of 1000 classes is replaced by a new one of 100" in capsys.readouterr().err
    saved, start = checkpoint.load(tmp_path / "tuned" / "last.pt"), torch.load(foreign, weights_only=True)
    assert (saved["architecture"]["padding"], saved["architecture"]["bn_eps"]) == ("same", 1e-3)
    assert saved["mean"] == [0.485, 0.456, 0.406]
    weights = saved["model"]
    assert torch.equal(weights["stem.conv.weight"], start["_conv_stem.weight"])
    assert torch.equal(weights["stem.norm.running_mean"], start["_bn0.running_mean"])
    assert torch.equal(weights["stages.2.1.project.norm.running_var"], start["_blocks.4._bn2.running_var"])
    assert not torch.equal(weights["stages.3.0.expand.conv.weight"], start["_blocks.5._expand_conv.weight"])
    assert not torch.equal(weights["stages.3.0.expand.norm.running_mean"], start["_blocks.5._bn0.running_mean"])
    options = f"--limit_eval 8 --loader resident --device cpu --output_dir {tmp_path}"
    run(f"eval --checkpoint {tmp_path}/tuned/last.pt {options}")
    assert f"loss {saved['result']['loss']:.4f}" in capsys.readouterr().out


def test_head_is_kept_for_as_many_classes(tmp_path: Path, capsys) -> None:
    line = f"{TINY} --width 0.25 --depth 0.3 --save_dir {tmp_path}"
    run(f"{line} --run_name first")
    first = checkpoint.load(tmp_path / "first" / "last.pt")
    capsys.readouterr()
    run(f"{line} --run_name second --pretrained {tmp_path}/first/last.pt --freeze backbone --learning_rate 0")
    printed = capsys.readouterr().err
    assert f"its head is kept, for its 100 classes: {', '.join(first['classes'][:4])} and 96 more" in printed
    second = checkpoint.load(tmp_path / "second" / "last.pt")["model"]
    assert torch.equal(second["classifier.weight"], first["model"]["classifier.weight"])


def test_resumed_fine_tuning_has_the_same_bits(foreign: Path, tmp_path: Path) -> None:
    line = f"{TINY} --pretrained {foreign} --freeze backbone --layer_decay 0.7 --save_dir {tmp_path}"
    run(f"{line} --run_name whole")
    run(f"{line} --run_name halves --time_budget 0.001")
    assert not checkpoint.load(tmp_path / "halves" / "last.pt")["progress"]["finished"]
    run(f"{line} --run_name halves")
    whole, halves = (checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_resuming_ignores_the_weights_file(foreign: Path, tmp_path: Path, capsys) -> None:
    weights = shutil.copy(foreign, tmp_path / "weights.pth")
    line = f"{TINY} --pretrained {weights} --save_dir {tmp_path} --run_name tuned"
    run(f"{line} --time_budget 0.001")
    before = checkpoint.load(tmp_path / "tuned" / "last.pt")
    assert not before["progress"]["finished"]
    weights.unlink()
    capsys.readouterr()
    run(line)
    assert "head" not in capsys.readouterr().err
    after = checkpoint.load(tmp_path / "tuned" / "last.pt")
    assert after["progress"]["finished"]
    assert after["architecture"] == before["architecture"]
    assert (after["architecture"]["padding"], after["mean"]) == ("same", [0.485, 0.456, 0.406])
    run(line)
    assert "is finished; nothing to do" in capsys.readouterr().out
    run(f"{line} --resume no", expected=2)
    assert f"there are no weights at {weights}" in capsys.readouterr().err


def test_two_ranks_fine_tune(foreign: Path, tmp_path: Path) -> None:
    line = f"{TINY} --pretrained {foreign} --freeze stages.3 --layer_decay 0.7 --save_dir {tmp_path} --run_name ranks"
    printed = run_ranks([sys.executable, "-m", "effnet_fast", *line.split()], 2)
    assert printed.count("its head of 1000 classes") == 1
    assert checkpoint.load(tmp_path / "ranks" / "last.pt")["progress"]["finished"]


def test_recipe_follows_the_paper(tmp_path: Path) -> None:
    from importlib import resources

    recipe = resources.files("effnet_fast.recipes") / "finetune-cifar100.yaml"
    settings = cli.parse(cli.VERBS["train"], "train", f"--config {recipe} --pretrained w.pth".split())
    assert isinstance(settings, TrainConfig)
    assert (settings.dataset, settings.image_size, settings.output_stride) == ("cifar100", 224, 32)
    assert settings.learning_rate < TrainConfig().learning_rate
    assert 19_000 < settings.num_epochs * (50_000 // settings.batch_size) < 21_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pretrained nowhere.pth", "there are no weights at nowhere.pth"),
        ("--resume elsewhere.pt --freeze stem", "there is no checkpoint at elsewhere.pt"),
        ("--freeze backbone", "--freeze applies to pretrained weights: add --pretrained FILE"),
        ("--pretrained_layout timm", "--pretrained_layout applies to pretrained weights"),
        ("--allow_unmatched true", "--allow_unmatched applies to pretrained weights"),
        ("--layer_decay 0", "--layer_decay must be above 0"),
        ("--model resnet50 --width 2", "resnet50 has no width"),
        ("--model resnet50 --output_stride 16", "not 16"),
        ("--model resnet51", "did you mean resnet50"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path: Path, flags: str, words: str) -> None:
    assert words in mistake(capsys, f"{TINY} --save_dir {tmp_path} {flags}")


def test_freeze_unknown_layer(foreign: Path, tmp_path: Path, capsys) -> None:
    run(f"{TINY} --save_dir {tmp_path} --pretrained {foreign} --freeze stages.9", expected=2)
    assert "\nerror: cannot freeze up to 'stages.9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model",
    [
        "resnet50",
        pytest.param("resnet152", marks=pytest.mark.slow),
        pytest.param("densenet201", marks=pytest.mark.slow),
    ],
)
def test_reference_models_train_and_evaluate(model: str, tmp_path: Path, capsys) -> None:
    run(f"{TINY} --model {model} --save_dir {tmp_path} --run_name reference")
    saved = checkpoint.load(tmp_path / "reference" / "last.pt")
    assert saved["architecture"] | {"name": model, "family": "reference", "image_size": 32} == saved["architecture"]
    options = f"--limit_eval 8 --loader resident --device cpu --output_dir {tmp_path}"
    run(f"eval --checkpoint {tmp_path}/reference/last.pt {options}")
    assert f"loss {saved['result']['loss']:.4f}" in capsys.readouterr().out


def test_info_of_a_reference_model(capsys) -> None:
    run("info --model resnet50 --num_classes 100 --json")
    printed = json.loads(capsys.readouterr().out)
    assert (printed["parameters"], printed["output_stride"], printed["image_size"]) == (23_705_252, 8, 32)
