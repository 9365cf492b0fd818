"""Time every op of effnet_kernels on EfficientNet-B0's shapes: `python benchmarks/ops.py [--op mbconv] [--out FILE]`.

For each op and shape: Triton, eager PyTorch (cuDNN for the convolution) and the compiled reference, forward and
backward separately. Reports milliseconds (p20/p50/p80), GB/s of the op's least traffic, and its share of the copy
bandwidth measured in the same run. A time is printed only where the op agrees with its float64 reference on that shape.
Kernels are replayed from a CUDA graph over rotating buffers larger than the cache, so that each starts with a cold one.

On the CPU the script runs on tiny maps in Triton's interpreter; the times then mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

if not torch.cuda.is_available():  # before Triton decorates the first kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

from harness import DEVICE, copy_bandwidth, parser, replayed, result, rotations, run, write
from torch import Tensor

from effnet_fast import create_model
from effnet_fast.model.blocks import MBConv
from effnet_kernels.batch_norm import batch_norm
from effnet_kernels.bn_silu_squeeze import bn_silu_squeeze
from effnet_kernels.depthwise_conv import depthwise_conv
from effnet_kernels.gate_mlp import SqueezeExcite
from effnet_kernels.mbconv import mbconv
from effnet_kernels.se_gate import se_gate
from effnet_kernels.silu import silu
from effnet_kernels.statistics import BatchNorm
from effnet_kernels.tuning import tolerance


@dataclass(frozen=True)
class Shape:
    """A depthwise layer: x is [n, c, size, size]."""

    n: int
    c: int
    size: int
    kernel: int
    stride: int
    hidden: int

    @property
    def padding(self) -> tuple[int, int, int, int]:
        return (self.kernel // 2,) * 4

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.size}x{self.size} k{self.kernel} s{self.stride}"


def b0_shapes() -> Iterator[Shape]:
    """B0's distinct depthwise layers, collected from the model: 512 images of 32 px, output stride 8; 128 of 224 px."""
    for batch, pixels in ((512, 32), (128, 224)):
        model = create_model("efficientnet-b0", image_size=pixels, kernels="torch")
        seen: dict[Shape, None] = {}

        def note(block: MBConv, inputs: tuple[Tensor], batch: int = batch, seen: dict[Shape, None] = seen) -> None:
            conv = block.depthwise.conv
            hidden = block.se.reduce.out_channels
            size = inputs[0].shape[-1]
            seen[Shape(batch, conv.in_channels, size, conv.kernel_size[0], conv.stride[0], hidden)] = None

        for module in model.modules():
            if isinstance(module, MBConv):
                module.register_forward_pre_hook(note)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, pixels, pixels))
        yield from seen


def tiny(shape: Shape) -> Shape:
    """The same layer, small enough for the interpreter."""
    return Shape(2, min(shape.c, 24), min(shape.size, 4), shape.kernel, shape.stride, 4)


@dataclass(frozen=True)
class Op:
    """`forward_passes`, `backward_passes`: the least reads and writes, as passes over (x, a map of out's size)."""

    run: Callable[[Tensor, Shape, list[Tensor], str], Tensor]
    parameters: Callable[[Shape], list[tuple[int, ...]]]
    forward_passes: tuple[int, int]
    backward_passes: tuple[int, int]


@functools.cache
def _running(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Running statistics, cached so that no timing includes their allocation."""
    return torch.zeros(channels, device=DEVICE, dtype=dtype), torch.ones(channels, device=DEVICE, dtype=dtype)


def _bn(parameters: list[Tensor], i: int = 0) -> BatchNorm:
    gamma, beta = parameters[i : i + 2]
    return BatchNorm(gamma, beta, *_running(len(gamma), gamma.dtype))


def _norm(s: Shape) -> list[tuple[int, ...]]:
    return [(s.c,), (s.c,)]


def _conv(s: Shape) -> list[tuple[int, ...]]:
    return [(s.c, 1, s.kernel, s.kernel)]


def _gate(s: Shape) -> list[tuple[int, ...]]:
    return [(s.hidden, s.c, 1, 1), (s.hidden,), (s.c, s.hidden, 1, 1), (s.c,)]


OPS = {
    "silu": Op(lambda x, s, p, k: silu(x, kernels=k), lambda s: [], (1, 1), (2, 1)),
    "bn_silu": Op(lambda x, s, p, k: batch_norm(x, _bn(p), activation=True, kernels=k), _norm, (2, 1), (3, 2)),
    "batch_norm": Op(lambda x, s, p, k: batch_norm(x, _bn(p), residual=x.detach(), kernels=k), _norm, (3, 1), (3, 2)),
    "bn_silu_squeeze": Op(lambda x, s, p, k: bn_silu_squeeze(x, _bn(p), kernels=k), _norm, (2, 0), (3, 0)),
    "depthwise_conv": Op(
        lambda x, s, p, k: depthwise_conv(x, p[0], s.stride, s.padding, kernels=k), _conv, (1, 1), (2, 1)
    ),
    "se_gate": Op(
        lambda x, s, p, k: se_gate(x, _bn(p), SqueezeExcite(*p[2:]), kernels=k),
        lambda s: _norm(s) + _gate(s),
        (3, 1),
        (3, 2),
    ),
    "mbconv": Op(
        lambda x, s, p, k: mbconv(x, _bn(p), p[2], s.stride, s.padding, _bn(p, 3), SqueezeExcite(*p[5:]), kernels=k),
        lambda s: _norm(s) + _conv(s) + _norm(s) + _gate(s),
        (2, 4),
        (5, 6),
    ),
}


def make(op: Op, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x, channels last, and float32 parameters."""
    x = torch.randn(shape.n, shape.c, shape.size, shape.size, device=DEVICE, dtype=dtype)
    parameters = []
    for size in op.parameters(shape):
        fan_in = size[1] * size[2] * size[3] if len(size) == 4 else 1
        parameters.append((torch.randn(size, device=DEVICE) / fan_in**0.5).requires_grad_())
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(), parameters


def agrees(op: Op, shape: Shape, dtype: torch.dtype) -> float:
    """Largest relative RMS of output, dx and parameter gradients of Triton against the reference in float64.

    On at most four images: float64 convolutions of a whole batch take minutes.
    """
    shape = Shape(min(shape.n, 4), *list(asdict(shape).values())[1:])
    x, parameters = make(op, shape, dtype)
    results = []
    for kernels, wide in (("triton", False), ("torch", True)):
        leaves = [(t.detach().double() if wide else t.detach().clone()).requires_grad_() for t in (x, *parameters)]
        y = op.run(leaves[0], shape, leaves[1:], kernels)
        torch.manual_seed(0)
        dy = torch.randn(y.shape, device=DEVICE)
        y.backward(dy.to(dtype).to(y.dtype))
        results.append([y.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    errors = [(a - b).norm() / b.norm() for a, b in zip(*results, strict=True)]
    return torch.stack(errors).max().item()  # NaN if any is


@torch._functorch.config.patch(donated_buffer=False)  # which a backward pass that is repeated needs
def measure(op: Op, shape: Shape, dtype: torch.dtype, kernels: str, compiled: bool) -> dict[str, tuple[float, ...]]:
    """Quantiles of forward, which saves what backward needs, and of backward on saved outputs."""
    run = torch.compile(op.run, fullgraph=True, dynamic=False) if compiled else op.run
    x_bytes = shape.n * shape.c * shape.size**2 * dtype.itemsize
    sets = [make(op, shape, dtype) for _ in range(rotations(3 * x_bytes))]

    def forward(x: Tensor, parameters: list[Tensor]) -> Tensor:
        return run(x, shape, parameters, kernels)

    outputs = [forward(x, p) for x, p in sets]
    gradients = [torch.randn_like(y) for y in outputs]

    def backward(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> None:
        torch.autograd.grad(y, leaves, dy, retain_graph=True)

    turns = list(zip(outputs, gradients, sets, strict=True))
    return {
        "forward": replayed([lambda x=x, p=p: forward(x, p) for x, p in sets]),  # type: ignore[misc]
        "backward": replayed([lambda y=y, g=g, x=x, p=p: backward(y, g, [x, *p]) for y, g, (x, p) in turns]),  # type: ignore[misc]
    }


def least_bytes(shape: Shape, passes: tuple[int, int], dtype: torch.dtype) -> int:
    out = -(-shape.size // shape.stride) if passes[1] else 0
    return shape.n * shape.c * (passes[0] * shape.size**2 + passes[1] * out**2) * dtype.itemsize


def line(row: dict) -> str:
    """A row as printed text; without a GPU there is no rate to show."""
    if "wrong by" in row:
        return f"{row['op']:16} {row['shape']:28} WRONG by {row['wrong by']}, so no time is shown"
    rate = f"{row['GB/s']:7.1f} GB/s, {row['share of copy']:6.1%}" if DEVICE == "cuda" else "not a timing"
    head = f"{row['op']:16} {row['shape']:28} {row['direction']:8} {row['path']:8}"
    return f"{head} {row['ms p20/p50/p80'][1]:9.4f} ms ({rate})"


def rows_of(name: str, shape: Shape, dtype: torch.dtype, paths: dict, bandwidth: float) -> Iterator[dict]:
    """One row per path and direction; a single row without times where Triton and float64 disagree."""
    op, about = OPS[name], {"op": name, "shape": str(shape)}
    error = agrees(op, shape, dtype)
    if not error <= tolerance(name, dtype):
        yield about | {"wrong by": error}
        return
    for path, (kernels, compiled) in paths.items():
        torch.compiler.reset()
        for direction, ms in measure(op, shape, dtype, kernels, compiled).items():
            passes = op.forward_passes if direction == "forward" else op.backward_passes
            rate = least_bytes(shape, passes, dtype) / ms[1] / 1e6
            row = about | {"direction": direction, "path": path, "error": error, "ms p20/p50/p80": ms}
            yield row | {"GB/s": rate, "share of copy": rate / bandwidth}


def speed_up(name: str, rows: list[dict]) -> str:
    """Eager time over Triton's, as the geometric mean over an op's shapes, by direction."""
    times = {
        (row["direction"], row["path"], row["shape"]): row["ms p20/p50/p80"][1]
        for row in rows
        if row["op"] == name and "path" in row
    }
    means = []
    for direction in ("forward", "backward"):
        pairs = [(times[direction, "eager", shape], ms) for (d, path, shape), ms in times.items()
                 if (d, path) == (direction, "triton")]  # fmt: skip
        if pairs:
            means.append(f"{direction} {statistics.geometric_mean(eager / ours for eager, ours in pairs):.2f}")
    return f"{name:16} eager over Triton, geometric mean: {', '.join(means) or 'nothing was right'}"


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--op", choices=OPS, action="append", help="only this op; repeat for several")
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options.add_argument("--limit", type=int, help="number of shapes of each op")
    options.add_argument("--no-compile", action="store_true", help="skip the compiled reference")
    args = options.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    bandwidth = copy_bandwidth()
    if DEVICE == "cpu":
        print("NOT A TIMING: without a GPU, tiny maps in Triton's interpreter only show that the script works.")
    print(f"copy bandwidth {bandwidth:.0f} GB/s; {args.dtype}; p50 ms (GB/s, share of copy) per path")
    shapes = list(b0_shapes())
    if DEVICE == "cpu":
        shapes = list(dict.fromkeys(tiny(s) for s in shapes))
    paths = {"triton": ("triton", False), "eager": ("torch", False)}
    if not args.no_compile:
        paths["compiled"] = ("torch", True)
    settings = {"dtype": args.dtype, "copy_GBs": bandwidth}
    rows: list[dict] = []
    for name in args.op or OPS:
        for shape in shapes[: args.limit]:
            for row in rows_of(name, shape, dtype, paths, bandwidth):
                print(line(row), flush=True)
                rows.append(row)
                write(args.out, result("ops", settings, rows), quiet=True)
        print(speed_up(name, rows))
    write(args.out, result("ops", settings, rows))


if __name__ == "__main__":
    # A backward runs on its forward's stream, and a graph is not captured on the default stream: use one for both.
    with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else contextlib.nullcontext():
        run(main)
