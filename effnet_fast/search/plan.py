"""The candidates (alpha, beta, gamma) of a search, what they cost, and how far each can be scaled within the limits.

Source: Tan and Le, EfficientNet, ICML 2019 (arXiv 1905.11946), equation 3 and section 3.3: a grid under
alpha * beta^2 * gamma^2 of about 2, searched at phi = 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from effnet_fast.model.scaling import PAPER_FACTORS
from effnet_fast.search.family import Family, Scale

LARGEST_PHI = 7
MOST_POINTS = 1_000_000
Span = tuple[float, float]
Factors = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Which factors to try.

    Attributes:
        alpha, beta, gamma: ends of the depth, width and resolution factors.
        step: distance of the factors.
        product: what alpha * beta^2 * gamma^2 must lie in.
    """

    alpha: Span
    beta: Span
    gamma: Span
    step: float
    product: Span

    def feasible(self) -> list[Factors]:
        """All factors of the grid whose product lies within.

        Raises:
            ValueError: there are none; the line says which bound is at fault and the nearest that would not be. Or the
                grid is too large to be walked through.
        """
        size = math.prod(_count(ends, self.step) for ends in (self.alpha, self.beta, self.gamma))
        if size > MOST_POINTS:
            raise ValueError(
                f"--grid_step {self.step:g} makes {size:,} points, more than {MOST_POINTS:,}: take a larger step, or "
                "narrower --alpha, --beta and --gamma"
            )
        if not (found := self._within()):
            raise ValueError(self._why_empty(self._points()))
        return found

    def _points(self) -> list[Factors]:
        alphas, betas, gammas = (_values(ends, self.step) for ends in (self.alpha, self.beta, self.gamma))
        return list(itertools.product(alphas, betas, gammas))

    def _within(self) -> list[Factors]:
        low, high = self.product
        return [point for point in self._points() if low - 1e-9 <= product(point) <= high + 1e-9]

    def _would_do(self, **changes: Any) -> bool:
        return bool(dataclasses.replace(self, **changes)._within())

    def _why_empty(self, points: list[Factors]) -> str:
        low, high = self.product
        largest, smallest = max(points, key=product), min(points, key=product)
        told = f"no alpha * beta^2 * gamma^2 of the grid lies in {low:g}..{high:g}: "
        if product(largest) < low:
            needed = low / (product(largest) / largest[0])
            alpha = next(value for value in itertools.count(largest[0], self.step) if value >= needed - 1e-9)
            advice = f"with --alpha up to {alpha:.6g} it would not be empty"
            return told + (
                f"the upper ends bound it, which reach {product(largest):.4g} at {_told(largest)}; "
                + (advice if self._would_do(alpha=(self.alpha[0], alpha)) else self._wider(largest))
            )
        if product(smallest) > high:
            return told + (
                f"the lower ends bound it, which begin at {product(smallest):.4g}, {_told(smallest)}; "
                f"start them lower, or allow --product {low:g}..{_up(product(smallest), 0.01):g}"
            )
        near = min(points, key=lambda point: max(low - product(point), product(point) - high))
        return told + (
            f"--grid_step {self.step:g} passes over it; the nearest is {product(near):.4g} at {_told(near)}; "
            + (f"try --grid_step {self.step / 2:g}" if self._would_do(step=self.step / 2) else self._wider(near))
        )

    def _wider(self, point: Factors) -> str:
        """The advice that always holds: a product's range which takes in a point of the grid."""
        low, high = min(self.product[0], product(point)), max(self.product[1], product(point))
        return f"allow --product {math.floor(low * 1e4) / 1e4:g}..{math.ceil(high * 1e4) / 1e4:g}"


def product(factors: Factors) -> float:
    """alpha * beta^2 * gamma^2."""
    alpha, beta, gamma = factors
    return alpha * beta**2 * gamma**2


def _count(ends: Span, step: float) -> int:
    return int((ends[1] - ends[0]) / step + 1e-6) + 1


def _values(ends: Span, step: float) -> list[float]:
    return [round(ends[0] + i * step, 6) for i in range(_count(ends, step))]


def _up(value: float, step: float) -> float:
    """The next multiple of `step`."""
    return round(-(-value // step) * step, 6)


def _told(factors: Factors) -> str:
    return "({:g}, {:g}, {:g})".format(*factors)


@dataclass(frozen=True)
class Limits:
    """The most that a scaled model may cost; None is no limit.

    Attributes:
        macs, activations: of one image.
        parameters: trainable numbers.
        latency_ms: milliseconds for one image, as `latency` measures them.
        latency: from a scale to its measured latency.
    """

    macs: float | None = None
    parameters: float | None = None
    activations: float | None = None
    latency_ms: float | None = None
    latency: Callable[[Scale], float] | None = None

    def exceeded(self, family: Family, scale: Scale) -> dict[str, tuple[float, float]]:
        """Limits that a model breaks, by flag: what it has and what is allowed. Latency is measured only if all else
        holds."""
        counts = family.counts(scale)
        limits: dict[str, tuple[float, float | None]] = {
            "--max_flops": (counts.macs, self.macs),
            "--max_params": (counts.parameters, self.parameters),
            "--max_activations": (counts.activations, self.activations),
        }
        broken = {flag: (has, most) for flag, (has, most) in limits.items() if most is not None and has > most}
        if not broken and self.latency_ms is not None and self.latency is not None:
            has = self.latency(scale)
            if has > self.latency_ms:
                broken["--max_latency_ms"] = (has, self.latency_ms)
        return broken


@dataclass(frozen=True)
class Candidate:
    """Factors and the model they make at phi = 1.

    Attributes:
        name: e.g. a1.2-b1.1-g1.15.
        alpha, beta, gamma: factors of depth, width and resolution.
        channels, repeats: of the seven stages.
        image_size: pixels.
        parameters, macs, activations: counted by fvcore on the built model.
        cost_ratio: MACs over 2^phi times the baseline's; rounding moves it.
        largest_phi: the largest of 1 to 7 at which the scaled model keeps all limits.
        estimated_step_ms: of a training step; the baseline's, measured, times the ratio of the least bytes to move.
        estimated_memory_mib: of training, on one device.
        same_as: other factors of the grid that round to the same model at phi = 1.
    """

    name: str
    alpha: float
    beta: float
    gamma: float
    channels: list[int]
    repeats: list[int]
    image_size: int
    parameters: int
    macs: int
    activations: int
    cost_ratio: float
    largest_phi: int
    estimated_step_ms: float
    estimated_memory_mib: float
    same_as: list[Factors] = field(default_factory=list)

    @property
    def scale(self) -> Scale:
        return Scale(self.alpha, self.beta, self.gamma)


@dataclass(frozen=True)
class Dropped:
    """Factors that no phi fits, and why."""

    alpha: float
    beta: float
    gamma: float
    reason: str


@dataclass(frozen=True)
class Workload:
    """A training step: images of it, bytes of a number, and how long the baseline takes for it, in milliseconds."""

    batch_size: int
    element_bytes: int
    baseline_ms: float


def candidates(
    family: Family, points: Iterable[Factors], limits: Limits, workload: Workload
) -> tuple[list[Candidate], list[Dropped]]:
    """Every distinct model among the factors that keeps the limits at phi = 1 at least, and what was dropped.

    Raises:
        ValueError: not even the baseline keeps the limits, or no candidate does; the line names the limit and the
            nearest one that would do.
    """
    _refuse_below_baseline(family, limits)
    groups = _distinct(family, points)
    kept, dropped = [], []
    for factors, others in groups:
        broken = limits.exceeded(family, Scale(*factors))
        if broken:
            reason = ", ".join(f"{has:,.6g} exceeds {flag} {most:g}" for flag, (has, most) in broken.items())
            dropped.append(Dropped(*factors, reason=f"at phi = 1, {reason}"))
        else:
            kept.append(_candidate(family, factors, others, limits, workload))
    if not kept:
        raise ValueError(_why_none_fits(family, [factors for factors, _ in groups], limits))
    return kept, dropped


def _distinct(family: Family, points: Iterable[Factors]) -> list[tuple[Factors, list[Factors]]]:
    """Factors that make different models at phi = 1, each with the others that make the same one.

    The paper's factors stand for their group; elsewhere those whose product is nearest to 2.
    """
    groups: dict[object, list[Factors]] = {}
    for factors in points:
        groups.setdefault(family.shape(Scale(*factors)), []).append(factors)
    ordered = [
        sorted(group, key=lambda factors: (factors != PAPER_FACTORS, abs(product(factors) - 2)))
        for group in groups.values()
    ]
    return [(group[0], group[1:]) for group in ordered]


def _candidate(
    family: Family, factors: Factors, others: list[Factors], limits: Limits, workload: Workload
) -> Candidate:
    scale = Scale(*factors)
    cost, base = family.cost(scale), family.cost(Scale())
    layout, size = family.shape(scale)
    load = (workload.batch_size, workload.element_bytes)
    slower = cost.minimum_step_bytes(*load) / base.minimum_step_bytes(*load)
    memory = workload.batch_size * cost.training_bytes_per_image(workload.element_bytes) + cost.state_bytes
    alpha, beta, gamma = factors
    return Candidate(
        name=f"a{alpha:g}-b{beta:g}-g{gamma:g}",
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        channels=[stage.channels for stage in layout.stages],
        repeats=[stage.repeats for stage in layout.stages],
        image_size=size,
        parameters=cost.parameters,
        macs=cost.macs,
        activations=cost.activations,
        cost_ratio=cost.macs / (2 * base.macs),
        largest_phi=largest_phi(family, scale, limits),
        estimated_step_ms=workload.baseline_ms * slower,
        estimated_memory_mib=memory / 2**20,
        same_as=others,
    )


def largest_phi(family: Family, scale: Scale, limits: Limits) -> int:
    """The largest phi of 1 to 7 up to which every scaled model keeps the limits; 0 if none does."""
    fits = itertools.takewhile(lambda phi: not limits.exceeded(family, scale.to_the(phi)), range(1, LARGEST_PHI + 1))
    return max(fits, default=0)


def _refuse_below_baseline(family: Family, limits: Limits) -> None:
    broken = limits.exceeded(family, Scale())
    if broken:
        told = ", ".join(f"{flag} {most:g} is below its {has:,.6g}" for flag, (has, most) in broken.items())
        raise ValueError(
            f"not even the unscaled model fits, {family.base_size} px at output stride {family.output_stride}: {told}"
        )


def _why_none_fits(family: Family, points: list[Factors], limits: Limits) -> str:
    """The limits that the candidate which comes closest breaks, and what would do."""

    def excess(factors: Factors) -> float:
        return max(has / most for has, most in limits.exceeded(family, Scale(*factors)).values())

    near = min(points, key=excess)
    broken = limits.exceeded(family, Scale(*near))
    told = ", ".join(f"{flag} {most:g}" for flag, (_, most) in broken.items())
    needed = ", ".join(f"{flag} {has:.6g}" if has % 1 else f"{flag} {has:.0f}" for flag, (has, _) in broken.items())
    return f"no candidate fits at phi = 1: {told} rules out the nearest, {_told(near)}, which needs {needed}"
