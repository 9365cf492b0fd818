"""Without a reader of stdout and stderr, verbs fall silent and finish their work."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from effnet_fast import checkpoint


def start(line, **streams):
    words = [sys.executable, "-m", "effnet_fast", *line.split()]
    return subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def without_reader(line):
    """The exit status and stderr of a command whose stdout is a pipe that was closed before."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    _, message = process.communicate()
    return process.returncode, message


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """A run whose output was piped into a program that ended after the first line."""
    folder = tmp_path_factory.mktemp("pipes")
    small = (
        "train --dataset synthetic --limit_train 64 --limit_eval 16 --batch_size 16 --num_epochs 2 --output_stride 32 "
        "--image_size 16 --width 0.25 --depth 0.3 --loader resident --num_workers 1 --log_every_steps 1 --device cpu"
    )
    process = start(f"{small} --save_dir {folder} --run_name run", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    return folder / "run"


def test_train_finishes_when_its_reader_ends(trained):
    assert checkpoint.load(trained / "last.pt")["progress"]["finished"]
    assert (trained / "curves.png").exists()


def test_eval(trained, tmp_path):
    line = f"eval --checkpoint {trained}/last.pt --limit_eval 16 --output_dir {tmp_path} --device cpu"
    assert without_reader(line) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["test-confusion.png", "test-per-class.csv"]


def test_predict_writes_its_whole_table(trained, tmp_path):
    names = [f"{number}.png" for number in range(4)]
    for name in names:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / name)
    table = tmp_path / "table.csv"
    line = f"predict --checkpoint {trained}/last.pt {tmp_path} --top 1 --batch_size 1 --output {table} --device cpu"
    assert without_reader(line) == (0, "")
    assert len(table.read_text().splitlines()) == 5


def test_data(tmp_path):
    assert without_reader(f"data --dataset synthetic --output {tmp_path}/sheet.png") == (0, "")
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("line", ["--help", "--version", "info --json"])
def test_short_answers(line):
    assert without_reader(line) == (0, "")


def test_other_errors_of_a_stream_are_reported():
    """A full disk behind `> file` is a failure."""
    with open("/dev/full", "w") as full:
        process = start("info --json", stdout=full, stderr=subprocess.PIPE, text=True)
        _, message = process.communicate()
    assert process.returncode != 0
    assert "No space left on device" in message
