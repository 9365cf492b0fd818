"""Stage 3, collect: one row per candidate with its cost, accuracy and membership of Pareto fronts."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from effnet_fast.report.table import Row
from effnet_fast.search.plan import Candidate
from effnet_fast.search.trials import COMPLETE, FAIL, PRUNED, State

FRONTS = {"pareto_macs": "macs", "pareto_parameters": "parameters", "pareto_latency": "latency_ms"}


def collect(candidates: Sequence[Candidate], states: Sequence[State], seeds: Sequence[int]) -> list[Row]:
    """Return one row per candidate, in the plan's order.

    `top1_mean` and `top1_std` are mean and sample standard deviation of validation accuracy (percent) over the
    completed seeds. `status` is "complete" if every seed is; otherwise "failed" if any seed failed, "pruned" if any was
    pruned, else "open". Pareto fronts hold complete candidates only. Times, memory and latency are means over the seeds
    that have them.
    """
    by_run = {state.run: state for state in states}
    rows = [_row(candidate, [by_run.get(f"{candidate.name}-s{seed}") for seed in seeds]) for candidate in candidates]
    for flag, cost in FRONTS.items():
        # The mean of an incomplete candidate may be that of its lucky seeds.
        front = pareto([(row[cost], row["top1_mean"] if row["status"] == "complete" else None) for row in rows])
        for i, row in enumerate(rows):
            row[flag] = i in front
    return rows


def check_any_complete(rows: Sequence[Row], states: Sequence[State], folder: Path) -> None:
    """Check that at least one trial is complete.

    Raises:
        ValueError: none is; if all failed, the message gives the first reason.
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
    columns = dataclasses.asdict(candidate)
    del columns["same_as"], columns["next_phi_exceeds"]
    return {
        **columns,
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
    """Return the indices of the points (cost, accuracy) on the Pareto front.

    A point is dominated if another is cheaper and at least as accurate, or as cheap and more accurate. Points with an
    unknown cost or accuracy are never on the front.
    """
    known = [(cost, -top1, i) for i, (cost, top1) in enumerate(points) if cost is not None and top1 is not None]
    front: set[int] = set()
    best_loss, best_cost = float("inf"), float("inf")
    for cost, loss, i in sorted(known):
        if loss < best_loss or (loss == best_loss and cost == best_cost):
            front.add(i)
            best_loss, best_cost = loss, cost
    return front
