"""Kernels compiled before the first step: the right ones, side by side, and none twice. Needs no GPU."""

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

from effnet_fast import create_model, provenance
from effnet_fast.model import recompute_blocks
from effnet_fast.model.blocks import MBConv, ahead
from effnet_fast.precision import autocast
from effnet_fast.run import cold_start
from effnet_fast.train.evaluate import evaluating

triton = pytest.importorskip("triton", reason="compiles Triton kernels")

from effnet_kernels import launch as launches  # noqa: E402

CPU = torch.device("cpu")
H100 = triton.backends.compiler.GPUTarget("cuda", 90, 32)

# Without the interpreter: compile a BatchNorm's kernels ahead, then launch it on real tensors of another batch.
REUSED = """
import os, types
from pathlib import Path
import torch, triton
from effnet_kernels import ahead
from effnet_kernels.batch_norm import batch_norm
from effnet_kernels.launch import launches_go_to
from effnet_kernels.statistics import BatchNorm

def step(images):
    x = torch.randn(images, 24, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = BatchNorm(*(torch.ones(24) for _ in range(4)))
    batch_norm(x, norm, activation=True, kernels="triton").sum().backward()

def cubins():
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

def start(op, kernel, grid, *args, **options):
    kernel.warmup(*args, grid=grid, **options)

target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
launches = ahead.recorded(lambda fakes: step(512))
compiled = list(ahead.compile_all(launches, target, 2))
assert all(ahead.is_compiled(*kernel) for kernel in compiled), compiled
assert len(compiled) == len(launches) == cubins() > 3, (compiled, launches)
here = types.SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
)
triton.runtime.driver.set_active(here)
with launches_go_to(start):
    step(2)
assert cubins() == len(launches)
"""


@pytest.mark.parametrize(
    ("precision", "kernels", "recomputes"),
    [("bf16", "triton", False), ("no", "triton", False), ("no", "triton-block", False), ("bf16", "triton", True)],
)
def test_the_launches_are_those_of_a_step(monkeypatch, precision, kernels, recomputes):
    """Those that real tensors give, in training and in evaluation, with activation checkpointing too."""
    model = create_model("efficientnet-b0", output_stride=8, width=0.25, depth=0.3, kernels=kernels)
    if recomputes:
        recompute_blocks(model)
    found = cold_start.step_launches(model, precision, CPU, 2, {32, 24})
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(block.recompute == recomputes for block in model.modules() if isinstance(block, MBConv))
    monkeypatch.setattr(ahead, "_OpsOnFakes", launches.nullcontext)

    def step(_):
        for size in (32, 24):
            images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
            with autocast(precision, CPU):
                logits = model(images)
            logits.float().sum().backward()
            with evaluating(model), autocast(precision, CPU):
                model(images)

    real = ahead.recorded(step)
    assert len(found) == len(set(found)) > 30
    assert set(found) == set(real)
    assert ("_product_kernel" in {launch.name for launch in found}) == (kernels == "triton-block")


def test_kernels_compiled_ahead_are_those_that_start(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", REUSED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_line_is_one_write(monkeypatch):
    """Processes share the pipe. With PYTHONUNBUFFERED=1 each write goes there at once, so that lines could mix."""
    written = []
    monkeypatch.setattr(ahead, "_compile", lambda **launch: "key name")
    monkeypatch.setattr(ahead.signal, "signal", lambda *_: None)
    monkeypatch.setattr(triton.runtime.driver, "set_active", lambda driver: None)
    task = [{"backend": "cuda", "arch": 90, "warp_size": 32}, [{}, {}]]
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(task)))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    ahead._main()
    assert written == ["key name\n"] * 2


def test_a_warm_cache_compiles_nothing(tmp_path, monkeypatch, capsys):
    """Nor does it start a process; a cache that lost a kernel compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(ahead, "current_target", lambda: H100)
    monkeypatch.setattr(cold_start, "SECONDS_BETWEEN_LINES", 0)
    started, compile_all = [], ahead.compile_all

    def counted(launches, target, workers):
        started.append(len(launches))
        return compile_all(launches, target, workers)

    monkeypatch.setattr(ahead, "compile_all", counted)
    model = create_model("efficientnet-b0", output_stride=8, width=0.25, depth=0.3, kernels="triton")
    found = cold_start.step_launches(model, "bf16", CPU, 2, {32})
    few = [launch for launch in found if launch.name in ("_merge_kernel", "_moments_kernel")][:2]
    record = tmp_path / "cache" / "record.json"
    cold_start.compile_missing(few, record, say=True)
    assert capsys.readouterr().err.splitlines() == [
        f"compiling 2 GPU kernels in {min(provenance.cores(), 2)} processes, once for this GPU",
        "compiled 1 of 2 GPU kernels",
        "compiled 2 of 2 GPU kernels",
    ]
    cold_start.compile_missing(few, record, say=True)
    assert capsys.readouterr() == ("", "")
    assert started == [2]
    shutil.rmtree(tmp_path / "triton")
    cold_start.compile_missing(few, record, say=False)
    assert started == [2, 2]
    assert capsys.readouterr() == ("", "")
    assert len(list((tmp_path / "triton").rglob("*.cubin"))) == 2


@pytest.mark.parametrize(
    ("device", "kernels", "rank", "ranks", "compiles"),
    [
        ("cuda", "triton", "0", 2, True),
        ("cuda", "triton", "1", 2, False),
        ("cuda", "triton", "1", 1, True),  # a worker of a search
        ("cuda", "torch", "0", 1, False),
        ("cpu", "cpp", "0", 1, False),
    ],
)
def test_who_compiles(monkeypatch, device, kernels, rank, ranks, compiles):
    """The first rank of each machine, where the run uses the Triton kernels."""
    asked = []
    monkeypatch.setattr(cold_start.distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(cold_start.distributed, "barrier", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("TRITON_CACHE_DIR", "of the user")
    monkeypatch.setattr(cold_start, "kernels_in_use", lambda *_: kernels)
    monkeypatch.setattr(cold_start, "step_launches", lambda *arguments: asked.append(arguments[1:]) or ["a launch"])
    monkeypatch.setattr(cold_start, "compile_missing", lambda found, record, say: asked.append((found, record.suffix)))
    step = ("bf16", torch.device(device), 8, {16, 32})
    cold_start.compile_kernels(None, "auto", *step)
    assert asked == ([step, (["a launch"], ".json")] if compiles else [])


def test_training_goes_on_where_the_launches_cannot_be_found(capsys):
    def find():
        raise NotImplementedError("no fake for this op\nand more")

    cold_start.compile_found(find, CPU, say=True)
    assert capsys.readouterr().err == (
        "warning: the GPU kernels are not known before the first step (NotImplementedError: no fake for this op); each "
        "compiles at its first launch\n"
    )


def test_the_cache_folder_is_not_changed_by_inductor(monkeypatch):
    """It sets TRITON_CACHE_DIR where nothing has, and kernels compiled before would not be found again."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TRITON_CACHE_DIR")
    folder = triton.knobs.cache.dir
    ahead.keep_cache_folder()
    assert triton_cache_dir(0) == folder == triton.knobs.cache.dir
    monkeypatch.setenv("TRITON_CACHE_DIR", "of the user")
    ahead.keep_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == "of the user"


def test_a_torch_without_fake_tensors(monkeypatch, capsys):
    """The kernels still import; one line says that they compile later."""
    name = "torch._subclasses.fake_tensor"
    script = f"import sys, effnet_kernels.launch; sys.modules[{name!r}] = None; from effnet_kernels import ahead"
    subprocess.run([sys.executable, "-c", f"{script}; assert not ahead.HAS_FAKES"], check=True)
    monkeypatch.setattr(ahead, "HAS_FAKES", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "of the user")
    monkeypatch.setattr(cold_start, "kernels_in_use", lambda *_: "triton")
    cold_start.compile_kernels(None, "auto", "bf16", torch.device("cuda"), 8, {32})
    assert capsys.readouterr().out == (
        f"torch {torch.__version__} has no FakeTensorMode: each GPU kernel compiles at its first launch\n"
    )


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(ahead, "current_target", lambda: H100)
    wrong = ahead.Launch("effnet_kernels.statistics", "_merge_kernel", (), (("num_warps", 4),))
    cold_start.compile_missing([wrong], tmp_path / "record.json", say=False)
    assert (tmp_path / "record.json").read_text() == "[]"
