"""The command line: known flags, settings files, and mistakes in one line."""

import contextlib
import errno
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

import effnet_fast
from command_line import mistake, run
from effnet_fast import cli, config

KNOWN = (
    "--model efficientnet-b0 --batch_size 256 --num_epochs 200 --learning_rate 0.1 --weight_decay 5e-4 "
    "--num_workers 8 --data_dir data --save_dir results --mixed_precision"
)


def settings(line, verb="train"):
    return cli.parse(cli.VERBS[verb], verb, line.split())


def test_known_flags_are_the_defaults():
    assert settings(KNOWN) == config.TrainConfig(mixed_precision="bf16")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "auto"),
        ("--mixed_precision", "bf16"),
        ("--mixed_precision --seed 3", "bf16"),
        ("--mixed_precision no", "no"),
        ("--mixed_precision off", "no"),
        ("--mixed_precision=fp16", "fp16"),
    ],
)
def test_mixed_precision(line, expected):
    assert settings(line).mixed_precision == expected


@pytest.mark.parametrize(
    ("word", "expected"), [("no", "no"), ("off", "no"), ("fp16", "fp16"), ("yes", "bf16"), ("bf16", "bf16")]
)
def test_mixed_precision_in_yaml(tmp_path, word, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"mixed_precision: {word}\nresume: no\nlearning_rate: 1e-3\n")
    read = settings(f"--config {path} --learning_rate 0.2")
    assert (read.mixed_precision, read.resume, read.learning_rate) == (expected, "no", 0.2)


def test_switches():
    assert settings("--dry_run --compile --deterministic").dry_run
    assert settings("--compile").step == "compile"
    assert settings("--compile no --sync_batchnorm false") == config.TrainConfig(step="eager", sync_batchnorm=False)


def test_printed_config_round_trip(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--learning_rate", "0.3", "--output_stride", "16", "--print_config"])
    assert done.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert settings(f"--config {path}") == config.TrainConfig(learning_rate=0.3, output_stride=16)


def test_recipes_have_names(tmp_path, monkeypatch):
    """From any folder; a file of the same name goes first."""
    monkeypatch.chdir(tmp_path)
    expected = settings(f"--config {Path(effnet_fast.__file__).parent / 'recipes' / 'cifar100.yaml'}")
    assert settings("--config cifar100") == settings("--config=cifar100") == expected != config.TrainConfig()
    (tmp_path / "cifar100").write_text("num_epochs: 7\n")
    assert settings("--config cifar100") == config.TrainConfig(num_epochs=7)


def test_every_flag_has_help(capsys):
    for name, verb in cli.VERBS.items():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert "default: " in capsys.readouterr().out or name == "plot"
        for action in cli._make_parser(verb, name)._actions:
            assert action.help, f"{name}: {action.option_strings}"


def test_recipes_are_valid():
    from importlib import resources

    recipes = [f for f in resources.files("effnet_fast.recipes").iterdir() if f.name.endswith(".yaml")]
    assert recipes
    for recipe in recipes:
        verb = "study" if "study" in recipe.name else "train"
        assert isinstance(settings(f"--config {recipe}", verb), config.TrainConfig)


TINY = (
    "--dataset synthetic --output_stride 32 --limit_train 64 --limit_eval 64 --batch_size 32 --num_epochs 1 "
    "--device cpu"
)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fly", "unknown verb 'fly'"),
        ("train --batchsize 3", "--batchsize"),
        ("train --model efficientnet-b8", "did you mean efficientnet-b"),
        ("train --batch 4", "--batch"),
        ("info --depth .inf", "--depth must be finite, not inf"),
        ("eval --checkpoint x.pt --num_workers -1", "--num_workers must not be negative"),
        ("train --batch_size 0", "--batch_size must be at least 1"),
        ("train --batch_size x", "batch_size"),
        ("train --learning_rate -0.1", "--learning_rate must not be negative"),
        ("train --optimizer lion", "optimizer"),
        ("train --output_stride 5", "output_stride"),
        ("train --mixup 1 --mixup_prob 1.5", "--mixup_prob must be from 0 to 1"),
        ("train --mixup_prob 0.5", "add --mixup or --cutmix"),
        ("train --mixup 1 --mixup_switch_prob 0.9", "add both --mixup and --cutmix"),
        ("train --val_fraction 1.5", "--val_fraction must be from 0 to below 1"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        ("train --dataset synthetic --batch_size 999999", "larger than the"),
        ("train --dataset synthetic --batch_size 32 --grad_accumulation 5", "must divide evenly"),
        ("train --dataset synthetic --limit_train 5 --batch_size 8", "larger than the 5 training images"),
        (
            "train --dataset synthetic --limit_train 48 --batch_size 8 --class_weights balanced --device cpu",
            "has no training image, so it has no weight",
        ),
        ("eval --checkpoint nowhere.pt", "there is no checkpoint at nowhere.pt"),
        ("eval", "checkpoint"),
        ("plot nowhere", "nowhere"),
        ("plot", "runs"),
        ("info --model vgg16", "unknown model"),
        ("info --image_size 0", "efficientnet-b0 cannot take images of 0 px"),
        ("info --image_size -5", "cannot take images of -5 px: use another --image_size"),
        ("info --model densenet201 --image_size 20 --output_stride 32", "or a smaller --output_stride"),
        ("info --num_classes 0", "--num_classes must be at least 1"),
    ],
)
def test_mistake_is_one_line(capsys, line, words):
    assert words in mistake(capsys, line)


def test_compile_overrides_a_recorded_step(tmp_path):
    (tmp_path / "run.yaml").write_text("step: compile\n")
    assert settings(f"--config {tmp_path}/run.yaml").step == "compile"
    assert settings(f"--config {tmp_path}/run.yaml --compile no").step == "eager"
    with pytest.raises(ValueError, match="contradict each other"):
        settings("--step compile --compile no")


def test_bounds_of_label_smoothing(capsys):
    for value in (0.0, 0.4, 0.99):
        assert settings(f"--label_smoothing {value}").label_smoothing == value
    for value in ("-0.1", "1", "1.5"):
        assert "--label_smoothing must be from 0 to below 1" in mistake(capsys, f"train --label_smoothing {value}")


def test_invalid_yaml(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("learning_rate: [")
    mistake(capsys, f"train --config {tmp_path / 'bad.yaml'}")
    (tmp_path / "unknown.yaml").write_text("learning_speed: 3")
    assert "learning_speed" in mistake(capsys, f"train --config {tmp_path / 'unknown.yaml'}")


def test_recursive_yaml(tmp_path, capsys):
    path = tmp_path / "endless.yaml"
    path.write_text("model: &a {b: *a}\n")
    assert "YAML aliases (*name) are not supported" in mistake(capsys, f"train --config {path}")


def test_missing_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "jsonargparse is not installed, which train needs: pip install jsonargparse" in mistake(capsys, "train")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert "no CUDA GPU is visible" in mistake(capsys, "train --dataset synthetic --device cuda")


def test_missing_data_without_network(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert str(tmp_path) in mistake(capsys, f"train --data_dir {tmp_path}")


def test_broken_archive(tmp_path, capsys):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    assert "cifar-100-python.tar.gz" in mistake(capsys, f"train --data_dir {tmp_path}")


def test_truncated_data_file(tmp_path, capsys):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"\x80\x02}q\x00.")
    assert str(folder) in mistake(capsys, f"train --data_dir {tmp_path}")


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    printed = mistake(capsys, f"train {TINY} --save_dir {tmp_path / 'file'}")
    assert "choose another --save_dir" in printed


def test_full_disk_at_a_checkpoint(tmp_path, capsys, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if "last.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    run(f"train {TINY} --save_dir {tmp_path}", expected=2)
    *warned, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert all("training continues" in line for line in warned if not line.startswith("warning: newer than"))
    assert "last.pt" in error
    assert "free some space" in error


def test_checkpoint_of_another_architecture(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(f"train {TINY} --save_dir {tmp_path} --run_name a".split())
    printed = mistake(
        capsys, f"train {TINY} --save_dir {tmp_path} --model efficientnet-b1 --resume {tmp_path}/a/last.pt"
    )
    assert "model was efficientnet-b0, now efficientnet-b1" in printed


def test_module_runs():
    command = [sys.executable, "-m", "effnet_fast", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("effnet-fast ")


def test_every_command_shares_the_cores_and_keeps_freed_memory(monkeypatch):
    """Without these two a training on a CPU is slower."""
    entered = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: entered.append("memory"))
    monkeypatch.setattr(cli, "share_cores", lambda: entered.append("cores") or contextlib.nullcontext())
    run("--version")
    assert entered == ["memory", "cores"]


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("EFFNET_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown verb"):
        cli.main(["fly"])


def test_config_of_a_run_is_a_recipe(tmp_path):
    path = tmp_path / "config.yaml"
    import dataclasses

    path.write_text(yaml.safe_dump(dataclasses.asdict(config.TrainConfig(mixed_precision="no", resume="no"))))
    assert settings(f"--config {path}").mixed_precision == "no"


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1" + "0" * 30])
@pytest.mark.parametrize("dry_run", ["", " --dry_run"])
def test_seed_out_of_range(capsys, seed, dry_run):
    assert "--seed must be from 0 to 2**64 - 1" in mistake(capsys, f"train {TINY} --seed {seed}{dry_run}")


def test_largest_seed_trains(tmp_path):
    with pytest.raises(SystemExit) as done:
        cli.main(f"train {TINY} --width 0.25 --depth 0.3 --mixup 1 --seed {2**64 - 1} --save_dir {tmp_path}".split())
    assert done.value.code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("just words\n", "write one `name: value` per line"),
        ("seed: 1\nmodel: efficientnet-b1\nseed: 2\n", "seed is set in line 1 and in line 3"),
        ("run_name: 5\n", "--run_name must be text, not the number 5: put it in quotes"),
    ],
)
@pytest.mark.parametrize("flag", ["--config {}", "--config={}"])
def test_faults_of_a_settings_file(tmp_path, capsys, text, words, flag):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert words in mistake(capsys, f"train {flag.format(path)} --dry_run")


def test_tilde_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "here")
    (tmp_path / "recipe.yaml").write_text("data_dir: ~/$PLACE/data\nsave_dir: $HOME/results\n")
    for flag in ("--config=~/recipe.yaml", "--config ~/recipe.yaml", "--config $HOME/recipe.yaml"):
        read = settings(f"{flag} --pretrained ~/${{PLACE}}.pth --run_name $PLACE --resume $UNSET/last.pt")
        assert (read.data_dir, read.save_dir) == (f"{tmp_path}/here/data", f"{tmp_path}/results")
        assert (read.pretrained, read.resume) == (f"{tmp_path}/here.pth", "$UNSET/last.pt")
        assert read.run_name == "$PLACE"  # a name, not a path
    predicted = settings("--checkpoint ~/last.pt ~/a.png $PLACE.png", "predict")
    assert (predicted.checkpoint, predicted.images) == (f"{tmp_path}/last.pt", [f"{tmp_path}/a.png", "here.png"])
    explained = settings("--images_path ~/images --output_path ~/out --run B0=~/b0", "cam")
    assert (explained.images_path, explained.output_path) == (f"{tmp_path}/images", f"{tmp_path}/out")
    assert explained.run == [f"B0={tmp_path}/b0"]


def test_an_existing_path_with_a_dollar_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "elsewhere")
    (tmp_path / "$PLACE").mkdir()
    assert settings(f"--data_dir {tmp_path}/$PLACE").data_dir == f"{tmp_path}/$PLACE"


def test_search_stage_overrides_a_config_file(tmp_path):
    (tmp_path / "search.yaml").write_text("stage: plan\n")
    verb = cli.VERBS["search"]
    assert cli.parse(verb, "search", ["run", "--config", f"{tmp_path}/search.yaml"]).stage == "run"
    assert cli.parse(verb, "search", ["--config", f"{tmp_path}/search.yaml"]).stage == "plan"


@pytest.mark.parametrize("form", ["--references {}", "--references={}"])
def test_repeated_flags_replace_a_list_of_a_config_file(tmp_path, form):
    path = tmp_path / "study.yaml"
    path.write_text("references: [densenet201]\n")
    flags = " ".join(form.format(name) for name in ("resnet50", "resnet152"))
    assert settings(f"--config {path} {flags}", "study").references == ["resnet50", "resnet152"]
    assert settings(f"--config {path}", "study").references == ["densenet201"]
