"""Training BatchNorm, Swish and the spatial mean, without writing the activation: an EfficientNet's head.

    z = gamma (x - mean) rstd + beta,  pool[n, c] = mean over h, w of silu(z)

Forward   One pass over x for the statistics (statistics.py), one for the mean.
Backward  The gradient at silu(z) is dpool / HW. One pass over x sums silu'(z) and silu'(z) xhat; weighted by dpool they
          give dgamma, dbeta and both means of BatchNorm's backward. A second pass reads x and writes dx.

The passes over an image are those of se_gate.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_kernels.batch_norm import batch_norm_reference
from effnet_kernels.launch import (
    Kernels,
    channels_last,
    chosen,
    custom_op,
    implementation_choice,
    torch_is_faster,
    use_kernels,
)
from effnet_kernels.se_gate import apply_sums, five_sums, squeeze
from effnet_kernels.statistics import (
    BatchNorm,
    batch_statistics,
    needs_grad,
    require_values,
    running_statistics,
    sum_over_ranks,
    update_running,
)

bn_silu_squeeze_choice = implementation_choice("bn_silu_squeeze")  # by (N, C, H, W)


def bn_silu_squeeze_reference(x: Tensor, bn: BatchNorm, *, training: bool = True) -> Tensor:
    """BatchNorm, Swish and spatial mean in plain PyTorch: [N, C, H, W] to [N, C]."""
    return batch_norm_reference(x, bn, training=training, activation=True).mean((2, 3))


@custom_op("bn_silu_squeeze")
def _bn_silu_squeeze(x: Tensor, weight: Tensor, bias: Tensor, eps: float, sync: bool) -> tuple[Tensor, Tensor]:
    stats = batch_statistics(x, eps, sync)
    return squeeze(x, stats, (weight, bias)).to(x.dtype), stats


@_bn_silu_squeeze.register_fake
def _(x, weight, bias, eps, sync):
    return x.new_empty(x.shape[:2]), x.new_empty(4, x.shape[1], dtype=torch.float32)


@custom_op("bn_silu_squeeze_backward")
def _bn_silu_squeeze_backward(
    dpool: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, sync: bool
) -> tuple[Tensor, Tensor]:
    bn = (weight, bias)
    dpool = dpool.float().contiguous()
    sums = (five_sums(None, x, stats, bn) * (dpool / (x.shape[2] * x.shape[3]))).sum(1)
    return apply_sums(None, x, stats, bn, None, dpool, sum_over_ranks(sums, sync)), sums


@_bn_silu_squeeze_backward.register_fake
def _(dpool, x, stats, weight, bias, sync):
    return torch.empty_like(x), torch.empty_like(stats[:2])


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # autograd would write zeros for every saved output
    x, weight, bias, _, ctx.sync = inputs
    ctx.save_for_backward(x, output[1], weight, bias)


def _backward(ctx, dpool: Tensor, _: Tensor):
    x, stats, weight, bias = ctx.saved_tensors
    dx, sums = _bn_silu_squeeze_backward(dpool, x, stats, weight, bias, ctx.sync)
    return dx, sums[1].to(weight.dtype), sums[0].to(bias.dtype), None, None


_bn_silu_squeeze.register_autograd(_backward, setup_context=_setup)


@custom_op("bn_silu_squeeze_eval")
def _bn_silu_squeeze_eval(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return squeeze(x, stats, (weight, bias)).to(x.dtype)


@_bn_silu_squeeze_eval.register_fake
def _(x, stats, weight, bias):
    return x.new_empty(x.shape[:2])


def bn_silu_squeeze(x: Tensor, bn: BatchNorm, *, training: bool = True, kernels: Kernels = "auto") -> Tensor:
    """Spatial mean of Swish of BatchNorm of `x` [N, C, H, W].

    Evaluation uses the running statistics; if a gradient is needed there, the reference runs.

    Returns:
        [N, C] of x's dtype.

    Raises:
        ValueError: training on one value per channel.
    """
    if training and chosen(kernels) == "auto" and not bn.sync and torch_is_faster("bn_silu_squeeze", tuple(x.shape)):
        kernels = "torch"
    if not use_kernels(kernels, x) or (not training and needs_grad(x, bn.weight, bn.bias)):
        return bn_silu_squeeze_reference(x, bn, training=training)
    x, bn = channels_last(x), bn.contiguous()
    if not training:
        return _bn_silu_squeeze_eval(x, running_statistics(bn), bn.weight, bn.bias)
    require_values(x.shape, bn.sync)
    pool, stats = _bn_silu_squeeze(x, bn.weight, bn.bias, bn.eps, bn.sync)
    update_running(bn, stats)
    return pool
