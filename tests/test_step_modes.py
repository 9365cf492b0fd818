"""Step modes: selection, refusals, and known defects of torch.compile."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel

from command_line import mistake, run
from effnet_fast import create_model
from effnet_fast.config import TrainConfig
from effnet_fast.distributed import World
from effnet_fast.model import recompute_blocks
from effnet_fast.model.blocks import MBConv, Style
from effnet_fast.model.complexity import complexity
from effnet_fast.run import forecast, training
from effnet_fast.run.plan import make_plan
from effnet_fast.run.resolve import compile_model, compile_options, resolve_step, set_backends

CPU, GPU = World(0, 1, torch.device("cpu")), World(0, 1, torch.device("cuda"))
TINY = (
    "train --dataset synthetic --output_stride 32 --limit_train 32 --limit_eval 16 --batch_size 16 --num_epochs 1 "
    "--loader resident --num_workers 1 --device cpu"
)


@pytest.mark.parametrize(
    ("flags", "world", "compiled", "graph"),
    [
        ({}, CPU, False, False),
        ({"step": "eager"}, GPU, False, False),
        ({"step": "compile"}, CPU, True, False),
        ({"step": "graph"}, GPU, True, True),
        ({"step": "graph"}, World(0, 2, torch.device("cuda")), True, True),
        ({}, World(0, 2, torch.device("cuda")), True, False),
        ({"compile": True}, CPU, True, False),
        ({"compile": "no"}, GPU, False, False),
    ],
)
def test_step_mode(flags, world, compiled, graph):
    assert resolve_step(TrainConfig(**flags), world, 32, 1000) == (compiled, graph)


@pytest.mark.parametrize(
    ("options", "world", "words"),
    [
        ({}, CPU, "runs on the CPU: use --step compile or eager"),
        ({"optimizer": "apex-sgd"}, GPU, "would freeze the learning rate of --optimizer apex-sgd"),
    ],
)
def test_graph_is_refused(options, world, words):
    with pytest.raises(ValueError, match=words) as refused:
        resolve_step(TrainConfig(step="graph", **options), world, 32, 1000)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("step", "asked"), [("eager", "yes"), ("compile", "no"), ("graph", "no"), ("graph", "yes")])
def test_step_and_compile_contradict(step, asked):
    with pytest.raises(ValueError, match=f"--step {step} and --compile {asked}, that is .*, contradict"):
        TrainConfig(step=step, compile=asked)


def test_graph_on_the_cpu_is_one_line(tmp_path, capsys):
    run(f"{TINY} --save_dir {tmp_path} --step graph", expected=2)
    assert capsys.readouterr().err == (
        "error: --step graph is a CUDA graph, and this runs on the CPU: use --step compile or eager\n"
    )
    assert not list(tmp_path.iterdir())


def test_deterministic_is_switched_off_again():
    set_backends(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    set_backends(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_missing_apex_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)
    printed = mistake(capsys, f"{TINY} --save_dir {tmp_path} --optimizer apex-lamb")
    assert printed.startswith("error: --optimizer apex-lamb needs NVIDIA apex")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recomputes", "images", "words"),
    [
        (False, 10, ["try --batch_size 10 at most (estimated for 0 GiB)", "--activation_checkpointing"]),
        (True, 10, ["try --batch_size 10 at most"]),
        (False, 1000, ["try half the --batch_size"]),
    ],
)
def test_advice_when_memory_is_full(tmp_path, capsys, monkeypatch, recomputes, images, words):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    model = create_model("efficientnet-b0", output_stride=32)
    if recomputes:
        recompute_blocks(model)
    cost = complexity(model, 32)
    total = cost.state_bytes + int((images + 0.5) * cost.training_bytes_per_image(4))
    monkeypatch.setattr(forecast, "_total_memory", lambda device: total)
    monkeypatch.setattr(training, "fit", full)
    printed = mistake(capsys, f"{TINY} --save_dir {tmp_path} --activation_checkpointing {str(recomputes).lower()}")
    assert printed.startswith("error: the memory of cpu is full at --batch_size 16: try ")
    for word in (*words, "--grad_accumulation"):
        assert word in printed
    assert "PYTORCH_ALLOC_CONF" not in printed  # which is for a GPU
    assert ("--activation_checkpointing" in printed) is not recomputes


def test_advice_for_a_resumed_run(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run(f"{TINY} --save_dir {tmp_path} --time_budget 0.001")
    monkeypatch.setattr(training, "fit", full)
    capsys.readouterr()
    run(f"{TINY} --save_dir {tmp_path}", expected=2)
    printed = capsys.readouterr().err
    assert printed.strip().endswith("try more ranks, --activation_checkpointing")
    assert "accumulation" not in printed


def test_activation_checkpointing_has_the_same_loss(tmp_path):
    losses = []
    for name, flag in (("kept", "false"), ("recomputed", "true")):
        line = f"{TINY} --save_dir {tmp_path} --run_name {name} --activation_checkpointing {flag} --log_every_steps 1"
        run(line)
        losses.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["result"]["loss"])
    assert losses[0] == losses[1]


def test_last_lines_report_the_speed(tmp_path, capsys):
    run(f"{TINY} --save_dir {tmp_path}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained at")]
    assert line.endswith("% of the time waiting for data")


# ------------------------------------------------------------------------------------ the known traps of torch.compile


def test_inductor_keeps_channels_last_in_the_backward_graph():
    """pytorch #189239: until 2.15 Inductor takes a graph without a forward convolution out of channels-last."""

    def backward(grad, x, weight):
        mask = [True, True, False]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )

    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    graph = make_fx(backward)(x, x, weight)
    assert GraphLowering.decide_layout_opt(graph, is_inference=False) == (torch.__version__ >= (2, 15))
    with torch._inductor.config.patch(compile_options(torch.device("cuda"))):
        assert GraphLowering.decide_layout_opt(graph, is_inference=False)


def test_compiled_random_numbers_are_eager_ones():
    """Dropout and stochastic depth (pytorch #196227, #198333) and their order (#192635)."""
    torch._dynamo.reset()

    class Draws(nn.Module):
        def forward(self, x):
            kept = torch.empty(x.shape[0]).bernoulli_(0.7)
            return nn.functional.dropout(x * kept[:, None], 0.5), torch.empty(x.shape[0]).bernoulli_(0.4)

    model = Draws()
    compiled = compile_model(model, torch.device("cpu"))
    x = torch.ones(64, 16)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(x), expected)


def test_each_image_size_is_compiled_once_and_for_itself(monkeypatch):
    """torch would compile the second size for all sizes; it stops at as many sizes as the config allows."""
    torch._dynamo.reset()
    compiled = []

    def record(graph, inputs, **options):
        compiled.append([value.shape[-1] for value in inputs if value.ndim == 4])
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", record)
    model = compile_model(nn.BatchNorm2d(3), torch.device("cpu"))
    sizes = [8, 8, 12, 12, 16, 20, 24, 28, 32, 36]
    for size in sizes:
        model(torch.randn(2, 3, size, size))
    assert compiled == [[size] for size in dict.fromkeys(sizes)]
    assert torch._dynamo.config.recompile_limit == 8


def test_inductor_cuda_graphs_are_off():
    """pytorch #139207: Inductor skips CUDA graphs where buffers change; `--step graph` captures the whole step."""
    with torch._inductor.config.patch(compile_options(torch.device("cuda"))):
        assert not torch._inductor.config.triton.cudagraphs


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 256)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recomputes", [False, True])
def test_ddp_splits_graphs_except_with_checkpointing(one_rank, monkeypatch, recomputes):
    """pytorch #108966, #108269: three blocks in three buckets, after the small first one."""
    torch._dynamo.reset()
    graphs = []
    compile_ = torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda model, dynamic, options: compile_(model, backend=count))
    blocks = nn.Sequential(*(MBConv(4, 4, 3, 1, 2, style=Style(kernels="torch")) for _ in range(3)))
    if recomputes:
        recompute_blocks(blocks)
    model = compile_model(DistributedDataParallel(blocks, bucket_cap_mb=0.0005), torch.device("cpu"))
    model(torch.randn(2, 4, 6, 6)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in blocks.parameters())
    assert (len(graphs) > 2) is not recomputes


@pytest.mark.parametrize(
    ("flags", "ranks", "shared"),
    [
        ({"batch_size": 64}, 2, True),
        ({"batch_size": 66}, 2, False),
        ({"batch_size": 66, "grad_accumulation": 3}, 2, True),
        ({"batch_size": 66, "sync_batchnorm": True}, 2, True),
        ({"batch_size": 64, "sync_batchnorm": False}, 2, False),
    ],
)
def test_small_shares_of_a_batch_share_their_statistics(flags, ranks, shared):
    config = TrainConfig(dataset="synthetic", limit_train=100, device="cpu", **flags)
    assert make_plan(config, World(0, ranks, torch.device("cpu")), None).sync_batchnorm == shared


def test_advice_for_a_full_cpu(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(training, "fit", full)
    assert "the memory of cpu is full" in mistake(capsys, f"{TINY} --save_dir {tmp_path}")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = forecast._total_memory(CPU.device)
    assert alone == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert forecast._total_memory(CPU.device) == alone // 2
