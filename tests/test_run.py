"""Whole training runs on a few images: files, messages, resuming."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from command_line import mistake, run
from effnet_fast import checkpoint, create_model, provenance
from effnet_fast.config import TrainConfig
from effnet_fast.distributed import World
from effnet_fast.report import curves
from effnet_fast.run import build
from effnet_fast.run.plan import make_plan
from effnet_fast.run.resolve import compiling_pays, worker_count
from effnet_fast.train.step import Step

TINY = (
    "train --dataset synthetic --output_stride 32 --width 0.25 --depth 0.3 --limit_train 96 --limit_eval 40 "
    "--batch_size 16 --num_epochs 2 --learning_rate 0.05 --log_every_steps 2 --loader resident --num_workers 1 "
    "--device cpu"
)


def rows(folder, kind=None):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in records if kind in (None, row["kind"])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run(f"{TINY} --save_dir {folder} --run_name done --ema_decay 0.9 --mixup 0.2 --cutmix 1.0", curves=True)
    return folder / "done"


def test_files_of_a_run(finished):
    names = {path.name for path in finished.iterdir()}
    files = {"config.yaml", "environment.json", "metrics.jsonl", "last.pt", "last-1.pt", "curves.png", ".lock"}
    assert names == files | {"tensorboard"}
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"commit", "gpu", "driver", "date", "command"} <= environment.keys()
    train, evaluations = rows(finished, "train"), rows(finished, "eval")
    assert [row["step"] for row in train] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in evaluations] == [6, 12]
    assert {"loss", "top1", "top5", "ema_top1", "seconds"} <= evaluations[0].keys()
    assert {"loss", "top1", "learning_rate", "img_per_s", "wait_share", "grad_norm"} <= train[0].keys()


def test_the_checkpoint_is_a_plain_dict(finished):
    state = torch.load(finished / "last.pt", weights_only=True)
    model = create_model("efficientnet-b0", output_stride=32, width=0.25, depth=0.3)
    assert state["model"].keys() == model.state_dict().keys()
    model.load_state_dict(state["model"])
    assert state["ema"].keys() == state["model"].keys()
    assert len(state["classes"]) == 100
    assert state["progress"] == {
        "epoch": 2,
        "batch": 0,
        "step": 12,
        "reported": 12,
        "best": -1.0,
        "finished": True,
    }


def test_finished_run_has_nothing_to_do(finished, capsys):
    run(f"{TINY} --save_dir {finished.parent} --run_name done --ema_decay 0.9 --mixup 0.2 --cutmix 1.0")
    assert "is finished; nothing to do" in capsys.readouterr().out


def _without_a_weight(state):
    del state["model"]["classifier.weight"]


def _with_unknown_progress(state):
    state["progress"]["no_such"] = 1


def _with_an_empty_optimizer(state):
    state["optimizer"] = {}


def _with_another_architecture(state):
    state["architecture"]["no_such"] = 1


@pytest.mark.parametrize(
    "spoil", [_without_a_weight, _with_another_architecture, _with_unknown_progress, _with_an_empty_optimizer]
)
def test_checkpoint_of_another_version(finished, tmp_path, capsys, spoil):
    state = checkpoint.load(finished / "last.pt")
    state["progress"]["finished"] = False
    spoil(state)
    checkpoint.save(tmp_path / "other.pt", state)
    flags = f"--save_dir {tmp_path} --run_name new --ema_decay 0.9 --mixup 0.2 --cutmix 1.0"
    assert f"error: {tmp_path / 'other.pt'} is of another version or incomplete (" in mistake(
        capsys, f"{TINY} {flags} --resume {tmp_path / 'other.pt'}"
    )


def test_failed_curves_are_a_warning(tmp_path, capsys):
    (tmp_path / "one" / "curves.png").mkdir(parents=True)
    run(f"{TINY} --save_dir {tmp_path} --run_name one --num_epochs 1", curves=True)
    assert "warning: cannot write the picture" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "one" / "last.pt")["progress"]["finished"]


def test_other_config_under_the_same_name(finished, capsys):
    run(f"{TINY} --save_dir {finished.parent} --run_name done --ema_decay 0.99 --mixup 0.2 --cutmix 1.0", expected=2)
    assert "ema_decay was 0.9, now 0.99" in capsys.readouterr().err


def test_eval(finished, capsys, tmp_path):
    line = f"eval --checkpoint {finished}/last.pt --limit_eval 40 --output_dir {tmp_path} --device cpu"
    run(f"{line} --loader resident")
    raw = rows(finished, "eval")[-1]
    assert f"top-1 {raw['ema_top1']:.2f} %" in capsys.readouterr().out
    run(f"{line} --weights raw --loader torch")
    assert f"loss {raw['loss']:.4f}" in capsys.readouterr().out
    assert {"test-evaluation.json", "test-per-class.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_eval_without_held_out_images(finished, capsys):
    run(f"eval --checkpoint {finished}/last.pt --split val", expected=2)
    assert "held out no validation images" in capsys.readouterr().err


def test_eval_with_other_classes(finished, tmp_path, capsys):
    state = checkpoint.load(finished / "last.pt")
    state["classes"] = [f"other {name}" for name in state["classes"]]
    checkpoint.save(tmp_path / "other.pt", state)
    run(f"eval --checkpoint {tmp_path / 'other.pt'} --limit_eval 40", expected=2)
    assert "was trained on 100 others (other " in capsys.readouterr().err


def test_plot_overlays_runs(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "other")
    legends = []
    monkeypatch.setattr(curves, "_draw_panels", lambda runs, styles, labels: legends.append(labels) or Figure())
    run(f"plot {finished} {tmp_path / 'other'} --output {tmp_path / 'both.svg'}")
    assert legends == [[f"{finished.name} (evaluated on test)", "other (evaluated on test)"]]
    assert (tmp_path / "both.svg").read_text().lstrip().startswith("<?xml")


def test_held_out_images_choose_the_best(tmp_path):
    run(f"{TINY} --save_dir {tmp_path} --run_name val --val_fraction 0.1 --num_epochs 3")
    scores = [row["top1"] for row in rows(tmp_path / "val", "eval")]
    assert {row["split"] for row in rows(tmp_path / "val", "eval")} == {"val"}
    best = checkpoint.load(tmp_path / "val" / "best.pt")
    assert best["result"]["top1"] == max(scores) == best["progress"]["best"]
    assert best["progress"]["epoch"] == scores.index(max(scores)) + 1


def test_no_best_without_held_out_images(finished):
    assert not (finished / "best.pt").exists()


def test_dry_run(tmp_path, capsys):
    run(f"{TINY} --save_dir {tmp_path / 'none'} --dry_run")
    printed = capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    for words in ("199,020 parameters", "MACs", "96 train", "12 (2 epochs x 6)", "MiB"):
        assert words in printed


def test_time_budget_then_resume(tmp_path, capsys):
    line = f"{TINY} --save_dir {tmp_path} --run_name brief --zero_init_residual --depthwise_init identity"
    run(f"{line} --time_budget 0.001")
    assert "time is up at step 1 of 12" in capsys.readouterr().out
    assert rows(tmp_path / "brief", "eval")
    run(line)
    assert checkpoint.load(tmp_path / "brief" / "last.pt")["progress"]["finished"]


def test_not_finite_loss_saves_state_and_batch(tmp_path, capsys):
    printed = mistake(
        capsys, f"{TINY} --save_dir {tmp_path} --run_name bad --learning_rate 1e30 --clip_grad 0 --warmup_epochs 0"
    )
    assert "not finite at step" in printed
    kept = torch.load(tmp_path / "bad" / "not-finite.pt", weights_only=True)
    assert kept["images"].shape == (16, 3, 32, 32)
    assert all(torch.isfinite(v).all() for v in kept["model"].values())
    assert f"step {kept['step']} " in printed


def test_resume_no_removes_the_earlier_run(tmp_path):
    line = f"{TINY} --save_dir {tmp_path} --run_name again"
    run(f"{line} --val_fraction 0.2")
    run(f"{line} --resume no")
    assert not (tmp_path / "again" / "best.pt").exists()
    assert [row["step"] for row in rows(tmp_path / "again", "eval")] == [6, 12]


def test_resume_no_in_a_slurm_job(tmp_path, capsys, monkeypatch):
    """It starts over until the job is requeued; then the run goes on, and says why."""
    line = f"{TINY} --save_dir {tmp_path} --run_name again --resume no"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run(line)
    run(line)
    assert "nothing to do" not in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(line)
    printed = capsys.readouterr().out
    assert "this job has written it, and follows --resume no only once" in printed
    assert "is finished; nothing to do (another --run_name starts a new run)" in printed


def test_config_of_a_run_does_not_start_it_over(tmp_path, capsys):
    run(f"{TINY} --save_dir {tmp_path} --run_name again --resume no")
    run(f"train --config {tmp_path}/again/config.yaml")
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_resuming_another_run_keeps_the_earlier_one(tmp_path, capsys):
    """Its rows, best.pt and older checkpoints would be mixed with those of the new run, or lost."""
    line = f"{TINY} --save_dir {tmp_path}"
    run(f"{line} --run_name first --num_epochs 1")
    run(f"{line} --run_name second --val_fraction 0.2 --keep_last 2")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "second").rglob("*")}
    printed = mistake(capsys, f"{line} --run_name second --resume {tmp_path / 'first' / 'last.pt'}")
    assert f"{tmp_path / 'second'} holds another run; choose another --run_name" in printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "second").rglob("*")} == before


def test_repeating_a_resume_of_another_run_continues(tmp_path, capsys, monkeypatch):
    """The command, or the run's config.yaml, does not start it over."""
    call = Step.__call__

    def interrupted(self, images, labels, step, *rest):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, images, labels, step, *rest)

    line = f"{TINY} --save_dir {tmp_path}"
    run(f"{line} --run_name first --num_epochs 1")
    line += f" --run_name second --num_epochs 3 --resume {tmp_path / 'first' / 'last.pt'}"
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        run(line, expected=128 + signal.SIGTERM)
    before = rows(tmp_path / "second", "train")
    for again in (line, f"train --config {tmp_path}/second/config.yaml"):
        capsys.readouterr()
        run(again)
        assert f"resuming {tmp_path}/second/last.pt: this run has followed --resume" in capsys.readouterr().out
        assert rows(tmp_path / "second", "train")[: len(before)] == before
    assert rows(tmp_path / "second", "eval")[-1]["epoch"] == 3


@pytest.mark.parametrize("name", ["last-1.pt", "best.pt"])
@pytest.mark.parametrize("relative", [False, True])
def test_resuming_an_older_checkpoint_of_the_run(tmp_path, monkeypatch, name, relative):
    """Newer ones are set aside: the next saves do not overwrite the chosen one by them."""
    monkeypatch.chdir(tmp_path)
    line = f"{TINY} --save_dir {tmp_path} --run_name r --val_fraction 0.2"
    run(f"{line} --keep_last 2")
    newest = (tmp_path / "r" / "last.pt").read_bytes()
    run(f"{line} --resume {'r' if relative else tmp_path / 'r'}/{name}")
    assert (tmp_path / "r" / "last.pt.unused").read_bytes() == newest
    assert (tmp_path / "r" / "last-1.pt.unused").exists() == (name == "best.pt")


def weights(folder):
    state = checkpoint.load(folder / "last.pt")
    return {f"{group}.{name}": t for group in ("model", "ema") for name, t in state[group].items()}


def test_evaluate_every_few_epochs(tmp_path):
    run(f"{TINY} --save_dir {tmp_path} --run_name r --num_epochs 5 --eval_every_epochs 2")
    steps = rows(tmp_path / "r", "train")[-1]["step"] // 5
    assert [row["step"] // steps for row in rows(tmp_path / "r", "eval")] == [2, 4, 5]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_saves_and_exits(tmp_path, capsys, monkeypatch, number, code):
    step = Step.__call__

    def interrupted(self, images, labels, number_of_step, *rest):
        if number_of_step == 2:
            os.kill(os.getpid(), number)
        return step(self, images, labels, number_of_step, *rest)

    monkeypatch.setattr(Step, "__call__", interrupted)
    handler = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        run(f"{TINY} --save_dir {tmp_path} --run_name stopped", expected=code)
    finally:
        signal.signal(number, handler)
    assert "stopped at step 3 of 12; the same command resumes from there" in capsys.readouterr().out
    progress = checkpoint.load(tmp_path / "stopped" / "last.pt")["progress"]
    assert (progress["step"], progress["finished"]) == (3, False)


@pytest.mark.parametrize(
    ("device", "stride", "images", "compiles"),
    [("cuda", 32, 1, True), ("cpu", 32, 10_000_000, False), ("cpu", 8, 10_000_000, True), ("cpu", 8, 10_000, False)],
)
def test_when_compiling_pays(device, stride, images, compiles):
    assert compiling_pays(torch.device(device), stride, images) is compiles


@pytest.mark.parametrize(
    "flags",
    [
        "--mixed_precision bf16 --optimizer adamw --schedule one-cycle --image_size 40",
        "--mixed_precision fp16 --optimizer rmsprop --schedule exponential --grad_accumulation 2",
        "--loader dali --auto_augment rand --color_jitter 0.3 --random_erasing 0.5 --schedule step",
        "--loader torch --rotation 15 --schedule constant --clip_grad 0 --model efficientnet-b1 --zero_init_residual "
        "--depthwise_init identity",
    ],
)
def test_other_settings_train(tmp_path, flags):
    if "dali" in flags:
        pytest.importorskip("nvidia.dali")
    run(f"{TINY} --save_dir {tmp_path} --run_name kind --num_epochs 1 {flags}")
    assert checkpoint.load(tmp_path / "kind" / "last.pt")["progress"]["finished"]
    assert rows(tmp_path / "kind", "eval")[0]["loss"] > 0


def test_folder_with_a_broken_image(tmp_path, capsys):
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (36, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    (tmp_path / "images" / "train" / "cat" / "broken.jpg").write_bytes(b"no picture")
    line = f"{TINY} --dataset folder --data_dir {tmp_path / 'images'} --loader auto --image_size 32 --num_epochs 1"
    line = line.replace("--limit_train 96 --limit_eval 40", "") + f" --save_dir {tmp_path}"
    run(f"{line} --run_name kept")
    assert "broken.jpg" in capsys.readouterr().err
    run(f"{line} --run_name failed --on_bad_image fail", expected=2)
    assert "broken.jpg" in capsys.readouterr().err


def test_workers_are_capped_to_the_cores(monkeypatch):
    monkeypatch.setattr(provenance, "cores", lambda: 3)
    assert [worker_count(count) for count in (0, 1, 10_000)] == [0, 1, 3]


@pytest.mark.parametrize(
    ("device", "loader", "images", "accumulation", "batch"),
    [
        ("cuda", "resident", 1000, 1, 32),
        ("cuda", "resident", 1000, 2, 16),
        ("cuda", "resident", 20, 1, 20),
        ("cuda", "resident", 4, 1, 8),
        ("cuda", "torch", 1000, 1, 8),
        ("cpu", "resident", 1000, 1, 8),
    ],
)
def test_evaluations_on_a_gpu_have_larger_batches(tmp_path, device, loader, images, accumulation, batch):
    """Only from the resident loader: four passes of training, but not more than there are images."""
    config = TrainConfig(dataset="synthetic", limit_train=16, batch_size=8, save_dir=str(tmp_path), device="cpu")
    plan = make_plan(config, World(0, 1, torch.device("cpu")), None)
    plan = replace(plan, loader=loader, world=World(0, 1, torch.device(device)), accumulation=accumulation)
    assert build._eval_spec(plan, images).batch_size == batch


@pytest.mark.slow
def test_compiled_losses_are_eager_losses(tmp_path):
    line = f"{TINY} --save_dir {tmp_path} --num_epochs 1 --log_every_steps 1 --learning_rate 0.002"
    run(f"{line} --run_name eager --step eager")
    run(f"{line} --run_name compiled --step compile")
    eager, compiled = ([row["loss"] for row in rows(tmp_path / name, "train")] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert not any("_orig_mod" in name for name in checkpoint.load(tmp_path / "compiled" / "last.pt")["model"])


ONE_PIXEL = TINY.replace("--batch_size 16", "--batch_size 4 --grad_accumulation 4")


@pytest.mark.parametrize("dry_run", ["", "--dry_run"])
def test_one_image_per_pass_and_one_pixel_are_refused(tmp_path, capsys, dry_run):
    message = mistake(capsys, f"{ONE_PIXEL} --save_dir {tmp_path} {dry_run}")
    assert "--batch_size 4 leaves one image per pass (1 rank(s) x 4 accumulation step(s))" in message
    assert "use a larger --batch_size, larger images (--image_size, --resize_schedule) or a smaller" in message
    assert not list(tmp_path.iterdir())


def test_one_image_per_pass_trains_on_a_larger_map(tmp_path):
    flags = "--output_stride 16 --num_epochs 1 --limit_train 4"
    run(f"{ONE_PIXEL} {flags} --save_dir {tmp_path} --run_name larger")
    assert checkpoint.load(tmp_path / "larger" / "last.pt")["progress"]["finished"]


SMALL = f"{TINY} --ema_decay 0.9 --log_every_steps 1"


@pytest.fixture(scope="module")
def first_epochs(tmp_path_factory):
    """A finished run of two epochs, 12 steps."""
    folder = tmp_path_factory.mktemp("first")
    run(f"{SMALL} --save_dir {folder} --run_name first")
    return folder / "first" / "last.pt"


def test_more_epochs_for_a_finished_run(first_epochs, tmp_path, capsys):
    line = f"{SMALL} --save_dir {tmp_path} --run_name more --resume {first_epochs} --num_epochs 4 --warmup_epochs 0"
    run(f"{line} --learning_rate 0.02")
    printed = capsys.readouterr().out
    assert f"continuing {first_epochs} with its weights, optimizer and averages; schedule cosine starts anew" in printed
    assert "over the 12 steps that are left" in printed
    training = rows(tmp_path / "more", "train")
    assert [row["step"] for row in training] == list(range(13, 25))
    rates = [row["learning_rate"] for row in training]
    assert rates[0] == pytest.approx(0.02)
    assert rates == sorted(rates, reverse=True)
    before, after = (checkpoint.load(path) for path in (first_epochs, tmp_path / "more" / "last.pt"))
    assert after["progress"] == before["progress"] | {"epoch": 4, "step": 24, "reported": 24}
    assert after["schedule_start"] == 12


def test_a_stopped_continuation_resumes_its_own_schedule(first_epochs, tmp_path):
    line = f"{SMALL} --save_dir {tmp_path} --num_epochs 4"
    run(f"{line} --run_name whole --resume {first_epochs}")
    run(f"{line} --run_name halves --resume {first_epochs} --time_budget 0.001")
    assert checkpoint.load(tmp_path / "halves" / "last.pt")["progress"]["step"] == 13
    run(f"{line} --run_name halves")
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())


def test_a_continuation_starts_with_the_weights_and_averages(first_epochs, tmp_path):
    run(
        f"{SMALL} --save_dir {tmp_path} --run_name same --resume {first_epochs} --num_epochs 3 --learning_rate 0 "
        "--limit_train 96"
    )
    before, after = weights(first_epochs.parent), weights(tmp_path / "same")
    assert torch.equal(before["model.classifier.weight"], after["model.classifier.weight"])
    assert not torch.equal(before["ema.classifier.weight"], after["ema.classifier.weight"])  # it still averages


def test_more_epochs_under_the_same_name_say_how(first_epochs, capsys):
    run(f"{SMALL} --save_dir {first_epochs.parents[1]} --run_name first --num_epochs 4", expected=2)
    message = capsys.readouterr().err
    assert "num_epochs was 2, now 4" in message
    assert f"to train it for 4 epochs, --resume {first_epochs} with another --run_name" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num_epochs 1", "has trained 2 epochs already; give a larger number"),
        ("--num_epochs 4 --weight_decay 0.1", "weight_decay was 0.0005, now 0.1"),
        ("--num_epochs 4 --depthwise_init identity", "depthwise_init was default, now identity"),
        ("--learning_rate 0.01", "learning_rate was 0.05, now 0.01"),
    ],
)
def test_a_continuation_changes_the_schedule_only(first_epochs, tmp_path, capsys, flags, words):
    assert words in mistake(capsys, f"{SMALL} --save_dir {tmp_path} --run_name other --resume {first_epochs} {flags}")


def test_newer_versions_than_tested_are_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(provenance.TESTED, "torch", "2.0.0")
    run(f"{SMALL} --save_dir {tmp_path} --run_name newer --num_epochs 1 --limit_train 16 --limit_eval 8")
    printed = "".join(capsys.readouterr())
    assert printed.count("warning: newer than the tested versions: torch ") == 1
