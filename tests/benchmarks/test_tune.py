"""The launches of a space beside the package's own, on the CPU, and their compilation ahead without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

AHEAD = """
import sys, types
import triton
target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
here = types.SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
)
triton.runtime.driver.set_active(here)
sys.path.insert(0, {benchmarks!r})
import torch
import tune
shape = tune.Shape(512, 96, 8, 3, 1, 4)
chosen, all_of_them = tune.candidates({name!r}, shape)
assert all_of_them[0].launch == chosen and len(all_of_them) > 1
tune.compile_ahead(all_of_them[1], torch.bfloat16)

def started(op, kernel, grid, *args, **options):
    before = {{name: len(cache) for name, (cache, *_) in kernel.device_caches.items()}}
    assert before, kernel
    kernel.warmup(*args, grid=grid, **options)
    assert before == {{name: len(cache) for name, (cache, *_) in kernel.device_caches.items()}}, kernel
    print(kernel.__name__)

with all_of_them[1].taken(), tune.quiet(started):  # real tensors, and another batch, as when it is timed
    tune.TARGETS[{name!r}].make(tune.Maps(tune.Shape(2, 96, 8, 3, 1, 4), torch.bfloat16, "cpu"))()
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_tune_times_every_launch(tmp_path):
    done = run(BENCHMARKS / "tune.py", "--target", "depthwise forward", "--target", "five sums", "--limit", "1",
               "--out", tmp_path / "tune.json", TRITON_INTERPRET="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "NOT A TIMING" in done.stdout
    made = json.loads((tmp_path / "tune.json").read_text())
    rows = made["rows"]
    assert {row["target"] for row in rows} == {"depthwise forward", "five sums"}
    assert len(rows) > 4
    for row in rows:
        assert len(row["ms p20/p50/p80"]) == 3, row
    assert [row["chosen"] for row in rows].count(True) == 2
    assert rows[0]["chosen"]
    assert rows[0]["launch"]["strip"] == 4


def test_wrong_results_are_not_timed(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import torch, tune
shape = tune.Shape(2, 24, 4, 3, 1, 4)
call = tune.TARGETS["normalize"].make(tune.Maps(shape, torch.float32, "cpu"))
chosen, both = tune.candidates("normalize", shape)
off, ms = tune.timed(both[0], torch.float32, (call, 1.01 * call()))
assert ms is None and 0.005 < off < 0.02, (off, ms)
print("refused")
"""
    done = run("-c", script, TRITON_INTERPRET="1")
    assert done.stdout.endswith("refused\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("depthwise backward", ["_backward_kernel"]), ("statistics", ["_moments_kernel", "_merge_kernel"])],
)
def test_compiled_ahead_kernels_are_reused(tmp_path, name, kernels):
    """A call with another batch size and real tensors compiles nothing."""
    script = AHEAD.format(benchmarks=str(BENCHMARKS), name=name)
    done = run("-c", script, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout.split() == kernels, done.stderr
    assert len(list(tmp_path.rglob("*.cubin"))) == len(kernels)
