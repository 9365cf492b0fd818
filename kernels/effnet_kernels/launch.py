"""Shared by every op: Triton where it is installed, the choice of Triton, C++ or PyTorch, and the launch itself."""

from __future__ import annotations

import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from effnet_kernels.cpu import build

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # the kernels are never called

    class triton:  # type: ignore[no-redef]
        """Stands in for the decorator."""

        @staticmethod
        def jit(function: Any, **_: Any) -> Any:
            return function

    tl = None
    HAS_TRITON = False

# `triton-block`: as `triton`, with the 1x1 convolutions of a block as Triton products too (block.py).
Kernels = Literal["auto", "triton", "triton-block", "cpp", "torch"]

STORAGE_TYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU_STORAGE_TYPES = (torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_ENVIRONMENT = os.environ.get("EFFNET_KERNELS", "auto")

# Multiprocessors of an H100; an A100 has 108. A constant rather than a query of the device, so that every GPU splits
# sums alike and returns the same bits.
PROCESSORS = 132


def kernel(function: Any) -> Any:
    """`triton.jit` for a kernel whose integer arguments are not specialised: one variant serves every batch size."""
    parameters = inspect.signature(function).parameters.values()
    numbers = [p.name for p in parameters if p.annotation is p.empty and not p.name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=numbers)


# The functions of the ops that launch Triton kernels, by the ops' names.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that changes none of its arguments as the op `effnet_kernels::name`."""

    def register(function: Callable[..., Any]) -> Any:
        IMPLEMENTATIONS[f"effnet_kernels::{name}"] = function
        return torch.library.custom_op(f"effnet_kernels::{name}", function, mutates_args=())

    return register


def chosen(kernels: Kernels) -> str:
    """`kernels`, or EFFNET_KERNELS in place of `auto`; EFFNET_KERNELS=torch overrides every choice."""
    return _ENVIRONMENT if kernels == "auto" or _ENVIRONMENT == "torch" else kernels


def use_kernels(kernels: Kernels, x: Tensor) -> bool:
    """Return whether a kernel of this package handles `x`, rather than PyTorch's operators, which take empty tensors.

    `auto` means Triton for CUDA tensors and C++ for CPU tensors, where it can be built and nothing is being exported
    or traced.

    Raises:
        ValueError: the choice is unknown, or it is `triton`, `triton-block` or `cpp`, which cannot handle `x`.
    """
    choice = chosen(kernels)
    if choice not in get_args(Kernels):
        raise ValueError(
            f"kernels (or EFFNET_KERNELS) must be auto, triton, triton-block, cpp or torch, not {choice!r}"
        )
    if choice == "auto" and not x.is_cuda:
        traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
        return not traced and x.numel() > 0 and _cpp_supports(x)
    if choice == "cpp":
        supported = _cpp_supports(x)
    else:
        can_launch = x.is_cuda or INTERPRETED or _replacement is not None
        supported = HAS_TRITON and can_launch and x.dtype in STORAGE_TYPES
    if choice in ("triton", "triton-block", "cpp") and not supported:
        raise ValueError(f"kernels={choice!r} cannot serve a {x.dtype} tensor on {x.device}; use kernels='auto'")
    return choice != "torch" and supported and x.numel() > 0


def on_cpu(x: Tensor) -> bool:
    """Whether the kernels that handle `x` are the C++ ones, not Triton's, compiled or interpreted."""
    return x.device.type == "cpu" and not INTERPRETED


def _cpp_supports(x: Tensor) -> bool:
    return on_cpu(x) and x.dtype in CPU_STORAGE_TYPES and is_built()


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether the C++ ops can be loaded; builds them if need be."""
    return build.library() is not None


def cpp_ops(x: Tensor) -> Any | None:
    """The C++ ops, `torch.ops.effnet_cpu`, where they handle `x`, else None (and within `launches_go_to`)."""
    return build.library() if on_cpu(x) and _replacement is None else None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def vector(channels: int) -> int:
    """The largest power of two up to 16 that divides `channels`: the alignment of a row, in elements."""
    return math.gcd(channels, 16)


def slots(resident: int) -> int:
    """Programs that run at once with `resident` of them on each multiprocessor.

    A grid slightly larger than this, or than a multiple of it, ends with most multiprocessors idle.
    """
    return PROCESSORS * resident


def channel_block(channels: int, widest: int = 128, slack: float = 1.0) -> int:
    """Channels per program: a power of two from 32 to `widest`, fewer only if there are fewer channels.

    It is the largest one that pads `channels` to at most `slack` times the smallest padded size. Rows of fewer than
    32 channels of 2 bytes would not fill whole 32-byte sectors evenly.
    """
    padded = {b: cdiv(channels, b) * b for b in (32, 64, 128, 256) if b <= widest}
    best = max(b for b, size in padded.items() if size <= slack * min(padded.values()))
    return min(best, max(power_of_2(channels), 8))


Sizes = tuple[int, ...]
_in_use: dict[tuple[str, Sizes], Any] = {}


def use_launches(launches: Mapping[tuple[str, Sizes], Any]) -> None:
    """Set the launches that replace the heuristics' choices, by (kernel, sizes); earlier ones no longer apply."""
    _in_use.clear()
    _in_use.update(launches)


@contextmanager
def launches_used(launches: Mapping[tuple[str, Sizes], Any]) -> Iterator[None]:
    """Inside the block, these launches too replace the heuristics' choices."""
    earlier = dict(_in_use)
    use_launches(earlier | dict(launches))
    try:
        yield
    finally:
        use_launches(earlier)


@dataclass(frozen=True)
class LaunchChoice:
    """Chooses a kernel's launch by the sizes of its input: the one set by `use_launches`, else the heuristic's.

    Attributes:
        kernel: its name in `use_launches`.
        heuristic: sizes -> the launch, a frozen dataclass.
        space: sizes -> launches that an autotuner may try.
    """

    kernel: str
    heuristic: Callable[..., Any]
    space: Callable[..., list[Any]]

    def __call__(self, *sizes: int) -> Any:
        return _in_use.get((self.kernel, sizes)) or heuristics_launch(self, sizes)

    def candidates(self, *sizes: int) -> list[Any]:
        """The heuristic's launch, then the others of the space."""
        return list(dict.fromkeys([self.heuristic(*sizes), *self.space(*sizes)]))


@cache
def heuristics_launch(choice: LaunchChoice, sizes: Sizes) -> Any:
    """The heuristic's launch, computed once for each size."""
    return choice.heuristic(*sizes)


@dataclass(frozen=True)
class Implementation:
    """What runs an op's training step where `kernels` is `auto`: the Triton kernels or PyTorch's operators."""

    kernels: Literal["triton", "torch"]


def implementation_choice(op: str) -> LaunchChoice:
    """The choice between an op's two implementations; its own is the kernels."""
    return LaunchChoice(op, lambda *_: Implementation("triton"), lambda *_: [Implementation("torch")])


def torch_is_faster(op: str, sizes: Sizes) -> bool:
    """Whether `use_launches` set PyTorch's operators for an op's training step; compiled code keeps the answer."""
    # Without tuned launches compiled code may have dynamic sizes, which cannot be looked up.
    return bool(_in_use) and _torch_was_faster(op, sizes)


@torch.compiler.assume_constant_result
def _torch_was_faster(op: str, sizes: Sizes) -> bool:
    return _in_use.get((op, sizes)) == Implementation("torch")


@dataclass(frozen=True)
class RowLaunch:
    """Launch of a pass over [rows, channels]: each program walks over `rows` rows of one channel block."""

    block_m: int
    block_c: int
    rows: int
    num_warps: int

    def constants(self, c: int) -> dict[str, int]:
        """Compile-time arguments of the kernel."""
        return {"VEC": vector(c), "BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "num_warps": self.num_warps}

    def grid(self, m: int, c: int) -> tuple[int, int]:
        """Programs over the channel blocks and over the rows."""
        return cdiv(c, self.block_c), cdiv(m, self.rows)


def row_launch(m: int, c: int, resident: int = 7, values: int = 16, num_warps: int = 4) -> RowLaunch:
    """`values` values per thread at a time, and programs for one wave with `resident` programs per multiprocessor.

    16 values are two 16-byte loads of bf16.
    """
    block_c = channel_block(c)
    block_m = max(num_warps * 32 * values // block_c, 1)
    chunks = max(slots(resident) // cdiv(c, block_c), 1)
    rows = cdiv(cdiv(m, block_m), chunks) * block_m
    return RowLaunch(block_m, block_c, rows, num_warps)


def row_launch_space(m: int, c: int) -> list[RowLaunch]:
    """Launches an autotuner may try in place of `row_launch`'s choice."""
    choices = itertools.product((5, 7, 8, 14), (8, 16), (2, 4, 8))
    return list(dict.fromkeys(row_launch(m, c, *choice) for choice in choices))


def row_choice(kernel: str, **options: int) -> LaunchChoice:
    """The choice for a pass over [rows, channels], by (rows, channels); `options` are those of `row_launch`."""
    return LaunchChoice(kernel, partial(row_launch, **options), row_launch_space)


def channels_last(x: Tensor) -> Tensor:
    """`x` [N, C, H, W] with its channels innermost in memory; a copy only if `x` has another layout."""
    return x.contiguous(memory_format=torch.channels_last)


Launcher = Callable[..., None]
_replacement: Launcher | None = None


@contextmanager
def launches_go_to(launcher: Launcher) -> Iterator[None]:
    """Inside the block, `launcher` receives the arguments of every `launch` and no kernel starts.

    With meta tensors it records or compiles what a step would launch, without a GPU.
    """
    global _replacement
    previous, _replacement = _replacement, launcher
    try:
        yield
    finally:
        _replacement = previous


def launch(op: str, function: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Start a kernel. Every launch of the package goes through this function (see `launches_go_to`).

    Raises:
        RuntimeError: the compiler or the driver refused; the message gives the op, the kernel and the shapes.
    """
    # The instruction counts and registers are those of fused multiply-adds; Triton 3.10 no longer fuses by default.
    options = {"num_warps": num_warps, "enable_fp_fusion": True, **constants}
    if _replacement is not None:
        _replacement(op, function, grid, *args, **options)
        return
    tensors = [a for a in args if isinstance(a, Tensor)]
    device = tensors[0].device
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    try:
        with nullcontext() if is_current else torch.cuda.device(device):  # to switch the device costs time
            function[grid](*args, **options)
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
        name = getattr(function, "__name__", "kernel")
        raise RuntimeError(
            f"{op}: {name} failed on {shapes} (set EFFNET_KERNELS=torch to run without Triton): {error}"
        ) from error
