"""The functions that Python calls: results, callbacks, and mistakes as exceptions."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import effnet_fast
from effnet_fast import EvalConfig, ExportConfig, StudyConfig, TrainConfig
from effnet_fast.config import CamConfig
from examples import run_examples

TINY = {
    "dataset": "synthetic", "width": 0.25, "depth": 0.3, "image_size": 16, "output_stride": 16, "limit_train": 16,
    "limit_eval": 8, "batch_size": 8, "num_epochs": 2, "device": "cpu", "loader": "resident", "kernels": "torch",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A result, and the calls of on_evaluation."""
    calls = []
    config = TrainConfig(**TINY, ema_decay=0.5, save_dir=str(tmp_path_factory.mktemp("results")), run_name="tiny")
    return effnet_fast.train(config, on_evaluation=lambda epoch, row: calls.append((epoch, row))), calls


@pytest.mark.parametrize(("of_the_user", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_cublas_is_set_before_its_first_product(monkeypatch, of_the_user, expected):
    """It reads the variable once; a later --deterministic would be refused."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", str(of_the_user))
    if of_the_user is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    code = "import os, sys, effnet_fast; print(os.environ['CUBLAS_WORKSPACE_CONFIG'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]


def test_train_returns_a_result(trained):
    result, calls = trained
    assert (result.status, result.finished, result.folder.name) == (0, True, "tiny")
    last = result.history.eval[-1]
    assert (result.top1, result.top5, result.loss) == (last["ema_top1"], last["ema_top5"], last["ema_loss"])
    assert [row["epoch"] for row in result.history.eval] == [1, 2]
    assert result.history.train[-1]["step"] == 4
    assert [(epoch, row["top1"]) for epoch, row in calls] == [
        (row["epoch"], row["top1"]) for row in result.history.eval
    ]
    assert len(result.model("cpu").classes) == 100


def test_a_finished_run_returns_its_result_again(trained):
    result, _ = trained
    config = TrainConfig(**TINY, ema_decay=0.5, save_dir=str(result.folder.parent), run_name="tiny")
    again = effnet_fast.train(config, on_evaluation=lambda epoch, row: pytest.fail("it has nothing to evaluate"))
    assert (again, again.top1) == (result, result.top1)


def test_evaluate_and_export_return_results(trained, tmp_path):
    result, _ = trained
    checkpoint = str(result.folder / "last.pt")
    evaluated = effnet_fast.evaluate(
        EvalConfig(checkpoint, limit_eval=8, device="cpu", loader="resident", output_dir=str(tmp_path))
    )
    assert (evaluated.top1, evaluated.top5) == pytest.approx((result.top1, result.top5))
    assert evaluated.loss == pytest.approx(result.loss, rel=1e-4)
    assert evaluated.confusion.shape == (100, 100) == (len(evaluated.classes),) * 2
    assert (evaluated.folder / "test-per-class.csv").is_file()
    exported = effnet_fast.export(ExportConfig(checkpoint, output=str(tmp_path / "tiny.safetensors")))
    assert exported.path == tmp_path / "tiny.safetensors"
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(exported.model("cpu").model(images), result.model("cpu").model(images))
    folder = effnet_fast.export(ExportConfig(checkpoint, format="hub", output=str(tmp_path / "hub")))
    assert len(folder.model("cpu").classes) == 100


def test_a_dry_run_has_no_metrics(tmp_path, capsys):
    result = effnet_fast.train(TrainConfig(**TINY, save_dir=str(tmp_path), dry_run=True))
    assert math.isnan(result.top1)
    assert not result.finished
    assert not result.folder.exists()
    with pytest.raises(FileNotFoundError):
        result.model()
    with pytest.raises(FileNotFoundError):
        _ = result.history
    assert "epochs" in capsys.readouterr().out


def test_an_exception_of_the_callback_ends_the_run(tmp_path):
    def end(epoch, row):
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        effnet_fast.train(TrainConfig(**TINY, save_dir=str(tmp_path)), on_evaluation=end)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "--optimizer must be one of sgd, adamw, "),
        ({"num_epochs": "three"}, "--num_epochs must be a whole number, not 'three'"),
        ({"num_epochs": 2.5}, "--num_epochs must be a whole number, not 2.5"),
        ({"batch_size": True}, "--batch_size must be a whole number, not True"),
        ({"deterministic": "yes"}, "--deterministic must be True or False, not 'yes'"),
        ({"image_size": "big"}, "--image_size must be auto or a whole number, not 'big'"),
        ({"learning_rate": None}, "--learning_rate must be a number, not None"),
        ({"model": 3}, "--model must be text, not 3"),
    ],
)
def test_values_of_other_types_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**settings)


def test_paths_and_numpy_numbers_become_plain_values(monkeypatch):
    """YAML can write them, and `~` is the home folder as on the command line."""
    monkeypatch.setenv("HOME", "/home/ada")
    config = TrainConfig(data_dir=Path("~/photos"), batch_size=np.int64(8), learning_rate=np.float32(0.5), rotation=3)
    assert (config.data_dir, config.batch_size, config.learning_rate, config.rotation) == (
        "/home/ada/photos",
        8,
        0.5,
        3,
    )
    assert (type(config.batch_size), type(config.learning_rate)) == (int, float)
    assert StudyConfig(target_flops=(1e8, 2e8)).targets == [1e8, 2e8]


def test_paths_with_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("RUNS", "/runs")
    assert TrainConfig(save_dir="~/lr=0.1", data_dir="$RUNS/a=~").save_dir == "/home/ada/lr=0.1"
    assert TrainConfig(data_dir="$RUNS/a=~").data_dir == "/runs/a=~"
    config = CamConfig(images_path="i", output_path="o", run=["b0=~/lr=0.1/last.pt", "b1=$RUNS/last.pt"])
    assert config.run == ["b0=/home/ada/lr=0.1/last.pt", "b1=/runs/last.pt"]


@pytest.mark.parametrize(("value", "expected"), [(True, "auto"), ("on", "auto"), (False, "no"), ("a.pt", "a.pt")])
def test_values_of_resume(value, expected):
    assert TrainConfig(resume=value).resume == expected


def test_packages_named_as_verbs_stay_packages():
    from effnet_fast.search import plan
    from effnet_fast.train import loop

    assert (effnet_fast.train.loop, effnet_fast.search.plan) == (loop, plan)
    assert all(callable(getattr(effnet_fast, verb)) for verb in ("train", "evaluate", "export", "search", "study"))
    assert set(dir(effnet_fast)) == set(effnet_fast.__all__)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: effnet_fast.train(TrainConfig(model="efficientnet-b8")), "did you mean efficientnet-b"),
        (lambda folder: effnet_fast.train(TrainConfig(batch_size=0)), "--batch_size must be at least 1"),
        (lambda folder: effnet_fast.train(TrainConfig(**TINY | {"batch_size": 32}, save_dir=folder)), "is larger than"),
        (lambda folder: effnet_fast.evaluate(EvalConfig(f"{folder}/last.pt")), "last.pt"),
        (lambda folder: effnet_fast.export(ExportConfig(f"{folder}/last.pt", output="a.onnx")), "must end in"),
        (lambda folder: effnet_fast.load(f"{folder}/last.pt"), "last.pt"),
    ],
)  # fmt: skip
def test_mistakes_raise_exceptions(tmp_path, call, words):
    """Rather than SystemExit, which would end a notebook's kernel or a server."""
    with pytest.raises((ValueError, OSError), match=words):
        call(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# Those of search and study run in test_search.py and test_study.py, whose runs count the cost of the same models.
EXAMPLES = sorted(set(effnet_fast.__all__) - {"__version__", "search", "study"})


@pytest.fixture(scope="module")
def folder_of_examples(tmp_path_factory):
    """A folder with results/tiny/, which the example of `train` writes and other examples read."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_examples("train")
    return folder


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "train"])
def test_examples_of_public_names(folder_of_examples, monkeypatch, name):
    monkeypatch.chdir(folder_of_examples)
    run_examples(name)
