"""Damaged checkpoints and data are reported, and an intact checkpoint is used instead."""

import hashlib
import io
import pickle
import random
import shutil
import tarfile

import numpy as np
import pytest
import torch

from command_line import mistake, run
from effnet_fast import checkpoint
from effnet_fast.data.archive import Archive, fetch, read


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        state = {"model": {f"layer{i}": torch.full((40,), float(i + step)) for i in range(5)}, "step": step}
        data = checkpoint.serialise(state)
        checkpoint.write_atomically(tmp_path / "last.pt", data, keep=2)
    return tmp_path


def test_flipped_bits_are_detected(folder):
    """Each of 1000 flips is refused, or changes bytes without meaning."""
    path, chance = folder / "last.pt", random.Random(0)
    whole = path.read_bytes()
    expected = checkpoint.load(path)
    refused = 0
    for _ in range(1000):
        bit = chance.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            state = checkpoint.load(path)
        except ValueError:
            refused += 1
            continue
        assert state["step"] == expected["step"]
        assert all(torch.equal(value, state["model"][name]) for name, value in expected["model"].items())
    assert refused > 500


def test_truncated_files_are_refused(folder):
    path, chance = folder / "last.pt", random.Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(whole[: chance.randrange(len(whole))])
        with pytest.raises(ValueError, match=r"last\.pt is damaged"):
            checkpoint.load(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains once and returns a function that copies the finished run."""
    first = tmp_path_factory.mktemp("trained")

    def copy(small, folder):
        if not (first / "run").exists():
            run(f"{small} --save_dir {first} --run_name run")
        shutil.copytree(first / "run", folder / "run")

    return copy


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_checkpoint_is_replaced_by_the_older_one(tmp_path, small, trained, capsys, damage, assert_same_state):
    line = f"{small} --save_dir {tmp_path} --run_name run"
    trained(small, tmp_path)
    path = tmp_path / "run" / "last.pt"
    whole = checkpoint.load(path)
    before = checkpoint.load(tmp_path / "run" / "last-1.pt")["progress"]["step"]  # 12, or 6 where the disk is slow
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    if damage == "missing":  # as a kill between two renames leaves it
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:1000])
    capsys.readouterr()
    run(line)
    printed = capsys.readouterr()
    if damage != "missing":
        assert f"warning: {path} is damaged" in printed.err
        assert f"resuming from {tmp_path}/run/last-1.pt" in printed.err
        assert (tmp_path / "run" / "last.pt.unused").exists()
    assert f"resuming at step {before} of 18" in printed.out
    assert_same_state(checkpoint.load(path), whole)
    assert before <= checkpoint.load(tmp_path / "run" / "last-1.pt")["progress"]["step"] < 18


def test_no_readable_checkpoint(tmp_path, small, capsys):
    line = f"{small} --save_dir {tmp_path} --run_name run"
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.pt", "last-1.pt"):
        (folder / name).write_bytes(b"torn")
    printed = mistake(capsys, line)
    assert "last.pt is damaged" in printed
    assert "--resume no starts over" in printed
    assert (folder / "last.pt").read_bytes() == b"torn"


@pytest.fixture
def archive(tmp_path):
    """A small archive in the form of CIFAR's."""
    content = pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}, protocol=2)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("images/train")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    (tmp_path / "images.tar.gz").write_bytes(packed.getvalue())
    md5s = [hashlib.md5(part, usedforsecurity=False).hexdigest() for part in (packed.getvalue(), content)]
    return Archive("Images", "http://127.0.0.1:9/images.tar.gz", md5s[0], "images", {"train": md5s[1]})


@pytest.mark.parametrize("damaged", ["images.tar.gz", "images/train"])
@pytest.mark.parametrize("truncated", [True, False])
def test_damaged_data_are_refused(tmp_path, archive, damaged, truncated):
    chance = random.Random(0)
    fetch(archive, tmp_path)
    path = tmp_path / damaged
    whole = path.read_bytes()
    for _ in range(100):
        if damaged == "images.tar.gz":
            shutil.rmtree(tmp_path / "images", ignore_errors=True)
        bit = chance.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole[: bit // 8] if truncated else changed)
        with pytest.raises(ValueError, match="truncated or modified"):
            read(archive, fetch(archive, tmp_path, download=False), "train")
