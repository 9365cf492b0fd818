"""Experiment trackers: TensorBoard, Weights & Biases, MLflow.

Each gets the config, the figures of every row of metrics.jsonl, and the files that the run leaves. None of them can
stop a run: metrics.jsonl has the same figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from effnet_fast.checkpoint import write_atomically

PROJECT = "effnet-fast"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
IDS = "trackers.json"

# Below this many free bytes, write no TensorBoard events: a full disk kills TensorBoard's thread.
_MIN_FREE_BYTES = 1 << 20


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run.

    Attributes:
        folder: the run folder. trackers.json in it holds the trackers' own ids of the run, so that a resumed run goes
            on in the same one.
        name: of the run.
        config: settings and environment, by name.
        step: optimizer steps done so far.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    step: int

    def ids(self) -> dict[str, str]:
        path = self.folder / IDS
        return json.loads(path.read_bytes()) if path.exists() else {}

    def remember(self, tracker: str, run_id: str) -> None:
        write_atomically(self.folder / IDS, json.dumps(self.ids() | {tracker: run_id}).encode())


class Tracker(Protocol):
    """A place that shows runs; its constructor takes a `TrackedRun`. Any method may raise."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Add figures, keyed by GROUP/NAME, at an optimizer step."""

    def add_files(self, files: Sequence[Path]) -> None:
        """Keep the files that the run leaves."""

    def close(self, status: int) -> None:
        """End the run; `status` is its exit status."""


class TensorBoard:
    """Event files in the folder `tensorboard` of the run. Rows after the run's step are hidden."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.folder
        self._events = SummaryWriter(run.folder / "tensorboard", purge_step=run.step + 1)
        config = "\n".join(f"    {name}: {value}" for name, value in run.config.items())  # indented: code in Markdown
        self._events.add_text("config", config, run.step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if shutil.disk_usage(self._folder).free < _MIN_FREE_BYTES:
            return
        for name, value in figures.items():
            with contextlib.suppress(OSError):  # a quota, which disk_usage does not show
                self._events.add_scalar(name, value, step)

    def add_files(self, files: Sequence[Path]) -> None:
        pass  # they lie beside the events

    def close(self, status: int) -> None:
        with contextlib.suppress(OSError):
            self._events.close()


class WandB:
    """A run of Weights & Biases, which reads WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY and its other variables."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=run.ids().get("wandb"),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(console="off", quiet=True),
        )
        run.remember("wandb", self._run.id)
        # Steps of its own must rise from call to call; a run that was killed repeats some.
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def add_files(self, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"run-{self._run.id}", type="run")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)


class MLflow:
    """A run of MLflow, in the store of MLFLOW_TRACKING_URI and the experiment MLFLOW_EXPERIMENT_NAME."""

    _MOST_PARAMETERS = 100  # that one request may hold

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        if known := run.ids().get("mlflow"):
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else self._client.create_experiment(title)
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        run.remember("mlflow", self._id)
        self._log_config(run.config)

    def _log_config(self, config: Mapping[str, Any]) -> None:
        parameters = [self._entities.Param(name, str(value)) for name, value in config.items()]
        for first in range(0, len(parameters), self._MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + self._MOST_PARAMETERS])

    def log(self, figures: Mapping[str, float], step: int) -> None:
        now = round(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def add_files(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._id, str(file))

    def close(self, status: int) -> None:
        self._client.set_terminated(self._id, "FINISHED" if status == 0 else "KILLED" if status > 128 else "FAILED")


KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        ValueError: one is missing.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"--tracker {name}: {name} is not installed: pip install 'effnet-fast[{name}]'")


class Trackers:
    """The trackers of a run. One that raises is turned off, with one line of warning, and training goes on.

    Args:
        names: keys of `KINDS`; none on ranks other than the main one.
        run: the run.
        warn: prints a line.

    Attributes:
        status: exit status to report on leaving the `with` block; a run that raises leaves it at 1.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun, warn: Callable[[str], None]) -> None:
        self.status = 1
        self._warn = warn
        self._active: dict[str, Tracker] = {}
        for name in names:
            tracker = self._attempt(name, KINDS[name], run)
            if tracker is not None:
                self._active[name] = tracker

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._active.items()):
            self._attempt(name, tracker.close, self.status)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Add figures, keyed by GROUP/NAME, at an optimizer step."""
        for name, tracker in list(self._active.items()):
            self._attempt(name, tracker.log, figures, step)

    def add_files(self, files: Sequence[Path]) -> None:
        """Keep the files that the run leaves."""
        for name, tracker in list(self._active.items()):
            self._attempt(name, tracker.add_files, files)

    def _attempt(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # other people's code and servers; nothing in it is worth a training run
            self._active.pop(name, None)
            reason = str(error).strip().partition("\n")[0]
            self._warn(
                f"warning: the tracker {name} failed and is off from here on ({type(error).__name__}: {reason}); "
                "metrics.jsonl has all figures"
            )
