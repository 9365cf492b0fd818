"""The verb doctor and its checks."""

import json
from collections import namedtuple

import pytest
import torch

from effnet_fast.config import DoctorConfig
from effnet_fast.model.blocks import MBConv
from effnet_fast.run import self_check
from effnet_fast.run.doctor import doctor

CPU = torch.device("cpu")
Usage = namedtuple("Usage", "total used free")


def test_table(capsys):
    status = doctor(DoctorConfig(device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[: len(self_check.CHECKS)]] == [n.split()[0] for n in self_check.CHECKS]
    broken = [line for line in lines if line.startswith("broken ")]
    assert status == bool(broken)
    assert any(line.startswith("--step auto: ") for line in lines)


def test_json_is_alone_on_stdout(capsys):
    doctor(DoctorConfig(device="cpu", json=True))
    report = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in report["checks"]} == set(self_check.CHECKS)
    assert report["auto"].keys() == {"device", "kernels", "mixed_precision", "step", "loader"}


def test_blocks_agree_with_float64():
    assert self_check.check_kernels(CPU)[0] == "ok"


def test_wrong_values_are_broken(monkeypatch):
    forward = MBConv.forward
    monkeypatch.setattr(MBConv, "forward", lambda self, x: forward(self, x) * (1.01 if x.dtype == torch.float32 else 1))
    status, detail = self_check.check_kernels(CPU)
    assert status == "broken"
    assert "--kernels torch" in detail


def test_failing_check_exits_1(monkeypatch, capsys):
    def fail(device):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(self_check, "CHECKS", {"gpu": fail, "torch": self_check.check_torch})
    assert doctor(DoctorConfig(device="cpu")) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: first line\n" in out
    assert "broken: gpu" in out


@pytest.mark.parametrize(
    ("driver", "cuda", "status", "text"),
    [
        (None, None, "absent", "no NVIDIA driver"),
        ("535.1", None, "broken", "CPU build: install a CUDA build"),
        ("535.1", "13.0", "broken", "driver 535.1 is too old for torch's CUDA 13.0"),
        ("580.2", "13.0", "broken", "check CUDA_VISIBLE_DEVICES"),
    ],
)
def test_driver(monkeypatch, driver, cuda, status, text):
    monkeypatch.setattr(self_check.provenance, "driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = self_check.check_gpu(CPU)
    assert answer[0] == status
    assert text in answer[1]


def test_triton_that_torch_does_not_fit(monkeypatch):
    monkeypatch.setattr(self_check.provenance, "version", lambda name: "3.5.0")
    monkeypatch.setattr(self_check.metadata, "requires", lambda name: ["triton==3.7.1; platform_system == 'Linux'"])
    status, detail = self_check.check_triton(CPU)
    assert status == "broken"
    assert "pip install triton==3.7.1" in detail


def test_small_shared_memory(monkeypatch):
    monkeypatch.setattr(self_check.shutil, "disk_usage", lambda path: Usage(0, 0, 64 * 2**20))
    status, detail = self_check.check_shared_memory(CPU)
    assert status == "broken"
    assert "--shm-size" in detail
    assert "--num_workers 0" in detail


def test_full_disk(monkeypatch):
    monkeypatch.setattr(self_check.shutil, "disk_usage", lambda path: Usage(0, 0, 2**20))
    assert self_check.check_disk(CPU)[0] == "broken"


def test_three_steps_are_deterministic():
    weights = [self_check._train_three_steps(CPU, graph=False) for _ in range(2)]
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()
