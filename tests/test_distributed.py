"""Several ranks compute what one process does: under torchrun on gloo, and one rank of DDP on nccl too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from effnet_fast.model import Architecture, EfficientNet, batch_norms
from marks import on_gpu

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


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=on_gpu)])
def test_one_rank_of_ddp_gives_the_plain_gradients(device, backend):
    """As `train` wraps the model, with BatchNorm synchronised."""
    torch.manual_seed(0)
    architecture = Architecture(width=0.25, depth=0.3, num_classes=10, output_stride=16, dropout=0.0, drop_path=0.0)
    model = EfficientNet(architecture, "torch").to(device)
    for norm in batch_norms(model):
        norm.synchronised = True
    images = torch.randn(8, 3, 32, 32, device=device)

    def gradients(called):
        model.zero_grad()
        called(images).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = gradients(
            DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True)
        )
    finally:
        dist.destroy_process_group()
    for one, other in zip(plain, wrapped, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
