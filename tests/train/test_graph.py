"""The captured step: what a CPU can show of it, then the graph itself on a GPU.

On the CPU `record` returns the function itself, so a replay is a call; what a graph would freeze is shown by the
operators and constants of two different steps, which must be the same.
"""

import copy
import dataclasses
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effnet_fast.distributed import World
from effnet_fast.model import Architecture, EfficientNet
from effnet_fast.run.build import data_parallel
from effnet_fast.run.resolve import compile_model
from effnet_fast.train import optim
from effnet_fast.train.graph import DDP_WARM_UP_CALLS, WARM_UP_CALLS, Captured, capture_stream, cuda_graph, unchanged
from effnet_fast.train.resizing import ImageSizes, resize
from effnet_fast.train.step import Step, StepOptions
from marks import on_gpu

NARROW = Architecture(width=0.25, depth=0.3, num_classes=10, output_stride=16, dropout=0.2, drop_path=0.3)

OPTIONS = {
    "plain": {"mixup": 0.0, "cutmix": 0.0, "clip_grad": 0.0},
    "mixed": {"accumulation": 2, "mixup_prob": 0.7, "mixup_switch_prob": 0.6},
    "fp16": {"precision": "fp16", "optimizer": "rmsprop"},
    "adamw": {"optimizer": "adamw", "precision": "bf16", "ema_decay": 0.9},
    "muon": {"optimizer": "muon"},
}


def network(kernels="torch"):
    torch.manual_seed(0)
    return EfficientNet(NARROW, kernels)


def make_step(device="cpu", *, optimizer="sgd", kernels="torch", **options):
    model = network(kernels).to(device)
    return join(device, model, optim.make_optimizer(optimizer, model, momentum=0.9, weight_decay=1e-3), **options)


def join(device, model, optimizer, *, compiled=lambda model: model, **options):
    defaults = {"learning_rate": 0.05, "clip_grad": 1.0, "mixup": 0.4, "cutmix": 1.0, "ema_decay": 0.99, "seed": 3}
    settings = StepOptions(**(defaults | options))
    world = World(0, 1, torch.device(device))
    return Step(compiled(model), model, optimizer, lambda step: 1 / (step + 1), settings, world)


def batch(seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 16, 16, generator=generator).to(device, memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (8,), generator=generator).to(device)


def captured(step, record):
    step._call = Captured(step._body, step.tensors, record)
    return step


def snapshot(step):
    return [t.clone() for t in step.tensors()]


def assert_same(left, right):
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ten_replays_are_ten_steps(options):
    eager, replayed = make_step(**options), captured(make_step(**options), record=lambda body: body)
    for i in range(10):
        eager(*batch(i), i)
        replayed(*batch(i), i)
        assert torch.equal(torch.get_rng_state(), torch.random.get_rng_state())
    assert_same(snapshot(eager), snapshot(replayed))
    assert eager.meters.read() == replayed.meters.read()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_warm_up_changes_nothing(options):
    step = captured(make_step(**options), record=lambda body: lambda: None)
    before = snapshot(step)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    step._call(*batch(0), step._numbers(0, 16))
    assert_same(snapshot(step), before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("device", "backend", "record"),
    [("cpu", "gloo", lambda body: body), pytest.param("cuda", "nccl", cuda_graph, marks=on_gpu)],
)
def test_captured_ddp_takes_the_steps_of_the_plain_model(device, backend, record, accumulation, monkeypatch):
    """A group of one rank. DDP is made as `train` makes it; the warm-up's eleven steps are undone.

    DDP sums gradients in another order. BatchNorm over the 4 values that images of 16 px leave in the last layer would
    raise a difference of 1e-7 above any tolerance in four steps; over 16 values it stays below 1e-5.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = {"precision": "no", "accumulation": accumulation}
    eager = make_step(device, **options)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def wrapped(model):
        with capture_stream(torch.device(device)):
            return data_parallel(model, static_graph=accumulation == 1)

    calls = []
    try:
        step = make_step(device, compiled=wrapped, **options, graph=True)
        step.model.register_forward_hook(lambda *_: calls.append(1))
        step._call = Captured(step._body, step.tensors, record, warm_up=DDP_WARM_UP_CALLS)
        for i in range(4):
            images, labels = batch(i, device)
            for each in (eager, step):
                each(resize(images, 32), labels, i)
        states = snapshot(eager), snapshot(step)
        step.close()
    finally:
        dist.destroy_process_group()
    assert len(calls) == accumulation * (DDP_WARM_UP_CALLS + (4 if device == "cpu" else 1))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ranks", "calls"), [(1, WARM_UP_CALLS), (2, DDP_WARM_UP_CALLS)])
def test_ddp_has_the_longer_warm_up(ranks, calls):
    model = network()
    optimizer = optim.make_optimizer("sgd", model, momentum=0.9, weight_decay=0.0)
    world = World(0, ranks, torch.device("cpu"))
    step = Step(model, model, optimizer, lambda step: 1.0, StepOptions(graph=True), world)
    assert step._call._warm_up_calls == calls


def test_warm_up_starts_without_nodes_of_the_stream_before():
    """AccumulateGrad works on the stream on which it was made, and that of the warm-up must be the captured one."""

    def node():
        return torch.autograd.graph.get_gradient_edge(weight).node

    weight = nn.Parameter(torch.zeros(1))
    with unchanged(lambda: [weight]):
        node().metadata["mark"] = True
        assert "mark" not in node().metadata  # else something in the context keeps the node


def test_a_closed_step_frees_its_graph():
    """At once, without a collection of cycles: NCCL leaves its group only when the graph is gone."""

    class Replay:
        def __call__(self):
            pass

    step = captured(make_step(), record=lambda body: Replay())
    step._call(*batch(0), step._numbers(0, 16))
    graph = weakref.ref(step._call._replay)
    gc.disable()
    try:
        step.close()
        assert graph() is None
    finally:
        gc.enable()


def test_load_state_captures_again():
    """A graph holds the addresses of the optimizer's tensors, and loading replaces the tensors."""
    first, second = make_step(), make_step()
    first(*batch(0), 0)
    second.options = dataclasses.replace(second.options, graph=True)
    before = captured(second, record=lambda body: body)._call
    second(*batch(1), 0)
    second.load_state(copy.deepcopy(first.state()))
    assert isinstance(second._call, Captured)
    assert second._call is not before
    captured(second, record=lambda body: body)
    for step in (first, second):
        step(*batch(2), 1)
    assert_same(snapshot(first), snapshot(second))


def test_each_image_size_is_captured_once():
    """And captured steps equal eager ones on images that were resized before, with mixing and accumulation."""
    captures = []

    def record(body):
        captures.append(step.sizes(number))
        return body

    eager, step = make_step(accumulation=2), make_step(accumulation=2)
    step.sizes = ImageSizes((8, 12, 16), (0, 2, 3))
    captured(step, record)
    for number, size in enumerate((8, 8, 12, 16, 16)):
        images, labels = batch(number)
        eager(resize(images, size), labels, number)
        step(images, labels, number)
    assert captures == [8, 12, 16]
    assert_same(snapshot(eager), snapshot(step))
    assert eager.meters.read() == step.meters.read()


class Log(TorchDispatchMode):
    """Logs every operator with its constants; refuses those that wait for a device or copy values to it."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "lift_fresh", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, f"{function} in a step"
        leaves = tree_leaves((args, kwargs))
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*leaves, *tree_leaves(result)) if isinstance(t, torch.Tensor)]
        # A scalar of the host may meet a tensor of the device only as a constant, which the log shows.
        assert len({t.device for t in tensors if t.ndim}) <= 1, f"{function} copies between devices"
        self.seen.append((str(function), [leaf for leaf in leaves if isinstance(leaf, bool | int | float | str)]))
        return result


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_body_reads_only_constants_from_the_host(options):
    step = make_step(**options)
    step(*batch(0), 0)
    logs = []
    for i in (3, 8):
        numbers = step._numbers(i, 16)
        with Log() as log:
            step._body(*batch(i), numbers)
        logs.append(log.seen)
    assert len(logs[0]) > 300
    assert logs[0] == logs[1]


def without_values(model, optimizer):
    """Replace the tensors of a model and its optimizer by meta tensors."""
    parameters = {}
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            parameters[value] = nn.Parameter(value.detach().to("meta"))
            setattr(module, name, parameters[value])
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, value.to("meta"))
    for group in optimizer.param_groups:
        group |= {"params": [parameters[p] for p in group["params"]], "lr": group["lr"].to("meta")}
    for real, state in list(optimizer.state.items()):
        optimizer.state[parameters[real]] = {key: value.to("meta") for key, value in state.items()}
        del optimizer.state[real]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_body_runs_on_meta_tensors(options, monkeypatch):
    """On tensors without values: reading one raises, and so does an array of the host where a device's should be.

    With our own optimizer: torch's fused ones are one operator each, which the meta device lacks.
    """
    monkeypatch.setattr("effnet_fast.train.step.autocast", lambda precision, device: nullcontext())
    model = network()
    optimizer = optim.make_optimizer("rmsprop", model, momentum=0.9, weight_decay=1e-3)
    without_values(model, optimizer)
    step = join("meta", model, optimizer, **{key: value for key, value in options.items() if key != "optimizer"})
    images, labels = batch(0, "meta")
    with Log() as log:
        step._body(images, labels, torch.empty(8, dtype=torch.float64, device="meta"))
    assert len(log.seen) > 300


@on_gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "compiled",
    [lambda model: model, lambda model: compile_model(model, torch.device("cuda"))],
    ids=["plain", "compiled"],
)
def test_ten_steps_of_the_graph_are_ten_steps(options, compiled, monkeypatch):
    # Some true gradients are zero, and AdamW makes whole steps of what sums in another order leave of them.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.compiler.reset()  # else the batches of the cases before count as one of changing size
    eager = make_step("cuda", compiled=compiled, kernels="auto", **options)
    graph = make_step("cuda", compiled=compiled, kernels="auto", **options, graph=True)
    for i in range(10):
        eager(*batch(i, "cuda"), i)
        graph(*batch(i, "cuda"), i)
    for a, b in zip(snapshot(eager), snapshot(graph), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-9)  # bf16 keeps 8 bits
    assert graph.meters.read().loss == pytest.approx(eager.meters.read().loss, rel=2**-7)


@on_gpu
def test_cuda_captures_each_image_size(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager, graph = make_step("cuda", kernels="auto"), make_step("cuda", kernels="auto", graph=True)
    for step in (eager, graph):
        step.sizes = ImageSizes((8, 16), (0, 3))
        for i in range(6):
            step(*batch(i, "cuda"), i)
    for a, b in zip(snapshot(eager), snapshot(graph), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-9)


@on_gpu
def test_cuda_warm_up_changes_nothing():
    step = captured(make_step("cuda", kernels="auto"), record=lambda body: lambda: None)
    before = snapshot(step)
    torch.manual_seed(7)
    random = torch.get_rng_state(), torch.cuda.get_rng_state()
    step._call(*batch(0, "cuda"), step._numbers(0, 16))
    assert_same(snapshot(step), before)
    assert_same((torch.get_rng_state(), torch.cuda.get_rng_state()), random)


@on_gpu
def test_draws_of_a_replay_follow_the_seed_of_its_step():
    draws = torch.zeros(64, device="cuda")

    def draw(place):
        draws.copy_(torch.rand_like(place))

    call = Captured(draw, lambda: [draws])
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        call(draws)
        replayed = draws.clone()
        torch.manual_seed(seed)
        assert torch.equal(replayed, torch.rand(64, device="cuda"))


@on_gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_no_step_synchronises(graph):
    step = make_step("cuda", kernels="auto", precision="bf16", graph=graph)
    batches = [batch(i, "cuda") for i in range(5)]
    step(*batches[0], 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 5):
            step(*batches[i], i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
