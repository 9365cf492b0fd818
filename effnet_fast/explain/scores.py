"""Scores of maps: focus, faithfulness to the model, and agreement of two models.

The scores of a map without positive evidence are NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor, nn

from effnet_fast.explain.layers import uncompiled

# Standard deviation of insertion's initial blur as a share of the side. Petsiuk et al. use a fixed number of pixels for
# 224 px images, which does not carry over to 32 px.
_BLUR = 0.1
_NOISE = 0.1  # standard deviation of infidelity's noise, in units of the normalised input
_RADIUS = 0.02  # radius of sensitivity's uniform noise, in the same units; Captum's default
_PERTURBATIONS = 10  # noise samples of infidelity and sensitivity


def energy_in_top(maps: Tensor, share: float = 0.1) -> Tensor:
    """Return the share of each map's sum in its largest pixels: [N, H, W] -> [N], between `share` (flat map) and 1."""
    values = maps.flatten(1).double()
    count = max(1, round(share * values.shape[1]))
    return (values.topk(count).values.sum(1) / values.sum(1)).float()


def entropy(maps: Tensor) -> Tensor:
    """Return the Shannon entropy of each map as a distribution over pixels, divided by a flat map's: [N], 0 to 1."""
    values = maps.flatten(1).double()
    p = values / values.sum(1, keepdim=True)
    return (-torch.special.xlogy(p, p).sum(1) / torch.log(torch.tensor(values.shape[1]))).float()


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Compute Spearman's rank correlation of each pair of maps: two of [N, H, W] -> float32 [N], -1 to 1.

    NaN if a map is constant. Adebayo et al. (2018) compare maps with it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        values = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    return torch.tensor(values, dtype=torch.float32)


def deletion_insertion(
    model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Return the areas under the deletion and the insertion curve of each map (Petsiuk et al. 2018).

    The curves are the target's probability while pixels change in the map's order, largest values first. Deletion sets
    pixels to the mean colour: the sooner the probability falls, the more faithful the map, so lower is better.
    Insertion restores pixels of a blurred image: higher is better. Pixels of equal value change in reading order. The
    areas use the trapezoid rule over `steps` equal shares of the pixels.

    Args:
        model: [N, 3, S, S] -> logits.
        images: [N, 3, S, S], normalised.
        maps: [N, S, S].
        targets: int64 [N].
        steps: number of equal shares of the pixels that change one after another.

    Returns:
        Deletion and insertion, float32 [N] each, 0 to 1.
    """
    n, _, height, width = images.shape
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1).view(n, 1, height, width)
    blank, blurred = torch.zeros_like(images), blur(images)
    curves: tuple[list[Tensor], list[Tensor]] = ([], [])
    with uncompiled(model) as module, torch.no_grad():
        for step in range(steps + 1):
            is_changed = rank < round(step * height * width / steps)
            both_inputs = (torch.where(is_changed, blank, images), torch.where(is_changed, images, blurred))
            for curve, inputs in zip(curves, both_inputs, strict=True):
                curve.append(module(inputs).float().softmax(1).gather(1, targets[:, None])[:, 0])
    deletion, insertion = (torch.trapezoid(torch.stack(curve, 1), dx=1 / steps) for curve in curves)
    lacks_evidence = maps.amax((1, 2)) <= 0
    return deletion.masked_fill(lacks_evidence, torch.nan), insertion.masked_fill(lacks_evidence, torch.nan)


def random_maps(maps: Tensor, seeds: Sequence[int]) -> Tensor:
    """Maps without meaning, the control of the faithfulness scores: uniform noise of the same shape, [N, h, w].

    Args:
        maps: the maps that they stand beside; where one has no positive evidence, its control has none either.
        seeds: seed of the noise of each map.
    """
    noise = [torch.rand(maps.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(maps) * (maps.amax((1, 2), keepdim=True) > 0)


def blur(images: Tensor) -> Tensor:
    """Blur [N, C, H, W] with a Gaussian whose standard deviation is a tenth of the shorter side."""
    sigma = _BLUR * min(images.shape[-2:])
    radius = min(round(3 * sigma), min(images.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * max(sigma, 1e-3) ** 2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    with torch.autocast(images.device.type, enabled=False):  # in bf16, a CPU takes minutes for these convolutions
        rows = F.conv2d(padded, kernel[:, :, None, :], groups=images.shape[1])
        return F.conv2d(rows, kernel[:, :, :, None], groups=images.shape[1])


def infidelity(model: nn.Module, image: Tensor, raw: Tensor, target: Tensor, seed: int) -> float:
    """Return Captum's infidelity (Yeh et al. 2019) of one map under Gaussian noise, optimally scaled; lower is better.

    Args:
        model: [N, 3, S, S] -> logits.
        image: [1, 3, S, S].
        raw: the map [1, S, S]; divided equally among the colours.
        target: int64 [1].
        seed: seed of the noise.
    """
    from captum.metrics import infidelity as captum_infidelity

    generator = torch.Generator().manual_seed(seed)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = _NOISE * torch.randn(inputs.shape, generator=generator).to(inputs)
        return noise, inputs - noise

    attributions = (raw[:, None] / 3).expand_as(image)
    with uncompiled(model) as module:
        return float(
            captum_infidelity(
                module, perturb, image, attributions, target=target, n_perturb_samples=_PERTURBATIONS, normalize=True
            )
        )


def sensitivity(explain: Callable[[Tensor, Tensor], Tensor], image: Tensor, target: Tensor, seed: int) -> float:
    """Return Captum's sensitivity_max (Yeh et al. 2019): the largest relative change of a map when noise is added.

    Args:
        explain: images [N, 3, S, S] and targets [N] -> maps [N, h, w].
        image: [1, 3, S, S].
        target: int64 [1]; the same class for every noisy image.
        seed: seed of the noise, which is uniform in [-0.02, 0.02] in normalised units.
    """
    from captum.metrics import sensitivity_max

    generator = torch.Generator().manual_seed(seed)

    def perturb(inputs: Tensor, perturb_radius: float) -> Tensor:
        return inputs + perturb_radius * (2 * torch.rand(inputs.shape, generator=generator).to(inputs) - 1)

    def explanation(inputs: tuple[Tensor, ...] | Tensor) -> tuple[Tensor]:
        values = inputs[0] if isinstance(inputs, tuple) else inputs
        return (explain(values, target.expand(len(values))),)  # a tuple: Captum splits a bare tensor into rows

    return float(sensitivity_max(explanation, image, perturb, perturb_radius=_RADIUS, n_perturb_samples=_PERTURBATIONS))
