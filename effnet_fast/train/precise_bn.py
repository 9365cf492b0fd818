"""Precise BN: BatchNorm statistics of the weights as they are (Wu and Johnson 2021, arXiv 2105.07576, section 3).

BatchNorm evaluates with moving averages over training batches. They are of other data than evaluation sees if batches
are mixed or images are smaller than those evaluated, they lag behind the weights, and those of a moving average of
weights are an average of statistics, not the statistics of the average.
"""

from __future__ import annotations

import torch
from torch import nn

from effnet_fast.model import batch_norms
from effnet_fast.precision import autocast
from effnet_fast.train.evaluate import Batches, evaluating
from effnet_fast.train.flat_tensors import FlatTensors


def precise_bn(model: nn.Module, batches: Batches, *, precision: str, device: torch.device) -> None:
    """Replace the running statistics by those of training batches; all ranks must call this together.

    The mean is the plain average of the batches' means, the variance that of their unbiased variances, over the batches
    of all ranks; torch's `update_bn` and fvcore's `update_bn_stats` compute the same on one rank. Dropout and
    stochastic depth are off. Frozen layers keep their statistics.

    Args:
        model: in training or evaluation mode; the mode is restored.
        batches: images [N, 3, H, W] of this rank, of one N, and labels, which are not used.
        precision: autocast precision: bf16, fp16 or no.
        device: device of the model and the batches.
    """
    norms = [norm for norm in batch_norms(model) if norm.weight.requires_grad]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.train()
        for i, (images, _) in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (i + 1)
            with autocast(precision, device):
                model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    if norms:
        FlatTensors(t for norm in norms for t in (norm.running_mean, norm.running_var)).average_over_ranks()
