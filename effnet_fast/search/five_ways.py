"""The five models of the scaling study: the baseline and four ways to scale it up (table 7 and figure 8).

Source: Tan and Le, EfficientNet, ICML 2019 (arXiv 1905.11946), section 5.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from effnet_fast.model.scaling import PAPER_FACTORS
from effnet_fast.search.family import Family, Scale

MAX_RATIO = 256  # largest target / the baseline's MACs: 2^8, as at phi = 8
TOLERANCE = 1.05  # costs count as equal if the largest / the smallest is at most this
DEEPER, WIDER, HIGHER, COMPOUND = "deeper", "wider", "higher-resolution", "compound"


@dataclass(frozen=True)
class StudyModel:
    """A model of the study.

    Attributes:
        name: baseline, deeper, wider, higher-resolution or compound; or the name of a reference model.
        scale: multipliers of the baseline; None for a reference model.
        target: MACs per image that `solve` aimed at; None for the baseline, table 7 and reference models.
    """

    name: str
    scale: Scale | None
    target: float | None = None

    @property
    def label(self) -> str:
        """Text for tables and plots, e.g. `compound (d = 1.4, w = 1.2, r = 1.3)`."""
        if self.scale is None:
            return self.name
        factors = {"d": self.scale.depth, "w": self.scale.width, "r": self.scale.resolution}
        details = ", ".join(f"{name} = {value:.4g}" for name, value in factors.items() if value != 1)
        return f"{self.name} ({details})" if details else self.name


BASELINE = StudyModel("baseline", Scale())
TABLE_7 = (
    BASELINE,
    StudyModel(DEEPER, Scale(depth=4)),
    StudyModel(WIDER, Scale(width=2)),
    StudyModel(HIGHER, Scale(resolution=2)),
    StudyModel(COMPOUND, Scale(depth=1.4, width=1.2, resolution=1.3)),
)


def solve(family: Family, target: float) -> tuple[StudyModel, ...]:
    """Scale the baseline to `target` MACs per image in four ways.

    Repeats, channels and pixels are whole numbers, so each way offers a model just below and one just above the target.
    The combination of four whose costs differ least is returned.

    Raises:
        ValueError: the target is below the baseline's cost or over 256 times it, or no four models are within 5 % of
            each other. The message gives the nearest target that works.
    """
    least = family.counts(Scale()).macs
    if target < least:
        raise ValueError(f"--target_flops {target:.4g} is below the baseline's {least:,} MACs: raise it")
    if target > MAX_RATIO * least:
        raise ValueError(
            f"--target_flops {target:.4g} is over {MAX_RATIO} times the baseline's {least:,} MACs: lower it"
        )
    pairs = _pairs(family, target)
    scales = _most_alike(family, pairs)
    if _spread(family, scales) > TOLERANCE:
        raise ValueError(_explain_gap(family, target, pairs))
    return tuple(StudyModel(name, scale, target) for name, scale in zip(pairs, scales, strict=True))


def _pairs(family: Family, target: float) -> dict[str, tuple[Scale, Scale]]:
    """For each way, the models just below and just above the target."""
    return {name: _neighbours(family, way, target) for name, way in _ways(family).items()}


def _most_alike(family: Family, pairs: dict[str, tuple[Scale, Scale]]) -> tuple[Scale, ...]:
    """One model of each pair, such that their costs differ least."""
    return min(itertools.product(*pairs.values()), key=lambda scales: _spread(family, scales))


def _ways(family: Family) -> dict[str, Callable[[int], Scale]]:
    """Map each way to a function of steps 0, 1, 2, ...; step 0 is the baseline; small steps skip no model."""
    alpha, beta, gamma = PAPER_FACTORS
    return {
        DEEPER: lambda step: Scale(depth=1 + step / 12),  # the stages repeat 1, 2, 3 or 4 times
        WIDER: lambda step: Scale(width=1 + step / 160),  # the widest layer, of 1280 channels, changes by 8
        HIGHER: lambda step: Scale(resolution=1 + step / family.base_size),
        COMPOUND: lambda step: Scale(alpha, beta, gamma).to_the(step / 200),
    }


def _neighbours(family: Family, way: Callable[[int], Scale], target: float) -> tuple[Scale, Scale]:
    """Return the last scale below the target and the first that reaches it; if the baseline does, return it twice."""
    below, above = 0, 1
    if family.counts(way(0)).macs >= target:
        return way(0), way(0)
    while family.counts(way(above)).macs < target:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if family.counts(way(middle)).macs < target else (below, middle)
    return way(below), way(above)


def _spread(family: Family, scales: tuple[Scale, ...]) -> float:
    """Return the ratio of the largest to the smallest cost."""
    macs = [family.counts(scale).macs for scale in scales]
    return max(macs) / min(macs)


def _explain_gap(family: Family, target: float, pairs: dict[str, tuple[Scale, Scale]]) -> str:
    """Return the error message: the way with the widest gap around the target, and the nearest target that works."""
    name, neighbours = max(pairs.items(), key=lambda pair: _spread(family, pair[1]))
    low, high = (family.counts(scale).macs for scale in neighbours)
    nearest = _nearest_target(family, target)
    advice = (
        f"use --target_flops {nearest:.4g}, a smaller --output_stride, or another --image_size"
        if nearest
        else "use a smaller --output_stride, or another --image_size"
    )
    return (
        f"no four models of {target:.4g} MACs are within 5 % of each other: {name} costs {low:,} or {high:,} and "
        f"nothing between; {advice}"
    )


def _nearest_target(family: Family, target: float) -> float | None:
    """Return the nearest target that four models reach; search in steps of 2 % up to a factor of about 4."""
    steps = [step for step in range(-70, 71) if target * 1.02**step > family.counts(Scale()).macs]
    for step in sorted(steps, key=abs):
        candidate = float(f"{target * 1.02**step:.4g}")
        if _spread(family, _most_alike(family, _pairs(family, candidate))) <= TOLERANCE:
            return candidate
    return None
