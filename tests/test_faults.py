"""Faults of the machine that torch reports as a RuntimeError."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from command_line import mistake
from effnet_fast import checkpoint, cli, create_model
from effnet_fast.data import decode
from effnet_fast.faults import explanation
from effnet_fast.model import trained
from effnet_fast.model.weights import read_weights
from effnet_fast.run import training
from effnet_fast.run.resume import explain_checkpoint_errors

FULL = "the memory is full: free some, or use a smaller --batch_size"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"), FULL),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"), FULL),
        (MemoryError(), FULL),
        (torch.OutOfMemoryError(), FULL),
        (RuntimeError("CUDA error: out of memory"), FULL),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), FULL),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "DataLoader worker (pid 7) is killed by signal: Killed: memory or /dev/shm may be short",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "so use fewer --num_workers"),
    ],
)
def test_fault_is_one_line(capsys, monkeypatch, error, words):
    def fail(config):
        raise error

    monkeypatch.setattr(training, "train", fail)
    assert words in mistake(capsys, "train --dataset synthetic")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_full_memory_is_no_damaged_checkpoint(tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    torch.save({"format": checkpoint.FORMAT}, tmp_path / "last.pt")
    monkeypatch.setattr(torch, "load", fail)
    assert FULL in mistake(capsys, f"eval --checkpoint {tmp_path}/last.pt")


def test_full_memory_is_no_damaged_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    torch.save({}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        read_weights(tmp_path / "weights.pth")
    monkeypatch.setattr(decode.Image, "open", fail)
    with pytest.raises(MemoryError):
        decode.load_image(tmp_path / "photo.jpg")


def test_a_fault_of_the_gpu_is_no_other_version(monkeypatch):
    network = create_model("efficientnet-b0", width=0.25, depth=0.3)
    move = type(network).to

    def fail(self, *device, **layout):
        if device:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return move(self, **layout)

    state = SimpleNamespace(
        ema=None,
        architecture=dataclasses.asdict(network.architecture),
        model=network.state_dict(),
        temperatures={},
        classes=["a"],
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    monkeypatch.setattr(type(network), "to", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        trained.from_checkpoint(state, "raw", torch.device("cpu"))


def test_full_memory_is_no_other_version(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError), explain_checkpoint_errors(tmp_path / "last.pt"):
        fail()
    monkeypatch.setattr(trained, "_build", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trained.from_checkpoint(SimpleNamespace(ema=None, architecture={}, model={}), "raw", torch.device("cpu"))


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(training, "train", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cli.main(["train", "--dataset", "synthetic"])
    assert explanation(ValueError("not enough memory")) is None
