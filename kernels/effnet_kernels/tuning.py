"""What an autotuner needs: the parts of the ops whose launch can be chosen, their inputs, and a check of their results.

A part is one launcher with a `LaunchChoice`. An autotuner times the candidates of a part on a layer, each within
`launches_used`, and keeps those whose result agrees with that of the heuristic's launch. It compiles them ahead, in
other processes, by `compile_ahead`: the kernels then come from Triton's disk cache.

The last parts, OPS, are whole ops: a training step on the kernels beside one on PyTorch's operators, both in
torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from effnet_kernels import batch_norm, bn_silu_squeeze, depthwise_conv, gate_mlp, mbconv, pointwise, se_gate, statistics
from effnet_kernels.gate_mlp import SqueezeExcite
from effnet_kernels.launch import LaunchChoice, Sizes, cdiv, launches_go_to, launches_used
from effnet_kernels.statistics import BatchNorm

Call = Callable[[], object]

# Relative RMS that storage types allow between two launches' results.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 2e-5}
# PyTorch's operators round more maps, or use TF32, and the gradients of an op's first BatchNorm are sums that nearly
# cancel.
OP_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Layer:
    """A map [n, c, size, size] and the layer that reads it.

    Attributes:
        kernel, stride: of the depthwise convolution; 0 and 1 where the layer is only a BatchNorm.
        hidden: hidden values of the gate after it.
        prologue: whether a BatchNorm and Swish precede the convolution.
        pooled: whether the layer is a head, which keeps only the map's mean.
        outputs: channels of the 1x1 convolution that reads the map, 0 where another layer does. With `prologue` it is a
            projection, else an expansion. Only `kernels="triton-block"` runs these in Triton.
    """

    n: int
    c: int
    size: int
    kernel: int = 0
    stride: int = 1
    hidden: int = 1
    prologue: bool = True
    pooled: bool = False
    outputs: int = 0

    @property
    def rows(self) -> int:
        """Pixels of all images."""
        return self.n * self.size**2

    @property
    def out(self) -> int:
        """Rows and columns of the convolution's output."""
        return cdiv(self.size, self.stride)

    def __str__(self) -> str:
        conv = f" k{self.kernel} s{self.stride}" if self.kernel else ""
        product = f" to {self.outputs}" if self.outputs else ""
        return f"{self.n}x{self.c}x{self.size}x{self.size}{conv}{product}"


@dataclass(frozen=True)
class Inputs:
    """Makes inputs for the parts of a layer's ops: maps before and after the depthwise convolution, and vectors."""

    layer: Layer
    dtype: torch.dtype
    device: torch.device

    def map(self, size: int) -> Tensor:
        x = torch.randn(self.layer.n, self.layer.c, size, size, device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def x(self) -> Tensor:
        return self.map(self.layer.size)

    def d(self) -> Tensor:
        return self.map(self.layer.out)

    def vector(self, *sizes: int) -> Tensor:
        return torch.rand(*sizes, device=self.device) + 0.5

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.vector(self.layer.c), self.vector(self.layer.c)

    def stats(self) -> Tensor:
        return self.vector(4, self.layer.c)

    def norm(self) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        return (self.stats(), self.affine()) if self.layer.prologue else None

    def batch_norm(self) -> BatchNorm:
        return BatchNorm(*self.affine(), *self.affine())

    def taps(self) -> Tensor:
        return self.vector(self.layer.kernel**2, self.layer.c)

    def weight(self) -> Tensor:
        return self.vector(self.layer.c, 1, self.layer.kernel, self.layer.kernel)

    def padding(self) -> depthwise_conv.Padding:
        side = self.layer.kernel // 2
        return side, side, side, side

    def per_image(self) -> Tensor:
        return self.vector(self.layer.n, self.layer.c)

    def gate(self) -> SqueezeExcite:
        c, r = self.layer.c, self.layer.hidden
        sizes = (r, c, 1, 1), (r,), (c, r, 1, 1), (c,)
        return SqueezeExcite(*((self.vector(*size) - 1) / c**0.5 for size in sizes))  # small: the gate is not saturated


@dataclass(frozen=True)
class Part:
    """A part of an op whose launch can be tuned.

    Attributes:
        choice: chooses the launch.
        sizes: the sizes that `choice` receives for a layer.
        make: allocates inputs and returns the call to time.
        passes: reads and writes of the maps before and after the depthwise convolution.
    """

    choice: LaunchChoice
    sizes: Callable[[Layer], Sizes]
    make: Callable[[Inputs], Call]
    passes: tuple[int, int]


def _bind(function: Callable[..., object], *args: Any, **options: Any) -> Call:
    return lambda: function(*args, **options)


def _rows(choice: LaunchChoice, passes: int, make: Callable[[Inputs], Call]) -> Part:
    return Part(choice, lambda s: (s.rows, s.c), make, (passes, 0))


def _images(choice: LaunchChoice, passes: int, make: Callable[[Inputs], Call]) -> Part:
    return Part(choice, lambda s: (s.n, s.c, s.out**2), make, (0, passes))


def _gate(choice: LaunchChoice, make: Callable[[Inputs], Call]) -> Part:
    return Part(choice, lambda s: (s.n, s.c, s.hidden), make, (0, 0))


def _depthwise_forward(i: Inputs) -> Call:
    return _bind(depthwise_conv.forward, i.x(), i.taps(), i.layer.stride, i.padding(), i.norm(), moments=True)


def _depthwise_backward(i: Inputs) -> Call:
    arguments = i.d(), i.x(), i.weight(), i.taps(), i.layer.stride, i.padding(), i.norm()
    return _bind(depthwise_conv.backward, *arguments)


def _grad_apply(i: Inputs) -> Call:
    sums = i.vector(2, i.layer.c)
    return _bind(batch_norm.grad_apply, i.x(), i.x(), i.stats(), i.affine(), None, sums, False)


def _five_sums(i: Inputs) -> Call:
    dy = None if i.layer.pooled else i.d()
    return _bind(se_gate.five_sums, dy, i.d(), i.stats(), i.affine())


def _apply_sums(i: Inputs) -> Call:
    dy, gate = (None, None) if i.layer.pooled else (i.d(), i.per_image())
    return _bind(se_gate.apply_sums, dy, i.d(), i.stats(), i.affine(), gate, i.per_image(), i.vector(2, i.layer.c))


def _gate_backward(i: Inputs) -> Call:
    n, c, r = i.layer.n, i.layer.c, i.layer.hidden
    vectors = i.vector(5, n, c), i.per_image() - 0.5, i.per_image(), i.vector(n, r)
    return _bind(gate_mlp.gate_backward, *vectors, i.gate(), i.layer.out**2)


def _product(i: Inputs) -> Call:
    is_projection, weight = i.layer.prologue, i.vector(i.layer.outputs, i.layer.c, 1, 1)
    prologue = pointwise.Prologue(i.stats(), i.affine(), i.per_image()) if is_projection else None
    return _bind(pointwise.product, i.x(), weight, prologue, moments=not is_projection)


def _mbconv(i: Inputs) -> Call:
    layer, se, second = i.layer, i.gate(), i.batch_norm()
    first = i.batch_norm() if layer.prologue else None
    x, weight = i.x(), i.weight()
    leaves = [x, weight, *se, *second[:2], *(() if first is None else first[:2])]
    arguments = (x, first, weight, layer.stride, i.padding(), second, se)
    return _training_step("mbconv", layer, mbconv.mbconv, arguments, leaves, i.d())


def _squeeze(i: Inputs) -> Call:
    x, norm, gradient = i.x(), i.batch_norm(), i.per_image().to(i.dtype)
    function = bn_silu_squeeze.bn_silu_squeeze
    return _training_step("bn_silu_squeeze", i.layer, function, (x, norm), [x, *norm[:2]], gradient)


def _training_step(
    name: str,
    layer: Layer,
    function: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    leaves: list[Tensor],
    gradient: Tensor,
) -> Call:
    """A compiled forward and backward pass of an op: its output, and the gradients of `leaves`."""
    compiled = torch.compile(function, dynamic=False)
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        chosen = PARTS[name].choice(*PARTS[name].sizes(layer))
        y = compiled(*arguments, kernels=chosen.kernels)
        return y.detach(), *torch.autograd.grad(y, leaves, gradient)

    return call


_PARTS = (
    Part(
        depthwise_conv.forward_choice,
        lambda s: (s.n, s.c, s.out, s.out, s.kernel, s.stride),
        _depthwise_forward,
        (1, 1),
    ),
    Part(
        depthwise_conv.backward_choice,
        lambda s: (s.n, s.c, s.size, s.size, s.kernel, s.stride),
        _depthwise_backward,
        (2, 1),
    ),
    _images(se_gate.squeeze_choice, 1, lambda i: _bind(se_gate.squeeze, i.d(), i.stats(), i.affine())),
    _images(se_gate.excite_choice, 2, lambda i: _bind(se_gate.excite, i.d(), i.stats(), i.affine(), i.per_image())),
    _images(se_gate.five_sums_choice, 2, _five_sums),
    _images(se_gate.apply_sums_choice, 3, _apply_sums),
    _rows(statistics.statistics_choice, 1, lambda i: _bind(statistics.batch_statistics, i.x(), 1e-3, False)),
    _rows(
        batch_norm.normalize_choice,
        2,
        lambda i: _bind(batch_norm.normalize, i.x(), i.stats(), i.affine(), None, None, True),
    ),
    _rows(
        batch_norm.grad_sums_choice,
        2,
        lambda i: _bind(batch_norm.grad_sums, i.x(), i.x(), i.stats(), i.affine(), None, True),
    ),
    _rows(batch_norm.grad_apply_choice, 3, _grad_apply),
    _gate(gate_mlp.forward_choice, lambda i: _bind(gate_mlp.gate_forward, i.per_image(), i.gate())),
    _gate(gate_mlp.backward_choice, _gate_backward),
    Part(pointwise.product_choice, lambda s: (s.rows, s.c, s.outputs), _product, (1, 0)),
    Part(
        mbconv.mbconv_choice,
        lambda s: (s.n, s.c, s.size, s.size, s.kernel, s.stride, s.hidden, int(s.prologue)),
        _mbconv,
        (6, 10),
    ),
    Part(bn_silu_squeeze.bn_silu_squeeze_choice, lambda s: (s.n, s.c, s.size, s.size), _squeeze, (5, 0)),
)
PARTS: dict[str, Part] = {part.choice.kernel: part for part in _PARTS}
OPS = ("mbconv", "bn_silu_squeeze")
_EXPANSION = ("statistics", "grad apply")  # the rest of an expansion's BatchNorm is in the depthwise kernels
_NORM = ("statistics", "normalize", "grad sums", "grad apply")
_HEAD = ("statistics", "squeeze", "five sums", "apply sums", "bn_silu_squeeze")


def parts_of(layer: Layer) -> list[str]:
    """Names of the parts that a training step runs on a layer, those with most traffic first."""
    if layer.outputs:
        return ["product"]
    if not layer.kernel:
        return list(_HEAD if layer.pooled else _NORM)
    block = [name for name in PARTS if name not in _NORM or (layer.prologue and name in _EXPANSION)]
    return [name for name in block if name not in ("product", "bn_silu_squeeze")]


def tolerance(part: str, dtype: torch.dtype) -> float:
    """Relative RMS allowed between two candidates."""
    return OP_TOLERANCE if part in OPS else TOLERANCE[dtype]


def launch_of(kernel: str, sizes: Sizes, fields: Mapping[str, Any]) -> Any | None:
    """The candidate with these fields, or None: the kernel or the launch exists no longer, or the sizes are not its."""
    try:
        return _candidates(kernel, sizes).get(tuple(fields.items()))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


@functools.cache
def _candidates(kernel: str, sizes: Sizes) -> dict[tuple[tuple[str, Any], ...], Any]:
    """The candidates of a part by their fields."""
    return {tuple(asdict(launch).items()): launch for launch in PARTS[kernel].choice.candidates(*sizes)}


def compile_ahead(part: str, layer: Layer, launch: Any, dtype: torch.dtype) -> None:
    """Compile a part's kernels into Triton's disk cache. Failures are ignored: the call that times it raises them.

    An op is not compiled: its kernels are those of the other parts, and torch.compile needs the GPU.
    """
    if part in OPS:
        return

    def warm(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kernel.warmup(*(a.dtype if isinstance(a, Tensor) else a for a in args), grid=grid, **options)

    used = {(part, PARTS[part].sizes(layer)): launch}
    with contextlib.suppress(Exception), launches_used(used), launches_go_to(warm):
        PARTS[part].make(Inputs(layer, dtype, torch.device("meta")))()


def relative_error(actual: object, expected: object) -> float:
    """Largest relative RMS between two results, without the tiles' moments, which depend on the launch."""
    pairs = zip(_tensors(_summed(actual)), _tensors(_summed(expected)), strict=True)
    errors = [(a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30) for a, b in pairs]
    return torch.stack(errors).max().item()  # NaN if any is


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple) else []


def _summed(value: object) -> object:
    return value[0] if isinstance(value, tuple) and _tensors(value)[-1].dim() == 3 else value
