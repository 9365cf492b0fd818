"""The verb predict, and `effnet_fast.load` from Python."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import effnet_fast
from command_line import mistake, run
from effnet_fast import checkpoint, distributed
from effnet_fast.data import load_dataset
from effnet_fast.run import prediction
from marks import on_gpu


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    run(
        "train --dataset synthetic --width 0.25 --depth 0.3 --limit_train 48 --limit_eval 12 --batch_size 8 "
        f"--num_epochs 1 --loader resident --num_workers 1 --device cpu --save_dir {folder} --run_name tiny"
    )
    return folder / "tiny" / "last.pt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve test images of the run, as files in two folders."""
    folder = tmp_path_factory.mktemp("images")
    split = load_dataset("synthetic", "data", limit_eval=12).test
    for i, pixels in enumerate(split.images):  # type: ignore[union-attr]
        path = folder / ("a" if i < 6 else "b") / f"{i:02}-{split.labels[i]}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.parametrize("name", ["cifar100-cpu-long", "cifar100-h200"])
def test_the_kept_weights_take_pictures_at_once(name: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path(__file__).parents[1] / "benchmarks" / "results" / name / "model.safetensors"
    run(f"predict --checkpoint {weights} {pictures / 'a'} --top 3 --device cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == sorted(map(str, (pictures / "a").iterdir()))
    assert all(line.count(" %") == 3 for line in lines)


def test_predict_from_python_equals_evaluation(trained: Path, pictures: Path) -> None:
    predictor = effnet_fast.load(trained, device="cpu")
    files = sorted(pictures.rglob("*.png"))
    predictions = predictor.predict(files, top=5)
    labels = [predictor.classes[int(file.stem.split("-")[1])] for file in files]
    hits = [label in [p.label for p in best] for label, best in zip(labels, predictions, strict=True)]
    result = checkpoint.load(trained)["result"]
    assert 100 * sum(hits) / len(hits) == pytest.approx(result["top5"])
    truth = torch.tensor([predictor.classes.index(label) for label in labels])
    batch = torch.stack([predictor.preprocess(Image.open(file)) for file in files])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(predictor.model(batch), truth)
    assert loss.item() == pytest.approx(result["loss"], rel=1e-4)
    probabilities = [p.probability for p in predictions[0]]
    assert probabilities == sorted(probabilities, reverse=True)
    everything = predictor.predict([Image.open(files[0])], top=1000)
    assert sum(p.probability for p in everything[0]) == pytest.approx(1)


def test_flipping_averages_the_predictions_of_both_views(trained: Path, pictures: Path, capsys) -> None:
    path = next(pictures.rglob("*.png"))
    model = dataclasses.replace(effnet_fast.load(trained, device="cpu"), temperature=2.0)
    views = Image.open(path), ImageOps.mirror(Image.open(path))
    plain, mirrored = (dict(best) for best in model.predict(views, top=100))
    (averaged,) = model.predict(path, top=100, tta="flip")
    assert plain != mirrored
    expected = {label: (p + mirrored[label]) / 2 for label, p in plain.items()}
    assert dict(averaged) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    run(f"predict --checkpoint {trained} {path} --tta flip --top 1 --device cpu")
    (averaged,) = effnet_fast.load(trained, device="cpu").predict(path, top=1, tta="flip")
    assert f"{averaged[0].label} {100 * averaged[0].probability:.1f} %" in capsys.readouterr().out
    with pytest.raises(ValueError, match="tta 'crop': choose none or flip"):
        model.predict(path, tta="crop")


def test_image_and_folder(trained: Path, pictures: Path, capsys) -> None:
    one = next(pictures.rglob("*.png"))
    run(f"predict --checkpoint {trained} {one} --device cpu")
    (line,) = capsys.readouterr().out.splitlines()
    best = effnet_fast.load(trained, device="cpu").predict([one])[0]
    assert line.startswith(f"{one}  {best[0].label} {100 * best[0].probability:.1f} %")
    assert all(p.label in line for p in best)
    assert line.count("%") == 5
    run(f"predict --checkpoint {trained} {pictures} --batch_size 5 --top 2 --device cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(line.count("%") == 2 for line in lines)


def test_tables(trained: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("table.csv", "table.json"):
        run(f"predict --checkpoint {trained} {pictures / 'a'} --output {tmp_path / name} --device cpu")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = json.loads((tmp_path / "table.json").read_text())
    assert len(rows) == 5 * len(images) == 30
    assert [row["rank"] for row in rows[:5]] == ["1", "2", "3", "4", "5"]
    assert rows[0]["image"] == images[0]["image"] == str(pictures / "a" / Path(rows[0]["image"]).name)
    assert rows[0]["label"] == images[0]["predictions"][0]["label"]
    assert float(rows[0]["probability"]) == pytest.approx(images[0]["predictions"][0]["probability"], abs=1e-5)


def test_an_early_interruption_keeps_the_earlier_table(
    trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"predict --checkpoint {trained} {pictures} --output {tmp_path}/table.csv --device cpu"
    run(line)
    before = (tmp_path / "table.csv").read_text()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction, "_predict_readable", interrupt)
    run(line, expected=130)
    assert (tmp_path / "table.csv").read_text() == before


@on_gpu
@pytest.mark.parametrize("tta", ["none", "flip"])
def test_a_gpu_gives_the_probabilities_of_the_cpu(trained: Path, pictures: Path, tta: str) -> None:
    files = sorted(pictures.rglob("*.png"))
    on_cpu, on_cuda = (effnet_fast.load(trained, device=device) for device in ("cpu", "cuda"))
    ours, theirs = (model.probabilities(model.prepare(files), tta).cpu() for model in (on_cuda, on_cpu))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_unreadable_files_are_skipped(trained: Path, tmp_path: Path, capsys) -> None:
    Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(tmp_path / "good.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    run(f"predict --checkpoint {trained} {tmp_path} --output {tmp_path / 'table.csv'} --device cpu", expected=1)
    output = capsys.readouterr()
    assert "good.jpg" in output.out
    assert "broken.png" in output.err
    assert "skipped 1 unreadable of 2 images" in output.err
    assert "good.jpg" in (tmp_path / "table.csv").read_text()


def test_duplicate_arguments(trained: Path, pictures: Path, capsys) -> None:
    image = next(pictures.rglob("*.png"))
    run(f"predict --checkpoint {trained} --device cpu {image} {image}")
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1
    assert not output.err


def test_mistakes(trained: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    lines = {
        f"--checkpoint {trained} {tmp_path}/nowhere.png": "there is no image or folder at",
        f"--checkpoint {trained} {tmp_path}/empty": "holds no image",
        f"--checkpoint {trained} {tmp_path} --output table.txt": ".csv or .json",
        f"--checkpoint {trained} {trained} --output {tmp_path}/no/where.csv": "choose another --output",
        f"--checkpoint {tmp_path}/nowhere.pt {trained}": "there is no checkpoint",
    }
    for line, message in lines.items():
        assert message in mistake(capsys, f"predict {line} --device cpu")


def test_single_image(trained: Path, pictures: Path) -> None:
    model = effnet_fast.load(trained, device="cpu")
    path = next(pictures.rglob("*.png"))
    expected = model.predict([path])
    assert len(expected) == 1
    for image in (path, str(path), Image.open(path)):
        assert model.predict(image) == expected
    assert model.predict([]) == []


@pytest.mark.parametrize("top", [-1, 0])
def test_top_below_1(trained: Path, pictures: Path, top: int) -> None:
    with pytest.raises(ValueError, match=f"top must be at least 1, not {top}"):
        effnet_fast.load(trained, device="cpu").predict(next(pictures.rglob("*.png")), top=top)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu!"}, r"unknown device 'tpu!': use auto, cpu, cuda or cuda:N"),
        ({"device": "cpu:1"}, r"unknown device 'cpu:1'"),
        ({"device": "cpu", "weights": "best"}, r"weights 'best': choose one of auto, ema, raw"),
    ],
)
def test_load_validates_its_arguments(trained: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effnet_fast.load(trained, **arguments)


def test_numbered_gpu(monkeypatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, index in (("cuda:1", 1), ("cuda:0", 0), ("cuda", 0), ("auto", 0)):
        assert distributed.choose_device(name) == torch.device("cuda", index)
    assert current == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="--device cuda:2: this machine has 2 GPUs"):
        distributed.choose_device("cuda:2")


def test_folders_are_listed_as_for_training(trained: Path, tmp_path: Path, capsys) -> None:
    """Hidden folders are left out, linked ones are followed, endings may be in upper case."""
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for path in (folder / "a.PNG", folder / ".ipynb_checkpoints" / "a.png", folder / ".b.png", elsewhere / "c.jfif"):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(path, "JPEG" if path.suffix == ".jfif" else "PNG")
    (folder / "linked").symlink_to(elsewhere)
    run(f"predict --checkpoint {trained} {folder} --device cpu")
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [str(folder / "a.PNG"), str(folder / "linked" / "c.jfif")]


NAMES = [b"caf\xe9.png", "猫.png".encode()]  # Latin-1 and UTF-8


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_unprintable_names(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    folder, table = tmp_path / "images", tmp_path / f"table.{suffix}"
    folder.mkdir()
    for name in NAMES:
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / os.fsdecode(name))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    image = f"{folder}/{os.fsdecode(NAMES[0])}"
    run(f"predict --device cpu --checkpoint {trained} {folder} {image} --output {table}")
    assert b"caf\\xe9.png  " in printed.getvalue()
    assert b"\\u732b.png  " in printed.getvalue()
    if suffix == "csv":
        with table.open(encoding="utf-8") as file:
            names = {row["image"] for row in csv.DictReader(file)}
    else:
        names = {row["image"] for row in json.loads(table.read_text())}
    assert names == {f"{folder}/caf\\xe9.png", f"{folder}/猫.png"}


def predict_in_a_process(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    script = (
        "import sys; from effnet_fast.cli import main\n"
        "try: main()\n"
        "finally: print(*[l for l in open('/proc/self/status') if l.startswith('VmHWM')], file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, "predict", "--device", "cpu", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )


def peak_memory(done: subprocess.CompletedProcess[bytes]) -> int:
    """Peak resident memory of a process, in bytes."""
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stderr.split()[-2])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["photographs", "scan"])
def test_memory_of_large_images(trained: Path, tmp_path: Path, kind: str) -> None:
    """At most 1 GB for 32 photographs of 12 Mpx in a batch, and for one 1-bit scan of 90 Mpx."""
    if kind == "scan":
        Image.new("1", (10_000, 9_000), 1).save(tmp_path / "scan.tif", compression="group4")
    else:
        rows = np.arange(3000, dtype=np.uint8)[:, None, None]
        pixels = np.broadcast_to(rows, (3000, 4000, 3))
        Image.fromarray(pixels.copy()).save(tmp_path / "0.jpg")
        for i in range(1, 32):
            os.link(tmp_path / "0.jpg", tmp_path / f"{i}.jpg")
    done = predict_in_a_process("--checkpoint", str(trained), str(tmp_path))
    assert len(done.stdout.splitlines()) == (32 if kind == "photographs" else 1)
    assert peak_memory(done) < 1e9
