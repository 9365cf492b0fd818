"""Build the plan, the trials and the training configs of a search from its settings."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from effnet_fast.checkpoint import writing_to
from effnet_fast.config import SearchConfig, TrainConfig, span
from effnet_fast.precision import activation_type
from effnet_fast.search import measure
from effnet_fast.search.family import Family, Scale
from effnet_fast.search.grid import Grid
from effnet_fast.search.plan import Candidate, Limits, SearchPlan, Workload, plan_search
from effnet_fast.search.runs import run_config
from effnet_fast.search.storage import explain_errors
from effnet_fast.search.trials import Task, Trials

CPU_BATCH = 16  # largest batch of the timed training step on a CPU
PLAN = "plan.json"


@dataclass(frozen=True)
class SearchSetup:
    """The settings that all stages of a search share.

    Attributes:
        config: the command's config.
        folder: SAVE_DIR/RUN_NAME.
        family: the scaled models for this data set.
        fingerprint: hash of the data set.
        device: this worker's device.
        precision: autocast type: bf16, fp16 or no.
    """

    config: SearchConfig
    folder: Path
    family: Family
    fingerprint: str
    device: torch.device
    precision: str

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    def make_plan(self) -> SearchPlan:
        """List the candidates and their costs; this times a training step of the baseline.

        Raises:
            ValueError: see `Grid.feasible` and `plan_search`.
        """
        config = self.config
        ranges = {name: span(name, getattr(config, name)) for name in ("alpha", "beta", "gamma", "product")}
        points = Grid(step=config.grid_step, **ranges).feasible()
        limits = Limits(
            macs=config.max_flops,
            parameters=config.max_params,
            activations=config.max_activations,
            latency_ms=config.max_latency_ms,
            latency=functools.cache(self.latency_ms),  # timings are noisy: measure each scale once per plan
        )
        return plan_search(self.family, points, limits, self._workload())

    def latency_ms(self, scale: Scale) -> float:
        """Measure the latency of one image on this device in milliseconds."""
        return measure.latency_ms(self.family.build(scale), self.family.image_size(scale), self.device, self.precision)

    def _workload(self) -> Workload:
        """Time the baseline's training step on this device; on a CPU, time fewer images and scale the result up."""
        batch = self.config.batch_size
        timed_batch = batch if self.device.type == "cuda" else min(batch, CPU_BATCH)
        model = self.family.build(Scale())
        milliseconds = measure.step_ms(model, self.family.base_size, timed_batch, self.device, self.precision)
        return Workload(batch, activation_type(self.precision).itemsize, milliseconds * batch / timed_batch)

    def tasks(self, plan: SearchPlan) -> list[Task]:
        """Return a task per candidate and seed, ordered by seed, then by candidate."""
        return [self.task(candidate, seed) for seed in self.seeds for candidate in plan.candidates]

    def task(self, candidate: Candidate, seed: int) -> Task:
        return Task(candidate.name, candidate.alpha, candidate.beta, candidate.gamma, seed)

    def trial_config(self, task: Task) -> TrainConfig:
        """Return the training config of a trial."""
        return run_config(
            self.config,
            self.family.settings(Scale(task.alpha, task.beta, task.gamma)),
            seed=task.seed,
            num_epochs=self.config.search_epochs,
            save_dir=str(self.folder / "trials"),
            run_name=task.run,
        )

    def open_trials(self, plan: SearchPlan) -> Trials:
        """Open the trials that all workers of this plan, which is in plan.json, share.

        Raises:
            ValueError: see `Trials`.
        """
        config = self.config
        names = [candidate.name for candidate in plan.candidates]
        # The settings as the plan's version of this package wrote them: a later version may have more of them.
        index = json.loads((self.folder / PLAN).read_text())
        content = json.dumps([index["settings"], index["fingerprint"], names])
        return Trials(
            self.folder,
            config.storage,
            config.name,
            digest=hashlib.sha256(content.encode()).hexdigest(),
            pruner=config.pruner,
            epochs=config.search_epochs,
            lease_seconds=config.lease_seconds,
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, so that one worker at a time writes the files of a stage.

        Raises:
            OSError: the folder cannot be written.
        """
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".stage.lock"):
            yield

    def storage_errors(self):
        """Return a context that turns database errors into one line; see `storage.explain_errors`."""
        return explain_errors(self.config.storage, "check the database and run the same command again")
