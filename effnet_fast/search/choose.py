"""The best candidate by validation accuracy, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
LEVEL = 0.05


@dataclass(frozen=True)
class Choice:
    """What `choose` found.

    Attributes:
        name: of the candidate with the highest mean accuracy.
        p_values: of each other candidate, the chance of so large a paired difference over the seeds if there were none
            (two-sided t-test, Holm's correction for their number); empty at one seed.
        seeds: runs of each.
    """

    name: str
    p_values: dict[str, float]
    seeds: int

    @property
    def inseparable(self) -> list[str]:
        """The others that these seeds cannot tell from the best at 5 %."""
        return [name for name, p in self.p_values.items() if p >= LEVEL]

    @property
    def confidence(self) -> str:
        """For people, one line."""
        if self.seeds == 1:
            return "not separable at n = 1: one seed tells nothing of the spread; raise --seeds"
        if not self.p_values:
            return "the only candidate"
        others = len(self.p_values)
        if not self.inseparable:
            return f"better than each of the {others} others (n = {self.seeds}, paired t-test, Holm, p < {LEVEL:g})"
        return (
            f"not separable at n = {self.seeds} from {len(self.inseparable)} of {others} others "
            f"(paired t-test, Holm, p >= {LEVEL:g}): {', '.join(self.inseparable)}"
        )


def choose(rows: Sequence[Row]) -> Choice:
    """The best of the candidates whose every seed ran to the end; of equals the one of fewest MACs.

    Raises:
        ValueError: there is none.
    """
    complete = [row for row in rows if row["status"] == "complete"]
    if not complete:
        raise ValueError("no candidate was trained to the end with every seed: run `effnet-fast search run` first")
    best = max(complete, key=lambda row: (row["top1_mean"], -row["macs"]))
    scores = best["top1_by_seed"]
    others = {row["name"]: row["top1_by_seed"] for row in complete if row is not best}
    raw = {name: paired_p(scores, theirs) for name, theirs in others.items()} if len(scores) > 1 else {}
    return Choice(best["name"], holm(raw), len(scores))


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test: seeds fix the held-out images, so runs of one seed belong together.

    It is 1 where all differences are the same: of whole images that is chance, and says nothing of the spread.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread < 1e-9:  # percent: what equal differences leave of rounding
        return 1.0
    return student_t_p(mean / (spread / math.sqrt(len(differences))), len(differences) - 1)


def student_t_p(t: float, freedom: int) -> float:
    """Chance that |T| >= |t| for Student's t with a whole number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term, total = math.cos(angle), 0.0
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= square * 2 * k / (2 * k + 1)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(1, freedom // 2 + 1):
            total += term
            term *= square * (2 * k - 1) / (2 * k)
        inside = sine * total
    return max(0.0, 1 - inside)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979), in the order given."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
