"""Stage 1, plan: the candidates of a search, their costs, and the largest phi at which each is within the limits.

Source: Tan and Le, EfficientNet, ICML 2019 (arXiv 1905.11946), equation 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from effnet_fast.model.scaling import PAPER_FACTORS
from effnet_fast.search.family import Family, Scale
from effnet_fast.search.grid import Factors, product, show

MAX_PHI = 7


@dataclass(frozen=True)
class Limits:
    """Upper limits of a scaled model's cost; None for no limit.

    Attributes:
        macs, activations: largest count per image.
        parameters: largest number of trainable parameters.
        latency_ms: largest latency of one image in milliseconds.
        latency: function that measures a scaled model's latency in milliseconds.
    """

    macs: float | None = None
    parameters: float | None = None
    activations: float | None = None
    latency_ms: float | None = None
    latency: Callable[[Scale], float] | None = None

    def exceeded(self, family: Family, scale: Scale) -> dict[str, tuple[float, float]]:
        """Return the limits that a model exceeds: flag -> (the model's value, the limit).

        Latency is measured only if the model is within all other limits.
        """
        counts = family.counts(scale)
        limits: dict[str, tuple[float, float | None]] = {
            "--max_flops": (counts.macs, self.macs),
            "--max_params": (counts.parameters, self.parameters),
            "--max_activations": (counts.activations, self.activations),
        }
        exceeded = {
            flag: (value, limit) for flag, (value, limit) in limits.items() if limit is not None and value > limit
        }
        if not exceeded and self.latency_ms is not None and self.latency is not None:
            value = self.latency(scale)
            if value > self.latency_ms:
                exceeded["--max_latency_ms"] = (value, self.latency_ms)
        return exceeded


@dataclass(frozen=True)
class Candidate:
    """Scaling factors to try, and the model they give at phi = 1.

    Attributes:
        name: for example a1.2-b1.1-g1.15.
        alpha, beta, gamma: factors of depth, width and resolution.
        channels, repeats: one value per stage, seven each.
        image_size: side of the image in pixels.
        parameters, macs, activations: counted on the built model.
        cost_ratio: MACs / (2 * the baseline's MACs). The scaling rule doubles MACs per phi; rounding causes deviations
            from 1.
        largest_phi: 1 to 7; every phi up to it gives a model within the limits.
        estimated_step_ms: training step time: the baseline's measured time times the ratio of minimum memory traffic.
        estimated_memory_mib: training memory on one device.
        same_as: other points of the grid that round to the same model at phi = 1.
        next_phi_exceeds: text listing the limits exceeded at phi = largest_phi + 1; empty if there are none.
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
    next_phi_exceeds: str = ""

    @property
    def scale(self) -> Scale:
        return Scale(self.alpha, self.beta, self.gamma)


@dataclass(frozen=True)
class Dropped:
    """Scaling factors that exceed a limit at phi = 1; `reason` lists the exceeded limits."""

    alpha: float
    beta: float
    gamma: float
    reason: str


@dataclass(frozen=True)
class Workload:
    """A training step: images per batch, bytes per element, and the baseline's measured time in milliseconds."""

    batch_size: int
    element_bytes: int
    baseline_ms: float


@dataclass(frozen=True)
class SearchPlan:
    """Candidates to train, and dropped factors; the content of plan.json."""

    candidates: list[Candidate]
    dropped: list[Dropped]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SearchPlan:
        """Build the plan from the content of plan.json.

        Raises:
            KeyError, TypeError: the content is not a plan.
        """
        return cls([Candidate(**row) for row in content["candidates"]], [Dropped(**row) for row in content["dropped"]])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def by_name(self) -> dict[str, Candidate]:
        return {candidate.name: candidate for candidate in self.candidates}

    def notes(self) -> list[str]:
        """List the counts, the dropped factors and the candidates with a limited phi, one line each."""
        merged = sum(len(candidate.same_as) for candidate in self.candidates)
        total = f"{len(self.candidates)} candidates; {merged} more round to one of them; {len(self.dropped)} dropped"
        dropped = [f"dropped {show((row.alpha, row.beta, row.gamma))}: {row.reason}" for row in self.dropped]
        limited = [
            f"{candidate.name}: recipes up to phi = {candidate.largest_phi}; "
            f"at phi = {candidate.largest_phi + 1}, {candidate.next_phi_exceeds}"
            for candidate in self.candidates
            if candidate.next_phi_exceeds
        ]
        return [total, *dropped, *limited]


def plan_search(family: Family, points: Iterable[Factors], limits: Limits, workload: Workload) -> SearchPlan:
    """Split the distinct models at phi = 1 into candidates, which are within the limits, and dropped factors.

    Raises:
        ValueError: the baseline exceeds a limit, or every candidate does. The message names the limit and the nearest
            value that works.
    """
    _check_baseline(family, limits)
    groups = _group_by_model(family, points)
    candidates, dropped = [], []
    for factors, others in groups:
        if exceeded := limits.exceeded(family, Scale(*factors)):
            dropped.append(Dropped(*factors, reason=f"at phi = 1, {_list_exceeded(exceeded)}"))
        else:
            candidates.append(_candidate(family, factors, others, limits, workload))
    if not candidates:
        raise ValueError(_explain_none_fits(family, [factors for factors, _ in groups], limits))
    return SearchPlan(candidates, dropped)


def _group_by_model(family: Family, points: Iterable[Factors]) -> list[tuple[Factors, list[Factors]]]:
    """Group factors that give the same model at phi = 1; return (representative, other members) per group.

    The paper's factors represent their group. Other groups are represented by the factors with product nearest to 2.
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
    batch = (workload.batch_size, workload.element_bytes)
    slowdown = cost.minimum_step_bytes(*batch) / base.minimum_step_bytes(*batch)
    memory = workload.batch_size * cost.training_bytes_per_image(workload.element_bytes) + cost.state_bytes
    alpha, beta, gamma = factors
    phi, exceeded = largest_phi(family, scale, limits)
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
        largest_phi=phi,
        estimated_step_ms=workload.baseline_ms * slowdown,
        estimated_memory_mib=memory / 2**20,
        same_as=others,
        next_phi_exceeds=_list_exceeded(exceeded),
    )


def largest_phi(family: Family, scale: Scale, limits: Limits) -> tuple[int, dict[str, tuple[float, float]]]:
    """Return the largest phi, 0 to 7, up to which all scaled models are within the limits, and the limits that the next
    phi exceeds."""
    for phi in range(1, MAX_PHI + 1):
        if exceeded := limits.exceeded(family, scale.to_the(phi)):
            return phi - 1, exceeded
    return MAX_PHI, {}


def _list_exceeded(exceeded: dict[str, tuple[float, float]]) -> str:
    units = {"--max_flops": " MACs", "--max_params": " parameters", "--max_activations": " activations"}
    return ", ".join(
        f"{value:,.6g}{units.get(flag, ' ms')} exceeds {flag} {limit:g}" for flag, (value, limit) in exceeded.items()
    )


def _check_baseline(family: Family, limits: Limits) -> None:
    if exceeded := limits.exceeded(family, Scale()):
        listed = ", ".join(f"{flag} {limit:g} is below its {value:,.6g}" for flag, (value, limit) in exceeded.items())
        raise ValueError(
            f"not even the unscaled model fits at {family.base_size} px and output stride {family.output_stride}: "
            f"{listed}; raise the limit"
        )


def _explain_none_fits(family: Family, points: list[Factors], limits: Limits) -> str:
    """Return the error message: the limits that the nearest candidate exceeds, and values that would admit it."""

    def excess(factors: Factors) -> float:
        return max(value / limit for value, limit in limits.exceeded(family, Scale(*factors)).values())

    nearest = min(points, key=excess)
    exceeded = limits.exceeded(family, Scale(*nearest))
    given = ", ".join(f"{flag} {limit:g}" for flag, (_, limit) in exceeded.items())
    needed = ", ".join(
        f"{flag} {value:.6g}" if value % 1 else f"{flag} {value:.0f}" for flag, (value, _) in exceeded.items()
    )
    return f"no candidate fits at phi = 1: {given} excludes the nearest, {show(nearest)}, which needs {needed}"
