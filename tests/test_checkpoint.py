"""Checkpoints are written atomically, and loading one executes no code."""

import errno
import os
import pickle

import pytest
import torch

from effnet_fast import checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.arange(3)}, "progress": {"step": 4}})
    state = checkpoint.load(path)
    assert torch.equal(state["model"]["w"], torch.arange(3))
    assert state["progress"] == {"step": 4}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*the one before it is kept: free some space"):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path / "a.pt", {"step": 1})
    assert checkpoint.load(tmp_path / "a.pt")["step"] == 1


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"last\.pt is damaged or not a checkpoint"):
        checkpoint.load(path)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "last.pt"
    torch.save({"format": checkpoint.FORMAT, "model": Bomb()}, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        checkpoint.load(tmp_path / "none.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of effnet_fast"):
        checkpoint.load(tmp_path / "other.pt")
