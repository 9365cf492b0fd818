"""A search from end to end on a few images, and its failures."""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import effnet_fast
from command_line import at_step, mistake, run
from effnet_fast import cli, data
from effnet_fast.outcome import FolderInUse, Outcome
from effnet_fast.run import search as searching
from effnet_fast.search import family, measure, setup, worker
from effnet_fast.search.trials import Pruned
from examples import run_examples

optuna = pytest.importorskip("optuna")

# Two candidates: alpha 1.2 and 1.25 round to one model.
TINY = (
    "--dataset synthetic --output_stride 32 --limit_train 64 --limit_eval 40 --batch_size 32 --search_epochs 1 "
    "--alpha 1.2..1.3 --beta 1.1 --gamma 1.15 --product 1.9..2.1 --loader resident --num_workers 1 --device cpu"
)
NAMES = ["a1.2-b1.1-g1.15", "a1.3-b1.1-g1.15"]


def test_flags_of_the_older_command():
    line = (
        "--search_epochs 10 --max_flops 1e10 --max_params 2e7 --max_activations 5e7 --max_latency_ms 20 --phi 1..7 "
        "--mixed_precision --num_workers 8 --limit_train 5000 --data_dir data --save_dir results"
    )
    config = cli.parse(cli.VERBS["search"], "search", line.split())
    assert (config.search_epochs, config.max_flops, config.max_params) == (10, 1e10, 2e7)
    assert (config.mixed_precision, config.limit_train, config.phis) == ("bf16", 5000, [1, 2, 3, 4, 5, 6, 7])
    assert (config.stage, config.max_latency_ms) == ("all", 20)
    assert cli.parse(cli.VERBS["search"], "search", ["choose", "--phi", "3"]).stage == "choose"


@pytest.fixture(scope="module", autouse=True)
def single_timings():
    """No verdict here depends on a timing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LATENCY_REPEATS", 1), ("STEP_REPEATS", 1), ("WARMUP", 0)):
            patch.setattr(measure, name, value)
        yield


class Unreadable:
    """A test split that fails when it is used."""

    def __getattr__(self, name):
        raise AssertionError(f"the test images were read: {name}")

    def __len__(self):
        raise AssertionError("the test images were counted")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished search that had no access to the test images."""
    folder = tmp_path_factory.mktemp("results")
    load = data.load_dataset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_dataset", lambda *a, **k: dataclasses.replace(load(*a, **k), test=Unreadable()))
        run(f"search {TINY} --save_dir {folder} --run_name done --phi 1..2 --max_flops 5e7 --num_epochs 7")
    return folder / "done"


def test_only_kept_checkpoints_remain(finished, planned, monkeypatch):
    assert list((finished / "trials").rglob("metrics.jsonl"))
    assert list((finished / "trials").rglob("*.pt")) == []
    run(f"{planned.format('run')} --keep_checkpoints")
    folder = Path(planned.partition("--save_dir ")[2].split()[0]) / "fake" / "trials"
    assert {path.parent.name.rpartition("-s")[0] for path in folder.rglob("last.pt")} == set(NAMES)


def test_files_of_a_search(finished):
    with (finished / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == NAMES
    assert {row["status"] for row in rows} == {"complete"}
    assert rows[0].keys() >= {"alpha", "channels", "repeats", "image_size", "parameters", "macs", "activations"}
    assert rows[0].keys() >= {"top1_mean", "top1_std", "latency_ms", "seconds_mean", "peak_memory_mib", "pareto_macs"}
    assert rows[0]["repeats"] == "2 3 3 4 4 5 2"
    assert float(rows[0]["latency_ms"]) > 0
    assert json.loads((finished / "candidates.json").read_text())["candidates"][0]["name"] == NAMES[0]
    plan = json.loads((finished / "plan.json").read_text())
    assert plan["candidates"][0]["same_as"] == [[1.25, 1.1, 1.15]]
    with (finished / "trials.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [f"{name}-s0" for name in NAMES]
    pictures = [f"{name}.{suffix}" for name in ("feasible", "pareto", "trials") for suffix in ("png", "svg")]
    for name in (*pictures, "search.html", "journal.log"):
        assert (finished / name).stat().st_size > 1000
    assert (finished / "search.html").read_text().count("<img") == 3


def test_example_of_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples("search")


def test_search_from_python(finished):
    line = f"{TINY} --save_dir {finished.parent} --run_name done --phi 1..2 --max_flops 5e7 --num_epochs 7"
    config = cli.parse(cli.VERBS["search"], "search", line.split())
    result = effnet_fast.search(config)
    assert (result.status, result.folder) == (0, finished)
    assert [row["name"] for row in result.candidates] == [candidate.name for candidate in result.plan.candidates]
    assert result.choice.name in NAMES
    assert [row["phi"] for row in result.models] == [1, 2]
    planned = effnet_fast.search(dataclasses.replace(config, stage="plan"))
    assert (planned.plan, planned.candidates, planned.choice) == (result.plan, [], None)


def test_plot_of_a_search(finished, tmp_path, capsys):
    run(f"plot {finished} --output {tmp_path}/trials.pdf")
    assert (tmp_path / "trials.pdf").read_bytes().startswith(b"%PDF")
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "candidates.json").write_text('{"candidates": []}')
    run(f"plot {tmp_path}/copy", expected=2)
    assert "run `effnet-fast search collect` again" in capsys.readouterr().err


def test_models_are_measured_with_the_kernels_that_train(tmp_path, monkeypatch):
    used, create = [], family.create_model

    def create_noted(*arguments, **options):
        used.append(options["kernels"])
        return create(*arguments, **options)

    monkeypatch.setattr(searching, "resolve_kernels", lambda setting, device: "torch")
    monkeypatch.setattr(family, "create_model", create_noted)
    run(f"search plan {TINY} --save_dir {tmp_path} --run_name measured")
    assert set(used) == {"torch"}


def test_default_limit_excludes_large_models(tmp_path, capsys):
    """At output stride 4 the largest models need over 1e10 MACs."""
    run(
        f"search plan --dataset synthetic --output_stride 4 --alpha 1.2 --beta 1.1 --gamma 1.15 --device cpu "
        f"--limit_train 64 --limit_eval 40 --batch_size 1 --save_dir {tmp_path} --run_name large"
    )
    assert re.search(
        r"a1.2-b1.1-g1.15: recipes up to phi = [3-6]; at phi = [4-7], [\d.e+,]+ MACs exceeds --max_flops 1e\+10",
        capsys.readouterr().out,
    )


def test_trials_are_evaluated_on_validation_images(finished):
    for name in NAMES:
        lines = (finished / "trials" / f"{name}-s0" / "metrics.jsonl").read_text().splitlines()
        assert {row["split"] for row in map(json.loads, lines) if row["kind"] == "eval"} == {"val"}


def test_choice_and_confidence(finished):
    chosen = json.loads((finished / "chosen.json").read_text())
    rows = json.loads((finished / "candidates.json").read_text())["candidates"]
    best = max(rows, key=lambda row: (row["top1_mean"], -row["macs"]))
    assert chosen["name"] == best["name"]
    assert chosen["confidence"].startswith("no test is possible with one seed")


def test_recipes_of_models_within_the_limits(finished, capsys):
    with (finished / "family.csv").open() as file:
        family = list(csv.DictReader(file))
    assert [row["fits"] for row in family] == ["True", "False"]
    assert [path.name for path in (finished / "recipes").iterdir()] == ["phi1.yaml"]
    recipe = yaml.safe_load((finished / "recipes" / "phi1.yaml").read_text())
    assert recipe["num_epochs"] == 7
    assert recipe["val_fraction"] == 0
    run(f"train --config {finished}/recipes/phi1.yaml --dry_run --compile no")
    assert f"{int(family[0]['parameters']):,} parameters, 37 px, output stride 32" in capsys.readouterr().out


def test_repeated_command_trains_nothing(finished, monkeypatch):
    monkeypatch.setattr(searching, "train_in", None)
    before = (finished / "plan.json").read_text()
    for stage in ("plan", "run"):
        run(f"search {stage} {TINY} --save_dir {finished.parent} --run_name done --max_flops 5e7")
    assert (finished / "plan.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_flops 5e7 --grid_step 0.1", "grid_step was 0.05, now 0.1"),
        ("--max_flops 6e7", "max_flops was 50000000.0, now 60000000.0"),
        ("--max_flops 5e7 --dataset cifar10", "dataset was synthetic, now cifar10"),
    ],
)
def test_changed_settings_are_refused(finished, capsys, monkeypatch, flags, message):
    load = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda name, *a, **k: load("synthetic", *a, **k))
    assert message in mistake(capsys, f"search run {TINY} --save_dir {finished.parent} --run_name done {flags}")


def test_changed_images_are_refused(finished, capsys, monkeypatch):
    load = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda *a, **k: dataclasses.replace(load(*a, **k), fingerprint="other"))
    run(f"search plan {TINY} --save_dir {finished.parent} --run_name done --max_flops 5e7", expected=2)
    assert "the images or labels differ" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["run", "collect", "choose"])
def test_stage_without_a_plan(tmp_path, capsys, stage):
    run(f"search {stage} {TINY} --save_dir {tmp_path}", expected=2)
    assert "run `effnet-fast search plan`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--alpha 1..1.1 --beta 1..1.1 --gamma 1..1.1", "the upper bounds are too low"),
        ("--max_flops 1e6", "not even the unscaled model fits"),
        ("--val_fraction 0", "the search needs held-out images"),
        ("--model efficientnet-b1", "only efficientnet-b0 can be scaled"),
        ("--width 1.5", "remove them"),
    ],
)
def test_mistake_is_one_line(tmp_path, capsys, flags, message):
    assert message in mistake(capsys, f"search {TINY} --save_dir {tmp_path} {flags}")


def test_a_folder_with_a_validation_split_of_its_own(tmp_path, capsys):
    for split, count in (("train", 32), ("val", 16), ("test", 16)):
        for i in range(count):
            path = tmp_path / "photos" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, 0, 0)).save(path)
    line = TINY.replace("--dataset synthetic", f"--dataset folder --data_dir {tmp_path}/photos --image_size 16")
    line = line.replace("--limit_train 64 --limit_eval 40 ", "") + f" --save_dir {tmp_path} --dry_run"
    assert "own validation split: use --val_fraction 0" in mistake(capsys, f"search {line}")
    run(f"search {line} --val_fraction 0")


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_a_damaged_choice_is_ignored(finished, tmp_path, content):
    shutil.copytree(finished, tmp_path / finished.name)
    (tmp_path / finished.name / "chosen.json").write_text(content)
    flags = "--phi 1..2 --max_flops 5e7 --num_epochs 7"
    run(f"search collect {TINY} --save_dir {tmp_path} --run_name {finished.name} {flags}")


def test_unknown_stage(capsys):
    run("search fly", expected=2)
    assert "stage" in capsys.readouterr().err


@pytest.fixture
def planned(finished, tmp_path):
    """The command of a search with a plan and without trials."""
    (tmp_path / "fake").mkdir()
    shutil.copy(finished / "plan.json", tmp_path / "fake")
    return f"search {{}} {TINY} --save_dir {tmp_path} --run_name fake --max_flops 5e7"


def fake_training(monkeypatch, behave):
    """Replace the training by `behave(config, on_evaluation)`; returns the names of its runs."""
    trained = []

    def train_in(world, config, on_evaluation):
        trained.append(config.name)
        return behave(config, on_evaluation)

    monkeypatch.setattr(searching, "train_in", train_in)
    monkeypatch.setattr(searching, "training_seconds", lambda *a: 1.0)
    return trained


def evaluated(top1):
    return {"split": "val", "loss": 1.0, "top1": top1, "top5": 50.0}


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (caused_by(ValueError("the GPU's memory is full"), torch.OutOfMemoryError()), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
        (FloatingPointError("the loss was not finite at step 3"), "not finite: the loss was not finite at step 3"),
    ],
)
def test_failed_trial_is_recorded_and_the_rest_trained(planned, tmp_path, monkeypatch, capsys, error, reason):
    def behave(config, on_evaluation):
        if config.name.startswith(NAMES[0]):
            raise error
        return Outcome(0, True, evaluated(10.0))

    trained = fake_training(monkeypatch, behave)
    run(planned.format("run"))
    run(planned.format("run"))
    assert trained == [f"{name}-s0" for name in NAMES]
    run(planned.format("collect"))
    rows = json.loads((tmp_path / "fake" / "candidates.json").read_text())["candidates"]
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", reason), ("complete", None)]


def test_other_errors_stop_the_worker_and_release_the_trial(planned, monkeypatch, capsys):
    def full(config, on_evaluation):
        raise OSError("the disk is full: free some space")

    fake_training(monkeypatch, full)
    run(planned.format("run"), expected=2)
    assert "free some space" in capsys.readouterr().err
    trained = fake_training(monkeypatch, lambda config, on_evaluation: Outcome(0, True, evaluated(10.0)))
    run(planned.format("run"))
    assert trained == [f"{name}-s0" for name in NAMES]


def test_signal_stops_the_worker_and_releases_the_trial(planned, monkeypatch):
    fake_training(monkeypatch, lambda config, on_evaluation: Outcome(130, False, {}))
    run(planned.format("run"), expected=130)
    trained = fake_training(monkeypatch, lambda config, on_evaluation: Outcome(0, True, evaluated(10.0)))
    run(planned.format("run"))
    assert trained == [f"{name}-s0" for name in NAMES]


def test_signal_in_the_last_evaluation_stops_the_worker(planned, monkeypatch):
    fake_training(monkeypatch, lambda config, on_evaluation: Outcome(143, True, evaluated(10.0)))
    run(planned.format("run"), expected=143)
    trained = fake_training(monkeypatch, lambda config, on_evaluation: Outcome(0, True, evaluated(10.0)))
    run(planned.format("run"))
    assert trained == [f"{NAMES[1]}-s0"]


def test_only_the_first_seed_is_pruned(planned, tmp_path, monkeypatch):
    """The other seeds of a candidate that was pruned are left out."""
    asked = []

    def report(trials, trial, epoch, top1, *, prune):
        asked.append((trial.user_attrs["run"], prune))
        if prune and top1 < 20:
            raise Pruned

    def behave(config, on_evaluation):
        top1 = 10.0 if config.name.startswith(NAMES[0]) else 30.0
        on_evaluation(1, evaluated(top1))
        return Outcome(0, True, evaluated(top1))

    monkeypatch.setattr(setup.Trials, "report", report)
    fake_training(monkeypatch, behave)
    run(f"{planned.format('all')} --seeds 3 --phi 1")
    assert asked == [
        (f"{NAMES[0]}-s0", True),
        (f"{NAMES[1]}-s0", True),
        (f"{NAMES[1]}-s1", False),
        (f"{NAMES[1]}-s2", False),
    ]
    rows = json.loads((tmp_path / "fake" / "candidates.json").read_text())["candidates"]
    assert [(row["status"], row["seeds"]) for row in rows] == [("pruned", 0), ("complete", 3)]


def test_folder_in_use_is_tried_again_later(planned, tmp_path, monkeypatch, capsys):
    """The worker that lost the claim may still be at work."""

    def behave(config, on_evaluation):
        if trained == [f"{NAMES[0]}-s0"]:
            raise FolderInUse("another run is at work")
        os.utime(tmp_path / "fake" / "leases" / "0", (0, 0))  # the claim expires meanwhile
        return Outcome(0, True, evaluated(10.0))

    monkeypatch.setattr(worker, "POLL_SECONDS", 0.1)
    trained = fake_training(monkeypatch, behave)
    run(planned.format("run"))
    assert trained == [f"{NAMES[0]}-s0", f"{NAMES[1]}-s0", f"{NAMES[0]}-s0"]
    assert "the worker that had it is still at work" in capsys.readouterr().out


def test_worker_that_died_in_a_claim(planned, monkeypatch):
    """Optuna writes a trial's parameters one by one."""
    suggest = optuna.trial.Trial._suggest

    def killed(trial, name, distribution):
        if name == "seed":
            raise OSError("killed")
        return suggest(trial, name, distribution)

    monkeypatch.setattr(optuna.trial.Trial, "_suggest", killed)
    run(planned.format("run"), expected=2)
    monkeypatch.setattr(optuna.trial.Trial, "_suggest", suggest)
    trained = fake_training(monkeypatch, lambda config, on_evaluation: Outcome(0, True, evaluated(10.0)))
    run(planned.format("run"))
    assert trained == [f"{name}-s0" for name in NAMES]


def test_plan_of_an_older_version(planned, tmp_path, monkeypatch):
    """A setting that the older version did not have: its trials are still those of this plan."""
    path = tmp_path / "fake" / "plan.json"
    plan = json.loads(path.read_text())
    del plan["settings"]["zero_init_residual"]
    path.write_text(json.dumps(plan))
    recorded = hashlib.sha256(json.dumps([plan["settings"], plan["fingerprint"], NAMES]).encode()).hexdigest()
    digests, real = [], setup.Trials
    monkeypatch.setattr(setup, "Trials", lambda *a, **k: digests.append(k["digest"]) or real(*a, **k))
    fake_training(monkeypatch, lambda config, on_evaluation: Outcome(0, True, evaluated(10.0)))
    run(planned.format("run"))
    assert digests == [recorded]


def test_collect_keeps_the_choice(planned, tmp_path, monkeypatch):
    fake_training(monkeypatch, lambda config, on_evaluation: Outcome(0, True, evaluated(10.0)))
    run(f"{planned.format('all')} --phi 1")
    for _ in range(2):
        assert f"Chosen: {NAMES[0]}; " in (tmp_path / "fake" / "search.html").read_text()
        run(planned.format("collect"))


def test_seeds_can_be_added(planned, tmp_path, monkeypatch):
    scores = {f"{name}-s{seed}": 30.0 * i + seed + 0.1 * i * seed for i, name in enumerate(NAMES) for seed in range(3)}
    trained = fake_training(monkeypatch, lambda config, on_evaluation: Outcome(0, True, evaluated(scores[config.name])))
    run(planned.format("run"))
    run(f"{planned.format('all')} --seeds 3 --phi 1")
    assert sorted(trained) == sorted(scores)
    chosen = json.loads((tmp_path / "fake" / "chosen.json").read_text())
    assert chosen["name"] == NAMES[1]
    assert chosen["confidence"].startswith("better than each of the 1 others (n = 3")


def test_lost_trial_is_left_to_its_new_worker(planned, monkeypatch, tmp_path):
    def lose(config, on_evaluation):
        other = rivals[0].claim()
        assert other.user_attrs["run"] == config.name
        try:
            while True:  # until the worker renews its claim and notices; the test's own timeout bounds it
                time.sleep(0.05)
                on_evaluation(1, evaluated(1.0))
        finally:
            rivals[0].finish(other, "COMPLETE", 77.0)

    def remember(*arguments, **settings):
        shared = real(*arguments, **settings)
        other = real(*arguments, **settings)
        other.owner = "elsewhere:1"
        other._is_expired = lambda trial: True  # however soon the worker renews its claim
        rivals[:] = [other]
        return shared

    rivals, real = [], setup.Trials
    monkeypatch.setattr(
        setup,
        "Trials",
        type("Trials", (), {"__new__": lambda cls, *a, **k: remember(*a, **k), "claim": real.claim}),
    )
    fake_training(monkeypatch, lose)
    run(f"{planned.format('run')} --lease_seconds 2")
    monkeypatch.setattr(setup, "Trials", real)
    run(planned.format("collect"))
    rows = json.loads((tmp_path / "fake" / "candidates.json").read_text())["candidates"]
    assert [row["top1_mean"] for row in rows] == [77.0, 77.0]


def start(line, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "effnet_fast", *line.split()], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["synthetic", "cifar100"])
def test_killed_and_resumed_worker_gives_the_same_table(tmp_path, dataset, request):
    real = f" --dataset cifar100 --data_dir {request.getfixturevalue('cifar100_dir')}" if dataset == "cifar100" else ""
    settings = "--seeds 2 --search_epochs 3 --pruner none --lease_seconds 30 --phi 1"
    line = f"search {TINY}{real} --save_dir {tmp_path} {settings}"
    undisturbed = start(f"{line} --run_name whole")
    undisturbed.communicate()
    run(f"{line.replace('search', 'search plan', 1)} --run_name killed")
    workers = [start(f"{line} --run_name killed", **at_step(2, "hold")), start(f"{line} --run_name killed")]
    name = next(printed.partition(":")[0] for printed in workers[0].stdout if ": epoch 2 " in printed)
    while not (tmp_path / "killed" / "trials" / name / "last.pt").exists():
        assert workers[0].poll() is None
        time.sleep(0.05)
    workers[0].send_signal(signal.SIGKILL)
    resumed = start(f"{line} --run_name killed")
    for survivor in (workers[1], resumed):
        survivor.communicate()
        assert survivor.returncode == 0

    def table(name):
        rows = json.loads((tmp_path / name / "candidates.json").read_text())["candidates"]
        timed = ("seconds", "latency", "_ms", "memory")
        return [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in rows]

    assert table("killed") == table("whole")
    chosen = [json.loads((tmp_path / name / "chosen.json").read_text())["name"] for name in ("killed", "whole")]
    assert chosen[0] == chosen[1]
    logs = [path.read_text() for path in (tmp_path / "killed" / "trials").glob("*/log.txt")]
    assert len(logs) == 4
    assert sum(log.count("resuming at step") for log in logs) == 1
    # No trial was trained twice; the kill may have lost the checkpoint of the epoch that was just evaluated.
    assert sum(log.count("\nepoch 1 ") for log in logs) == 4
    assert sum(log.count("\nepoch ") for log in logs) in (4 * 3, 4 * 3 + 1)


def test_latency_is_measured_once_a_model(tmp_path, monkeypatch):
    """A second measurement would be on the other side of the limit."""
    for first in (1.0, 9.0):
        readings = itertools.chain([1.0], itertools.cycle([first, 10.0 - first]))  # the baseline, then the candidates
        monkeypatch.setattr(measure, "latency_ms", lambda *a, readings=readings: next(readings))
        run(f"search plan {TINY} --save_dir {tmp_path} --run_name noisy{first:g} --max_latency_ms 5")
        plan = json.loads((tmp_path / f"noisy{first:g}" / "plan.json").read_text())
        assert all(candidate["largest_phi"] >= 1 for candidate in plan["candidates"])


def test_all_trials_failed(planned, monkeypatch, capsys):
    def failing(config, watch):
        raise FloatingPointError("the loss is not finite")

    fake_training(monkeypatch, failing)
    run(planned.format("run"))
    error = mistake(capsys, planned.format("collect"))
    assert re.search(r"all 2 trials in .* failed, the first \(\S+\) with: not finite: the loss is not finite", error)
