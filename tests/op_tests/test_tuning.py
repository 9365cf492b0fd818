"""Launches set from outside: each part uses them, with equal results, and they compile ahead without a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from op_cases import DEVICE

from effnet_kernels import bn_silu_squeeze, launch, mbconv, tuning
from effnet_kernels.launch import Implementation, launches_go_to, launches_used
from effnet_kernels.tuning import OPS, PARTS, TOLERANCE, Inputs, Layer, launch_of, parts_of, relative_error, tolerance

AHEAD = """
import types
import torch, triton
target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
here = types.SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
)
triton.runtime.driver.set_active(here)
from effnet_kernels.launch import launches_go_to, launches_used
from effnet_kernels.tuning import PARTS, Inputs, Layer, compile_ahead
part, small = PARTS[{name!r}], Layer(2, 96, 8, 3, 1, 4)
launch = part.choice.candidates(*part.sizes(small))[1]
compile_ahead({name!r}, Layer(512, 96, 8, 3, 1, 4), launch, torch.bfloat16)

def started(op, kernel, grid, *args, **options):
    before = {{name: len(cache) for name, (cache, *_) in kernel.device_caches.items()}}
    assert before, kernel
    kernel.warmup(*args, grid=grid, **options)
    assert before == {{name: len(cache) for name, (cache, *_) in kernel.device_caches.items()}}, kernel
    print(kernel.__name__)

# Real tensors, and another batch than was compiled, as when it is timed.
with launches_used({{({name!r}, part.sizes(small)): launch}}), launches_go_to(started):
    part.make(Inputs(small, torch.bfloat16, torch.device("cpu")))()
"""


@pytest.mark.parametrize("name", [name for name in PARTS if name not in OPS])
def test_a_part_uses_the_launch_for_its_sizes(name):
    """`Part.sizes` are those that the launcher asks for."""
    part, layer = PARTS[name], Layer(512, 96, 8, 5, 2, 4, outputs=24)
    sizes = part.sizes(layer)
    own, *others = part.choice.candidates(*sizes)

    def started(launch, at):
        started_with = []

        def note(op, kernel, grid, *_, **options):
            started_with.append((grid, options))

        with launches_used({(name, at): launch}), launches_go_to(note):
            part.make(Inputs(layer, torch.float32, torch.device("meta")))()
        return started_with

    assert started(own, sizes) != started(others[-1], sizes)
    assert started(own, sizes) == started(others[-1], (1, 2, 3))
    with launches_used({(name, sizes): others[-1]}):
        assert part.choice(*sizes) == others[-1]
    assert part.choice(*sizes) == own


@pytest.mark.parametrize("name", ["depthwise backward", "five sums", "grad sums", "product"])
def test_launches_agree(name):
    part, layer = PARTS[name], Layer(2, 24, 4, 3, 1, 4, outputs=20)
    sizes = part.sizes(layer)
    another = part.choice.candidates(*sizes)[-1]
    call = part.make(Inputs(layer, torch.float32, torch.device(DEVICE)))
    expected = call()
    with launches_used({(name, sizes): another}):
        assert relative_error(call(), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("prologue", [True, False])
def test_an_op_runs_on_the_implementation_for_its_sizes(monkeypatch, name, prologue):
    """`kernels="auto"` means PyTorch's operators where they are in use for these sizes, and nowhere else."""
    module, layer = {"mbconv": mbconv, "bn_silu_squeeze": bn_silu_squeeze}[name], Layer(2, 8, 4, 3, 2, 4, prologue)
    monkeypatch.setattr(module, "use_kernels", lambda kernels, x: kernels == "auto")
    monkeypatch.setattr(tuning, "_training_step", lambda name, layer, function, arguments, *_: (function, arguments))
    function, arguments = PARTS[name].make(Inputs(layer, torch.float32, torch.device("cpu")))
    function = torch.compile(function, backend="eager", fullgraph=True)

    def kernels_started(used, training=True):
        torch.compiler.reset()
        started = []
        with launches_used({used: Implementation("torch")}), launches_go_to(lambda op, *_, **__: started.append(op)):
            function(*arguments, training=training)
        return len(started)

    sizes = PARTS[name].sizes(layer)
    assert kernels_started((name, sizes)) == 0
    assert kernels_started((name, sizes), training=False) > 0
    assert kernels_started((name, (1, *sizes[1:]))) > 0
    monkeypatch.setattr(launch, "_ENVIRONMENT", "triton")  # EFFNET_KERNELS, which replaces `auto` and what tune found
    assert kernels_started((name, sizes)) > 0


@pytest.mark.parametrize(("name", "dtype"), [("mbconv", torch.bfloat16), ("bn_silu_squeeze", torch.float32)])
def test_implementations_agree(name, dtype):
    """The output and every gradient of a training step."""
    part, layer = PARTS[name], Layer(2, 24, 4, 3, 1, 4)
    call = part.make(Inputs(layer, dtype, torch.device(DEVICE)))
    with torch.compiler.set_stance("force_eager"):
        expected = call()
        with launches_used({(name, part.sizes(layer)): Implementation("torch")}):
            actual = call()
    assert len(actual) == {"mbconv": 11, "bn_silu_squeeze": 4}[name]
    assert 0 < relative_error(actual, expected) <= 0.6 * tolerance(name, dtype)


def test_relative_error_leaves_out_moments_of_tiles():
    x, moments = torch.ones(4), torch.ones(2, 3, 5)
    assert relative_error((1.01 * x, moments), (x, moments[:1])) == pytest.approx(0.01, rel=1e-3)


def test_relative_error_of_nan_is_nan():
    x = torch.ones(4)
    assert not relative_error((x, x * torch.nan), (x, x)) <= 1e9


def test_parts_of_a_layer():
    expanded, first = Layer(2, 24, 4, 3, 1, 4), Layer(2, 24, 4, 3, 1, 4, prologue=False)
    assert set(parts_of(expanded)) - set(parts_of(first)) == {"statistics", "grad apply"}
    assert parts_of(Layer(2, 24, 4)) == ["statistics", "normalize", "grad sums", "grad apply"]
    head = parts_of(Layer(2, 24, 4, pooled=True))
    assert head == ["statistics", "squeeze", "five sums", "apply sums", "bn_silu_squeeze"]
    assert parts_of(expanded)[-1] == parts_of(first)[-1] == "mbconv"
    assert parts_of(Layer(2, 24, 4, outputs=8)) == ["product"]


@pytest.mark.parametrize(("name", "reads"), [("five sums", 2), ("apply sums", 3)])
def test_a_head_reads_its_map_alone(name, reads):
    """In the squeeze's backward pass the gradient is a vector."""
    maps = []
    for pooled in (False, True):
        given = []
        with launches_go_to(lambda op, kernel, grid, *args, given=given, **_: given.extend(args)):
            PARTS[name].make(Inputs(Layer(2, 24, 4, pooled=pooled), torch.float32, torch.device("meta")))()
        maps.append(len({id(t) for t in given if isinstance(t, torch.Tensor) and t.shape == (2, 24, 4, 4)}))
    assert maps == [reads, reads - 1]


def test_a_launch_outside_the_space_is_none():
    sizes = PARTS["gate"].sizes(Layer(2, 24, 4, 3, 1, 4))
    fields = {"block_n": 16, "block_c": 64, "block_r": 16, "num_warps": 4, "turns": 1, "direct": False}
    assert launch_of("gate", sizes, fields) is not None
    for kernel, at, wanted in (
        ("gate", sizes, fields | {"turns": 3}),
        ("gate", sizes, fields | {"turns": []}),
        ("gate", sizes[:1], fields),
        ("squeeze", (0, 0, 0), fields),
        ("gone", sizes, fields),
    ):
        assert launch_of(kernel, at, wanted) is None


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("depthwise backward", ["_backward_kernel", "_add_kernel"]),
        ("statistics", ["_moments_kernel", "_merge_kernel"]),
        ("grad sums", ["_grad_sums_kernel", "_add_kernel"]),
    ],
)
def test_compiled_ahead_kernels_are_reused(tmp_path, name, kernels):
    """A call with another batch size and real tensors compiles nothing."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", AHEAD.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == kernels, done.stderr
    assert len(list(tmp_path.rglob("*.cubin"))) == len(kernels)
