"""Without a reader of stdout and stderr, verbs fall silent and finish their work."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from command_line import run
from effnet_fast import checkpoint
from effnet_fast.streams import QuietStream, quiet_streams


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose output was piped into a program that ended after the first line."""
    folder = tmp_path_factory.mktemp("pipes")
    reading, writing = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))

    def read_one_line():
        with reading:
            reading.readline()

    reader = threading.Thread(target=read_one_line)
    reader.start()
    with writing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", writing)
        run(
            "train --dataset synthetic --limit_train 64 --limit_eval 16 --batch_size 16 --num_epochs 2 --image_size 16 "
            "--output_stride 32 --width 0.25 --depth 0.3 --loader resident --num_workers 1 --log_every_steps 1 "
            f"--device cpu --save_dir {folder} --run_name run"
        )
    reader.join()
    return folder / "run"


@pytest.fixture
def run_without_reader(monkeypatch, capsys):
    """Runs a command whose stdout is a pipe that was closed before; it must end with status 0 and an empty stderr."""
    monkeypatch.setattr("effnet_fast.provenance.newer_than_tested", lambda: None)  # else a line on stderr

    def run_without_reader(line):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            run(line)
        assert capsys.readouterr().err == ""

    return run_without_reader


def test_train_finishes_when_its_reader_ends(trained):
    assert checkpoint.load(trained / "last.pt")["progress"]["finished"]
    assert (trained / "metrics.jsonl").read_text().count('"kind": "train"') == 8


def test_eval(trained, tmp_path, run_without_reader):
    run_without_reader(f"eval --checkpoint {trained}/last.pt --limit_eval 16 --output_dir {tmp_path} --device cpu")
    tables, pictures = {"confused-pairs.csv", "evaluation.json", "per-class.csv"}, {"confusion", "reliability", "worst"}
    assert set(os.listdir(tmp_path)) == {f"test-{name}" for name in tables | {f"{name}.png" for name in pictures}}


def test_predict_writes_its_whole_table(trained, tmp_path, run_without_reader):
    names = [f"{number}.png" for number in range(4)]
    for name in names:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / name)
    table = tmp_path / "table.csv"
    run_without_reader(
        f"predict --checkpoint {trained}/last.pt {tmp_path} --top 1 --batch_size 1 --output {table} --device cpu"
    )
    assert len(table.read_text().splitlines()) == 5


def test_data(tmp_path, run_without_reader):
    run_without_reader(f"data --dataset synthetic --output {tmp_path}/sheet.png")
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("line", ["--help", "--version", "train --help"])
def test_the_interpreter_exits_without_an_error(line):
    """It flushes stdout once more when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "effnet_fast", *line.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("closed", "said"), [(">&-", ""), ("2>&-", "effnet-fast "), (">&- 2>&-", "")])
def test_closed_streams(closed, said):
    command = f"{sys.executable} -m effnet_fast --version {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(said)
    assert done.stderr == ""


def test_other_errors_of_a_stream_are_reported():
    """A full disk behind `> file` is a failure."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "effnet_fast", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: a part of stdout is lost (No space left on device): free some space\n"


def test_a_full_disk_loses_only_what_it_refused(tmp_path):
    with open("/dev/full", "w") as full, open(tmp_path / "log", "w") as log:
        stream = QuietStream(full)
        print("refused", file=stream, flush=True)
        assert stream.lost is not None
        os.dup2(log.fileno(), full.fileno())
        print("written", file=stream, flush=True)
    assert (tmp_path / "log").read_text() == "written\n"


@pytest.mark.parametrize("end", [SystemExit(3), RuntimeError("a fault")])
def test_a_full_disk_hides_no_other_end(monkeypatch, end):

    @quiet_streams()
    def command():
        print("lost")
        raise end

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(type(end)) as raised:
            command()
    assert raised.value is end


def test_training_needs_no_disk_for_its_lines(tmp_path, small):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "effnet_fast", *f"{small} --save_dir {tmp_path} --run_name run".split()]
        done = subprocess.run(command, stdout=full, stderr=full)
    assert done.returncode == 2
    assert checkpoint.load(tmp_path / "run" / "last.pt")["progress"]["finished"]
