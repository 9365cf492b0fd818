"""Stands for the package mlflow: the part of its interface that effnet_fast uses. `runs` holds what it was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

runs: dict[str, SimpleNamespace] = {}
experiments: dict[str, SimpleNamespace] = {}


@dataclass(frozen=True)
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True)
class Param:
    key: str
    value: str


entities = SimpleNamespace(Metric=Metric, Param=Param)


class MlflowClient:
    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return experiments.get(name)

    def create_experiment(self, name: str) -> str:
        experiments[name] = SimpleNamespace(experiment_id=str(len(experiments)))
        return experiments[name].experiment_id

    def create_run(self, experiment_id: str, *, run_name: str) -> SimpleNamespace:
        run_id = f"run{len(runs)}"
        runs[run_id] = SimpleNamespace(name=run_name, status="RUNNING", params={}, metrics=[], files=[])
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        runs[run_id].status = status

    def log_batch(self, run_id: str, *, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()) -> None:
        assert len(params) <= 100
        assert not {param.key for param in params} & runs[run_id].params.keys(), "MLflow refuses to change a parameter"
        runs[run_id].params |= {param.key: param.value for param in params}
        runs[run_id].metrics += metrics

    def log_artifact(self, run_id: str, local_path: str) -> None:
        runs[run_id].files.append(Path(local_path).name)

    def set_terminated(self, run_id: str, status: str) -> None:
        runs[run_id].status = status
