"""The ops with opcheck, torch.compile, autocast and several ranks; their error messages and the choice of path."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import DEVICE, OPS, TOLERANCE, Case, make_inputs, relative_rms, run

from command_line import run_ranks
from effnet_fast.model.blocks import MBConv, Style
from effnet_kernels import launch
from effnet_kernels.batch_norm import batch_norm
from effnet_kernels.bn_silu_squeeze import bn_silu_squeeze
from effnet_kernels.cpu import build
from effnet_kernels.statistics import BatchNorm

ROOT = Path(__file__).parents[2]
CASE = Case(2, 24, 4, 4, 3, 1)
ops = torch.ops.effnet_kernels


def _opcheck_calls():
    x, weight, bias, *_ = vectors = [torch.randn(s, device=DEVICE) for s in ((2, 24, 4, 4), (24,), (24,))]
    x = vectors[0] = x.contiguous(memory_format=torch.channels_last)
    for v in vectors:
        v.requires_grad_()
    w = torch.randn(24, 1, 3, 3, device=DEVICE, requires_grad=True)
    se = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((4, 24, 1, 1), (4,), (24, 4, 1, 1), (24,))]
    stats = torch.rand(4, 24, device=DEVICE)
    return {
        "silu": (ops.silu, (x,)),
        "batch_norm": (ops.batch_norm, (x, weight, bias, None, None, True, 1e-3, False)),
        "batch_norm_residual": (
            ops.batch_norm,
            (x, weight, bias, x.detach(), torch.rand(2, device=DEVICE), False, 1e-3, False),
        ),
        "batch_norm_eval": (ops.batch_norm_eval, (x.detach(), stats, weight.detach(), bias.detach(), None, True)),
        "depthwise_conv": (ops.depthwise_conv, (x, w, 1, [1, 1, 1, 1])),
        "depthwise_conv_stride": (ops.depthwise_conv, (x, w, 2, [0, 1, 0, 1])),
        "bn_silu_squeeze": (ops.bn_silu_squeeze, (x, weight, bias, 1e-3, False)),
        "se_gate": (ops.se_gate, (x, weight, bias, *se, 1e-3, False)),
        "mbconv": (ops.mbconv, (x, weight, bias, w, weight, bias, *se, 1, [1, 1, 1, 1], 1e-3, False)),
        "mbconv_unexpanded": (ops.mbconv, (x, None, None, w, weight, bias, *se, 2, [1, 1, 1, 1], 1e-3, False)),
    }


@pytest.mark.parametrize("name", _opcheck_calls())
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)  # opcheck also compares torch.empty of fakes: no NaN there
    op, args = _opcheck_calls()[name]
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("silu", "triton"),
        ("mbconv", "triton"),
        ("silu", "torch"),
        *(
            pytest.param(name, kernels, marks=pytest.mark.slow)
            for name, kernels in (("bn_residual", "triton"), ("se_gate", "triton"), ("mbconv", "torch"))
        ),
    ],
)
def test_compiles_without_a_graph_break(name, kernels):
    op = OPS[name]
    inputs = make_inputs(op, CASE, torch.float32)
    eager, dy = run(op, CASE, inputs.fresh(), kernels)
    compiled = dataclasses.replace(op, run=torch.compile(op.run, fullgraph=True))
    got, _ = run(compiled, CASE, inputs.fresh(), kernels, dy)
    for key, value in eager.items():
        assert relative_rms(got[key], value) <= TOLERANCE[torch.float32], key


@pytest.mark.parametrize("name", ["bn_silu", "bn_residual", "se_gate", "mbconv"])
def test_float32_weights_under_autocast(name):
    """Autocast gives an op a bf16 map with float32 parameters and buffers, forward and backward."""
    op = OPS[name]
    inputs = make_inputs(op, CASE, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, dy = run(op, CASE, inputs.fresh(), "triton")
    want, _ = run(op, CASE, inputs.double(), "torch", dy)
    assert got["y"].dtype == torch.bfloat16
    assert got["dparameter0"].dtype == torch.float32
    for key, value in want.items():
        assert relative_rms(got[key], value) <= 2 * op.slack * TOLERANCE[torch.bfloat16], key


def test_parameters_need_not_be_contiguous():
    def column(*shape):
        return torch.randn(*shape, 2, device=DEVICE)[..., 0]

    x, bn = torch.randn(4, 8, 3, 3, device=DEVICE), BatchNorm(column(8), column(8), column(8), column(8).abs())
    scale = column(4)
    for training, factor in ((True, scale), (False, None)):
        got, want = (
            batch_norm(x, bn, training=training, sample_scale=factor, kernels=kernels)
            for kernels in ("triton", "torch")
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_an_empty_map():
    block = MBConv(24, 16, 3, 2, 6, style=Style(kernels="triton")).to(DEVICE).eval()
    assert block(torch.zeros(0, 24, 8, 8, device=DEVICE)).shape == (0, 16, 4, 4)


def test_compiles_with_dynamic_sizes():
    """As `torch.compile(model)` does from the second batch size on."""
    bn = BatchNorm(*(torch.ones(8, device=DEVICE) for _ in range(4)))
    compiled = torch.compile(lambda x: bn_silu_squeeze(x, bn), fullgraph=True, backend="eager", dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 8, 4, 4, device=DEVICE)
        torch.testing.assert_close(compiled(x), bn_silu_squeeze(x, bn), rtol=1e-4, atol=1e-5)


def test_error_of_a_kernel_names_op_and_shapes(monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("no such instruction")

    class Kernel:
        __name__ = "_some_kernel"
        __getitem__ = staticmethod(lambda grid: refuse)

    with pytest.raises(RuntimeError, match=r"bn_silu: _some_kernel failed on \(2, 3\) float32.*EFFNET_KERNELS=torch"):
        launch.launch("bn_silu", Kernel(), (1,), torch.zeros(2, 3), num_warps=4)


def test_every_launch_fuses_multiply_and_add():
    """Whatever the Triton version's default."""
    started = []

    class Kernel:
        __getitem__ = staticmethod(lambda grid: lambda *args, **options: started.append(options))

    launch.launch("silu", Kernel(), (1,), torch.zeros(1), num_warps=4, BLOCK=2)
    with launch.launches_go_to(lambda *_, **options: started.append(options)):
        launch.launch("silu", Kernel(), (1,), torch.zeros(1), num_warps=4, BLOCK=2)
    assert started == [{"num_warps": 4, "enable_fp_fusion": True, "BLOCK": 2}] * 2


def test_use_kernels(monkeypatch):
    x = torch.zeros(2, device=DEVICE)
    assert launch.use_kernels("triton", x)
    assert not launch.use_kernels("torch", x)
    assert launch.use_kernels("auto", x) == x.is_cuda
    with pytest.raises(ValueError, match=r"cannot serve a torch\.float64 tensor"):
        launch.use_kernels("triton", x.double())
    with pytest.raises(ValueError, match="must be auto, triton, triton-block, cpp or torch, not"):
        launch.use_kernels("cuda", x)
    monkeypatch.setattr(launch, "_ENVIRONMENT", "torch")
    assert not launch.use_kernels("triton", x)


def test_references_run_without_triton():
    """Without Triton every file still imports, and the references run."""
    script = """
import sys; sys.modules["triton"] = None
import torch
from effnet_kernels.batch_norm import bn_silu
from effnet_kernels.bn_silu_squeeze import bn_silu_squeeze
from effnet_kernels.mbconv import mbconv
from effnet_kernels.gate_mlp import SqueezeExcite
from effnet_kernels.silu import silu
from effnet_kernels.statistics import BatchNorm
x = torch.randn(2, 8, 4, 4)
bn = BatchNorm(torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8))
se = SqueezeExcite(torch.randn(2, 8, 1, 1), torch.zeros(2), torch.randn(8, 2, 1, 1), torch.zeros(8))
y = mbconv(x, bn, torch.randn(8, 1, 3, 3), 1, (1, 1, 1, 1), bn, se)
assert y.shape == x.shape == silu(x).shape == bn_silu(x, bn).shape and bn_silu_squeeze(x, bn).shape == (2, 8)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import op_cases
from effnet_kernels import launch
from op_cases import *
dist.init_process_group("gloo")
rank, case, op = dist.get_rank(), Case(4, 24, 3, 3), OPS["mbconv"]
whole = make_inputs(op, case, torch.float32)
def step(inputs, sync, dy, kernels):
    def norm(i, j): return op_cases._bn(inputs.parameters, inputs.buffers, i, j)._replace(sync=sync)
    for leaf in (inputs.x, *inputs.parameters): leaf.requires_grad_()
    p = inputs.parameters
    y = mbconv(inputs.x, norm(0, 0), p[2], 1, case.padding, norm(3, 1), SqueezeExcite(*p[5:]), kernels=kernels)
    z = batch_norm(y, norm(3, 1), kernels=kernels)
    z.backward(dy)
    return [y.detach(), inputs.x.grad], [p.grad for p in p], inputs.buffers
dy = torch.randn(4, 24, 3, 3, generator=torch.Generator().manual_seed(3))
for kernels in sys.argv[2:]:
    launch.INTERPRETED = kernels == "triton"
    maps, grads, buffers = step(whole.fresh(), False, dy, kernels)
    mine = whole.fresh()
    part = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares
    mine.x = mine.x[part].clone()
    my_maps, my_grads, my_buffers = step(mine, True, dy[part], kernels)
    for g in my_grads: dist.all_reduce(g)
    for a, b in zip(my_maps, maps): assert relative_rms(a, b[part]) < 1e-5
    for a, b in zip(my_grads + my_buffers, grads + buffers): assert relative_rms(a, b) < 1e-5
"""


def test_statistics_over_two_ranks():
    """Two ranks with unequal shares of a batch give one process's outputs, gradients and running statistics."""
    if DEVICE == "cuda":
        pytest.skip("one GPU holds one rank")
    kernels = ["triton", "cpp"] if build.library() is not None else ["triton"]
    run_ranks([sys.executable, "-c", RANK, Path(__file__).parent, *kernels], 2, TRITON_INTERPRET="1")


def test_the_environment_chooses_the_kernels():
    program = "from effnet_kernels.launch import chosen; print(chosen('auto'), chosen('cpp'))"
    environment = os.environ | {"EFFNET_KERNELS": "torch"}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert shown.stdout.split() == ["torch", "torch"]
