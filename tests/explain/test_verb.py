"""`effnet-fast cam` from end to end: images of many kinds in; pictures, tables and a gallery out."""

import csv
import dataclasses
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from command_line import mistake, run
from effnet_fast.config import CamConfig
from effnet_fast.data import FileSplit
from effnet_fast.data.examine import examine_file
from effnet_fast.data.image import load_image
from effnet_fast.data.torch_loader import TorchLoader
from effnet_fast.explain import cam, explainer, output, overlay, records
from effnet_fast.explain.image_files import list_image_files
from effnet_fast.explain.maps import evidence, normalise
from effnet_fast.explain.models import load_models
from effnet_fast.explain.tables import SCORES
from effnet_fast.run import quick_study
from effnet_fast.run import study as study_verb
from effnet_fast.run.training import Outcome
from plain_spec import PLAIN

QUICK = "--curve_steps 4 --device cpu"


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def picture(seed, width, height):
    """A random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write(folder, *sizes):
    """Write images of these sizes, cycling through the class folders bear, cat and dog."""
    for i, (width, height) in enumerate(sizes):
        path = folder / ("bear", "cat", "dog")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, width, height).save(path)
    return folder


def models_of(study, **settings):
    config = CamConfig(images_path="", output_path="", checkpoints=str(study), **settings)
    return load_models(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
    """Five images of several sizes and aspects, explained by the study's models in batches of two."""
    folder = tmp_path_factory.mktemp("done")
    images = write(folder / "images", (32, 32), (90, 40), (40, 90), (33, 32), (200, 150))
    run(f"cam --images_path {images} --output_path {folder}/out --checkpoints {study} --batch_size 2 {QUICK}")
    return folder


def test_output_files(done):
    out = done / "out"
    names = ["bear/0.png", "bear/3.png", "cat/1.png", "cat/4.png", "dog/2.png"]
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {
        *(f"pictures/{name}.png" for name in names),
        *(f"records/{name}.json" for name in names),
        *(f"maps/{name}.npz" for name in names),
        *(f"grids/grid-0000{i}.png" for i in (1, 2, 3)),
        *("grids/members.json", "settings.json", "maps.csv", "agreement.csv", "summary.csv", "gallery.html"),
    }
    rows = table(out / "maps.csv")
    assert [row["image"] for row in rows] == sorted(names * 3)
    assert [row["model"] for row in rows[:3]] == ["baseline", "deeper", "higher-resolution"]
    assert {row["image"]: (row["width"], row["height"]) for row in rows}["cat/1.png"] == ("90", "40")
    assert len(table(out / "agreement.csv")) == 5 * 3


def test_tables_match_python_api(done, study):
    rows = {(row["image"], row["model"]): row for row in table(done / "out" / "maps.csv")}
    for model in models_of(study):
        trained = model.trained
        x = trained.prepare([Image.open(done / "images" / "cat" / "1.png")])
        probabilities = trained.model(x).softmax(1)[0]
        row = rows["cat/1.png", model.name]
        assert row["prediction"] == row["target"] == trained.classes[probabilities.argmax()]
        assert float(row["confidence"]) == pytest.approx(probabilities.max().item(), abs=1e-5)
        with np.load(done / "out" / "maps" / "cat" / "1.png.npz") as maps:
            side = trained.image_size
            kept = torch.nn.functional.interpolate(
                torch.from_numpy(maps[model.name])[None, None], (side, side), mode="bilinear"
            )
        ours = cam(trained.model, x)[0]
        assert torch.allclose(kept[0, 0] / kept.max().clamp_min(1e-9), ours, atol=1e-5)


def test_summary_is_mean_and_std_of_rows(done):
    rows = table(done / "out" / "maps.csv")
    for line in table(done / "out" / "summary.csv"):
        own = [row for row in rows if row["model"] == line["model"]]
        assert int(line["images"]) == len(own) == 5
        for score in (*SCORES, "agreement"):
            values = [float(row[score]) for row in own if row[score]]
            assert float(line[f"{score}_mean"]) == pytest.approx(np.mean(values), abs=1e-5)
            assert float(line[f"{score}_std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-5)
        right = [row["prediction"] == row["class"] for row in own]
        assert float(line["top1_mean"]) == pytest.approx(100 * np.mean(right))


def test_preprocessing_equals_evaluation_loader(tmp_path, study):
    """Several sizes, aspects and an EXIF rotation, against the torch loader."""
    paths = []
    for i, (width, height) in enumerate([(32, 32), (90, 41), (40, 97), (16, 20)]):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1  # rotated by 90 degrees
        paths.append(tmp_path / f"{i}.jpg")
        picture(i, width, height).save(paths[-1], quality=95, exif=exif)
    for model in (model.trained for model in models_of(study)):
        spec = dataclasses.replace(PLAIN, batch_size=4, image_size=model.image_size, mean=model.mean, std=model.std)
        files = tuple(examine_file(path).file(path) for path in paths)
        loader = TorchLoader(FileSplit(files, np.zeros(4, np.int64)), spec)
        ((expected, _),) = loader.epoch(0)
        prepared = model.prepare([load_image(path) for path in paths])
        assert prepared.shape == (4, 3, model.image_size, model.image_size)
        assert torch.equal(prepared, expected)


def test_study_loads_one_seed_of_each_model_with_torch_kernels(study):
    found = models_of(study)
    sizes = {"baseline": 32, "deeper": 32, "higher-resolution": 40}
    assert {m.name: m.trained.image_size for m in found} == sizes
    assert found[0].label == "baseline (32 px)"
    assert not any(m.trained.model.training for m in found)
    assert {part.kernels for m in found for part in m.trained.model.modules() if hasattr(part, "kernels")} == {"torch"}
    other = models_of(study, seed=1)
    assert [m.name for m in other] == ["baseline"]
    assert other[0].digest != found[0].digest


@pytest.mark.parametrize(
    "lines",
    [
        ["compound of all (d = 2,", "w = 1.82, r = 1.414)"],
        ["compound (d = 1.11,", "w = 1.056, r = 1.083)"],
        ["higher-resolution", "(r = 1.133)"],
    ],
    ids=lambda lines: lines[0].split()[0],
)
def test_headings_do_not_wrap_inside_a_factor(study, tmp_path, lines):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    label = " ".join(lines)
    (baseline, *_) = json.loads((folder / "study.json").read_text())["models"]
    (folder / "study.json").write_text(json.dumps({"models": [baseline | {"label": label}]}))
    (model,) = models_of(folder)
    row = overlay.Row("a", np.zeros((8, 8, 3), np.uint8), None, [overlay.Panel(np.ones((8, 8)), "a", 1.0, "a", 1.0)])
    assert overlay.draw([row], [model.label]).axes[1].get_title().split("\n") == lines


def test_run_flag_and_single_checkpoint(study, tmp_path):
    images = write(tmp_path / "images", (32, 32))
    one, two = study / "runs" / "deeper-0", study / "runs" / "baseline-0" / "last.pt"
    run(f"cam --images_path {images}/bear/0.png --output_path {tmp_path}/a --run x={one} --run y={two} {QUICK}")
    assert [row["model"] for row in table(tmp_path / "a" / "summary.csv")] == ["x", "y"]
    run(f"cam --images_path {images} --output_path {tmp_path}/b --checkpoints {two} {QUICK}")
    (row,) = table(tmp_path / "b" / "summary.csv")
    assert row["model"] == "baseline-0"
    assert "agreement_mean" not in row


@pytest.mark.parametrize("flags", ["", "--fold_batchnorm"])
def test_safetensors_export(study, tmp_path, flags):
    images = write(tmp_path / "images", (32, 32), (50, 40))
    checkpoint = study / "runs" / "baseline-0" / "last.pt"
    export = tmp_path / "exported" / "model.safetensors"
    export.parent.mkdir()
    run(f"export --checkpoint {checkpoint} --output {export} {flags}")
    for name, path in (("checkpoint", checkpoint), ("export", export)):
        run(f"cam --images_path {images} --output_path {tmp_path}/{name} --run a={path} {QUICK}")
    first, second = (table(tmp_path / name / "maps.csv") for name in ("checkpoint", "export"))
    assert len(first) == 2
    for row, exported in zip(first, second, strict=True):
        assert row["prediction"] == exported["prediction"]
        for score in SCORES:
            assert float(row[score]) == pytest.approx(float(exported[score]), abs=1e-3)
    run(f"cam --images_path {images} --output_path {tmp_path}/single --checkpoints {export} {QUICK}")
    assert [row["model"] for row in table(tmp_path / "single" / "summary.csv")] == ["exported"]


def test_second_run_computes_only_new_and_changed_images(done, study, capsys):
    folder = done.parent / "again"
    shutil.copytree(done, folder)
    line = f"cam --images_path {folder}/images --output_path {folder}/out --checkpoints {study} --batch_size 2 {QUICK}"
    # The images' folder is one of the settings, so maps of other images are never mistaken for these.
    run(line, expected=2)
    assert "images_path" in capsys.readouterr().err
    line = f"cam --images_path {done}/images --output_path {done}/out --checkpoints {study} --batch_size 2 {QUICK}"
    out = done / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png*")}
    tables = {name: (out / name).read_bytes() for name in ("maps.csv", "agreement.csv", "summary.csv", "gallery.html")}
    run(line)
    assert "5 images explained, 5 of them by an earlier run; models: 3" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png*")} == before
    assert {name: (out / name).read_bytes() for name in tables} == tables

    changed = done / "images" / "dog" / "2.png"
    kept = changed.read_bytes()
    picture(77, 50, 50).save(changed)
    run(line)
    assert "5 images explained, 4 of them by an earlier run" in capsys.readouterr().out
    now = {path.relative_to(out).as_posix() for path, time in before.items() if path.stat().st_mtime_ns != time}
    names = {
        f"{kind}/dog/2.png.{suffix}" for kind, suffix in (("pictures", "png"), ("maps", "npz"), ("records", "json"))
    }
    assert now == names | {"grids/grid-00003.png"}
    changed.write_bytes(kept)
    run(line)
    assert {name: (out / name).read_bytes() for name in tables} == tables


def test_maps_of_models_with_any_names_are_kept(tmp_path):
    """`file` and `allow_pickle` are arguments of np.savez_compressed."""
    folder = output.OutputFolder(tmp_path, "png")
    for name in folder.FOLDERS:
        (tmp_path / name).mkdir()
    maps = {name: np.full((2, 3), number, np.float32) for number, name in enumerate(["file", "allow_pickle", "b 0.é"])}
    folder.save({"image": "cat.png"}, maps, Figure())
    kept = folder.load_maps("cat.png")
    assert list(kept) == list(maps)
    assert all(np.array_equal(kept[name], values) for name, values in maps.items())


def test_each_record_is_read_once(done, study, monkeypatch):
    reads = []
    load_record = output.OutputFolder.load_record
    monkeypatch.setattr(
        output.OutputFolder, "load_record", lambda self, name: reads.append(name) or load_record(self, name)
    )
    line = f"cam --images_path {done}/images --output_path {done}/out --checkpoints {study} --batch_size 2 {QUICK}"
    run(f"{line} --gallery_images 1")
    names = ["bear/0.png", "bear/3.png", "cat/1.png", "cat/4.png", "dog/2.png"]
    assert reads == [*names, names[0]], "once for the tables, and the gallery's image again"
    run(line)


def add_study(save_dir, name, study, finished=True):
    """Copy a study, and mark its models as trained or not."""
    folder = save_dir / name
    shutil.copytree(study, folder)
    models = json.loads((folder / "study.json").read_text())["models"]
    for model in models[: len(models) if finished else 1]:
        model["top1"] = 50.0
    (folder / "study.json").write_text(json.dumps({"models": models}))
    return folder


def test_newest_finished_study_is_the_default(study, tmp_path, capsys):
    images = write(tmp_path / "images", (32, 32))
    for age, (name, finished) in enumerate([("running", False), ("new", True), ("old", True)]):
        index = add_study(tmp_path / "results", name, study, finished) / "study.json"
        os.utime(index, (index.stat().st_atime, index.stat().st_mtime - 100 * age))
    run(f"cam --images_path {images} --output_path {tmp_path}/out --save_dir {tmp_path}/results {QUICK}")
    messages = capsys.readouterr()
    assert f"models: the newest study, {tmp_path}/results/new" in messages.out
    assert f"skipped: the study {tmp_path}/results/running is not finished" in messages.err
    assert len(table(tmp_path / "out" / "summary.csv")) == 3


def test_quick_study_is_trained_once_and_resumes(tmp_path, capsys, monkeypatch):
    tiny = {"image_size": 16, "limit_train": 8, "limit_eval": 4, "batch_size": 4, "target_flops": None}
    settings = quick_study.recipe()
    assert settings["dataset"] == "synthetic"
    monkeypatch.setattr(quick_study, "recipe", lambda: settings | tiny)
    images = write(tmp_path / "images", (32, 32))
    line = f"cam --images_path {images} --output_path {tmp_path}/out --save_dir {tmp_path}/results {QUICK}"

    trained, train_in = [], study_verb.train_in

    def interrupted_at_third(world, config):
        trained.append(config.name)
        return Outcome(130, False, {}) if len(trained) == 3 else train_in(world, config)

    monkeypatch.setattr(study_verb, "train_in", interrupted_at_third)
    run(line, expected=130)
    assert f"{tmp_path}/results has no finished study: training five small models" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    run(line)
    names = ["baseline", "deeper", "wider", "higher-resolution", "compound"]
    assert [row["model"] for row in table(tmp_path / "out" / "summary.csv")] == names
    assert trained[2:4] == ["wider-0", "wider-0"], "the finished runs are not trained again"
    trained.clear()
    run(line)
    assert not trained
    assert f"models: the newest study, {tmp_path}/results/quick-study" in capsys.readouterr().out


def test_resume_after_interrupt(study, tmp_path, monkeypatch):
    images = write(tmp_path / "images", (32, 32), (32, 32), (32, 32))
    line = f"cam --images_path {images} --run a={study}/runs/baseline-0 --batch_size 1 {QUICK} --output_path"
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return explain_batch(*arguments)

    explain_batch = explainer.explain_batch
    monkeypatch.setattr(explainer, "explain_batch", killed)
    run(f"{line} {tmp_path}/killed", expected=130)
    assert len(list((tmp_path / "killed" / "records").rglob("*.json"))) == 2
    run(f"{line} {tmp_path}/killed")
    assert len(calls) == 3 + 1
    assert {len(arguments[1]) for arguments in calls} == {1}, "one batch is in memory at a time"
    monkeypatch.undo()
    run(f"{line} {tmp_path}/whole")
    for name in ("maps.csv", "agreement.csv", "summary.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_grid_of_a_changed_image_is_drawn_after_an_interrupt(study, tmp_path, monkeypatch):
    images = write(tmp_path / "images", (32, 32), (32, 32))
    line = f"cam --images_path {images} --run a={study}/runs/baseline-0 {QUICK} --output_path {tmp_path}/out"
    run(line)
    before = (tmp_path / "out" / "grids" / "grid-00001.png").read_bytes()
    Image.new("RGB", (40, 32), "green").save(next(images.rglob("0.png")))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.OutputFolder, "save_grid", killed)
        run(line, expected=130)
    run(line)
    assert (tmp_path / "out" / "grids" / "grid-00001.png").read_bytes() != before


def test_other_settings_are_refused_unless_restarted(study, tmp_path, capsys):
    images = write(tmp_path / "images", (32, 32), (32, 32))
    line = f"cam --images_path {images} --output_path {tmp_path}/out --checkpoints {study} {QUICK}"
    run(line)
    assert "other settings (method was grad-cam, now cam)" in mistake(capsys, f"{line} --method cam")
    run(f"{line} --seed 1", expected=2)
    assert "models" in capsys.readouterr().err
    run(f"{line} --method cam --resume no --format svg")
    assert (tmp_path / "out" / "grids" / "grid-00001.svg").read_text().lstrip().startswith("<?xml")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_output_folder_with_other_files_is_refused(study, tmp_path, capsys):
    images = write(tmp_path / "images", (32, 32))
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    (tmp_path / "out" / "pictures" / "holiday.png").write_bytes(b"mine")
    for resume in ("auto", "no"):
        run(f"cam --images_path {images} --output_path {tmp_path}/out --checkpoints {study} --resume {resume}", 2)
        assert "contains other files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["holiday.png"]


@pytest.mark.parametrize("content", ['{"theme": "dark"}', "[1]", "// not JSON"])
def test_output_folder_of_another_program_is_refused(study, tmp_path, capsys, content):
    images = write(tmp_path / "images", (32, 32))
    for name in ("settings.json", "records/a.json", "maps/city.tif"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "out" / name).write_text(content)
    for resume in ("auto", "no"):
        run(f"cam --images_path {images} --output_path {tmp_path}/out --checkpoints {study} --resume {resume}", 2)
        assert "contains other files" in capsys.readouterr().err
    assert (tmp_path / "out" / "settings.json").read_text() == content
    assert (tmp_path / "out" / "maps" / "city.tif").exists()


@pytest.mark.parametrize("flags", ["--layer stagess.1", "--method guided-grad-cam"])
def test_an_impossible_restart_deletes_nothing(study, tmp_path, capsys, flags):
    images = write(tmp_path / "images", (32, 32))
    line = f"cam --images_path {images} --output_path {tmp_path}/out --run a={study}/runs/baseline-0 {QUICK}"
    run(line)
    before = sorted((tmp_path / "out").rglob("*"))
    run(f"{line} --resume no {flags}", expected=2)
    assert sorted((tmp_path / "out").rglob("*")) == before


def odd_files(folder):
    """Write a corrupt file, a text file, and images of unusual kinds."""
    folder.mkdir(parents=True)
    base = picture(5, 48, 36)
    base.save(folder / "plain.png")
    content = io.BytesIO()
    base.save(content, "PNG")
    (folder / "corrupt.png").write_bytes(content.getvalue()[:400])
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    base.convert("L").save(folder / "grey.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    frames = [base, picture(6, 48, 36)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    base.convert("RGBA").save(folder / "alpha.png")
    base.convert("P").save(folder / "palette.png")
    (folder / ".hidden").write_text("ignored")
    return folder


def test_unusual_images_are_explained_and_bad_files_skipped(study, tmp_path, capsys):
    images = odd_files(tmp_path / "images" / "bear")
    one = f"--run baseline={study}/runs/baseline-0"
    run(f"cam --images_path {images} --output_path {tmp_path}/out {one} {QUICK}", expected=1)
    messages = capsys.readouterr()
    named = {line.split(":")[1].split("/")[-1] for line in messages.err.splitlines() if line.startswith("skipped:")}
    assert named == {"corrupt.png", "notes.txt", "empty.jpg", "sixteen.png"}
    assert "16-bit or float grey: convert it to 8 bits" in messages.err
    assert "4 of 10 files were skipped" in messages.err
    assert "6 images explained" in messages.out
    rows = {row["image"]: row for row in table(tmp_path / "out" / "maps.csv") if row["model"] == "baseline"}
    assert rows.keys() == {"plain.png", "grey.png", "cmyk.jpg", "animated.gif", "alpha.png", "palette.png"}
    assert float(rows["alpha.png"]["confidence"]) == float(rows["plain.png"]["confidence"])


def test_no_images(study, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("no image")
    run(f"cam --images_path {tmp_path}/images --output_path {tmp_path}/out --checkpoints {study}", expected=2)
    assert "none of the 1 files" in capsys.readouterr().err
    run(f"cam --images_path {tmp_path}/none --output_path {tmp_path}/out --checkpoints {study}", expected=2)
    assert "there is no folder or image at" in capsys.readouterr().err


def test_target(study, tmp_path, capsys):
    images = write(tmp_path / "images", (32, 32), (32, 32))
    line = f"cam --images_path {images} --run baseline={study}/runs/baseline-0 {QUICK}"
    run(f"{line} --output_path {tmp_path}/true --target true")
    assert {(row["image"], row["target"]) for row in table(tmp_path / "true" / "maps.csv")} == {
        ("bear/0.png", "bear"),
        ("cat/1.png", "cat"),
    }
    run(f"{line} --output_path {tmp_path}/eel --target eel")
    rows = table(tmp_path / "eel" / "maps.csv")
    assert {row["target"] for row in rows} == {"eel"}
    run(f"{line} --output_path {tmp_path}/none --target eal", expected=2)
    assert "no class 'eal'; did you mean eel" in capsys.readouterr().err
    model = models_of(study)[0].trained
    with Image.open(images / "bear/0.png") as image:
        batch = model.prepare([image])
    maps = {}
    for name in ("true", "eel"):
        with np.load(tmp_path / name / "maps" / "bear" / "0.png.npz") as saved:
            maps[name] = saved["baseline"]
        target = torch.tensor([model.classes.index({"true": "bear", "eel": "eel"}[name])])
        expected = normalise(evidence(model.model, batch, target, method="grad-cam"))[0].numpy()
        np.testing.assert_allclose(maps[name], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(maps["true"], maps["eel"])


def test_true_classes_from_csv(study, tmp_path, capsys):
    images = tmp_path / "flat"
    images.mkdir()
    for i in range(3):
        picture(i, 32, 32).save(images / f"{i}.png")
    labels = images / "labels.csv"  # in the same folder, but not an image
    labels.write_text("image,class\n0.png,dog\n1.png,eel\n")
    line = f"cam --images_path {images} --run a={study}/runs/baseline-0 --target true --labels {labels} {QUICK}"
    run(f"{line} --output_path {tmp_path}/out", expected=1)
    assert "2.png has no true class" in capsys.readouterr().err
    found = {row["image"]: row["target"] for row in table(tmp_path / "out" / "maps.csv")}
    assert found == {"0.png": "dog", "1.png": "eel"}
    labels.write_text("file;label\n0.png;dog\n")
    run(f"{line} --output_path {tmp_path}/other", expected=2)
    assert "must be a CSV with the header image,class" in capsys.readouterr().err


def test_captum_scores_do_not_depend_on_batch_size(study, tmp_path):
    images = write(tmp_path / "images", (32, 32), (32, 32))
    line = f"cam --images_path {images} --run a={study}/runs/baseline-0 --infidelity --sensitivity {QUICK}"
    run(f"{line} --output_path {tmp_path}/one --batch_size 1")
    run(f"{line} --output_path {tmp_path}/two --batch_size 2")
    one, two = (table(tmp_path / name / "maps.csv") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for score in ("infidelity", "sensitivity"):
            assert float(a[score]) > 0
            assert float(a[score]) == pytest.approx(float(b[score]), rel=1e-3, abs=1e-5)
    assert "infidelity_mean" in table(tmp_path / "one" / "summary.csv")[0]


def test_a_map_without_evidence_has_no_scores(study, tmp_path, monkeypatch):
    images = write(tmp_path / "images", (32, 32))
    monkeypatch.setattr(records, "evidence", lambda model, inputs, *a, **k: torch.zeros(len(inputs), 4, 4))
    line = f"cam --images_path {images} --run a={study}/runs/baseline-0 --infidelity --sensitivity {QUICK}"
    run(f"{line} --output_path {tmp_path}/out")
    (row,) = table(tmp_path / "out" / "maps.csv")
    names = ("energy_top10", "deletion", "deletion_random", "infidelity", "sensitivity")
    assert [row[score] for score in names] == [""] * 5


def test_bf16(study, tmp_path):
    images = write(tmp_path / "images", (40, 32))
    for precision in ("no", "bf16"):
        run(
            f"cam --images_path {images} --output_path {tmp_path}/{precision} --run a={study}/runs/baseline-0 "
            f"--mixed_precision {precision} {QUICK}"
        )
    exact, coarse = (np.load(tmp_path / name / "maps" / "bear" / "0.png.npz")["a"] for name in ("no", "bf16"))
    assert not np.array_equal(exact, coarse)
    np.testing.assert_allclose(coarse, exact, atol=0.1)


@pytest.mark.parametrize("method", ["cam", "grad-cam++", "layer-cam", "integrated-gradients", "occlusion"])
def test_methods(study, tmp_path, method):
    images = write(tmp_path / "images", (40, 32))
    run(
        f"cam --images_path {images} --output_path {tmp_path}/out --run a={study}/runs/baseline-0 "
        f"--method {method} --colormap viridis --format pdf {QUICK}"
    )
    assert (tmp_path / "out" / "grids" / "grid-00001.pdf").read_bytes().startswith(b"%PDF")
    with np.load(tmp_path / "out" / "maps" / "bear" / "0.png.npz") as maps:
        assert maps["a"].shape == ((32, 32) if method in ("integrated-gradients", "occlusion") else (4, 4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method guided-grad-cam", "needs a model with ReLU modules"),
        ("--layer stages.9", "baseline: layer 'stages.9' is not in the model; did you mean"),
        ("--method cam --layer stem", "cam takes no layer"),
        ("--colormap rainbowish", "no colormap 'rainbowish'"),
        ("--run baseline", "--run must be NAME=PATH"),
        ("--run baseline=/nowhere", "two models are called baseline"),
        ("--run other=/nowhere/last.pt", "there is no checkpoint at /nowhere/last.pt"),
        ("--seed 7", "has no model of seed 7"),
        ("--opacity 2", "--opacity must be from 0 to 1"),
        ("--method gradcam", "Got value: gradcam"),
    ],
)
def test_mistakes_are_one_line(study, tmp_path, capsys, flags, message):
    images = write(tmp_path / "images", (32, 32))
    assert message in mistake(
        capsys, f"cam --images_path {images} --output_path {tmp_path}/out --checkpoints {study} {flags}"
    )


def test_damaged_study(tmp_path, capsys):
    (tmp_path / "study.json").write_text('{"models": [{"name": "baseline"}]}')
    run(f"cam --images_path {tmp_path} --output_path {tmp_path}/out --checkpoints {tmp_path}", expected=2)
    assert "study.json is damaged or not a study" in capsys.readouterr().err


def test_single_pixel_map_warns(tmp_path, study, capsys):
    saved = torch.load(study / "runs" / "baseline-0" / "last.pt", weights_only=True)
    saved["architecture"]["output_stride"] = 32
    (tmp_path / "run").mkdir()
    torch.save(saved, tmp_path / "run" / "last.pt")
    images = write(tmp_path / "images", (32, 32))
    run(f"cam --images_path {images} --output_path {tmp_path}/out --checkpoints {tmp_path}/run {QUICK}")
    assert "run's map has a single pixel, so it shows no location" in capsys.readouterr().err


def test_unwritable_output_folder(study, tmp_path, capsys):
    images = write(tmp_path / "images", (32, 32))
    (tmp_path / "closed").write_text("a file, in which no folder can be")
    run(f"cam --images_path {images} --output_path {tmp_path}/closed/out --checkpoints {study}", expected=2)
    assert "closed" in capsys.readouterr().err


def test_full_disk_loses_nothing(study, tmp_path, capsys, monkeypatch):
    images = write(tmp_path / "images", (32, 32), (32, 32))
    line = f"cam --images_path {images} --output_path {tmp_path}/out --run a={study}/runs/baseline-0 {QUICK}"
    line += " --batch_size 1"
    save, saved = output.picture.save, []

    def full(figure, path):
        saved.append(path)
        if len(saved) == 3:
            raise ValueError(f"cannot write the picture {path}: No space left on device; choose another output")
        save(figure, path)

    monkeypatch.setattr(output.picture, "save", full)
    run(line, expected=2)
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    run(line)
    assert "2 images explained, 1 of them by an earlier run" in capsys.readouterr().out


def test_data_verb_exports_images_in_class_folders(tmp_path):
    run(f"data --dataset synthetic --output {tmp_path}/sheet.png --export {tmp_path}/images --export_images 7")
    exported = list((tmp_path / "images").rglob("*.png"))
    assert len(exported) == 7
    assert len({path.parent.name for path in exported}) == 7
    with Image.open(exported[0]) as image:
        assert image.size == (32, 32)


def test_data_verb_exports_what_there_is(tmp_path, capsys):
    for split, count in (("train", 6), ("test", 3)):
        write(tmp_path / "photos" / split, *[(16, 16)] * count)
    line = f"data --dataset folder --data_dir {tmp_path}/photos --output {tmp_path}/sheet.png --export {tmp_path}/out"
    run(line)
    assert "written: 3 test images" in capsys.readouterr().out
    assert "--export_images must be at least 1, not 0" in mistake(capsys, f"{line} --export_images 0")


def test_records_are_json(done):
    record = json.loads((done / "out" / "records" / "cat" / "1.png.json").read_text())
    assert {"image", "label", "width", "height", "models", "pairs", "agreement", "stamp"} <= record.keys()


def test_study_with_several_costs_and_missing_checkpoints(study, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    models = [m for m in json.loads((folder / "study.json").read_text())["models"] if m["seed"] == 0]
    baseline, deeper, higher = models
    missing = {**higher, "checkpoint": "runs/none/last.pt", "failed": "out of memory", "target_macs": 1e8}
    several = [baseline, {**deeper, "target_macs": 1e8}, {**deeper, "target_macs": 2e8}, missing]
    (folder / "study.json").write_text(json.dumps({"models": several}))
    images = write(tmp_path / "images", (32, 32))
    line = f"cam --images_path {images} --output_path {tmp_path}/out --checkpoints {folder} {QUICK}"
    run(line)
    assert "skipped: higher-resolution of seed 0 has no checkpoint: out of memory" in capsys.readouterr().err
    names = [row["model"] for row in table(tmp_path / "out" / "summary.csv")]
    assert names == ["baseline", "deeper-1e+08", "deeper-2e+08"]
    (folder / "study.json").write_text(json.dumps({"models": [missing]}))
    run(f"{line} --resume no", expected=2)
    assert "run effnet-fast study first" in capsys.readouterr().err


def test_larger_batches_remove_older_grids(study, tmp_path):
    images = write(tmp_path / "images", (32, 32), (32, 32), (32, 32))
    line = f"cam --images_path {images} --output_path {tmp_path}/out --checkpoints {study} {QUICK} --batch_size"
    for size, grids in ((1, 3), (3, 1)):
        run(f"{line} {size}")
        assert len(list((tmp_path / "out" / "grids").glob("grid-*"))) == grids


def test_symbolic_link_and_name_that_is_not_utf8(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    Image.new("RGB", (8, 8)).save(store / "1.png")
    folder = tmp_path / "images" / "apple"
    folder.mkdir(parents=True)
    (folder / "1.png").symlink_to(store / "1.png")
    shutil.copy(store / "1.png", os.fsencode(folder) + b"/\xff.png")
    linked, odd = list_image_files(tmp_path / "images", None, set())
    assert (linked.label, odd.label) == ("apple", "apple")
    assert odd.name == "apple/\\xff.png"
    assert odd.path.is_file()
