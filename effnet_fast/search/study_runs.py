"""The runs of a scaling study and the rows of its tables."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from effnet_fast.config import StudyConfig, TrainConfig
from effnet_fast.model import model_name
from effnet_fast.report.table import Row
from effnet_fast.search import five_ways
from effnet_fast.search.choose import holm, paired_p
from effnet_fast.search.family import Family, Scale
from effnet_fast.search.five_ways import COMPOUND, DEEPER, HIGHER, WIDER, StudyModel
from effnet_fast.search.runs import run_config

RESULT = ("split", "top1", "loss", "seconds")  # keys of the result of a run that ended well


@dataclass
class StudyRun:
    """One model trained with one seed.

    Attributes:
        name: name of the run's folder below runs/.
        result: split, top1 (percent), loss and seconds; or only `failed`, the reason; empty until the run has ended.
    """

    model: StudyModel
    seed: int
    name: str
    result: Row = field(default_factory=dict)

    def config(self, study: StudyConfig, family: Family, save_dir: str) -> TrainConfig:
        """Return the run's training config."""
        settings = model_settings(family, self.model)
        return run_config(study, settings, seed=self.seed, save_dir=save_dir, run_name=self.name)


def study_models(config: StudyConfig, family: Family) -> list[StudyModel]:
    """Return the baseline, the scaled models of every target, and the reference models.

    Raises:
        ValueError: a reference model is unknown, or a target cannot be met; see `five_ways.solve`.
    """
    references = [StudyModel(model_name(name), scale=None) for name in config.references or []]
    if not config.targets:
        return [*five_ways.TABLE_7, *references]
    scaled = [model for target in config.targets for model in five_ways.solve(family, target)]
    return [five_ways.BASELINE, *scaled, *references]


def study_runs(config: StudyConfig, models: list[StudyModel]) -> list[StudyRun]:
    """Return a run per model and seed, ordered by seed, then by model."""
    has_targets = len(config.targets) > 1  # then names need the target to be unique
    return [
        StudyRun(
            model,
            seed,
            f"{model.name}-{model.target:.4g}-{seed}" if has_targets and model.target else f"{model.name}-{seed}",
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for model in models
    ]


def restore_results(runs: list[StudyRun], index: dict[str, Any]) -> None:
    """Give each run that `index`, study.json, lists with an accuracy its result, so that it is not trained again."""
    known = {entry["run"]: entry for entry in index["models"] if "top1" in entry}
    for run in runs:
        if entry := known.get(_folder(run)):
            run.result = {key: entry[key] for key in RESULT}


def _folder(run: StudyRun) -> str:
    return f"runs/{run.name}"


def model_settings(family: Family, model: StudyModel) -> dict[str, Any]:
    """Return the fields of a training config that select the model."""
    return family.reference_settings(model.name) if model.scale is None else family.settings(model.scale)


def cost_row(family: Family, model: StudyModel) -> Row:
    """Return a model's multipliers, image size and costs, absolute and relative to the baseline and the target."""
    settings = model_settings(family, model)
    cost = family.reference_cost(model.name) if model.scale is None else family.cost(model.scale)
    return {
        "model": model.name,
        "depth": settings["depth"],
        "width": settings["width"],
        "image_size": settings["image_size"],
        "parameters": cost.parameters,
        "macs": cost.macs,
        "activations": cost.activations,
        "times_baseline": cost.macs / family.cost(Scale()).macs,
        "times_target": cost.macs / model.target if model.target else None,
    }


def result_rows(family: Family, models: list[StudyModel], runs: list[StudyRun]) -> list[Row]:
    """Return a row per model: cost, mean and sample standard deviation of its top-1 (percent) over the seeds.

    `p_compound` is the p-value of the two-sided paired t-test over the seeds, with Holm's correction, between compound
    scaling and each other way to scale to the same target; None with fewer than two common seeds.
    """
    p_values: dict[StudyModel, float] = {}
    for compound in (model for model in models if model.name == COMPOUND):
        ways = {m.name: m for m in models if m.target == compound.target and m.name in (DEEPER, WIDER, HIGHER)}
        pairs = {name: _common_scores(runs, way, compound) for name, way in ways.items()}
        tests = holm({name: paired_p(*scores) for name, scores in pairs.items() if len(scores[0]) > 1})
        p_values |= {ways[name]: p for name, p in tests.items()}
    return [_result_row(family, model, runs, p_values.get(model)) for model in models]


def _scores(runs: list[StudyRun], model: StudyModel) -> dict[int, float]:
    """Seed -> top-1 of the model's runs that ended well."""
    return {run.seed: run.result["top1"] for run in runs if run.model == model and "top1" in run.result}


def _common_scores(runs: list[StudyRun], first: StudyModel, second: StudyModel) -> tuple[list[float], list[float]]:
    """Top-1 of two models for the seeds that both have, in the same order."""
    one, two = _scores(runs, first), _scores(runs, second)
    seeds = sorted(one.keys() & two.keys())
    return [one[seed] for seed in seeds], [two[seed] for seed in seeds]


def _result_row(family: Family, model: StudyModel, runs: list[StudyRun], p_compound: float | None) -> Row:
    results = [run.result for run in runs if run.model == model]
    scores = list(_scores(runs, model).values())
    seconds = [result["seconds"] for result in results if "seconds" in result]
    return {
        **cost_row(family, model),
        "seeds": len(scores),
        "top1_mean": statistics.fmean(scores) if scores else None,
        "top1_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "seconds_mean": statistics.fmean(seconds) if seconds else None,
        "p_compound": p_compound,
        "failed": next((result["failed"] for result in results if "failed" in result), None),
    }


def index_row(family: Family, run: StudyRun) -> Row:
    """Return a run's entry in study.json."""
    return {
        "name": run.model.name,
        "label": run.model.label,
        "seed": run.seed,
        "run": _folder(run),
        "checkpoint": f"{_folder(run)}/last.pt",
        "target_macs": run.model.target,
        **{key: value for key, value in cost_row(family, run.model).items() if key != "model"},
        **run.result,
    }
