"""The verb eval: which images a split has, and where data and outputs are."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import effnet_fast
from command_line import mistake, run
from effnet_fast import checkpoint
from effnet_fast.data import load_dataset
from effnet_fast.data.dataset import Superclasses
from effnet_fast.model import trained as model_of_a_run
from effnet_fast.report.confusion import plot_confusion, write_per_class
from effnet_fast.run import eval_report, evaluation, prediction
from effnet_fast.run import folder as run_folder

QUICK = "--loader torch --num_workers 0 --device cpu"


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    start = len(list(folder.iterdir()))
    for i in range(start, start + count):
        random = np.random.default_rng([len(folder.name), i])
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i:02}.png")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("cat", "horse"):
        write_images(folder / "train" / name, 20)
        write_images(folder / "test" / name, 4)
    return folder


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a relative --data_dir: of 40 training images 10 are held out, and 12 of the rest are used."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data_dir.parent)
        run(
            f"train --dataset folder --data_dir {data_dir.name} --width 0.25 --depth 0.3 --batch_size 4 --num_epochs 1 "
            f"--val_fraction 0.25 --limit_train 12 --class_weights balanced --save_dir {folder} --run_name tiny {QUICK}"
        )
    return folder / "tiny" / "last.pt"


@pytest.mark.parametrize(
    ("flags", "images"),
    [
        ("--split test", 8),
        ("--split val", 10),
        ("--split train", 12),  # the run's --limit_train
        ("--split train --limit_eval 5", 5),
        ("--split val --limit_eval 5", 5),
    ],
)
def test_images_of_a_split(trained: Path, tmp_path: Path, capsys, flags: str, images: int) -> None:
    run(f"eval --checkpoint {trained} --output_dir {tmp_path} {flags} {QUICK}")
    assert re.search(rf"\({images} images; ", capsys.readouterr().out)
    (table,) = tmp_path.glob("*-per-class.csv")
    assert sum(int(row["images"]) for row in csv.DictReader(table.open())) == images


def test_flipped_figures_are_apart(trained: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    line = f"eval --checkpoint {trained} --output_dir {tmp_path} {QUICK}"
    run(line)
    plain, *_ = capsys.readouterr().out.splitlines()
    table = (tmp_path / "test-per-class.csv").read_text()
    run(f"{line} --tta flip")
    same, flipped, *_ = capsys.readouterr().out.splitlines()
    assert same == plain
    assert (tmp_path / "test-per-class.csv").read_text() == table
    model = effnet_fast.load(trained, device="cpu")
    files = sorted((data_dir / "test").rglob("*.png"))
    views = [[Image.open(file), ImageOps.mirror(Image.open(file))] for file in files]
    both = [
        [dict(view)[file.parent.name] for view in model.predict(pair)] for file, pair in zip(files, views, strict=True)
    ]
    truth = np.mean(both, axis=1)  # the probability of the true class of two
    assert f"loss_tta {-np.log(truth).mean():.4f}  top1_tta {100 * np.mean(truth > 0.5):.2f} %" in flipped


def test_flipping_averages_calibrated_probabilities(trained: Path, tmp_path: Path, capsys) -> None:
    """As predict does."""
    shutil.copy(trained, tmp_path / "last.pt")
    checkpoint.store_temperature(tmp_path / "last.pt", "raw", 2.0)
    result = effnet_fast.evaluate(
        effnet_fast.EvalConfig(
            f"{tmp_path}/last.pt", tta="flip", weights="raw", device="cpu", loader="torch", num_workers=0
        )
    )
    model = effnet_fast.load(tmp_path / "last.pt", weights="raw", device="cpu")
    split = load_dataset("folder", str(checkpoint.load(trained)["config"]["data_dir"])).test
    files = [Image.open(path) for path in split.paths]
    probabilities = model.probabilities(model.prepare(files), "flip")
    loss = torch.nn.functional.nll_loss(probabilities.log(), torch.as_tensor(split.labels))
    assert result.tta is not None
    assert result.tta.loss == pytest.approx(loss.item(), abs=1e-4)


def test_an_export_is_no_checkpoint(trained: Path, tmp_path: Path, capsys) -> None:
    run(f"export --checkpoint {trained} --output {tmp_path}/model.safetensors")
    line = f"eval --checkpoint {tmp_path}/model.safetensors"
    assert "is an export, not a run's checkpoint: name a run's last.pt or best.pt" in mistake(capsys, line)


def test_report(trained: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    """The files of the report; the figures on two ranks are those on one. Of 9 images, one rank has a padded batch."""
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    write_images(folder / "test" / "cat", 1)
    line = f"eval --checkpoint {trained} --data_dir {folder} --batch_size 2 {QUICK}"
    run(f"{line} --output_dir {tmp_path}/one")
    printed = capsys.readouterr().out
    one = json.loads((tmp_path / "one" / "test-evaluation.json").read_text())
    assert f"macro-F1 {one['macro_f1']:.2f} %  expected calibration error {one['ece']:.2f} %" in printed
    endings = "confused-pairs.csv confusion.png evaluation.json per-class.csv reliability.png worst.png"
    assert {path.name for path in (tmp_path / "one").iterdir()} == {f"test-{ending}" for ending in endings.split()}
    assert sum(row["images"] for row in one["reliability"]) == one["images"] == len(one["worst"]) == 9
    losses = [row["loss"] for row in one["worst"]]
    assert losses == sorted(losses, reverse=True)
    assert np.mean(losses) == pytest.approx(one["loss"])
    for row in one["worst"]:
        assert Path(row["file"]).parent.name == row["true"]
        assert row["loss"] == pytest.approx(-np.log(row["true_probability"]))

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "effnet_fast", *line.split(), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("macro-F1") == 1
    two = json.loads((tmp_path / "two" / "test-evaluation.json").read_text())
    assert two["confusion"] == one["confusion"]
    assert [row["file"] for row in two["worst"]] == [row["file"] for row in one["worst"]]
    for name in ("loss", "top1", "top5", "macro_f1", "ece"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_calibrate(trained: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    """The temperature is fitted to the 10 val images, reported on the 8 test images, and kept by every verb."""
    path, files = tmp_path / "last.pt", sorted((data_dir / "test").rglob("*.png"))
    shutil.copy(trained, path)
    before = effnet_fast.load(path, device="cpu")
    assert before.temperature == 1
    run(f"eval --checkpoint {path} --calibrate {QUICK}")
    report = json.loads((tmp_path / "test-evaluation.json").read_text())
    printed = capsys.readouterr().out
    assert "fitted to 10 val images; on test: expected calibration error" in printed
    assert f"stored in {path}" in printed
    calibration = report["calibration"]
    assert (report["images"], calibration["fitted_to"], calibration["fitted_images"]) == (8, "val", 10)

    after = effnet_fast.load(path, device="cpu")
    assert after.temperature == report["temperature"] != 1
    batch = after.prepare(files)
    with torch.no_grad():
        logits = before.model(batch)
    torch.testing.assert_close(after.probabilities(batch), (logits / report["temperature"]).softmax(1))
    assert [best[0].label for best in after.predict(files)] == [best[0].label for best in before.predict(files)]
    truth = torch.tensor([after.classes.index(file.parent.name) for file in files])
    for figures, temperature in ((calibration["before"], 1.0), (report, report["temperature"])):
        expected = torch.nn.functional.cross_entropy(logits / temperature, truth)
        assert figures["loss"] == pytest.approx(expected.item(), rel=1e-4)

    old, new = checkpoint.load(trained), checkpoint.load(path)
    assert new.pop("temperatures") == {"raw": report["temperature"]}
    assert old.pop("temperatures") == {}
    assert repr(new) == repr(old)
    run(f"eval --checkpoint {path} --output_dir {tmp_path}/again {QUICK}")
    again = json.loads((tmp_path / "again" / "test-evaluation.json").read_text())
    assert (again["ece"], again["temperature"]) == (pytest.approx(report["ece"]), report["temperature"])
    run(f"export --checkpoint {path} --format hub --output {tmp_path}/hub")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["temperature"] == report["temperature"]
    assert effnet_fast.load(tmp_path / "hub" / "model.safetensors", device="cpu").temperature == report["temperature"]


def test_a_report_that_fails_does_not_lose_the_temperature(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_):
        raise OSError("the disk is full: free some space")

    shutil.copy(trained, tmp_path)
    monkeypatch.setattr(evaluation, "write_report", full)
    assert "free some space" in mistake(capsys, f"eval --checkpoint {tmp_path}/last.pt --calibrate {QUICK}")
    assert checkpoint.load(tmp_path / "last.pt")["temperatures"].keys() == {"raw"}


def test_the_self_checks_decide(trained: Path, data_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Evaluation and prediction use the kernels and the loader that pass them, as training does."""
    used = []

    def build(architecture, state, kernels):
        used.append(kernels)
        return real(architecture, state, kernels)

    real = model_of_a_run._build
    monkeypatch.setattr(model_of_a_run, "_build", build)
    for module in (evaluation, prediction):
        monkeypatch.setattr(module, "resolve_kernels", lambda setting, device: "torch")
    monkeypatch.setattr(evaluation, "resolve_loader", lambda setting, split, device: ("torch", "DALI fails"))
    run(f"eval --checkpoint {trained} --output_dir {tmp_path} --num_workers 0 --device cpu")
    assert "(8 images; DALI fails)" in capsys.readouterr().out
    run(f"predict --checkpoint {trained} {data_dir}/test/cat/00.png --device cpu")
    assert used == ["torch", "torch"]


def test_thumbnails_of_photographs_are_small() -> None:
    assert eval_report._thumbnail(Image.new("RGB", (4000, 3000))).shape == (192, 256, 3)
    assert eval_report._thumbnail(Image.new("RGB", (32, 24))).shape == (24, 32, 3)


def test_a_run_that_trains_is_not_calibrated(trained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    shutil.copy(trained, tmp_path)
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)
    with run_folder.locked(tmp_path):
        run(f"eval --checkpoint {tmp_path}/last.pt --calibrate {QUICK}", expected=2)
    message = capsys.readouterr().err
    assert message == f"error: another run is at work in {tmp_path}: wait for its end, or leave --calibrate out\n"
    assert checkpoint.load(tmp_path / "last.pt")["temperatures"] == {}


def test_calibrate_needs_other_images(trained: Path, tmp_path: Path, capsys) -> None:
    state = checkpoint.load(trained)
    state["config"]["val_fraction"] = 0.0
    del state["temperatures"]  # as in files of older versions
    torch.save(state, tmp_path / "last.pt")
    assert effnet_fast.load(tmp_path / "last.pt", device="cpu").temperature == 1
    for line, message in (
        (f"--checkpoint {tmp_path}/last.pt", "the run held out none (--val_fraction 0)"),
        (f"--checkpoint {trained} --split val", "so it cannot report on them: use --split test"),
    ):
        assert message in mistake(capsys, f"eval --calibrate {line} {QUICK}")


@pytest.fixture
def changed(data_dir: Path, tmp_path: Path) -> Path:
    """The data set with one more training image."""
    folder = tmp_path / "changed"
    shutil.copytree(data_dir, folder)
    write_images(folder / "train" / "cat", 1)
    return folder


@pytest.mark.parametrize("split", ["val", "train"])
def test_val_and_train_of_changed_data_are_refused(trained: Path, changed: Path, capsys, split: str) -> None:
    """The added image changes which images are held out."""
    message = mistake(capsys, f"eval --checkpoint {trained} --data_dir {changed} --split {split} {QUICK}")
    assert f"{changed} is not the data that {trained} was trained on (the images or labels differ)" in message
    assert "use --split test" in message


def test_test_split_of_other_data(trained: Path, changed: Path, tmp_path: Path, capsys) -> None:
    write_images(changed / "test" / "cat", 3)
    run(f"eval --checkpoint {trained} --data_dir {changed} --output_dir {tmp_path}/out {QUICK}")
    assert "(11 images; " in capsys.readouterr().out


def test_relative_data_dir_from_another_folder(
    trained: Path, data_dir: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    assert checkpoint.load(trained)["config"]["data_dir"] == str(data_dir)
    monkeypatch.chdir(tmp_path)
    run(f"eval --checkpoint {trained} --output_dir {tmp_path} {QUICK}")
    assert "(8 images; " in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["folder", "cifar100"])
def test_moved_data(trained: Path, tmp_path: Path, capsys, monkeypatch, dataset: str) -> None:
    """Older checkpoints hold relative paths, which may name another folder now."""
    state = checkpoint.load(trained)
    state["config"] |= {"data_dir": "data", "dataset": dataset}
    torch.save(state, tmp_path / "last.pt")
    monkeypatch.chdir(tmp_path)
    assert "if the run's data set has moved, name its folder with --data_dir" in mistake(
        capsys, f"eval --checkpoint last.pt {QUICK}"
    )
    assert not (tmp_path / "data" / "cifar-100-python.tar.gz.part").exists()


def test_unwritable_outputs(trained: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "folder"  # not even root can create a folder in a file
    for line, flag in (
        (f"eval --checkpoint {trained} --output_dir {place} {QUICK}", "--output_dir"),
        (f"export --checkpoint {trained} --output {place}/model.safetensors", "--output"),
        (f"data --dataset folder --data_dir {data_dir} --output {place}/samples.png", "--output"),
        (f"predict --checkpoint {trained} {data_dir} --output {place}/table.csv", "--output"),
    ):
        assert f"cannot write to {place} (Not a directory): choose another {flag}\n" in mistake(capsys, line)


def test_class_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_per_class(tmp_path / "table.csv", [name, "dog"], np.array([[3, 1], [0, 2]]))
    plot_confusion(tmp_path / "picture.png", [name, "dog"], np.array([[3, 1], [0, 2]]))
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert [row["class"] for row in rows] == ["caf\\udce9", "dog"]


@pytest.mark.parametrize("of_class", [(0, 0), (1, 0)])
def test_superclasses(data_dir, trained, tmp_path, monkeypatch, capsys, of_class):
    """Both classes in one: every prediction is right; each in one of its own: as by class."""
    names = ("animals", "others")
    load = evaluation.data.load_dataset

    def with_superclasses(*arguments, **settings):
        return dataclasses.replace(load(*arguments, **settings), superclasses=Superclasses(names, of_class))

    monkeypatch.setattr(evaluation.data, "load_dataset", with_superclasses)
    run(f"eval --checkpoint {trained} --data_dir {data_dir} --output_dir {tmp_path} {QUICK}")
    report = json.loads((tmp_path / "test-evaluation.json").read_text())
    top1 = 100 if of_class == (0, 0) else report["top1"]
    assert report["superclasses"]["top1"] == pytest.approx(top1)
    assert f"superclasses: top-1 {top1:.2f} %" in capsys.readouterr().out
    with (tmp_path / "test-superclasses.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(names)
    with Image.open(tmp_path / "test-superclass-confusion.png") as picture:
        assert min(picture.size) > 100
