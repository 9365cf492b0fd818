"""The command `search` with its stages plan, run, collect and choose, which share files in SAVE_DIR/RUN_NAME."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from effnet_fast import distributed, provenance
from effnet_fast.checkpoint import write_atomically, write_json
from effnet_fast.config import SearchConfig, TrainConfig, identity
from effnet_fast.outcome import OnEvaluation, Outcome
from effnet_fast.precision import resolve_precision
from effnet_fast.report.progress import Board
from effnet_fast.report.table import Row, as_csv, as_text
from effnet_fast.run.resolve import load_dataset, resolve_kernels
from effnet_fast.run.scaled_runs import family_of, read_index, training_seconds
from effnet_fast.run.training import train_in
from effnet_fast.search.choose import Choice, choose
from effnet_fast.search.collect import check_any_complete, collect
from effnet_fast.search.importance import importances, trial_rows
from effnet_fast.search.plan import SearchPlan
from effnet_fast.search.scale_up import recipe, scaled_models
from effnet_fast.search.setup import PLAN, SearchSetup
from effnet_fast.search.worker import Worker

CHOSEN = "chosen.json"
PLAN_COLUMNS = ("name", "image_size", "parameters", "macs", "cost_ratio", "largest_phi", "estimated_step_ms")
RESULT_COLUMNS = ("name", "macs", "parameters", "latency_ms", "status", "seeds", "top1_mean", "top1_std", "pareto_macs")


@dataclass(frozen=True)
class SearchResult:
    """Result of a search. The fields of stages that have not run are empty or None.

    Attributes:
        status: 0, or 128 + the signal number that stopped training.
        folder: SAVE_DIR/RUN_NAME, which contains all output files.
        plan: candidates and dropped factors.
        candidates: rows of candidates.csv.
        choice: the best candidate and its p-values.
        models: rows of family.csv: the best candidate scaled by each phi.
    """

    status: int
    folder: Path
    plan: SearchPlan
    candidates: list[Row] = field(default_factory=list)
    choice: Choice | None = None
    models: list[Row] = field(default_factory=list)


def search(config: SearchConfig) -> SearchResult:
    """Run `effnet-fast search [plan|run|collect|choose]`.

    Raises:
        ValueError, OSError: the user's input is wrong; the message is one line.
    """
    world = distributed.alone(config.device)  # also under torchrun, because workers share trials, not batches
    dataset = load_dataset(config)
    if dataset.val is None:
        raise ValueError("--val_fraction 0: the search needs held-out images to choose by; try 0.1")
    setup = SearchSetup(
        config,
        Path(config.save_dir) / config.name,
        family_of(config, dataset, resolve_kernels(config.kernels, world.device)),
        dataset.fingerprint,
        world.device,
        resolve_precision(str(config.mixed_precision), world.device),
    )
    if config.dry_run:
        plan = setup.make_plan()
        print(_plan_text(plan))
        return SearchResult(0, setup.folder, plan)
    with setup.storage_errors():
        return _run_stages(setup, lambda settings, on_evaluation: train_in(world, settings, on_evaluation))


def _run_stages(setup: SearchSetup, train: Callable[[TrainConfig, OnEvaluation], Outcome]) -> SearchResult:
    stage = setup.config.stage
    plan = _plan(setup) if stage in ("all", "plan") else _read_plan(setup)
    if plan is None:
        raise ValueError(f"there is no plan in {setup.folder}: run `effnet-fast search plan` with the same flags first")
    result = SearchResult(0, setup.folder, plan)
    if stage in ("all", "run"):
        result = dataclasses.replace(result, status=_run(setup, plan, train))
    if stage in ("plan", "run") or result.status:
        return result
    states = setup.open_trials(plan).states()
    rows = collect(plan.candidates, states, setup.seeds)
    check_any_complete(rows, states, setup.folder)
    result = dataclasses.replace(result, candidates=rows)
    if stage != "choose":
        _collect(setup, plan, rows, trial_rows(plan.candidates, states))
    if stage != "collect":
        choice, models = _choose(setup, plan, rows)
        result = dataclasses.replace(result, choice=choice, models=models)
    return result


def _plan(setup: SearchSetup) -> SearchPlan:
    """Return the existing plan, or make one and write plan.json and plan.csv."""
    with setup.locked():
        plan = _read_plan(setup)
        if plan is None:
            plan = setup.make_plan()
            settings = {"settings": identity(setup.config), "fingerprint": setup.fingerprint}
            write_json(
                setup.folder / PLAN,
                {**settings, **plan.to_dict(), "environment": provenance.environment()},
            )
            rows = [{k: v for k, v in row.items() if k != "same_as"} for row in plan.to_dict()["candidates"]]
            write_atomically(setup.folder / "plan.csv", as_csv(rows).encode())
    print(_plan_text(plan))
    return plan


def _read_plan(setup: SearchSetup) -> SearchPlan | None:
    return read_index(setup.folder / PLAN, setup.config, setup.fingerprint, SearchPlan.from_dict)


def _plan_text(plan: SearchPlan) -> str:
    rows = [{name: getattr(candidate, name) for name in PLAN_COLUMNS} for candidate in plan.candidates]
    return "\n".join([as_text(rows), *plan.notes()])


def _run(setup: SearchSetup, plan: SearchPlan, train: Callable[[TrainConfig, OnEvaluation], Outcome]) -> int:
    """Train trials, shared with other workers, until all have ended; return the exit status."""
    trials = setup.open_trials(plan)
    with Board(trials.states, setup.config.search_epochs) as board:
        return Worker(setup, plan, trials, train, training_seconds, board.say).run()


def _collect(setup: SearchSetup, plan: SearchPlan, rows: list[Row], trials: list[Row]) -> None:
    """Write the tables of candidates and trials, the plots and the HTML page."""
    from effnet_fast.report.search_page import draw_search, draw_trials

    tables = {"candidates": rows, "trials": trials, "importances": importances(trials)}
    with setup.locked():
        write_json(setup.folder / "candidates.json", {**tables, "environment": provenance.environment()})
        write_atomically(setup.folder / "candidates.csv", as_csv(rows).encode())
        write_atomically(setup.folder / "trials.csv", as_csv(trials).encode())
        draw_trials(setup.folder)
        draw_search(setup.folder, setup.config.name, plan.to_dict(), rows, *_earlier_choice(setup.folder, rows))
    print(as_text([{name: row[name] for name in RESULT_COLUMNS} for row in rows]))
    print(f"in {setup.folder}: candidates.csv, candidates.json, trials.*, feasible.*, pareto.*, search.html")


def _earlier_choice(folder: Path, rows: list[Row]) -> tuple[str | None, str]:
    """Name and confidence of the choice in chosen.json, if these candidates lead to the same; else None."""
    with contextlib.suppress(FileNotFoundError, KeyError, TypeError, ValueError):
        chosen = json.loads((folder / CHOSEN).read_text())
        if (choice := choose(rows)).confidence == chosen["confidence"] and choice.name == chosen["name"]:
            return choice.name, choice.confidence
    return None, ""


def _choose(setup: SearchSetup, plan: SearchPlan, rows: list[Row]) -> tuple[Choice, list[Row]]:
    """Write chosen.json, family.csv and a recipe for each scaled model within the limits."""
    from effnet_fast.report.search_page import draw_search

    choice = choose(rows)
    best = plan.by_name()[choice.name]
    models = scaled_models(setup, best)
    with setup.locked():
        recipes = setup.folder / "recipes"
        recipes.mkdir(exist_ok=True)
        for stale in recipes.glob("phi*.yaml"):  # from an earlier choice
            stale.unlink()
        for row in models:
            if row["fits"]:
                write_atomically(recipes / f"phi{row['phi']}.yaml", recipe(setup, best, row).encode())
        write_atomically(setup.folder / "family.csv", as_csv(models).encode())
        content = {**dataclasses.asdict(choice), "confidence": choice.confidence, "candidate": dataclasses.asdict(best)}
        write_json(setup.folder / CHOSEN, content)
        draw_search(setup.folder, setup.config.name, plan.to_dict(), rows, choice.name, choice.confidence)
    print(f"chosen: alpha {best.alpha:g}, beta {best.beta:g}, gamma {best.gamma:g}; {choice.confidence}")
    print(as_text(models))
    if best.next_phi_exceeds and not all(row["fits"] for row in models):
        print(f"no recipe from phi = {best.largest_phi + 1} on: {best.next_phi_exceeds}")
    print(f"in {setup.folder}: chosen.json, family.csv, recipes/")
    return choice, models
