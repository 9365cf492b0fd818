"""Time every launch of an op's space, on B0's shapes: `python benchmarks/tune.py [--target NAME] [--out FILE]`.

Compares, for each part of an op and each shape, the launch that the package chooses with the fastest of its space. A
candidate is timed only where its result agrees with that of the package's choice. On a GPU `--workers` processes first
compile the candidates in parallel into Triton's disk cache.

On the CPU the script runs on tiny maps in Triton's interpreter; the times then mean nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from ops import TOLERANCE, Shape, b0_shapes, least_bytes, tiny  # first: selects Triton's interpreter if there is no GPU

# isort: split
import torch
from harness import DEVICE, Call, Quantiles, copy_bandwidth, parser, replayed, result, rotations, run, write
from torch import Tensor

from effnet_kernels import batch_norm, depthwise_conv, gate_mlp, launch, se_gate, statistics
from effnet_kernels.gate_mlp import SqueezeExcite


def _out(s: Shape) -> int:
    return -(-s.size // s.stride)


@dataclass(frozen=True)
class Maps:
    """Makes inputs for the parts of a layer's ops: maps before and after the depthwise convolution, and vectors."""

    shape: Shape
    dtype: torch.dtype
    device: str

    def map(self, size: int) -> Tensor:
        x = torch.randn(self.shape.n, self.shape.c, size, size, device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def x(self) -> Tensor:
        return self.map(self.shape.size)

    def d(self) -> Tensor:
        return self.map(_out(self.shape))

    def vector(self, *sizes: int) -> Tensor:
        return torch.rand(*sizes, device=self.device) + 0.5

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.vector(self.shape.c), self.vector(self.shape.c)

    def stats(self) -> Tensor:
        return self.vector(4, self.shape.c)

    def taps(self) -> Tensor:
        return self.vector(self.shape.kernel**2, self.shape.c)

    def per_image(self) -> Tensor:
        return self.vector(self.shape.n, self.shape.c)

    def se(self) -> SqueezeExcite:
        c, r = self.shape.c, self.shape.hidden
        return SqueezeExcite(*(self.vector(*size) for size in ((r, c, 1, 1), (r,), (c, r, 1, 1), (c,))))


@dataclass(frozen=True)
class Target:
    """A part of an op whose launch can be tuned.

    Attributes:
        module, choice: module and name of the function that chooses the launch.
        space: the candidates for a shape.
        make: allocates inputs and returns the call to time.
        passes: reads and writes of the maps before and after the depthwise convolution.
    """

    module: ModuleType
    choice: str
    space: Callable[[Shape], list[Any]]
    make: Callable[[Maps], Call]
    passes: tuple[int, int]


def _rows(make: Callable[[Maps], Call], passes: int, module: ModuleType = batch_norm) -> Target:
    def space(s: Shape) -> list[Any]:
        return launch.row_launch_space(s.n * s.size**2, s.c)

    return Target(module, "row_launch", space, make, (passes, 0))


def _images(make: Callable[[Maps], Call], passes: int) -> Target:
    def space(s: Shape) -> list[Any]:
        return se_gate.image_launch_space(_out(s) ** 2, s.c)

    return Target(se_gate, "image_launch", space, make, (0, passes))


def _gate(make: Callable[[Maps], Call]) -> Target:
    return Target(gate_mlp, "gate_launch", lambda s: gate_mlp.gate_launch_space(s.hidden), make, (0, 0))


def _bind(function: Callable[..., object], *args: Any, **options: Any) -> Call:
    return lambda: function(*args, **options)


def _depthwise_forward(m: Maps) -> Call:
    s, norm = m.shape, (m.stats(), m.affine())
    return _bind(depthwise_conv.forward, m.x(), m.taps(), s.stride, s.padding, norm, moments=True)


def _depthwise_backward(m: Maps) -> Call:
    s, norm = m.shape, (m.stats(), m.affine())
    return _bind(depthwise_conv.backward, m.d(), m.x(), m.taps(), s.stride, s.padding, norm)


def _gate_backward(m: Maps) -> Call:
    n, c, r = m.shape.n, m.shape.c, m.shape.hidden
    gate = m.per_image() - 0.5
    return _bind(
        gate_mlp.gate_backward, m.vector(5, n, c), gate, m.per_image(), m.vector(n, r), m.se(), _out(m.shape) ** 2
    )


TARGETS = {
    "depthwise forward": Target(
        depthwise_conv,
        "forward_launch",
        lambda s: depthwise_conv.forward_space(s.n, s.c, _out(s), _out(s), s.kernel),
        _depthwise_forward,
        (1, 1),
    ),
    "depthwise backward": Target(
        depthwise_conv,
        "backward_launch",
        lambda s: depthwise_conv.backward_space(s.n, s.c, s.size, s.size, s.kernel, s.stride),
        _depthwise_backward,
        (2, 1),
    ),
    "statistics": _rows(lambda m: _bind(statistics.batch_statistics, m.x(), 1e-3, False), 1, statistics),
    "normalize": _rows(lambda m: _bind(batch_norm.normalize, m.x(), m.stats(), m.affine(), None, None, True), 2),
    "grad sums": _rows(lambda m: _bind(batch_norm.grad_sums, m.x(), m.x(), m.stats(), m.affine(), None, True), 2),
    "grad apply": _rows(
        lambda m: _bind(
            batch_norm.grad_apply, m.x(), m.x(), m.stats(), m.affine(), None, m.vector(2, m.shape.c), False
        ),
        3,
    ),
    "squeeze": _images(lambda m: _bind(se_gate.squeeze, m.d(), m.stats(), m.affine()), 1),
    "excite": _images(lambda m: _bind(se_gate.excite, m.d(), m.stats(), m.affine(), m.per_image()), 2),
    "five sums": _images(lambda m: _bind(se_gate.five_sums, m.d(), m.d(), m.stats(), m.affine()), 2),
    "apply sums": _images(
        lambda m: _bind(
            se_gate.apply_sums,
            *(m.d(), m.d(), m.stats(), m.affine(), m.per_image(), m.per_image(), m.vector(2, m.shape.c)),
        ),
        3,
    ),
    "gate": _gate(lambda m: _bind(gate_mlp.gate_forward, m.per_image(), m.se())),
    "gate backward": _gate(_gate_backward),
}


@dataclass(frozen=True)
class Candidate:
    """One launch of a target on a shape."""

    name: str
    shape: Shape
    launch: Any

    @property
    def target(self) -> Target:
        return TARGETS[self.name]

    def taken(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the block, the package chooses this launch."""
        return mock.patch.object(self.target.module, self.target.choice, return_value=self.launch)


def candidates(name: str, shape: Shape) -> tuple[Any, list[Candidate]]:
    """The package's choice, and candidates for it and the whole space, the choice first."""
    target = TARGETS[name]
    choice = mock.Mock(side_effect=getattr(target.module, target.choice))
    with mock.patch.object(target.module, target.choice, choice), quiet():
        target.make(Maps(shape, torch.float32, "meta"))()
    chosen = getattr(target.module, target.choice)(*choice.call_args.args)
    return chosen, [Candidate(name, shape, choice) for choice in dict.fromkeys([chosen, *target.space(shape)])]


@contextlib.contextmanager
def quiet(launcher: Callable[..., None] = lambda *_, **__: None) -> Iterator[None]:
    """Inside the block, `launcher` receives every launch instead of the device; by default it does nothing."""
    with launch.launches_go_to(launcher):
        yield


def compile_ahead(candidate: Candidate, dtype: torch.dtype) -> None:
    """Compile a candidate's kernels into Triton's disk cache. Failures are ignored here: `timed` raises them again."""

    def warm(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kernel.warmup(*(a.dtype if isinstance(a, Tensor) else a for a in args), grid=grid, **options)

    with contextlib.suppress(Exception), candidate.taken(), quiet(warm):
        candidate.target.make(Maps(candidate.shape, dtype, "meta"))()


def tensors(value: object) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple) else []


def error(actual: object, expected: object) -> float:
    """The largest relative RMS between two results."""
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in pairs)


def summed(value: object) -> object:
    """A result without the tiles' moments, which depend on the launch."""
    return value[0] if isinstance(value, tuple) and tensors(value)[-1].dim() == 3 else value


def timed(candidate: Candidate, dtype: torch.dtype, reference: tuple[Call, object]) -> tuple[float, Quantiles | None]:
    """Relative RMS from the result of the package's choice, and the times, or None if it exceeds the tolerance."""
    call, expected = reference
    with candidate.taken():
        deviation = error(summed(call()), expected)
        if not deviation <= TOLERANCE[dtype]:
            return deviation, None
        sets = rotations(max(least_bytes(candidate.shape, candidate.target.passes, dtype), 1))
        return deviation, replayed([candidate.target.make(Maps(candidate.shape, dtype, DEVICE)) for _ in range(sets)])


def rows_of(name: str, shape: Shape, dtype: torch.dtype, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each candidate, the package's choice first."""
    chosen, launches = candidates(name, shape)
    call = TARGETS[name].make(Maps(shape, dtype, DEVICE))
    reference = (call, summed(call()))
    for candidate in launches:
        row: dict[str, Any] = {"target": name, "shape": str(shape), "launch": asdict(candidate.launch)}
        row["chosen"] = candidate.launch == chosen
        try:
            deviation, ms = timed(candidate, dtype, reference)
        except RuntimeError as refusal:  # it needs too many registers or too much shared memory
            yield row | {"failed": str(refusal).splitlines()[0]}
            continue
        if ms is None:
            yield row | {"wrong by": deviation}
            continue
        rate = least_bytes(shape, TARGETS[name].passes, dtype) / ms[1] / 1e6
        yield row | {"ms p20/p50/p80": ms, "share of copy": rate / bandwidth}


def line(rows: list[dict[str, Any]]) -> str:
    """One line that compares the package's choice with the fastest launch."""
    measured = [row for row in rows if "ms p20/p50/p80" in row]
    if not measured or not measured[0]["chosen"]:
        return f"{rows[0]['target']:18} {rows[0]['shape']:28} the package's choice failed: {rows[0]}"
    ms = {id(row): row["ms p20/p50/p80"][1] for row in measured}
    best = min(measured, key=lambda row: ms[id(row)])
    ratio = ms[id(measured[0])] / ms[id(best)]
    head = f"{best['target']:18} {best['shape']:28} chosen {ms[id(measured[0])]:.4f} ms"
    share = f"{measured[0]['share of copy']:.0%} of copy"
    return f"{head} ({share}), {ratio:.2f} x the fastest of {len(measured)}: {best['launch']}"


def compile_all(name: str, shapes: list[Shape], dtype: torch.dtype, pool: Any) -> None:
    """Compile a target's candidates in the processes of a pool."""
    work = [(candidate, dtype) for shape in shapes for candidate in candidates(name, shape)[1]]
    print(f"{name}: compiling {len(work)} candidates", flush=True)
    pool.starmap(compile_ahead, work, chunksize=1)


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--target", choices=TARGETS, action="append", help="only this part; repeat for several")
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options.add_argument("--limit", type=int, help="number of shapes; the first twelve are those at 32 px")
    options.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 12), help="compiling processes")
    args = options.parse_args(argv)
    dtype, bandwidth = getattr(torch, args.dtype), copy_bandwidth()
    settings = {"dtype": args.dtype, "copy_GBs": bandwidth}
    shapes = list(b0_shapes())[: args.limit]
    if DEVICE == "cpu":
        print("NOT A TIMING: without a GPU, tiny maps in Triton's interpreter only show that the script works.")
        shapes = list(dict.fromkeys(tiny(s) for s in shapes))
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        pool = DEVICE == "cuda" and stack.enter_context(multiprocessing.get_context("spawn").Pool(args.workers))
        for name in args.target or TARGETS:
            if pool:
                compile_all(name, shapes, dtype, pool)
            for shape in shapes:
                new = list(rows_of(name, shape, dtype, bandwidth))
                print(line(new), flush=True)
                rows += new
                write(args.out, result("tune", settings, rows), quiet=True)
    write(args.out, result("tune", settings, rows))


if __name__ == "__main__":
    with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else contextlib.nullcontext():
        run(main)
