"""Stands for the package wandb: the part of its interface that effnet_fast uses. `runs` holds what it was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

runs: dict[str, list[Run]] = {}  # by id: one entry each time the run was opened


class Settings:
    def __init__(self, *, console: str, quiet: bool) -> None:
        assert console == "off", "wandb would capture the console"


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type = name, type
        self.files: list[str] = []

    def add_file(self, local_path: str) -> None:
        self.files.append(Path(local_path).name)


class Run:
    def __init__(self, run_id: str, name: str, config: dict[str, Any]) -> None:
        self.id, self.name, self.config = run_id, name, config
        self.rows: list[dict[str, float]] = []
        self.files: list[str] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, data: dict[str, float]) -> None:
        self.rows.append(data)

    def log_artifact(self, artifact_or_path: Artifact) -> None:
        self.files += artifact_or_path.files

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


def init(
    *, project: str, name: str, id: str | None, resume: str, dir: str, config: dict[str, Any], settings: Settings
) -> Run:
    run = Run(id or f"new{len(runs)}", name, config)
    runs.setdefault(run.id, []).append(run)
    return run
