"""The inside of an MBConv block (Tan and Le, 2019): everything between its two 1x1 convolutions, as one op.

    a = silu(bn1(x)) (a = x without expansion),  d = depthwise(a),  y = se_gate(bn2(d))

It chains the launchers of the other files so that neither silu(bn1(x)) nor silu(bn2(d)) is ever written. In passes over
the map before the depthwise convolution (E) and after it (D):

Forward   E: read for statistics, read by the convolution.  D: written with its statistics, read for the mean, read
          and written as y.
Backward  D: dy and d read for the five sums, read again and dd written, dd read by the convolution's backward.
          E: x read and dz written by the convolution's backward; dz and x read and dx written.

With the 1x1 convolutions around it (E: written, dx read twice; D: y read twice, dy written) that is 10 E + 13 D; eager
PyTorch makes about 23 E + 29 D. Saved: x, d, the taps, and [N, C] or [C] vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_kernels import depthwise_conv as depthwise
from effnet_kernels.batch_norm import batch_norm_reference, grad_apply
from effnet_kernels.depthwise_conv import Padding, depthwise_conv_reference
from effnet_kernels.gate_mlp import SqueezeExcite, gate_backward
from effnet_kernels.launch import (
    Kernels,
    channels_last,
    chosen,
    cpp_ops,
    custom_op,
    implementation_choice,
    torch_is_faster,
    use_kernels,
)
from effnet_kernels.se_gate import five_sums, se_backward, se_forward, se_gate_reference
from effnet_kernels.statistics import (
    BatchNorm,
    batch_statistics,
    merge_moments,
    needs_grad,
    require_values,
    running_statistics,
    sum_over_ranks,
    update_running,
)

# By (N, C, H, W, k, stride, hidden values of the gate, 1 with an expansion or 0).
mbconv_choice = implementation_choice("mbconv")


def mbconv_reference(
    x: Tensor,
    bn1: BatchNorm | None,
    weight: Tensor,
    stride: int,
    padding: Padding,
    bn2: BatchNorm,
    se: SqueezeExcite,
    *,
    training: bool = True,
) -> Tensor:
    """The equations above in plain PyTorch; arguments as in `mbconv`."""
    a = x if bn1 is None else batch_norm_reference(x, bn1, training=training, activation=True)
    d = depthwise_conv_reference(a, weight, stride, padding)
    return se_gate_reference(d, bn2, se, training=training)


def _norm(stats: Tensor, weight: Tensor | None, bias: Tensor | None):
    return None if weight is None or bias is None else (stats, (weight, bias))


@custom_op("mbconv")
def _mbconv(
    x: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    stride: int,
    padding: list[int],
    eps: float,
    sync: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    left, right, top, bottom = padding
    stats1 = x.new_empty(0, dtype=torch.float32) if weight1 is None else batch_statistics(x, eps, sync)
    norm1, taps = _norm(stats1, weight1, bias1), depthwise.taps_first(weight)
    d, moments = depthwise.forward(x, taps, stride, (left, right, top, bottom), norm1, moments=True)
    assert moments is not None
    stats2 = merge_moments(moments, eps, sync)
    y, pool, gate, hidden = se_forward(d, stats2, (weight2, bias2), SqueezeExcite(w1, b1, w2, b2))
    return y, d, taps, stats1, stats2, pool, gate, hidden


@_mbconv.register_fake
def _(x, weight1, bias1, weight, weight2, bias2, w1, b1, w2, b2, stride, padding, eps, sync):
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    k = weight.shape[-1]
    ho = depthwise.output_size(h, k, stride, top, bottom)
    wo = depthwise.output_size(w, k, stride, left, right)
    shapes = ((k * k, c), (0,) if weight1 is None else (4, c), (4, c), (n, c), (n, c), (n, w1.shape[0]))
    maps = (depthwise.empty_channels_last(x, n, c, ho, wo) for _ in range(2))
    return *maps, *(x.new_empty(s, dtype=torch.float32) for s in shapes)


@custom_op("mbconv_backward")
def _mbconv_backward(
    dy: Tensor,
    x: Tensor,
    d: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    se: list[Tensor],
    saved: list[Tensor],
    stride: int,
    padding: list[int],
    sync: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    left, right, top, bottom = padding
    taps, stats1, stats2, pool, gate, hidden = saved
    bn2 = (weight2, bias2)
    norm1 = _norm(stats1, weight1, bias1)
    if ops := cpp_ops(x):  # computes dd without writing it
        sums = five_sums(dy, d, stats2, bn2)
        dpool, sums2, se_grads = gate_backward(sums, gate, pool, hidden, SqueezeExcite(*se), d.shape[2] * d.shape[3])
        gradient = (dy, d, stats2, *bn2, gate, dpool, sum_over_ranks(sums2, sync))
        first = (None, None, None) if norm1 is None else (stats1, weight1, bias1)
        dx, dw, sums1 = ops.gated_depthwise_backward(*gradient, x, taps, stride, padding, *first)
        dw = depthwise.weight_gradient(dw, weight)
    else:
        dd, sums2, se_grads = se_backward(dy, d, stats2, bn2, SqueezeExcite(*se), (pool, gate, hidden), sync)
        dx, dw, sums1 = depthwise.backward(dd, x, weight, taps, stride, (left, right, top, bottom), norm1)
    if norm1 is not None and sums1 is not None:
        dx = grad_apply(dx, x, stats1, norm1[1], None, sum_over_ranks(sums1, sync), activation=False)
    sums1 = stats1.new_empty(0) if sums1 is None else sums1
    return dx, sums1, dw, sums2, *se_grads


@_mbconv_backward.register_fake
def _(dy, x, d, weight1, bias1, weight, weight2, bias2, se, saved, stride, padding, sync):
    stats1, stats2 = saved[1:3]
    like = (x, stats1[:2], weight, stats2[:2], *se)
    return tuple(torch.empty_like(t) for t in like)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # autograd would write zeros for every saved output
    x, weight1, bias1, *weights, ctx.stride, ctx.padding, _, ctx.sync = inputs
    ctx.save_for_backward(x, output[1], weight1, bias1, *weights, *output[2:])


def _backward(ctx, dy: Tensor, *_: Tensor):
    x, d, weight1, bias1, weight, weight2, bias2, *rest = ctx.saved_tensors
    dx, sums1, dw, sums2, *se_grads = _mbconv_backward(
        channels_last(dy),
        x,
        d,
        weight1,
        bias1,
        weight,
        weight2,
        bias2,
        rest[:4],
        rest[4:],
        ctx.stride,
        ctx.padding,
        ctx.sync,
    )
    first = (None, None) if weight1 is None else (sums1[1].to(weight1.dtype), sums1[0].to(bias1.dtype))
    second = (sums2[1].to(weight2.dtype), sums2[0].to(bias2.dtype))
    return dx, *first, dw, *second, *se_grads, None, None, None, None


_mbconv.register_autograd(_backward, setup_context=_setup)


@custom_op("mbconv_eval")
def _mbconv_eval(
    x: Tensor,
    stats1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight: Tensor,
    stats2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    se: list[Tensor],
    stride: int,
    padding: list[int],
) -> Tensor:
    left, right, top, bottom = padding
    norm1 = None if stats1 is None else _norm(stats1, weight1, bias1)
    taps = depthwise.taps_first(weight)
    d, _ = depthwise.forward(x, taps, stride, (left, right, top, bottom), norm1, moments=False)
    return se_forward(d, stats2, (weight2, bias2), SqueezeExcite(*se))[0]


@_mbconv_eval.register_fake
def _(x, stats1, weight1, bias1, weight, stats2, weight2, bias2, se, stride, padding):
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    k = weight.shape[-1]
    ho = depthwise.output_size(h, k, stride, top, bottom)
    return depthwise.empty_channels_last(x, n, c, ho, depthwise.output_size(w, k, stride, left, right))


def mbconv(
    x: Tensor,
    bn1: BatchNorm | None,
    weight: Tensor,
    stride: int,
    padding: Padding,
    bn2: BatchNorm,
    se: SqueezeExcite,
    *,
    training: bool = True,
    kernels: Kernels = "auto",
) -> Tensor:
    """From the expansion's raw output to the projection's input.

    Args:
        x: [N, C, H, W], the expansion's output before its BatchNorm; the block's input if it has no expansion.
        bn1: the expansion's BatchNorm, or None.
        weight: [C, 1, k, k] of the depthwise convolution, k 3 or 5.
        stride, padding: of the depthwise convolution; padding as (left, right, top, bottom).
        bn2: the depthwise convolution's BatchNorm; bn1 must have the same eps and sync.
        se: the gate's weights.
        training: False uses the running statistics; if a gradient is needed there, the reference runs.

    Returns:
        [N, C, HO, WO] of x's dtype, channels last.

    Raises:
        ValueError: training on one value per channel.
    """
    norms = () if bn1 is None else (bn1.weight, bn1.bias)
    differentiable = needs_grad(x, *norms, weight, bn2.weight, bn2.bias, *se)
    sizes = (*x.shape, weight.shape[-1], stride, se.reduce_weight.shape[0], int(bn1 is not None))
    if training and chosen(kernels) == "auto" and not bn2.sync and torch_is_faster("mbconv", sizes):
        kernels = "torch"
    served = depthwise.serves(weight.shape[-1], stride) and use_kernels(kernels, x)
    if not served or (not training and differentiable):
        return mbconv_reference(x, bn1, weight, stride, padding, bn2, se, training=training)
    assert bn1 is None or (bn1.eps, bn1.sync) == (bn2.eps, bn2.sync)
    x, weight, bn2 = channels_last(x), weight.contiguous(), bn2.contiguous()
    se = SqueezeExcite(*(p.contiguous() for p in se))
    weight1, bias1 = [p.contiguous() for p in norms] or (None, None)
    if not training:
        stats1 = None if bn1 is None else running_statistics(bn1)
        return _mbconv_eval(
            x,
            stats1,
            weight1,
            bias1,
            weight,
            running_statistics(bn2),
            bn2.weight,
            bn2.bias,
            list(se),
            stride,
            list(padding),
        )
    if bn1 is not None:
        require_values(x.shape, bn2.sync)
    n, _, h, w = x.shape
    k, (left, right, top, bottom) = weight.shape[-1], padding
    out = depthwise.output_size(h, k, stride, top, bottom) * depthwise.output_size(w, k, stride, left, right)
    require_values((n, weight.shape[0], out), bn2.sync)
    y, _, _, stats1, stats2, *_ = _mbconv(
        x, weight1, bias1, weight, bn2.weight, bn2.bias, *se, stride, list(padding), bn2.eps, bn2.sync
    )
    if bn1 is not None:
        update_running(bn1, stats1)
    update_running(bn2, stats2)
    return y
