"""The blocks: convolution + BatchNorm + Swish, squeeze-and-excitation, and the inverted bottleneck MBConv.

Only this file of effnet_fast imports effnet_kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet_fast import distributed
from effnet_fast.model.scaling import SE_RATIO
from effnet_kernels import ahead as ahead
from effnet_kernels import batch_norm as bn_ops
from effnet_kernels import block as block_ops
from effnet_kernels import bn_silu_squeeze as squeeze_ops
from effnet_kernels import mbconv as mbconv_ops
from effnet_kernels import se_gate as gate_ops
from effnet_kernels import tuning as tuning
from effnet_kernels.depthwise_conv import serves
from effnet_kernels.launch import Kernels, use_kernels
from effnet_kernels.launch import chosen as chosen
from effnet_kernels.launch import launches_used as launches_used
from effnet_kernels.launch import use_launches as use_launches

Padding = Literal["symmetric", "same"]


@dataclass(frozen=True)
class Style:
    """Settings that all blocks of a network share.

    Attributes:
        padding: see `Conv`.
        bn_eps, bn_momentum: see `BatchNorm`.
        kernels: `auto` uses Triton for CUDA tensors and C++ for CPU tensors where they are supported; `triton`,
            `triton-block` and `cpp` raise an error where they are not; `torch` calls the modules in this file. The
            kernels fuse everything between an MBConv's two 1x1 convolutions, and elsewhere BatchNorm, Swish and the
            residual. In training, `triton-block`, and on the CPU in float32 also the C++ kernels, fuse the whole block.
            They do not call the fused modules, so forward hooks inside a block, or on the head in training, need
            `torch`.
    """

    padding: Padding = "symmetric"
    bn_eps: float = 1e-3
    bn_momentum: float = 0.01
    kernels: Kernels = "auto"


def kernels_in_use(kernels: Kernels, device: torch.device) -> Kernels:
    """Which kernels handle float32 tensors on `device`: triton (triton-block too), cpp or torch."""
    if not use_kernels(kernels, torch.empty(1, device=device)):
        return "torch"
    return "triton" if device.type == "cuda" else "cpp"


class BatchNorm(nn.Module):
    """BatchNorm over [N, C, H, W] (Ioffe and Szegedy 2015), with optional statistics over all ranks on any device.

    torch's SyncBatchNorm rejects CPU tensors; this one computes the same on gloo and nccl. All ranks must have the same
    number of values. Parameters and running statistics are float32 [C] for activations of any dtype.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics (torch's convention).

    Raises:
        ValueError: in training mode, there is only one value per channel.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-3, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.synchronised = False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.synchronised and distributed.world_size() > 1:
            return self._synchronised_forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def fused(self) -> bn_ops.BatchNorm:
        """The parameters and statistics for effnet_kernels."""
        shared = self.training and self.synchronised and distributed.world_size() > 1
        return bn_ops.BatchNorm(
            self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, shared
        )

    def _synchronised_forward(self, x: Tensor) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        means, variances = distributed.gather_rows(torch.cat([mean, var])).chunk(2, dim=1)
        mean = means.mean(0)
        # Chan et al. 1983 for equal counts: accurate for large means.
        var = variances.mean(0) + (means - mean).square().mean(0)
        count = x.numel() // x.shape[1] * distributed.world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, momentum={self.momentum}"


class Conv(nn.Conv2d):
    """Convolution with ceil(size / stride) output pixels.

    On maps of one or two pixels a side, the outer taps of a larger kernel only multiply padding, so they are skipped.
    On single pixels, a dense convolution is computed as a matrix product and a depthwise one as a product by channel.
    The results are the same. On the CPU, oneDNN's backward pass over single pixels takes 100 times as long for a 5x5
    depthwise convolution, and 2 to 4 times as long for a dense one.

    Args:
        padding: `symmetric` pads k // 2 on every side; `same` pads like TensorFlow's SAME: as few pixels as
            possible, an odd one at the bottom and right. The two differ for a stride of 2 on an even size.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        padding: Padding = "symmetric",
        *,
        bias: bool = False,
    ) -> None:
        self.asymmetric = padding == "same" and stride > 1
        pad = 0 if self.asymmetric else kernel // 2
        super().__init__(inputs, outputs, kernel, stride, pad, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:
            return super().forward(F.pad(x, self.pads(x)))
        # A traced or exported model must work for other sizes too.
        exporting = torch.jit.is_tracing() or torch.compiler.is_exporting()
        return super().forward(x) if exporting or min(x.shape[-2:]) > 2 else self._forward_small(x)

    def _forward_small(self, x: Tensor) -> Tensor:
        centre = self.kernel_size[0] // 2
        rows, columns = (min(centre, size - 1) for size in x.shape[-2:])
        taps = self.weight[:, :, centre - rows : centre + rows + 1, centre - columns : centre + columns + 1]
        if self.groups == 1:
            if x.shape[-2:] == (1, 1):
                return F.linear(x.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]
            return F.conv2d(x, taps, self.bias, self.stride, (rows, columns))
        if x.shape[-2:] == (1, 1) and self.groups == self.in_channels == self.out_channels and self.bias is None:
            return x * taps[:, 0].to(x.dtype)
        # With oneDNN's own padding, the backward pass takes 4 times as long on 2 x 2 pixels.
        x = F.pad(x, (columns, columns, rows, rows))
        return F.conv2d(x, taps, self.bias, self.stride, groups=self.groups)

    def pads(self, x: Tensor) -> tuple[int, int, int, int]:
        """Padding of `x`, in pixels: left, right, top, bottom."""
        if not self.asymmetric:
            return (self.kernel_size[0] // 2,) * 4
        return (*self._same_padding(x.shape[-1]), *self._same_padding(x.shape[-2]))

    def _same_padding(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class ConvNormAct(nn.Module):
    """Convolution, BatchNorm and (where `act`) Swish: [N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        style: Style,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, kernel, stride, groups, style.padding)
        self.norm = BatchNorm(outputs, style.bn_eps, style.bn_momentum)
        self.act = nn.SiLU() if act else nn.Identity()
        self.activates = act
        self.kernels = style.kernels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if use_kernels(self.kernels, y):
            return self.finish(y)
        return self.act(self.norm(y))

    def fused(self) -> block_ops.ConvNorm:
        """The parameters of this layer for effnet_kernels."""
        return block_ops.ConvNorm(self.conv.weight, self.norm.fused())

    def finish(self, y: Tensor, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Everything after the convolution as one op, times `scale` [N], plus `residual`."""
        return bn_ops.batch_norm(
            y,
            self.norm.fused(),
            training=self.norm.training,
            activation=self.activates,
            residual=residual,
            sample_scale=scale,
            kernels=self.kernels,
        )

    def pooled(self, x: Tensor) -> Tensor:
        """The spatial mean [N, C'] of `forward(x)`. In training with the kernels, the map is not written to memory."""
        if self.norm.training and use_kernels(self.kernels, x):
            return squeeze_ops.bn_silu_squeeze(self.conv(x), self.norm.fused(), kernels=self.kernels)
        return self(x).mean((2, 3))


def norm_relu(x: Tensor, norm: BatchNorm, relu: nn.ReLU, kernels: Kernels, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual). The kernels fuse norm and residual without calling `norm`: its hooks do not run."""
    if use_kernels(kernels, x):
        fused = bn_ops.batch_norm(x, norm.fused(), training=norm.training, residual=residual, kernels=kernels)
        return relu(fused)
    y = norm(x)
    return relu(y if residual is None else y + residual)


class SqueezeExcite(nn.Module):
    """Channel gate (Hu et al. 2018): x * sigmoid(W2 swish(W1 mean(x) + b1) + b2), with the mean over pixels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = Conv(channels, squeezed, 1, bias=True)
        self.expand = Conv(squeezed, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(mean))))

    def fused(self) -> gate_ops.SqueezeExcite:
        """The parameters of this layer for effnet_kernels."""
        assert self.reduce.bias is not None
        assert self.expand.bias is not None
        return gate_ops.SqueezeExcite(self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias)


def drop_path_scale(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth (Huang et al. 2016): 0 with probability `rate`, else 1 / (1 - rate), for each sample.

    Scaling at training time follows the EfficientNet authors' code. Returns [N] for [N, ...], with `x`'s dtype.
    """
    keep = 1 - rate
    return torch.empty(x.shape[0], dtype=x.dtype, device=x.device).bernoulli_(keep) / keep


@contextmanager
def _frozen_statistics(norms: list[BatchNorm]) -> Iterator[None]:
    """In this context, a training pass normalises by the batch and does not change the running statistics."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation (Sandler et al. 2018, Tan and Le 2019).

    1x1 expansion (none if `expand` is 1), depthwise k x k, gate, 1x1 projection without activation. Blocks whose input
    and output have the same shape have a residual with stochastic depth.

    Args:
        inputs, outputs: channels.
        kernel, stride: of the depthwise convolution.
        expand: ratio of the depthwise convolution's channels to the input's.
        style: padding and BatchNorm's constants.
        drop_path: probability that a sample skips the block in training.

    If the attribute `recompute` is set, only the block's input is saved, and the backward pass recomputes activations
    (Chen et al. 2016): the same gradients, statistics and random draws, less memory, one more forward pass.
    """

    expand: ConvNormAct | nn.Identity

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        expand: int,
        *,
        style: Style,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = inputs * expand
        self.kernels = style.kernels if serves(kernel, stride) else "torch"
        self.drop_path = drop_path
        self.recompute = False
        self.residual = stride == 1 and inputs == outputs
        self.expand = ConvNormAct(inputs, hidden, 1, style=style) if expand != 1 else nn.Identity()
        self.depthwise = ConvNormAct(hidden, hidden, kernel, stride, groups=hidden, style=style)
        self.se = SqueezeExcite(hidden, max(1, int(inputs * SE_RATIO)))
        self.project = ConvNormAct(hidden, outputs, 1, act=False, style=style)

    @property
    def drops(self) -> bool:
        return self.residual and self.training and self.drop_path > 0

    def forward(self, x: Tensor) -> Tensor:
        # Draw outside of the recomputed part. Recomputing the draw would have to restore the generator's state, which a
        # CUDA graph cannot do, and compiled code can draw another mask the second time (pytorch #198333).
        scale = drop_path_scale(x, self.drop_path) if self.drops else None
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self._block(x, scale)
        # When compiled, the statistics' update is an output of the forward graph; the backward does not repeat it.
        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": self._contexts}
        return checkpoint(self._block, x, scale, use_reentrant=False, preserve_rng_state=False, **contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        return nullcontext(), _frozen_statistics(norms)

    def _block(self, x: Tensor, scale: Tensor | None) -> Tensor:
        layers = [layer for layer in (self.expand, self.depthwise, self.project) if isinstance(layer, ConvNormAct)]
        # A frozen BatchNorm may evaluate while the others train.
        one_mode = len({layer.norm.training for layer in layers}) == 1
        if one_mode and use_kernels(self.kernels, x):
            whole = self.depthwise.norm.training and block_ops.supports(self.kernels, x, self.project.conv.weight)
            return self._whole_block(x, scale) if whole else self._fused_block(x, scale)
        y = self.project(self.se(self.depthwise(self.expand(x))))
        if scale is not None:
            y = y * scale[:, None, None, None]
        return x + y if self.residual else y

    def _fused_block(self, x: Tensor, scale: Tensor | None) -> Tensor:
        expand = self.expand if isinstance(self.expand, ConvNormAct) else None
        raw = x if expand is None else expand.conv(x)
        conv = self.depthwise.conv
        gated = mbconv_ops.mbconv(
            raw,
            None if expand is None else expand.norm.fused(),
            conv.weight,
            conv.stride[0],
            conv.pads(raw),
            self.depthwise.norm.fused(),
            self.se.fused(),
            training=self.depthwise.norm.training,
            kernels=self.kernels,
        )
        y = self.project.conv(gated)
        return self.project.finish(y, x if self.residual else None, scale)

    def _whole_block(self, x: Tensor, scale: Tensor | None) -> Tensor:
        conv = self.depthwise.conv
        return block_ops.mbconv_block(
            x,
            self.expand.fused() if isinstance(self.expand, ConvNormAct) else None,
            self.depthwise.fused(),
            conv.stride[0],
            conv.pads(x),
            self.se.fused(),
            self.project.fused(),
            sample_scale=scale,
            residual=self.residual,
        )
