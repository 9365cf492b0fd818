"""Harness of the op tests: tables of shapes (`CASES`), tolerances and ops (`OPS`), and `compare`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_kernels.batch_norm import batch_norm
from effnet_kernels.bn_silu_squeeze import bn_silu_squeeze
from effnet_kernels.depthwise_conv import depthwise_conv
from effnet_kernels.gate_mlp import SqueezeExcite
from effnet_kernels.mbconv import mbconv
from effnet_kernels.se_gate import se_gate
from effnet_kernels.silu import silu
from effnet_kernels.statistics import BatchNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Limits of the relative RMS error against float64, for an op that rounds only its result to the storage type.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """A depthwise layer on x [n, c, h, w]. `same` pads as TensorFlow does: an odd pixel goes bottom and right."""

    n: int
    c: int
    h: int
    w: int
    k: int = 3
    stride: int = 1
    same: bool = False
    note: str = ""

    @property
    def id(self) -> str:
        padding = "same" if self.same else "sym"
        text = f"n{self.n}-c{self.c}-{self.h}x{self.w}-k{self.k}s{self.stride}-{padding}"
        return f"{text}-{self.note}" if self.note else text

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """left, right, top, bottom"""
        if not self.same:
            return (self.k // 2,) * 4

        def total(size: int) -> int:
            return max((-(-size // self.stride) - 1) * self.stride + self.k - size, 0)

        return total(self.w) // 2, -(-total(self.w) // 2), total(self.h) // 2, -(-total(self.h) // 2)

    @property
    def r(self) -> int:
        """Hidden channels of the gate, as in a block that expands by 6."""
        return max(self.c // 24, 4)


# Every distinct depthwise layer (channels, kernel, stride) of B0 at 224 px, and at 32 px with output stride 8 or 32;
# maps are cropped to at most 14 x 14.
B0_CASES = [
    Case(2, 32, 14, 14, 3, 1),
    Case(2, 96, 14, 14, 3, 2),
    Case(2, 96, 14, 14, 3, 1, note="stride8"),
    Case(2, 144, 8, 8, 3, 1),
    Case(2, 144, 14, 14, 5, 2),
    Case(2, 144, 8, 8, 5, 1, note="stride8"),
    Case(2, 240, 7, 7, 5, 1),
    Case(2, 240, 14, 14, 3, 2),
    Case(2, 480, 7, 7, 3, 1),
    Case(2, 480, 4, 4, 5, 1),
    Case(2, 672, 4, 4, 5, 1),
    Case(2, 672, 7, 7, 5, 2),
    Case(3, 1152, 2, 2, 5, 1),
    Case(2, 1152, 4, 4, 3, 1),
    Case(4, 1152, 1, 1, 3, 1, note="stride32"),
]
ODD_CASES = [
    Case(3, 13, 5, 7, 3, 1, note="no-vector"),
    Case(2, 20, 7, 7, 5, 2, note="49-pixels"),
    Case(1, 40, 11, 13, 3, 2, same=True, note="batch-1-prime"),
    Case(1, 8, 17, 1, 5, 1, note="one-column"),
    Case(8, 24, 1, 1, 5, 2, note="one-pixel"),
    Case(2, 24, 8, 8, 3, 2, same=True),
    Case(2, 24, 9, 8, 5, 2, same=True),
    Case(40, 16, 3, 2, 3, 1, note="many-images"),
    Case(1, 24, 50, 5, 3, 2, note="bands"),
    Case(1, 8, 41, 18, 5, 1, note="bands-and-strips"),
]
CASES = B0_CASES + ODD_CASES
# Run by `make test`: both kernel sizes, strides and paddings, vector widths 8, 4 and 1, batch 1, rows in bands.
QUICK_CASES = ODD_CASES[:3] + ODD_CASES[5:7] + ODD_CASES[8:9]


@dataclass(frozen=True)
class Op:
    """An op under test.

    Attributes:
        shapes: shapes of the parameters for a case.
        run: `run(x, parameters, buffers, case, kernels)` returns y.
        norms: number of BatchNorms; each has two buffers.
        slack: factor on the tolerance, above 1 if the op rounds more than its result to the storage type.
    """

    name: str
    shapes: Callable[[Case], list[tuple[int, ...]]]
    run: Callable[..., Tensor]
    norms: int = 0
    slack: float = 1.0


def _bn(p: list[Tensor], b: list[Tensor], i: int = 0, j: int = 0) -> BatchNorm:
    return BatchNorm(p[i], p[i + 1], b[2 * j], b[2 * j + 1], momentum=0.1)


def _scale(x: Tensor) -> Tensor:
    """Factors [N] of stochastic depth that drop every third image, starting with the second."""
    return (torch.arange(x.shape[0], device=x.device) % 3 != 1).to(x.dtype) * 1.25


def _se(c: Case) -> list[tuple[int, ...]]:
    return [(c.r, c.c, 1, 1), (c.r,), (c.c, c.r, 1, 1), (c.c,)]


OPS = {
    op.name: op
    for op in (
        Op("silu", lambda c: [], lambda x, p, b, c, kernels: silu(x, kernels=kernels)),
        Op(
            "bn_silu",
            lambda c: [(c.c,)] * 2,
            lambda x, p, b, c, kernels: batch_norm(x, _bn(p, b), activation=True, kernels=kernels),
            norms=1,
        ),
        Op(
            "bn_residual",
            lambda c: [(c.c,)] * 2,
            lambda x, p, b, c, kernels: batch_norm(
                x, _bn(p, b), residual=x.sin(), sample_scale=_scale(x), kernels=kernels
            ),
            norms=1,
            slack=1.5,  # also rounds the residual
        ),
        Op(
            "depthwise_conv",
            lambda c: [(c.c, 1, c.k, c.k)],
            lambda x, p, b, c, kernels: depthwise_conv(x, p[0], c.stride, c.padding, kernels=kernels),
        ),
        Op(
            "bn_silu_squeeze",
            lambda c: [(c.c,)] * 2,
            lambda x, p, b, c, kernels: bn_silu_squeeze(x, _bn(p, b), kernels=kernels),
            norms=1,
        ),
        Op(
            "se_gate",
            lambda c: [(c.c,)] * 2 + _se(c),
            lambda x, p, b, c, kernels: se_gate(x, _bn(p, b), SqueezeExcite(*p[2:]), kernels=kernels),
            norms=1,
        ),
        Op(
            "mbconv",
            lambda c: [(c.c,)] * 2 + [(c.c, 1, c.k, c.k)] + [(c.c,)] * 2 + _se(c),
            lambda x, p, b, c, kernels: mbconv(
                *(x, _bn(p, b), p[2], c.stride, c.padding, _bn(p, b, 3, 1), SqueezeExcite(*p[5:])), kernels=kernels
            ),
            norms=2,
            slack=2.0,  # also rounds d and, backward, dd and dz
        ),
        Op(
            "mbconv_unexpanded",
            lambda c: [(c.c, 1, c.k, c.k)] + [(c.c,)] * 2 + _se(c),
            lambda x, p, b, c, kernels: mbconv(
                *(x, None, p[0], c.stride, c.padding, _bn(p, b, 1), SqueezeExcite(*p[3:])), kernels=kernels
            ),
            norms=1,
            slack=1.5,  # also rounds d and, backward, dd
        ),
    )
}


@dataclass
class Inputs:
    """x in the storage type, parameters and buffers in float32. `double` copies to float64, `fresh` as they are."""

    x: Tensor
    parameters: list[Tensor]
    buffers: list[Tensor]

    def double(self) -> Inputs:
        return Inputs(*(_each(v, lambda t: t.detach().double()) for v in (self.x, self.parameters, self.buffers)))

    def fresh(self) -> Inputs:
        return Inputs(*(_each(v, lambda t: t.detach().clone()) for v in (self.x, self.parameters, self.buffers)))


def _each(value, function):
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def make_inputs(op: Op, case: Case, dtype: torch.dtype, mean: float = 0.0, seed: int = 0) -> Inputs:
    """Normally distributed inputs; BatchNorm scales are near 1, convolution weights have variance 1 / fan-in."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = (normal(case.n, case.c, case.h, case.w) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    parameters = []
    for shape in op.shapes(case):
        fan_in = max(shape[1] * shape[2] * shape[3], 1) if len(shape) == 4 else 1
        parameters.append((normal(*shape) / fan_in**0.5).float())
    for i, shape in enumerate(op.shapes(case)[:-1]):
        if len(shape) == 1 and op.shapes(case)[i + 1] == shape:  # a gamma: the next shape is its beta's
            parameters[i] = 1 + 0.2 * parameters[i].tanh()
    buffers = [f(case.c) for _ in range(op.norms) for f in (torch.zeros, torch.ones)]
    return Inputs(*(_each(v, lambda t: t.to(DEVICE)) for v in (x, parameters, buffers)))


def run(op: Op, case: Case, inputs: Inputs, kernels: str, dy: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Run one training step of the op. Returns {name: output, gradient or buffer}, and the gradient dy that it used."""
    leaves = [inputs.x, *inputs.parameters]
    for leaf in leaves:
        leaf.requires_grad_()
    y = op.run(inputs.x, inputs.parameters, inputs.buffers, case, kernels)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    y.backward(dy.to(y.dtype))
    results = {"y": y.detach(), "dx": leaves[0].grad}
    results |= {f"dparameter{i}": p.grad for i, p in enumerate(inputs.parameters)}
    results |= {f"buffer{i}": b for i, b in enumerate(inputs.buffers)}
    return results, dy


def relative_rms(a: Tensor, b: Tensor) -> float:
    """RMS of a - b over the RMS of b, in float64."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def compare(op: Op, case: Case, dtype: torch.dtype, kernels: str = "triton") -> None:
    """Compare one training step with the float64 reference by relative RMS error.

    An op that stores intermediate maps (slack > 1) may exceed its tolerance where terms of a gradient cancel. It must
    then be at least as accurate as PyTorch's operators in the same storage type.
    """
    inputs = make_inputs(op, case, dtype)
    exact, baseline_inputs = inputs.double(), inputs.fresh()
    got, dy = run(op, case, inputs, kernels)
    want, _ = run(op, case, exact, "torch", dy)
    limit = TOLERANCE[dtype] * op.slack
    assert got["y"].dtype == dtype
    assert all(value.isfinite().all() for value in got.values())
    errors = {name: relative_rms(got[name], value) for name, value in want.items()}
    if op.slack > 1 and max(errors.values()) > limit:
        baseline, _ = run(op, case, baseline_inputs, "torch", dy)
        errors = {name: e for name, e in errors.items() if e > relative_rms(baseline[name], want[name])}
    for name, error in errors.items():
        assert error <= limit, f"{name}: relative RMS {error:.2e} above {limit:.0e}"
