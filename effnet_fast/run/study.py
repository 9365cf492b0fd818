"""The command `study`: train the baseline and four ways to scale it, all with the same recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effnet_fast import distributed, provenance
from effnet_fast.checkpoint import write_atomically, write_json, writing_to
from effnet_fast.config import StudyConfig, identity
from effnet_fast.distributed import World
from effnet_fast.report.table import Row, as_csv, as_text
from effnet_fast.run.rank_check import about_start, compare_ranks
from effnet_fast.run.resolve import load_dataset
from effnet_fast.run.scaled_runs import family_of, read_index, training_seconds
from effnet_fast.run.training import train_in
from effnet_fast.search.family import Family
from effnet_fast.search.runs import failure_reason, free_memory
from effnet_fast.search.study_runs import (
    StudyRun,
    cost_row,
    index_row,
    restore_results,
    result_rows,
    study_models,
    study_runs,
)


@dataclass(frozen=True)
class StudyResult:
    """Result of a study.

    Attributes:
        status: 0, or 128 + the signal number that stopped it.
        folder: SAVE_DIR/RUN_NAME, which contains all output files and runs.
        models: rows of study.csv: one per model, with cost and accuracy.
        runs: one run per model and seed, with its result.
    """

    status: int
    folder: Path
    models: list[Row]
    runs: list[StudyRun]


def study(config: StudyConfig) -> StudyResult:
    """Run `effnet-fast study`: train the models.

    Raises:
        ValueError, OSError: the user's input is wrong; the message is one line.

    >>> from effnet_fast import StudyConfig, study
    >>> result = study(StudyConfig(dataset="synthetic", output_stride=32, dry_run=True, device="cpu"))
    model ...
    >>> [row["model"] for row in result.models]
    ['baseline', 'deeper', 'wider', 'higher-resolution', 'compound']
    """
    with distributed.group(config.device, 1.5 * config.hang_timeout or None) as world:
        compare_ranks(about_start(config))
        return _study(config, world)


def _study(config: StudyConfig, world: World) -> StudyResult:
    folder = Path(config.save_dir) / config.name
    dataset = load_dataset(config)
    family = family_of(config, dataset)
    models = study_models(config, family)
    runs = study_runs(config, models)
    read_index(folder / "study.json", config, dataset.fingerprint, parse=partial(restore_results, runs))
    _say(world, as_text([cost_row(family, model) for model in models]))
    status = 0 if config.dry_run else _train_all(config, world, family, runs, folder, dataset.fingerprint)
    rows = result_rows(family, models, runs)
    if world.is_main and not config.dry_run and not status:
        _report(config, rows, runs, folder)
    return StudyResult(status, folder, rows, runs)


def _train_all(
    config: StudyConfig, world: World, family: Family, runs: list[StudyRun], folder: Path, fingerprint: str
) -> int:
    """Train the runs in order and update study.json after each; return 0, or the status of a stopped run."""
    heading = {"settings": identity(config), "fingerprint": fingerprint}
    if not all(run.result for run in runs):  # else study.json keeps the environment in which they were trained
        _write_index(world, folder, heading, family, runs)
    for number, run in enumerate(runs, start=1):
        _say(world, f"\nrun {number} of {len(runs)}: {run.model.label}, seed {run.seed}")
        if run.result:
            _say(world, f"finished: top-1 {run.result['top1']:.2f} %")
            continue
        status = _train(config, world, family, run, folder / "runs")
        _write_index(world, folder, heading, family, runs)
        if status:
            return status
    return 0


def _train(config: StudyConfig, world: World, family: Family, run: StudyRun, folder: Path) -> int:
    """Start or resume one run and set its result; if the model cannot be trained, record the reason and return 0."""
    try:
        outcome = train_in(world, run.config(config, family, str(folder)))
    except (FloatingPointError, MemoryError, RuntimeError, ValueError) as error:
        reason = failure_reason(error)
        if reason is None or world.size > 1:  # skipping on one rank would leave the others waiting
            raise
        _say(world, f"failed: {reason}")
        run.result = {"failed": reason}
        return 0
    finally:
        free_memory()
    if outcome.finished:
        run.result = {
            "split": outcome.result["split"],
            "top1": outcome.top1,
            "loss": outcome.loss,
            "seconds": training_seconds(folder / run.name),
        }
    return outcome.status


def _write_index(world: World, folder: Path, heading: Row, family: Family, runs: list[StudyRun]) -> None:
    """Write study.json, which lists the runs; `effnet-fast cam --checkpoints FOLDER` reads it."""
    if world.is_main:
        models = [index_row(family, run) for run in runs]
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "study.json", {**heading, "models": models, "environment": provenance.environment()})


def _report(config: StudyConfig, rows: list[Row], runs: list[StudyRun], folder: Path) -> None:
    write_atomically(folder / "study.csv", as_csv(rows).encode())
    print("\n" + as_text(rows))
    if any(row["top1_mean"] is not None for row in rows):
        _draw(config, rows, runs, folder)
    print(f"in {folder}: study.json, study.csv, study.*, curves.*, study.html, runs/")


def _draw(config: StudyConfig, rows: list[Row], runs: list[StudyRun], folder: Path) -> None:
    """Draw accuracy against MACs and the runs' curves, and write the page that embeds them and the table."""
    from effnet_fast.report.curves import plot_curves
    from effnet_fast.report.fronts import save_both, scaling_curves
    from effnet_fast.report.page import render_page

    trained = [run for run in runs if "top1" in run.result]
    split = trained[0].result["split"]
    _, against_macs = save_both(scaling_curves(rows, split), folder, "study")
    for suffix in ("png", "svg"):
        folders = [folder / "runs" / run.name for run in trained]
        models = [run.name.rpartition("-")[0] for run in trained]
        curves = plot_curves(folders, folder / f"curves.{suffix}", groups=models)
    pictures = {"Accuracy against multiply-accumulates": against_macs, "Curves of the runs": curves}
    note = f"All models trained alike for {config.num_epochs} epochs; accuracy on the {split} images after the last."
    write_atomically(folder / "study.html", render_page(f"Study {config.name}", rows, pictures, note).encode())


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)
