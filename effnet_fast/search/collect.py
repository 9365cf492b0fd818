"""Stage 3, collect: one row a candidate with its cost, its accuracy and the Pareto fronts it is on."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnet_fast.search.plan import Candidate
from effnet_fast.search.trials import COMPLETE, FAIL, PRUNED, State

Row = dict[str, Any]
FRONTS = {"pareto_macs": "macs", "pareto_parameters": "parameters", "pareto_latency": "latency_ms"}


def collect(candidates: Sequence[Candidate], states: Sequence[State], seeds: Sequence[int]) -> list[Row]:
    """A row for every candidate, in the plan's order.

    `top1_mean` and `top1_std` (sample standard deviation) are percent of the validation images over the completed
    seeds. `status` is complete if all seeds are, else failed, pruned or open, the first that applies. Times, memory and
    latency are means over the completed seeds.
    """
    by_run = {state.run: state for state in states}
    rows = [_row(candidate, [by_run.get(f"{candidate.name}-s{seed}") for seed in seeds]) for candidate in candidates]
    for flag, cost in FRONTS.items():
        front = pareto([(row[cost], row["top1_mean"]) for row in rows])
        for i, row in enumerate(rows):
            row[flag] = i in front
    return rows


def check_any_complete(rows: Sequence[Row], states: Sequence[State], folder: Path) -> None:
    """Refuse a table without a single accuracy.

    Raises:
        ValueError: no trial is complete; the message gives the reason if all failed.
    """
    if any(row["seeds"] for row in rows):
        return
    failed = [state for state in states if state.state == FAIL]
    if failed and len(failed) == len(states):
        reason = failed[0].attrs.get("reason", "no reason was recorded")
        raise ValueError(f"all {len(states)} trials in {folder} failed, the first ({failed[0].run}) with: {reason}")
    raise ValueError(f"no trial in {folder} is complete: run `effnet-fast search run` first")


def _row(candidate: Candidate, states: list[State | None]) -> Row:
    existing = [state for state in states if state is not None]
    kinds = {state.state for state in existing}
    completed = [state for state in existing if state.state == COMPLETE]
    scores = [state.top1 for state in completed if state.top1 is not None]
    is_complete = len(completed) == len(states)
    status = "complete" if is_complete else "failed" if FAIL in kinds else "pruned" if PRUNED in kinds else "open"
    facts = dataclasses.asdict(candidate)
    del facts["same_as"], facts["next_phi_exceeds"]
    return {
        **facts,
        "status": status,
        "seeds": len(scores),
        "top1_mean": statistics.fmean(scores) if scores else None,
        "top1_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "top1_by_seed": scores,
        "latency_ms": _mean(existing, "latency_ms"),
        "seconds_mean": _mean(existing, "training_seconds"),
        "peak_memory_mib": _mean(existing, "peak_memory_mib"),
        "reason": next((state.attrs["reason"] for state in existing if "reason" in state.attrs), None),
    }


def _mean(states: list[State], name: str) -> float | None:
    values = [state.attrs[name] for state in states if state.attrs.get(name) is not None]
    return statistics.fmean(values) if values else None


def pareto(points: Sequence[tuple[float | None, float | None]]) -> set[int]:
    """Indices of the points (cost, accuracy) on the Pareto front.

    A point is off the front if another is cheaper and as accurate, or as cheap and more accurate. Points with an
    unknown cost or accuracy are off it.
    """
    known = [(cost, -gain, i) for i, (cost, gain) in enumerate(points) if cost is not None and gain is not None]
    front: set[int] = set()
    best, best_cost = float("inf"), float("inf")
    for cost, loss, i in sorted(known):
        if loss < best or (loss == best and cost == best_cost):
            front.add(i)
            best, best_cost = loss, cost
    return front
