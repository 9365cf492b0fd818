"""The verb search: plan, run, collect, choose, each through files in SAVE_DIR/RUN_NAME: all repeatable."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from filelock import FileLock

from effnet_fast import checkpoint, distributed, provenance
from effnet_fast.checkpoint import write_atomically
from effnet_fast.config import SearchConfig, TrainConfig, identity, span
from effnet_fast.data import Dataset
from effnet_fast.distributed import World
from effnet_fast.precision import PRECISIONS
from effnet_fast.report.progress import Board
from effnet_fast.report.table import as_csv, as_text
from effnet_fast.run.resolve import load_dataset, resolve_precision
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
from effnet_fast.search import measure
from effnet_fast.search.choose import Choice, choose
from effnet_fast.search.collect import collect
from effnet_fast.search.family import Family, Scale
from effnet_fast.search.plan import Candidate, Grid, Limits, Workload, candidates
from effnet_fast.search.trials import COMPLETE, FAIL, PRUNED, RUNNING, Lost, Pruned, Task, Trials

if TYPE_CHECKING:
    from optuna.trial import Trial

PLAN_COLUMNS = ("name", "image_size", "parameters", "macs", "cost_ratio", "largest_phi", "estimated_step_ms")
RESULT_COLUMNS = ("name", "macs", "parameters", "latency_ms", "status", "seeds", "top1_mean", "top1_std", "pareto_macs")
POLL_SECONDS = 2.0
CPU_BATCH = 16  # images of the step that a plan times on a CPU


@dataclass(frozen=True)
class _Search:
    """A search's settings and what they decide.

    Attributes:
        folder: SAVE_DIR/RUN_NAME.
        world: this process alone, under torchrun too: workers share trials, not batches.
    """

    config: SearchConfig
    folder: Path
    dataset: Dataset
    family: Family
    world: World

    @property
    def precision(self) -> torch.dtype | None:
        return PRECISIONS.get(resolve_precision(str(self.config.mixed_precision), self.world.device))

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def latency_ms(self, scale: Scale) -> float:
        size = self.family.image_size(scale)
        return measure.latency_ms(self.family.build(scale), size, self.world.device, self.precision)

    @contextlib.contextmanager
    def locked(self):
        """One worker at a time writes the files of a stage."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to {self.folder} ({error.strerror}); choose another --save_dir") from error
        with FileLock(self.folder / ".stage.lock"):
            yield


def search(config: SearchConfig) -> int:
    """Run `effnet-fast search [plan|run|collect|choose]`; returns 0, or 128 + the signal that stopped it.

    Raises:
        ValueError, OSError: for what the user can mend, each with one line.
    """
    world = distributed.alone(config.device)
    dataset = load_dataset(config)
    job = _Search(config, Path(config.save_dir) / config.name, dataset, family_of(config, dataset), world)
    if config.dry_run:
        print(_plan_table(_make_plan(job)))
        return 0
    stages = {"plan": _plan, "run": _run, "collect": _collect, "choose": _choose}
    for stage in stages if config.stage == "all" else [config.stage]:
        status = stages[stage](job)
        if status:
            return status
    return 0


# -- plan


def _plan(job: _Search) -> int:
    """Write plan.json and plan.csv, unless they are there."""
    path = job.folder / "plan.json"
    with job.locked():
        plan = claim_folder(path, job.config, job.dataset)
        if plan is None:
            plan = _make_plan(job)
            write_json(path, plan)
            rows = [{k: v for k, v in row.items() if k != "same_as"} for row in plan["candidates"]]
            write_atomically(job.folder / "plan.csv", as_csv(rows).encode())
    print(_plan_table(plan))
    return 0


def _make_plan(job: _Search) -> dict[str, Any]:
    config = job.config
    spans = {name: span(name, getattr(config, name)) for name in ("alpha", "beta", "gamma", "product")}
    points = Grid(step=config.grid_step, **spans).feasible()
    limits = Limits(
        macs=config.max_flops,
        parameters=config.max_params,
        activations=config.max_activations,
        latency_ms=config.max_latency_ms,
        latency=functools.cache(job.latency_ms),  # each question about a model gets the same answer
    )
    kept, dropped = candidates(job.family, points, limits, _workload(job))
    return {
        "settings": identity(config),
        "fingerprint": job.dataset.fingerprint,
        "candidates": [dataclasses.asdict(candidate) for candidate in kept],
        "dropped": [dataclasses.asdict(row) for row in dropped],
        "environment": provenance.environment(),
    }


def _workload(job: _Search) -> Workload:
    """A training step of the baseline, timed on this device; on a CPU with few images, and scaled up."""
    batch = job.config.batch_size
    timed = batch if job.world.device.type == "cuda" else min(batch, CPU_BATCH)
    family, base = job.family, Scale()
    milliseconds = measure.step_ms(family.build(base), family.base_size, timed, job.world.device, job.precision)
    return Workload(batch, 4 if job.precision is None else 2, milliseconds * batch / timed)


def _plan_table(plan: dict[str, Any]) -> str:
    rows = [{name: row[name] for name in PLAN_COLUMNS} for row in plan["candidates"]]
    merged = sum(len(row["same_as"]) for row in plan["candidates"])
    lines = [
        as_text(rows),
        f"{len(rows)} candidates; {merged} more round to one of them; {len(plan['dropped'])} dropped",
    ]
    lines += [
        f"dropped ({row['alpha']:g}, {row['beta']:g}, {row['gamma']:g}): {row['reason']}" for row in plan["dropped"]
    ]
    return "\n".join(lines)


def _read_plan(job: _Search) -> list[Candidate]:
    plan = claim_folder(job.folder / "plan.json", job.config, job.dataset)
    if plan is None:
        raise ValueError(f"there is no plan in {job.folder}: run `effnet-fast search plan` with the same flags first")
    return [Candidate(**row) for row in plan["candidates"]]


# -- run


def _run(job: _Search) -> int:
    """Train what no worker has trained, until nothing is left; returns 128 + a signal where one stops it."""
    planned = {candidate.name: candidate for candidate in _read_plan(job)}
    trials = _open_trials(job, list(planned.values()))
    trials.enqueue([_task(candidate, seed) for seed in job.seeds for candidate in planned.values()])
    with Board(trials.states, job.config.search_epochs) as board:
        while True:
            trial = trials.claim()
            if trial is not None:
                candidate = planned[trial.user_attrs["candidate"]]
                status = _train(job, trials, trial, candidate, board)
                if status:
                    return status
            elif any(state.state == RUNNING for state in trials.states()):
                time.sleep(POLL_SECONDS)  # another worker may still fall silent
            else:
                return 0


def _open_trials(job: _Search, planned: list[Candidate]) -> Trials:
    config = job.config
    content = json.dumps([identity(config), job.dataset.fingerprint, [candidate.name for candidate in planned]])
    return Trials(
        job.folder,
        config.storage,
        config.name,
        digest=hashlib.sha256(content.encode()).hexdigest(),
        pruner=config.pruner,
        epochs=config.search_epochs,
        lease_seconds=config.lease_seconds,
    )


def _task(candidate: Candidate, seed: int) -> Task:
    return Task(candidate.name, candidate.alpha, candidate.beta, candidate.gamma, seed)


def _train(job: _Search, trials: Trials, trial: Trial, candidate: Candidate, board: Board) -> int:
    """Train one trial, or go on with it, and record how it ended; returns 128 + a signal where one stopped it."""
    task = _task(candidate, trial.params["seed"])
    settings = _trial_config(job, task, candidate.scale)
    board.say(f"{task.run}: started")

    def watch(epoch: int, row: dict[str, Any]) -> None:
        board.say(f"{task.run}: epoch {epoch}  val top-1 {final_top1(row):.2f} %")
        if lost.is_set():
            raise Lost
        trials.report(trial, epoch, final_top1(row))

    try:
        with trials.held(trial) as lost:
            outcome = _train_quietly(job, settings, watch)
            if not outcome.finished:
                trials.release(trial)
                return outcome.status
            measured = _measured(job, settings, candidate)
        trials.finish(trial, COMPLETE, final_top1(outcome.result), **measured)
        _drop_checkpoints(job, settings)
        board.say(f"{task.run}: val top-1 {final_top1(outcome.result):.2f} %")
    except Lost:
        board.say(f"{task.run}: another worker took it up")
    except Pruned:
        trials.finish(trial, PRUNED)
        _drop_checkpoints(job, settings)
        board.say(f"{task.run}: pruned")
    except BaseException as error:
        reason = failure_reason(error)
        if reason is None:
            trials.release(trial)
            raise
        trials.finish(trial, FAIL, reason=reason)
        board.say(f"{task.run}: failed, {reason}")
    finally:
        _free_memory()
    return 0


def _trial_config(job: _Search, task: Task, scale: Scale) -> TrainConfig:
    return run_config(
        job.config,
        job.family.settings(scale),
        seed=task.seed,
        num_epochs=job.config.search_epochs,
        save_dir=str(job.folder / "trials"),
        run_name=task.run,
    )


def _train_quietly(job: _Search, settings: TrainConfig, watch):
    """Train with what it prints in the run's own log.txt."""
    folder = Path(settings.save_dir) / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    if job.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (folder / "log.txt").open("a", buffering=1) as log, contextlib.redirect_stdout(log):
        return train_in(job.world, settings, watch)


def _drop_checkpoints(job: _Search, settings: TrainConfig) -> None:
    """A trial that has ended is never taken up again."""
    if not job.config.keep_checkpoints:
        folder = Path(settings.save_dir) / settings.name
        for path in (*checkpoint.generations(folder / checkpoint.LAST), folder / checkpoint.BEST):
            path.unlink(missing_ok=True)


def _measured(job: _Search, settings: TrainConfig, candidate: Candidate) -> dict[str, Any]:
    on_gpu = job.world.device.type == "cuda"
    return {
        "latency_ms": job.latency_ms(candidate.scale),
        "training_seconds": training_seconds(Path(settings.save_dir) / settings.name),
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- collect and choose


def _collect(job: _Search) -> int:
    """Write candidates.csv and candidates.json, the pictures and the page."""
    rows = _rows(job)
    with job.locked():
        write_json(job.folder / "candidates.json", {"candidates": rows, "environment": provenance.environment()})
        write_atomically(job.folder / "candidates.csv", as_csv(rows).encode())
        _draw(job, rows)
    print(as_text([{name: row[name] for name in RESULT_COLUMNS} for row in rows]))
    print(f"in {job.folder}: candidates.csv, candidates.json, feasible.*, pareto.*, search.html")
    return 0


def _draw(job: _Search, rows: list[dict[str, Any]], choice: Choice | None = None) -> None:
    """The pictures (PNG, SVG) and the page that holds them, with the choice in them once it is made."""
    from effnet_fast.report.fronts import feasible_set, pareto_fronts, save_both
    from effnet_fast.report.page import render_page

    plan = claim_folder(job.folder / "plan.json", job.config, job.dataset)
    assert plan is not None
    chosen = choice.name if choice else None
    _, feasible = save_both(feasible_set(plan["candidates"], plan["dropped"], chosen), job.folder, "feasible")
    _, fronts = save_both(pareto_fronts(rows, chosen), job.folder, "pareto")
    note = f"Chosen: {choice.name}; {choice.confidence}." if choice else "Nothing is chosen yet."
    text = render_page(
        f"Search {job.config.name}: accuracy on held-out images",
        rows,
        {"Accuracy against cost": fronts, "Feasible factors": feasible},
        note,
        chosen,
    )
    write_atomically(job.folder / "search.html", text.encode())


def _rows(job: _Search) -> list[dict[str, Any]]:
    planned = _read_plan(job)
    states = _open_trials(job, planned).states()
    rows = collect(planned, states, job.seeds)
    if not any(row["seeds"] for row in rows):
        failures = [state for state in states if state.state == FAIL]
        if failures and len(failures) == len(states):
            reason = failures[0].attrs.get("reason", "no reason is kept")
            raise ValueError(f"all {len(states)} trials in {job.folder} failed, {failures[0].run} thus: {reason}")
        raise ValueError(f"no trial in {job.folder} is complete: run `effnet-fast search run` first")
    return rows


def _choose(job: _Search) -> int:
    """Write chosen.json, family.csv and a recipe for each scaled model that keeps the limits."""
    planned = {candidate.name: candidate for candidate in _read_plan(job)}
    rows = _rows(job)
    choice = choose(rows)
    best = planned[choice.name]
    table = [_scaled(job, best, phi) for phi in job.config.phis]
    with job.locked():
        (job.folder / "recipes").mkdir(exist_ok=True)
        for stale in (job.folder / "recipes").glob("phi*.yaml"):  # of an earlier choice
            stale.unlink()
        for row in table:
            if row["fits"]:
                text = _recipe(job, best, row)
                write_atomically(job.folder / "recipes" / f"phi{row['phi']}.yaml", text.encode())
        write_atomically(job.folder / "family.csv", as_csv(table).encode())
        content = {**dataclasses.asdict(choice), "confidence": choice.confidence, "candidate": dataclasses.asdict(best)}
        write_json(job.folder / "chosen.json", content)
        _draw(job, rows, choice)
    print(f"chosen: alpha {best.alpha:g}, beta {best.beta:g}, gamma {best.gamma:g}; {choice.confidence}")
    print(as_text(table))
    print(f"in {job.folder}: chosen.json, family.csv, recipes/")
    return 0


def _scaled(job: _Search, best: Candidate, phi: int) -> dict[str, Any]:
    """Cost of the chosen model scaled by phi."""
    scale = best.scale.to_the(phi)
    cost, base = job.family.cost(scale), job.family.cost(Scale())
    return {
        "phi": phi,
        "depth": scale.depth,
        "width": scale.width,
        "image_size": job.family.image_size(scale),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "activations": cost.activations,
        "ratio_to_2^phi": cost.macs / base.macs / 2**phi,
        "fits": phi <= best.largest_phi,
    }


def _recipe(job: _Search, best: Candidate, row: dict[str, Any]) -> str:
    """The YAML of a scaled model: the search's settings, all training images, the whole number of epochs."""
    phi = row["phi"]
    name = f"{job.config.name}-phi{phi}"
    settings = run_config(
        job.config,
        job.family.settings(best.scale.to_the(phi)),
        run_name=name,
        val_fraction=0.0,
        limit_train=None,
        limit_eval=None,
    )
    head = (
        f"# B0 scaled by phi = {phi} with alpha {best.alpha:g}, beta {best.beta:g}, gamma {best.gamma:g}: "
        f"{row['parameters']:,} parameters, {row['macs']:,} MACs at {row['image_size']} px.\n"
        f"# effnet-fast train --config phi{phi}.yaml --data_dir data\n"
    )
    return head + yaml.safe_dump({**identity(settings), "run_name": name}, sort_keys=False)
