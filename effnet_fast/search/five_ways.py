"""The scaling study: ways to spend a budget on a larger baseline, as the EfficientNet paper's table 7 and figure 8.

Source: Tan and Le, EfficientNet, ICML 2019 (arXiv 1905.11946), section 5.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from effnet_fast.model.scaling import PAPER_FACTORS
from effnet_fast.search.family import Family, Scale

LARGEST_TARGET = 256  # times the baseline, as phi = 8 would be
TOLERANCE = 1.05  # the dearest of four models that cost the same, over the cheapest
DEEPER, WIDER, HIGHER, COMPOUND = "deeper", "wider", "higher-resolution", "compound"


@dataclass(frozen=True)
class Member:
    """A model of the study.

    Attributes:
        name: baseline, deeper, wider, higher-resolution or compound; or a reference model's own.
        scale: its multipliers; None for a reference model.
        target: MACs of one image that it was solved for; None for the baseline and the paper's factors.
    """

    name: str
    scale: Scale | None
    target: float | None = None

    @property
    def label(self) -> str:
        """For people: `compound (d = 1.4, w = 1.2, r = 1.3)`."""
        if self.scale is None:
            return self.name
        factors = {"d": self.scale.depth, "w": self.scale.width, "r": self.scale.resolution}
        told = ", ".join(f"{name} = {value:.4g}" for name, value in factors.items() if value != 1)
        return f"{self.name} ({told})" if told else self.name


BASELINE = Member("baseline", Scale())
TABLE_7 = (
    BASELINE,
    Member(DEEPER, Scale(depth=4)),
    Member(WIDER, Scale(width=2)),
    Member(HIGHER, Scale(resolution=2)),
    Member(COMPOUND, Scale(depth=1.4, width=1.2, resolution=1.3)),
)


def solve(family: Family, target: float) -> tuple[Member, ...]:
    """The four ways to scale the baseline to `target` MACs of one image.

    Each way has a model just below and one just above the target, for repeats, channels and pixels are whole numbers;
    of these the four that cost most nearly the same are taken.

    Raises:
        ValueError: the target is below the baseline's cost, or no four are within 5 % of each other.
    """
    least = family.counts(Scale()).macs
    if target < least:
        raise ValueError(f"--target_flops {target:.4g} is below the baseline's {least:,} MACs: ask for more")
    if target > LARGEST_TARGET * least:
        raise ValueError(
            f"--target_flops {target:.4g} is over {LARGEST_TARGET} times the baseline's {least:,} MACs: ask for less"
        )
    pairs = _pairs(family, target)
    chosen = _most_alike(family, pairs)
    if _spread(family, chosen) > TOLERANCE:
        raise ValueError(_too_coarse(family, target, pairs))
    return tuple(Member(name, scale, target) for name, scale in zip(pairs, chosen, strict=True))


def _pairs(family: Family, target: float) -> dict[str, tuple[Scale, Scale]]:
    return {name: _neighbours(family, way, target) for name, way in _ways(family).items()}


def _most_alike(family: Family, pairs: dict[str, tuple[Scale, Scale]]) -> tuple[Scale, ...]:
    """One of each pair, so that their costs differ least."""
    return min(itertools.product(*pairs.values()), key=lambda scales: _spread(family, scales))


def _ways(family: Family) -> dict[str, Callable[[int], Scale]]:
    """Each way as steps 0, 1, 2, ... fine enough to meet every model on it; step 0 is the baseline."""
    alpha, beta, gamma = PAPER_FACTORS
    return {
        DEEPER: lambda step: Scale(depth=1 + step / 12),  # the stages repeat 1, 2, 3 or 4 times
        WIDER: lambda step: Scale(width=1 + step / 160),  # the widest layer, of 1280 channels, changes by 8
        HIGHER: lambda step: Scale(resolution=1 + step / family.base_size),
        COMPOUND: lambda step: Scale(alpha, beta, gamma).to_the(step / 200),
    }


def _neighbours(family: Family, way: Callable[[int], Scale], target: float) -> tuple[Scale, Scale]:
    """The last step below the target and the first that reaches it (twice the baseline, if that reaches it)."""
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
    macs = [family.counts(scale).macs for scale in scales]
    return max(macs) / min(macs)


def _too_coarse(family: Family, target: float, pairs: dict[str, tuple[Scale, Scale]]) -> str:
    """Which way has the widest gap about the target, and the nearest target that none has a gap at."""
    name, ends = max(pairs.items(), key=lambda pair: _spread(family, pair[1]))
    low, high = (family.counts(scale).macs for scale in ends)
    near = _nearest_target(family, target)
    advice = f"try --target_flops {near:.4g}, or a smaller --output_stride" if near else "use a smaller --output_stride"
    return (
        f"no four models of {target:.4g} MACs are within 5 % of each other: {name} can cost {low:,} or {high:,} and "
        f"nothing between; {advice}"
    )


def _nearest_target(family: Family, target: float) -> float | None:
    """The nearest cost, in steps of 2 % up to a factor of about 4, that four models share."""
    steps = [step for step in range(-70, 71) if target * 1.02**step > family.counts(Scale()).macs]
    for step in sorted(steps, key=abs):
        near = float(f"{target * 1.02**step:.4g}")
        if _spread(family, _most_alike(family, _pairs(family, near))) <= TOLERANCE:
            return near
    return None
