"""The verb study: the baseline and four ways to scale it, trained alike."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnet_fast import distributed, provenance
from effnet_fast.checkpoint import write_atomically
from effnet_fast.config import StudyConfig, identity
from effnet_fast.distributed import World
from effnet_fast.model import model_name
from effnet_fast.report.table import as_csv, as_text
from effnet_fast.run.rank_check import about_start, agree
from effnet_fast.run.resolve import load_dataset
from effnet_fast.run.scaled_runs import (
    claim_folder,
    failure_reason,
    family_of,
    final_top1,
    run_config,
    training_seconds,
    write_json,
)
from effnet_fast.run.training import train_in
from effnet_fast.search import five_ways
from effnet_fast.search.family import Family, Scale
from effnet_fast.search.five_ways import Member


@dataclass
class _Run:
    """A member with a seed, and what came of it."""

    member: Member
    seed: int
    name: str
    result: dict[str, Any] = field(default_factory=dict)


def study(config: StudyConfig) -> int:
    """Run `effnet-fast study`; returns the exit status: 0, or 128 + the signal that stopped it.

    Raises:
        ValueError, OSError: for what the user can mend, each with one line.
    """
    world = distributed.init(config.device, 1.5 * config.hang_timeout or None)
    try:
        agree(about_start(config))
        return _study(config, world)
    finally:
        distributed.shutdown()


def _study(config: StudyConfig, world: World) -> int:
    folder = Path(config.save_dir) / config.name
    dataset = load_dataset(config)
    family = family_of(config, dataset)
    claim_folder(folder / "study.json", config, dataset)
    members = _members(config, family)
    runs = _runs(config, members)
    _say(world, as_text([_cost_row(family, member) for member in members]))
    if config.dry_run:
        return 0
    heading = {"settings": identity(config), "fingerprint": dataset.fingerprint}
    _write_index(world, folder, heading, family, runs)
    for number, run in enumerate(runs, start=1):
        _say(world, f"\nrun {number} of {len(runs)}: {run.member.label}, seed {run.seed}")
        status = _train(config, world, family, run, folder)
        _write_index(world, folder, heading, family, runs)
        if status:
            return status
    if world.is_main:
        _report(config, family, members, runs, folder)
    return 0


def _members(config: StudyConfig, family: Family) -> list[Member]:
    references = [Member(model_name(name), scale=None) for name in config.references or []]
    if not config.targets:
        return [*five_ways.TABLE_7, *references]
    solved = [member for target in config.targets for member in five_ways.solve(family, target)]
    return [five_ways.BASELINE, *solved, *references]


def _runs(config: StudyConfig, members: list[Member]) -> list[_Run]:
    several = len(config.targets) > 1
    return [
        _Run(
            member,
            seed,
            f"{member.name}-{member.target:.4g}-{seed}" if several and member.target else f"{member.name}-{seed}",
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for member in members
    ]


def _train(config: StudyConfig, world: World, family: Family, run: _Run, folder: Path) -> int:
    """Train one run, or go on with it; a model that cannot be trained is told and passed over."""
    model = _model_settings(family, run.member)
    settings = run_config(config, model, seed=run.seed, save_dir=str(folder / "runs"), run_name=run.name)
    try:
        outcome = train_in(world, settings)
    except (FloatingPointError, MemoryError, RuntimeError, ValueError) as error:
        reason = failure_reason(error)
        if reason is None or world.size > 1:  # the other ranks would wait for this one
            raise
        _say(world, f"failed: {reason}")
        run.result = {"failed": reason}
        return 0
    if outcome.finished:
        run.result = {
            "split": outcome.result["split"],
            "top1": final_top1(outcome.result),
            "loss": outcome.result["loss"],
            "seconds": training_seconds(folder / "runs" / run.name),
        }
    return outcome.status


def _model_settings(family: Family, member: Member) -> dict[str, Any]:
    return family.reference_settings(member.name) if member.scale is None else family.settings(member.scale)


def _cost_row(family: Family, member: Member) -> dict[str, Any]:
    scale, model = member.scale, _model_settings(family, member)
    cost, base = family.reference_cost(member.name) if scale is None else family.cost(scale), family.cost(Scale())
    return {
        "model": member.name,
        "depth": model["depth"],
        "width": model["width"],
        "image_size": model["image_size"],
        "parameters": cost.parameters,
        "macs": cost.macs,
        "activations": cost.activations,
        "times_baseline": cost.macs / base.macs,
        "times_target": cost.macs / member.target if member.target else None,
    }


def _write_index(world: World, folder: Path, heading: dict[str, Any], family: Family, runs: list[_Run]) -> None:
    """study.json: what the folder holds; `effnet-fast cam --checkpoints FOLDER` reads it."""
    if not world.is_main:
        return
    models = [
        {
            "name": run.member.name,
            "label": run.member.label,
            "seed": run.seed,
            "run": f"runs/{run.name}",
            "checkpoint": f"runs/{run.name}/last.pt",
            "target_macs": run.member.target,
            **{k: v for k, v in _cost_row(family, run.member).items() if k != "model"},
            **run.result,
        }
        for run in runs
    ]
    write_json(folder / "study.json", {**heading, "models": models, "environment": provenance.environment()})


def _report(config: StudyConfig, family: Family, members: list[Member], runs: list[_Run], folder: Path) -> None:
    rows = [_result_row(family, member, [run for run in runs if run.member == member]) for member in members]
    write_atomically(folder / "study.csv", as_csv(rows).encode())
    print("\n" + as_text(rows))
    if any(row["top1_mean"] is not None for row in rows):
        _draw(config, rows, runs, folder)
    print(f"in {folder}: study.json, study.csv, study.*, curves.*, study.html, runs/")


def _draw(config: StudyConfig, rows: list[dict[str, Any]], runs: list[_Run], folder: Path) -> None:
    """Accuracy against MACs, the runs' curves, and the page that holds both with the table."""
    from effnet_fast.report.curves import plot_curves
    from effnet_fast.report.fronts import save_both, scaling_curves
    from effnet_fast.report.page import render_page

    trained = [run for run in runs if "top1" in run.result]
    split = trained[0].result["split"]
    _, against_macs = save_both(scaling_curves(rows, split), folder, "study")
    for suffix in ("png", "svg"):
        curves = plot_curves([folder / "runs" / run.name for run in trained], folder / f"curves.{suffix}")
    pictures = {"Accuracy against multiply-accumulates": against_macs, "Curves of the runs": curves}
    note = f"All trained alike for {config.num_epochs} epochs; accuracy on the {split} images after the last."
    write_atomically(folder / "study.html", render_page(f"Study {config.name}", rows, pictures, note).encode())


def _result_row(family: Family, member: Member, runs: list[_Run]) -> dict[str, Any]:
    """A member's cost and its accuracy over seeds: mean and sample standard deviation, percent."""
    scores = [run.result["top1"] for run in runs if "top1" in run.result]
    seconds = [run.result["seconds"] for run in runs if "seconds" in run.result]
    return {
        **_cost_row(family, member),
        "seeds": len(scores),
        "top1_mean": statistics.fmean(scores) if scores else None,
        "top1_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "seconds_mean": statistics.fmean(seconds) if seconds else None,
        "failed": next((run.result["failed"] for run in runs if "failed" in run.result), None),
    }


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)
