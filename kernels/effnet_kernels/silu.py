"""Swish: y = x * s(x) with s the logistic function (Ramachandran et al., 2017; Elfwing et al., 2017).

Forward   y = x s                      reads x, writes y
Backward  dx = dy s (1 + x (1 - s))    reads dy and x, writes dx; s is recomputed, so only x is saved

The other kernels of the package use `sigmoid` and `silu_slope` of this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_kernels.launch import Kernels, cdiv, custom_op, launch, on_cpu, tl, triton, use_kernels

BLOCK = 2048  # values per program: two 16-byte loads of bf16 for each of 128 threads


def silu_reference(x: Tensor) -> Tensor:
    """x * sigmoid(x), any shape and floating type."""
    return torch.nn.functional.silu(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) to 3e-7 in 5 instructions; with exp and a division it takes 12."""
    r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # log2(e)
    return r * r


@triton.jit
def silu_slope(x, s):
    """Derivative of Swish at x, given s = sigmoid(x)."""
    return s * (1.0 + x * (1.0 - s))


@triton.jit  # `size` is specialised: where 16 divides it, accesses are 16 bytes wide
def _silu_forward_kernel(
    x_ptr,  # [size]
    y_ptr,  # [size]
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, (x * sigmoid(x)).to(y_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _silu_backward_kernel(
    dy_ptr,  # [size]
    x_ptr,  # [size]
    dx_ptr,  # [size]
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(dx_ptr + i, (dy * silu_slope(x, sigmoid(x))).to(dx_ptr.dtype.element_ty), mask=i < size)


@custom_op("silu")
def _silu(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    grid = (cdiv(x.numel(), BLOCK),)
    launch("silu", _silu_forward_kernel, grid, x, y, x.numel(), BLOCK=BLOCK, num_warps=4)
    return y


@custom_op("silu_backward")
def _silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    grid = (cdiv(x.numel(), BLOCK),)
    launch("silu", _silu_backward_kernel, grid, dy, x, dx, x.numel(), BLOCK=BLOCK, num_warps=4)
    return dx


_silu.register_fake(torch.empty_like)
_silu_backward.register_fake(lambda dy, x: torch.empty_like(x))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return _silu_backward(_with_strides_of(dy, x), x)


_silu.register_autograd(_backward, setup_context=_setup)


def _dense(x: Tensor) -> Tensor:
    """`x` itself if it is dense, contiguous or channels last, else a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _with_strides_of(dy: Tensor, x: Tensor) -> Tensor:
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


def silu(x: Tensor, *, kernels: Kernels = "auto") -> Tensor:
    """Swish of `x`, any shape; returns its shape and dtype. A dense `x` keeps its layout and is not copied."""
    if not use_kernels(kernels, x) or on_cpu(x):  # ATen's Swish serves the CPU: there is no C++ op
        return silu_reference(x)
    return _silu(_dense(x))
