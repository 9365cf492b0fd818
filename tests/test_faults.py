"""Faults of the machine that torch reports as a RuntimeError."""

import pytest
import torch

from command_line import mistake
from effnet_fast import cli
from effnet_fast.faults import explanation
from effnet_fast.run import training

FULL = "the memory is full: use a smaller --batch_size"
KILLED = "a worker process that loads images was killed"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"), FULL),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"), FULL),
        (MemoryError(), FULL),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), KILLED),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), KILLED),
    ],
)
def test_fault_is_one_line(capsys, monkeypatch, error, words):
    def fail(config):
        raise error

    monkeypatch.setattr(training, "train", fail)
    assert words in mistake(capsys, "train --dataset synthetic")


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(training, "train", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cli.main(["train", "--dataset", "synthetic"])
    assert explanation(ValueError("not enough memory")) is None
