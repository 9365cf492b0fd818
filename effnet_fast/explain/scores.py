"""Numbers for maps: how focused they are, how faithful to the model, and how far two models agree.

A map without positive evidence has no focus and agrees with nothing: its scores are NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.explain.maps import uncompiled

# The blurred image that insertion starts from: Petsiuk et al. blur 224 px with a few pixels, which would hide nothing
# of a 32 px image; this is a share of the side.
_BLUR = 0.1
_NOISE = 0.1  # standard deviation of infidelity's noise, in the units of the normalised input
_RADIUS = 0.02  # of sensitivity's ball, the same units; Captum's default
_PERTURBATIONS = 10


def energy_in_top(maps: Tensor, share: float = 0.1) -> Tensor:
    """The share of each map's sum that its largest pixels hold: [N, H, W] -> [N], from `share` (flat) to 1."""
    values = maps.flatten(1).double()
    count = max(1, round(share * values.shape[1]))
    return (values.topk(count).values.sum(1) / values.sum(1)).float()


def entropy(maps: Tensor) -> Tensor:
    """Shannon entropy of each map taken as a distribution over its pixels, by that of a flat map: [N], 0 to 1."""
    values = maps.flatten(1).double()
    p = values / values.sum(1, keepdim=True)
    return (-torch.special.xlogy(p, p).sum(1) / torch.log(torch.tensor(values.shape[1]))).float()


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of maps, pair by pair: two of [N, H, W] -> [N], -1 to 1; ties share their mean rank.

    Adebayo et al. (2018) compare maps by it. NaN where a map is constant.
    """
    ranks = [torch.stack([_ranks(m) for m in maps.flatten(1)]) for maps in (first, second)]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).float()


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def deletion_insertion(
    model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Areas under the curves of the target's probability as pixels go or come in the map's order (Petsiuk et al. 2018).

    Deletion sets the most important pixels to the mean colour first; a faithful map makes the probability fall soon, so
    lower is better. Insertion uncovers them on the blurred image; higher is better. Pixels of equal value go in reading
    order; the areas are by the trapezoid rule over `steps` equal shares of the pixels.

    Args:
        model: [N, 3, S, S] -> logits.
        images: [N, 3, S, S], normalised.
        maps: [N, S, S].
        targets: int64 [N].
        steps: shares that the pixels are cut into.

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
            first = rank < round(step * height * width / steps)
            for curve, shown in zip(
                curves, (torch.where(first, blank, images), torch.where(first, images, blurred)), strict=True
            ):
                curve.append(module(shown).float().softmax(1).gather(1, targets[:, None])[:, 0])
    deletion, insertion = (torch.trapezoid(torch.stack(curve, 1), dx=1 / steps) for curve in curves)
    empty = maps.amax((1, 2)) <= 0
    return deletion.masked_fill(empty, torch.nan), insertion.masked_fill(empty, torch.nan)


def blur(images: Tensor) -> Tensor:
    """Gaussian blur of [N, C, H, W] with a standard deviation of a tenth of the shorter side."""
    sigma = _BLUR * min(images.shape[-2:])
    reach = min(round(3 * sigma), min(images.shape[-2:]) - 1)
    at = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(at**2) / (2 * max(sigma, 1e-3) ** 2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    with torch.autocast(images.device.type, enabled=False):  # in bf16 the CPU takes minutes for these kernels
        rows = F.conv2d(padded, kernel[:, :, None, :], groups=images.shape[1])
        return F.conv2d(rows, kernel[:, :, :, None], groups=images.shape[1])


def infidelity(model: nn.Module, image: Tensor, raw: Tensor, target: Tensor, seed: int) -> float:
    """Captum's infidelity (Yeh et al. 2019) of one map under Gaussian noise, with the optimal scaling; lower is better.

    Args:
        model: [N, 3, S, S] -> logits.
        image: [1, 3, S, S].
        raw: the map [1, S, S]; shared equally among the colours.
        target: int64 [1].
        seed: of the noise, so that an image's number depends on no other image.
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
    """Captum's sensitivity_max (Yeh et al. 2019): a map's largest relative change when noise is added to its image.

    Args:
        explain: images [N, 3, S, S] and targets [N] -> maps [N, h, w].
        image: [1, 3, S, S].
        target: int64 [1], held while the image changes.
        seed: of the noise, uniform within 0.02 of each normalised value.
    """
    from captum.metrics import sensitivity_max

    generator = torch.Generator().manual_seed(seed)

    def perturb(inputs: Tensor, perturb_radius: float) -> Tensor:
        return inputs + perturb_radius * (2 * torch.rand(inputs.shape, generator=generator).to(inputs) - 1)

    def explanation(inputs: tuple[Tensor, ...] | Tensor) -> tuple[Tensor]:
        values = inputs[0] if isinstance(inputs, tuple) else inputs
        return (explain(values, target.expand(len(values))),)  # Captum takes the rows of a bare tensor apart

    return float(sensitivity_max(explanation, image, perturb, perturb_radius=_RADIUS, n_perturb_samples=_PERTURBATIONS))
