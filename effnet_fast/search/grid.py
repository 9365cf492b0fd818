"""The grid of (alpha, beta, gamma) that a search tries.

Source: Tan and Le, EfficientNet, ICML 2019 (arXiv 1905.11946), section 3.3: a grid under alpha * beta^2 * gamma^2 of
about 2, searched at phi = 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 1_000_000
Range = tuple[float, float]
Factors = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """A regular grid, bounded by the product of its factors.

    Attributes:
        alpha, beta, gamma: lowest and highest factor of depth, width and resolution.
        step: distance between neighbouring factors.
        product: allowed range of alpha * beta^2 * gamma^2.
    """

    alpha: Range
    beta: Range
    gamma: Range
    step: float
    product: Range

    def feasible(self) -> list[Factors]:
        """Return all points whose product is in range.

        Raises:
            ValueError: no point is in range, or the grid has over a million points. The message names the flag to
                change and a value that works.
        """
        size = math.prod(_count(bounds, self.step) for bounds in (self.alpha, self.beta, self.gamma))
        if size > MAX_POINTS:
            raise ValueError(
                f"--grid_step {self.step:g} makes {size:,} points, more than {MAX_POINTS:,}: use a larger step, or "
                "narrower --alpha, --beta and --gamma"
            )
        points = self._points_in_range()
        if not points:
            raise ValueError(self._explain_empty(self._points()))
        return points

    def _points(self) -> list[Factors]:
        alphas, betas, gammas = (_values(bounds, self.step) for bounds in (self.alpha, self.beta, self.gamma))
        return list(itertools.product(alphas, betas, gammas))

    def _points_in_range(self) -> list[Factors]:
        low, high = self.product
        return [point for point in self._points() if low - 1e-9 <= product(point) <= high + 1e-9]

    def _has_points_with(self, **changes: Any) -> bool:
        return bool(dataclasses.replace(self, **changes)._points_in_range())

    def _explain_empty(self, points: list[Factors]) -> str:
        low, high = self.product
        largest, smallest = max(points, key=product), min(points, key=product)
        message = f"no alpha * beta^2 * gamma^2 of the grid is in {low:g}..{high:g}: "
        if product(largest) < low:
            return message + (
                f"the upper bounds are too low, they reach {product(largest):.4g} at {show(largest)}; "
                + self._advise_alpha(largest)
            )
        if product(smallest) > high:
            return message + (
                f"the lower bounds are too high, the smallest product is {product(smallest):.4g} at {show(smallest)}; "
                f"lower them, or use --product {low:g}..{_round_up(product(smallest), 0.01):g}"
            )
        nearest = min(points, key=lambda point: max(low - product(point), product(point) - high))
        finer = self.step / 2
        return message + (
            f"--grid_step {self.step:g} is too coarse, the nearest product is {product(nearest):.4g} at "
            f"{show(nearest)}; "
            + (f"use --grid_step {finer:g}" if self._has_points_with(step=finer) else self._advise_product(nearest))
        )

    def _advise_alpha(self, largest: Factors) -> str:
        """Advise a higher upper bound of alpha, or another range of products if that does not suffice."""
        needed = self.product[0] / (product(largest) / largest[0])
        alpha = next(value for value in itertools.count(largest[0], self.step) if value >= needed - 1e-9)
        bounds = self.alpha[0], _round_up(alpha, 1e-4)
        if self._has_points_with(alpha=bounds):
            return f"use --alpha {bounds[0]}..{bounds[1]}"
        return self._advise_product(largest)

    def _advise_product(self, point: Factors) -> str:
        """Advise a range of products that contains `point`, so that the grid is not empty."""
        low, high = min(self.product[0], product(point)), max(self.product[1], product(point))
        return f"use --product {math.floor(low * 1e4) / 1e4:g}..{math.ceil(high * 1e4) / 1e4:g}"


def product(factors: Factors) -> float:
    """Return alpha * beta^2 * gamma^2, the approximate growth of MACs from one phi to the next."""
    alpha, beta, gamma = factors
    return alpha * beta**2 * gamma**2


def show(factors: Factors) -> str:
    """Format factors as `(1.2, 1.1, 1.15)`."""
    return "({:g}, {:g}, {:g})".format(*factors)


def _count(bounds: Range, step: float) -> int:
    return int((bounds[1] - bounds[0]) / step + 1e-6) + 1


def _values(bounds: Range, step: float) -> list[float]:
    return [round(bounds[0] + i * step, 6) for i in range(_count(bounds, step))]


def _round_up(value: float, step: float) -> float:
    """Round up to a multiple of `step`, tolerating floating-point error in `value`."""
    return round(math.ceil(value / step - 1e-6) * step, 6)
