"""Stage 4, choose: find the candidate with the best validation accuracy and test whether its lead is significant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effnet_fast.report.table import Row

LEVEL = 0.05  # significance level


@dataclass(frozen=True)
class Choice:
    """The best candidate and the evidence for it.

    Attributes:
        name: the candidate with the highest mean accuracy.
        p_values: name of each other candidate -> p-value of the two-sided paired t-test over the seeds, with Holm's
            correction; empty with one seed.
        seeds: number of runs per candidate.
    """

    name: str
    p_values: dict[str, float]
    seeds: int

    @property
    def similar(self) -> list[str]:
        """Names of the candidates that do not differ significantly from the best at the 5 % level."""
        return [name for name, p in self.p_values.items() if p >= LEVEL]

    @property
    def confidence(self) -> str:
        """One line that states how certain the choice is."""
        if self.seeds == 1:
            return "no test is possible with one seed (n = 1): raise --seeds"
        if not self.p_values:
            return "the only candidate"
        others = len(self.p_values)
        if not self.similar:
            return f"better than each of the {others} others (n = {self.seeds}, paired t-test, Holm, p < {LEVEL:g})"
        return (
            f"not significantly better than {len(self.similar)} of {others} others (n = {self.seeds}, "
            f"paired t-test, Holm, p >= {LEVEL:g}): {', '.join(self.similar)}"
        )


def choose(rows: Sequence[Row]) -> Choice:
    """Choose the most accurate candidate that completed every seed; ties go to the one with the fewest MACs.

    Args:
        rows: the result of `collect`.

    Raises:
        ValueError: no candidate is complete.
    """
    complete = [row for row in rows if row["status"] == "complete"]
    if not complete:
        if any(row["status"] == "open" for row in rows):
            raise ValueError("no candidate has completed every seed: run `effnet-fast search run` first")
        reasons = [f" (the first failure: {row['reason']})" for row in rows if row["reason"]]
        raise ValueError(
            f"every candidate failed or was pruned{''.join(reasons[:1])}: search again with --pruner none, or a lower "
            "limit of the costs, and another --run_name"
        )
    best = max(complete, key=lambda row: (row["top1_mean"], -row["macs"]))
    scores = best["top1_by_seed"]
    others = {row["name"]: row["top1_by_seed"] for row in complete if row is not best}
    has_spread = len(scores) > 1
    p_values = {name: paired_p(scores, other) for name, other in others.items()} if has_spread else {}
    return Choice(best["name"], holm(p_values), len(scores))


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t-test of accuracies in percent.

    Runs with the same seed form a pair, because the seed selects the validation images. If all differences are equal,
    the result is 1: accuracies count whole images, so equal differences occur by chance, but the test, seeing no
    variance, would return p = 0.
    """
    from scipy.stats import ttest_rel

    if np.std(np.subtract(first, second)) < 1e-9:  # equal up to rounding
        return 1.0
    return float(ttest_rel(first, second).pvalue)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Apply Holm's step-down correction (Holm 1979); keep the order of the names."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
