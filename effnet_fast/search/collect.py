"""One row a candidate: what it is, what it costs, how it did; and which no other beats at both cost and accuracy."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from effnet_fast.search.plan import Candidate
from effnet_fast.search.trials import COMPLETE, FAIL, PRUNED, State

Row = dict[str, Any]
FRONTS = {"pareto_macs": "macs", "pareto_parameters": "parameters", "pareto_latency": "latency_ms"}


def collect(candidates: Sequence[Candidate], states: Sequence[State], seeds: Sequence[int]) -> list[Row]:
    """Every candidate's row, in the plan's order.

    `top1_mean` and `top1_std` (sample standard deviation) are percent of the validation images, over the seeds that ran
    to the end; `status` is complete only where all of them did, else the first of failed, pruned and open. Times,
    memory and latency are means of what was measured.
    """
    by_run = {state.run: state for state in states}
    rows = [_row(candidate, [by_run.get(f"{candidate.name}-s{seed}") for seed in seeds]) for candidate in candidates]
    for flag, cost in FRONTS.items():
        front = pareto([(row[cost], row["top1_mean"]) for row in rows])
        for i, row in enumerate(rows):
            row[flag] = i in front
    return rows


def _row(candidate: Candidate, states: list[State | None]) -> Row:
    told = {state.state for state in states if state is not None}
    done = [state for state in states if state is not None and state.state == COMPLETE]
    scores = [state.top1 for state in done if state.top1 is not None]
    complete = len(done) == len(states)
    status = "complete" if complete else "failed" if FAIL in told else "pruned" if PRUNED in told else "open"
    facts = dataclasses.asdict(candidate)
    del facts["same_as"]
    return {
        **facts,
        "status": status,
        "seeds": len(scores),
        "top1_mean": statistics.fmean(scores) if scores else None,
        "top1_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "top1_by_seed": scores,
        "latency_ms": _mean(states, "latency_ms"),
        "seconds_mean": _mean(states, "training_seconds"),
        "peak_memory_mib": _mean(states, "peak_memory_mib"),
        "reason": next((s.attrs["reason"] for s in states if s is not None and "reason" in s.attrs), None),
    }


def _mean(states: list[State | None], name: str) -> float | None:
    values = [state.attrs[name] for state in states if state is not None and state.attrs.get(name) is not None]
    return statistics.fmean(values) if values else None


def pareto(points: Sequence[tuple[float | None, float | None]]) -> set[int]:
    """Positions of the points (cost, accuracy) that none beats: as cheap and more accurate, or cheaper and as accurate.

    Points of which one number is not known are left out.
    """
    known = [(cost, -gain, i) for i, (cost, gain) in enumerate(points) if cost is not None and gain is not None]
    front: set[int] = set()
    best, best_cost = float("inf"), float("inf")
    for cost, loss, i in sorted(known):
        if loss < best or (loss == best and cost == best_cost):
            front.add(i)
            best, best_cost = loss, cost
    return front
