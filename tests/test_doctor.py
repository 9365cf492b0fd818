"""The verb doctor and its checks."""

import json
from collections import namedtuple

import pytest
import torch

from effnet_fast.config import DoctorConfig, TrainConfig
from effnet_fast.data.synthetic import load_synthetic
from effnet_fast.distributed import World
from effnet_fast.model.blocks import MBConv
from effnet_fast.report import fonts
from effnet_fast.run import cold_start, machine, self_check, verdicts
from effnet_fast.run import doctor as doctor_module
from effnet_fast.run.doctor import doctor
from effnet_fast.run.resolve import resolve_kernels, resolve_loader, resolve_step
from effnet_kernels import launch
from effnet_kernels.launch import launches_go_to
from marks import on_gpu

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of check results."""
    monkeypatch.setenv("EFFNET_FAST_CACHE", str(tmp_path / "cache"))
    verdicts._local_verdict.cache_clear()
    yield tmp_path / "cache"
    verdicts._local_verdict.cache_clear()


def counted(monkeypatch, name, *answer):
    """Replace a check; the returned list grows by one with each call."""
    calls = []
    monkeypatch.setitem(self_check.CHECKS, name, lambda device: calls.append(device) or answer)
    return calls


def test_table(capsys):
    status = doctor(DoctorConfig(device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[: len(self_check.CHECKS)]] == [n.split()[0] for n in self_check.CHECKS]
    broken = [line for line in lines if line.startswith("broken ")]
    assert status == bool(broken)
    assert any(line.startswith("--step auto: ") for line in lines)
    assert any(line.startswith("--mixed_precision auto: no (the default on CPUs") for line in lines)


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [(torch.float32, "the default on CPUs"), (torch.bfloat16, "the default on CPUs; bf16 trains faster on this one")],
)
def test_reason_for_the_precision(monkeypatch, dtype, reason):
    monkeypatch.setattr(doctor_module, "fastest_dtype", lambda device: dtype)
    assert doctor_module.choose_automatically(CPU)["mixed_precision"] == ("no", reason)


def test_json_is_alone_on_stdout(capsys):
    doctor(DoctorConfig(device="cpu", json=True))
    report = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in report["checks"]} == set(self_check.CHECKS)
    assert report["auto"].keys() == {"device", "kernels", "mixed_precision", "step", "loader"}
    assert report["auto"].keys() == report["reasons"].keys()
    assert report["auto"]["mixed_precision"] == "no"


def test_blocks_agree_with_float64():
    assert self_check.check_kernels(CPU)[0] == "ok"


def test_wrong_values_are_broken(monkeypatch):
    forward = MBConv.forward
    monkeypatch.setattr(MBConv, "forward", lambda self, x: forward(self, x) * (1.01 if x.dtype == torch.float32 else 1))
    status, detail = self_check.check_kernels(CPU)
    assert status == "broken"
    assert "--kernels torch" in detail


@pytest.mark.parametrize(("layers", "spoilt"), [(False, [True]), (True, [True]), (True, [False, False, True])])
def test_nan_is_broken(monkeypatch, layers, spoilt):
    """Also in a result after the first: max() would pass over it.

    `spoilt`: which of the float32 results of blocks, or of the layers; theirs are compared with float64, then with
    PyTorch's operators.
    """
    results, left = self_check._results, list(spoilt)

    def one_nan(module, x):
        found = results(module, x)
        asked = isinstance(module, self_check._Layers) is layers and x.dtype == torch.float32
        return [*found[:-1], found[-1] * (torch.nan if asked and left.pop(0) else 1)]

    monkeypatch.setattr(self_check, "_results", one_nan)
    monkeypatch.setattr(self_check, "BLOCKS", [(8, 8, 3, 1, 1)])
    status, detail = self_check._check_blocks(CPU, "torch", "advice")
    assert (status, "nan" in detail) == ("broken", True)


@on_gpu
@pytest.mark.parametrize("check", [self_check.check_kernels, self_check.check_products, self_check.check_graph])
def test_checks_pass_on_this_gpu(check):
    assert check(GPU)[0] == "ok"


def test_products_are_checked_on_a_gpu(monkeypatch):
    kernels = []
    monkeypatch.setattr(self_check, "block_error", lambda device, asked, *block: kernels.append(asked) or 0.1)
    monkeypatch.setattr(self_check, "block_launches", lambda *_: [])
    for name in ("ends_error", "layers_error"):
        monkeypatch.setattr(self_check, name, lambda *_: 0.0)
    assert self_check.check_products(CPU)[0] == "absent"
    status, detail = self_check.check_products(GPU)
    assert status == "broken"
    assert detail.endswith("do not use --kernels triton-block")
    assert set(kernels) == {"triton-block"}


def test_kernels_are_checked_where_a_user_chose_tf32_by_torchs_newer_names():
    """torch 2.13 refuses to read its older setting then."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert self_check.block_error(torch.device("cpu"), "torch", *self_check.BLOCKS[0]) < 1e-5
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")  # sets both


@pytest.mark.parametrize("kernels", ["triton", "triton-block"])
def test_the_launches_of_the_blocks_are_known_before(monkeypatch, kernels):
    """Those that the comparison starts, so that they are compiled side by side."""
    pytest.importorskip("triton")
    found, started = self_check.block_launches(CPU, kernels), []
    note = lambda op, kernel, *_, **options: started.append((kernel.fn.__name__, tuple(options.items())))  # noqa: E731
    with launches_go_to(note):
        for block in self_check.BLOCKS:
            self_check.block_error(CPU, kernels, *block)
        self_check.ends_error(CPU, kernels)
        self_check.layers_error(CPU, kernels)
    assert {(launch.name, launch.options) for launch in found} == set(started)
    asked = []
    monkeypatch.setattr(self_check, "block_launches", lambda device, kernels: found)
    for name in ("block_error", "ends_error", "layers_error"):
        monkeypatch.setattr(self_check, name, lambda *_: 0.0)
    monkeypatch.setattr(cold_start, "compile_missing", lambda launches, record, say: asked.append(launches))
    assert self_check._check_blocks(GPU, kernels, "")[0] == "ok"
    assert asked == [found]


def test_blocks_are_compared_without_tf32(monkeypatch):
    """Neither in matrix products nor in cuDNN's convolutions, whatever the user's setting, which stays."""
    before = precisions()
    used, results = [], self_check._results
    monkeypatch.setattr(self_check, "_results", lambda *arguments: used.append(precisions()) or results(*arguments))
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        self_check.block_error(CPU, "torch", *self_check.BLOCKS[0])
        assert used == [("ieee", "ieee")] * 2
        assert precisions()[1] == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before[1]


def precisions():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def test_failing_check_exits_1(monkeypatch, capsys):
    def fail(device):
        raise RuntimeError("first line\nsecond line")

    for module in (self_check, doctor_module):
        monkeypatch.setattr(module, "CHECKS", {"gpu": fail, "torch": self_check.check_torch})
    assert doctor(DoctorConfig(device="cpu")) == 1
    out = capsys.readouterr().out
    assert "the check gpu failed (RuntimeError: first line)\n" in out
    assert "broken: gpu" in out


@pytest.mark.parametrize(
    ("driver", "cuda", "status", "text"),
    [
        (None, None, "absent", "no NVIDIA driver"),
        ("535.1", None, "broken", "CPU build: install torch's cu126 wheels"),
        ("580.2", None, "broken", "CPU build: install torch's cu130 wheels"),
        ("470.1", None, "broken", "CPU build: install driver 525 or newer, then torch's cu126 wheels"),
        (
            "535.1",
            "13.0",
            "broken",
            "driver 535.1 is too old for torch's CUDA 13.0, so torch sees no GPU: install driver ",
        ),
        ("535.1", "13.0", "broken", "driver 580 or newer, or torch's cu126 wheels"),
        ("470.1", "12.6", "broken", "install driver 525 or newer"),
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


def test_two_builds_of_dali_are_broken(monkeypatch):
    monkeypatch.setattr(self_check.provenance, "version", lambda name: "2.4.0" if "dali" in name else None)
    status, text = self_check.check_dali(CPU)
    assert (status, "pip uninstall nvidia-dali-cuda120 nvidia-dali-cuda130" in text) == ("broken", True)


def test_small_shared_memory(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(0, 0, 64 * 2**20))
    status, detail = machine.check_shared_memory(CPU)
    assert status == "broken"
    assert "--shm-size" in detail
    assert "--num_workers 0" in detail


def test_fonts(monkeypatch):
    monkeypatch.setattr("effnet_fast.report.fonts._family_with", lambda character: None)
    fonts._drawable_character.cache_clear()
    assert machine.check_fonts(CPU)[0] == "absent"
    fonts._drawable_character.cache_clear()
    monkeypatch.setattr("effnet_fast.report.fonts._family_with", lambda character: "a font")
    assert machine.check_fonts(CPU)[0] == "ok"
    fonts._drawable_character.cache_clear()


def test_full_disk(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(0, 0, 2**20))
    assert machine.check_disk(CPU)[0] == "broken"


def test_three_steps_are_deterministic():
    weights = [self_check._train_three_steps(CPU, graph=False) for _ in range(2)]
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()


def test_a_check_runs_once_per_key(monkeypatch, cache):
    calls = counted(monkeypatch, "graph", "ok", "fine")
    for _ in range(2):
        verdicts._local_verdict.cache_clear()
        assert verdicts.passes_check("graph", GPU, "--step auto is compile")
    assert len(calls) == 1
    monkeypatch.setattr(verdicts.provenance, "source_digest", lambda: "other code")
    verdicts._local_verdict.cache_clear()
    verdicts.passes_check("graph", GPU, "")
    assert len(calls) == 2
    monkeypatch.setattr(launch, "_ENVIRONMENT", "torch")  # EFFNET_KERNELS: another result than that of `auto`
    verdicts._local_verdict.cache_clear()
    verdicts.passes_check("graph", GPU, "")
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("error", "holds"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    ],
)
def test_a_check_that_raises(monkeypatch, cache, error, holds):
    """It is tried again by another process only if the GPU was full."""
    calls = []

    def fail(device):
        calls.append(device)
        raise error

    monkeypatch.setitem(self_check.CHECKS, "graph", fail)
    for _ in range(2):
        verdicts._local_verdict.cache_clear()
        assert not verdicts.passes_check("graph", GPU, "--step auto is compile")
        assert not verdicts.passes_check("graph", GPU, "--step auto is compile")
    assert len(calls) == (1 if holds else 2)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"name": "graph"}', '{"other": 1}'])
def test_torn_and_foreign_cache_files_are_ignored(monkeypatch, cache, content):
    calls = counted(monkeypatch, "graph", "ok", "fine")
    verdicts.passes_check("graph", GPU, "")
    next(cache.iterdir()).write_text(content)
    verdicts._local_verdict.cache_clear()
    assert verdicts.passes_check("graph", GPU, "")
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFNET_FAST_CACHE", str(tmp_path / "file"))
    counted(monkeypatch, "graph", "ok", "fine")
    assert verdicts.passes_check("graph", GPU, "")


@pytest.mark.parametrize(("answer", "graph"), [("ok", True), ("broken", False), ("absent", False)])
def test_step_auto_follows_the_check(monkeypatch, capsys, answer, graph):
    counted(monkeypatch, "graph", answer, "what was found")
    assert resolve_step(TrainConfig(), World(0, 1, GPU), 8, 1000) == (True, graph)
    warning = "" if graph else "warning: what was found; --step auto is compile (effnet-fast doctor checks again)\n"
    assert capsys.readouterr().err == warning


def test_step_auto_asks_no_check_where_a_graph_is_impossible(monkeypatch):
    calls = counted(monkeypatch, "graph", "ok", "fine")
    for config, world in ((TrainConfig(), World(0, 2, GPU)), (TrainConfig(optimizer="apex-sgd"), World(0, 1, GPU))):
        assert resolve_step(config, world, 8, 1000) == (True, False)
    assert not calls


@pytest.mark.parametrize(
    ("environment", "kernels", "step"),
    [
        ("auto", "the ops for the CPU", "the C++ ops leave little to compile"),
        ("torch", "EFFNET_KERNELS=torch", "the run is long enough to repay compiling"),
    ],
)
def test_reasons_on_a_cpu(monkeypatch, environment, kernels, step):
    monkeypatch.setattr(launch, "_ENVIRONMENT", environment)
    choices = doctor_module.choose_automatically(CPU)
    assert (choices["kernels"][1], choices["step"][1]) == (kernels, step)


@pytest.mark.parametrize("answer", ["ok", "broken"])
def test_reasons_on_a_gpu(monkeypatch, answer):
    counted(monkeypatch, "graph", answer, "what was found")
    counted(monkeypatch, "kernels", answer, "what was found")
    monkeypatch.setattr(doctor_module, "resolve_loader", lambda *_: ("resident", "a reason"))
    monkeypatch.setattr(doctor_module, "kernels_in_use", lambda kernels, _: "triton" if kernels == "auto" else kernels)
    choices = doctor_module.choose_automatically(GPU)
    fine = answer == "ok"
    assert choices["kernels"][0] == ("triton" if fine else "torch")
    assert choices["kernels"][1].endswith("no fault" if fine else "failed their check")
    assert choices["step"] == (
        ("graph", "its check found no fault") if fine else ("compile", "a captured step failed its check")
    )


@pytest.mark.parametrize(("answer", "kernels"), [("ok", "auto"), ("broken", "torch")])
def test_kernels_auto_follows_the_check(monkeypatch, answer, kernels):
    counted(monkeypatch, "kernels", answer, "what was found")
    assert resolve_kernels("auto", GPU) == kernels
    assert resolve_kernels("triton", GPU) == "triton"
    assert resolve_kernels("auto", CPU) == "auto"


@pytest.mark.parametrize(("answer", "loader"), [("ok", "dali"), ("broken", "resident")])
def test_loader_auto_follows_the_check(monkeypatch, answer, loader):
    counted(monkeypatch, "dali", answer, "what was found")
    monkeypatch.setattr("effnet_fast.run.resolve.choose_loader", lambda *_: ("dali", "DALI is faster"))
    assert resolve_loader("auto", load_synthetic(8, 8).train, GPU)[0] == loader
    assert resolve_loader("dali", load_synthetic(8, 8).train, GPU)[0] == "dali"
