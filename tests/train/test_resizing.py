"""Progressive resizing: the schedule, the images, whole runs, bad flags."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command_line import mistake, run
from effnet_fast import checkpoint, cli
from effnet_fast.config import SearchConfig, StudyConfig, TrainConfig, resize_stages
from effnet_fast.data.resize import resize as resize_array
from effnet_fast.train.resizing import image_sizes, resize

RUN = (
    "train --dataset synthetic --output_stride 16 --width 0.25 --depth 0.3 --limit_train 96 --limit_eval 16 "
    "--batch_size 16 --num_epochs 1 --loader resident --num_workers 1 --device cpu"
)


def test_shares_of_the_steps():
    sizes = image_sizes(resize_stages("20:0.15,24:0.35,32", 32), 0, 100)
    assert [sizes(step) for step in (0, 14, 15, 49, 50, 99)] == [20, 20, 24, 24, 32, 32]
    assert sizes.counts(0, 100) == {20: 15, 24: 35, 32: 50}
    assert sizes.counts(10, 40) == {20: 5, 24: 25}
    assert sizes.pixels(14, 16) == 20**2 + 24**2
    # A run that adds epochs starts its schedule anew.
    assert image_sizes([(20, 0.5), (32, 0.5)], 100, 110).starts == (100, 105)


@given(
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=7), first=st.integers(0, 10), steps=st.integers(1, 1000)
)
def test_every_step_has_a_size(shares, first, steps):
    stages = [(8 + i, share / sum(shares)) for i, share in enumerate(shares)]
    sizes = image_sizes(stages, first, first + steps)
    sequence = [sizes(step) for step in range(first, first + steps)]
    assert sequence == sorted(sequence)
    assert {size: sequence.count(size) for size in sequence} == sizes.counts(first, first + steps)
    for size, share in stages:
        assert abs(sequence.count(size) - share * steps) <= 1


@pytest.mark.parametrize("size", [16, 20, 24])
def test_images_equal_those_of_the_loaders_resize(size):
    """Except at the border, where torch leaves out pixels outside the image and the loaders repeat the outermost."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
    resized = resize(images, size)
    assert resized.is_contiguous(memory_format=torch.channels_last)
    expected = torch.from_numpy(resize_array(pixels, size)).float().permute(0, 3, 1, 2)
    inside = (..., slice(2, -2), slice(2, -2))
    assert (resized - expected)[inside].abs().max() < 0.51  # the loaders round
    assert resize(images, 32) is images


@pytest.mark.parametrize("flags", ["", "--optimizer muon --learning_rate 6e-3 --loader torch --alternating_flip"])
def test_a_run_stopped_in_the_middle_ends_as_an_uninterrupted_one(tmp_path, capsys, flags):
    line = f"{RUN} --save_dir {tmp_path} --resize_schedule 16:0.34,24:0.33,32 --ema_decay 0.9 --mixup 0.2 --cutmix 1"
    line += f" --grad_accumulation 2 {flags}"
    run(f"{line} --dry_run")
    assert "training images of 16 px for 2 steps, 24 px for 2 steps, 32 px for 2 steps; evaluation at 32 px" in (
        capsys.readouterr().out
    )
    run(f"{line} --run_name whole")
    for step in (1, 2):  # within a size, between two
        run(f"{line} --run_name pieces --time_budget 0.001")
        assert f"time is up at step {step} of 6" in capsys.readouterr().out
    run(f"{line} --run_name pieces")
    whole, pieces = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "pieces"))
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(value, pieces[part][name]), name


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("20", None),
        ("20:0.15,24:0.35,32", None),
        ("20:0.5", "use SIZE:SHARE,...,SIZE, e.g. 20:0.15,24:0.35,32"),
        ("20,32", "use SIZE:SHARE"),
        ("20:half,32", "use SIZE:SHARE"),
        ("", "use SIZE:SHARE"),
        ("20:0.5,24:0.5,32", "shares must be above 0, and their sum below 1"),
        ("20:-0.1,32", "shares must be above 0"),
        ("20:nan,32", "shares must be above 0"),
        ("32:0.5,20", "each size must be larger than the one before"),
        ("20:0.2,20:0.2,32", "each size must be larger than the one before"),
        ("4:0.5,32", "sizes must be at least 8 px"),
        ("62.5%:0.4,75%:0.4,100%", None),
        ("75%:0.4,32", "use pixels or percentages for all sizes"),
        ("20%5:0.4,100%", "use SIZE:SHARE"),
        ("75%:0.4,inf%", "use SIZE:SHARE"),
        ("75%:0.4,75.1%", "each size must be larger than the one before"),
        (",".join(f"{8 + i}:0.1" for i in range(8)) + ",32", "use at most 8 sizes"),
    ],
)
def test_schedules(schedule, words):
    if words is None:
        assert TrainConfig(resize_schedule=schedule).resize_schedule == schedule
        return
    with pytest.raises(ValueError, match=words) as refused:
        TrainConfig(resize_schedule=schedule)
    assert str(refused.value).startswith(f"--resize_schedule {schedule}: ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--resize_schedule 20:0.5,48", "--resize_schedule 20:0.5,48: images of 32 px are not enlarged"),
        ("--resize_schedule 75%:0.5,110%", "--resize_schedule 75%:0.5,110%: images of 32 px are not enlarged"),
        ("--resize_schedule 32:0.5", "use SIZE:SHARE"),
        (
            "--model densenet201 --output_stride 32 --resize_schedule 16:0.5,32",
            "images of 16 px are too small for densenet201 at output stride 32",
        ),
        (
            "--output_stride 32 --batch_size 4 --grad_accumulation 4 --image_size 64 --resize_schedule 32:0.5,64",
            "leaves one image per pass",
        ),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, words):
    line = RUN.replace(" --width 0.25 --depth 0.3", "") if "densenet" in flags else RUN
    assert words in mistake(capsys, f"{line} --save_dir {tmp_path} {flags} --dry_run")


def test_percentages_of_the_image_size():
    assert resize_stages("62.5%:0.4,75%:0.4,100%", 32) == resize_stages("20:0.4,24:0.4,32", 32)
    assert [size for size, _ in resize_stages("62.5%:0.4,75%:0.4,100%", 45)] == [28, 34, 45]


@pytest.mark.parametrize("config", [SearchConfig, StudyConfig])
def test_search_and_study_take_percentages_only(config):
    assert config(resize_schedule="75%:0.5,100%")
    with pytest.raises(ValueError, match="is in pixels, and the models of this verb differ in image size: use perc"):
        config(resize_schedule="20:0.5,32")


def test_settings_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("resize_schedule: 20:0.15,24:0.35,32\n")
    config = cli.parse(cli.VERBS["train"], "train", ["--config", str(path)])
    assert config.resize_schedule == "20:0.15,24:0.35,32"
