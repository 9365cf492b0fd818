"""Several ranks compute what one process does; run for real under torchrun on gloo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "workers" / "ddp_gradients.py"
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}


def gradients(folder, kernels):
    """{ranks: {dtype: {name: gradient or statistic}}} of one and of two ranks."""
    found = {}
    for ranks in (1, 2):
        path = folder / f"{ranks}.pt"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run([*torchrun, str(WORKER), str(path), kernels], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_two_ranks_give_the_gradients_and_statistics_of_one(tmp_path, kernels):
    """In training mode: BatchNorm's statistics are of the whole batch. float64 shows the mathematics alone."""
    if kernels == "triton":
        pytest.importorskip("triton")
    found = gradients(tmp_path, kernels)
    for dtype, one in found[1].items():
        two = found[2][dtype]
        assert one.keys() == two.keys()
        # Some true gradients are zero (a shift that the next BatchNorm takes out again): hence the common scale.
        scale = torch.stack([torch.linalg.norm(v) for v in one.values()]).median()
        for name, expected in one.items():
            error = torch.linalg.norm(two[name] - expected) / (torch.linalg.norm(expected) + 0.1 * scale)
            assert error < TOLERANCE[dtype], (dtype, name, error)
