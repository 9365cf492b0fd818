"""The verb train: lock the folder, read the checkpoint, plan, build, fit."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effnet_fast import checkpoint, distributed, provenance
from effnet_fast.checkpoint import BadStep, Checkpoint
from effnet_fast.config import TrainConfig
from effnet_fast.distributed import World
from effnet_fast.faults import explanation, is_out_of_memory
from effnet_fast.model.trained import TrainedModel, load
from effnet_fast.outcome import OnEvaluation, Outcome, metric
from effnet_fast.run import folder, rank_check
from effnet_fast.run.build import Parts, build
from effnet_fast.run.forecast import forecast, memory_advice, opening_lines
from effnet_fast.run.plan import Plan, make_plan, run_folder
from effnet_fast.run.resume import find_checkpoint
from effnet_fast.train.evaluate import Batches, Result, evaluate
from effnet_fast.train.loop import Hooks, fit
from effnet_fast.train.precise_bn import precise_bn
from effnet_fast.train.record import Recorder
from effnet_fast.train.stop import SaveDue, Stop
from effnet_fast.train.trackers import TrackedRun, Trackers
from effnet_fast.train.watchdog import Watchdog, watchdog
from effnet_fast.train.writer import Writer

if TYPE_CHECKING:
    from effnet_fast.report.curves import Metrics


@dataclass(frozen=True)
class TrainResult(Outcome):
    """Result of a training run: `top1`, `top5` and `loss` of its last evaluation, and the files in its folder.

    Attributes:
        folder: SAVE_DIR/RUN_NAME, which contains the checkpoints, metrics.jsonl and curves.png.
    """

    folder: Path

    @property
    def history(self) -> Metrics:
        """The rows of metrics.jsonl: `history.train` at each logging interval, `history.eval` at each evaluation.

        Raises:
            OSError, ValueError: the run has not written metrics yet.
        """
        from effnet_fast.report.curves import read_metrics

        return read_metrics(self.folder)

    def model(self, device: str | torch.device = "auto") -> TrainedModel:
        """Load the model of last.pt with its preprocessing; `effnet_fast.load` also reads best.pt.

        Raises:
            FileNotFoundError: the run has not written a checkpoint.
        """
        return load(self.folder / checkpoint.LAST, device=device)


def train(config: TrainConfig, on_evaluation: OnEvaluation | None = None) -> TrainResult:
    """Run `effnet-fast train`: train a model, or resume its training, and evaluate it.

    After a signal, for example Ctrl-C, the run saves a checkpoint and returns; see `TrainResult.finished`.

    Args:
        config: settings.
        on_evaluation: called on every rank after each evaluation, with the epochs done and the row of metrics.jsonl;
            an exception ends the run.

    Raises:
        ValueError, OSError: mistakes of the user and faults of the machine, in one line each.
        FloatingPointError: the loss or the gradient is not finite.
        The errors of `on_evaluation`.
    """
    # A longer timeout than the watchdog's, so that the watchdog reports first: its message is clearer.
    with distributed.group(config.device, 1.5 * config.hang_timeout or None) as world:
        rank_check.compare_ranks(rank_check.about_start(config))
        if config.dry_run:
            plan = _plan(config, world)
            if world.is_main:
                print(forecast(plan))
            return TrainResult(0, False, {}, run_folder(config))
        return TrainResult(**vars(train_in(world, config, on_evaluation)), folder=run_folder(config))


def train_in(world: World, config: TrainConfig, on_evaluation: OnEvaluation | None = None) -> Outcome:
    """Train in an existing process group; may be called several times in a process.

    Raises:
        The errors of `train`, and those of `on_evaluation`.
    """
    with folder.locked(run_folder(config)):
        plan = _plan(config, world)  # the watchdog does not time it: to download and examine images can take hours
        if plan.progress.finished:
            return _finished(plan)
        try:
            with watchdog(world, config.hang_timeout) as watch:
                return _Training(plan, build(plan), watch, on_evaluation).run()
        except (MemoryError, RuntimeError) as error:
            message = memory_advice(plan) if is_out_of_memory(error) else explanation(error)
            if message is None:
                raise
            raise ValueError(message) from error


def _plan(config: TrainConfig, world: World) -> Plan:
    resumed = find_checkpoint(str(config.resume), run_folder(config))
    plan = make_plan(config, world, resumed)
    rank_check.compare_ranks(rank_check.about_data(plan.dataset, resumed.checkpoint if resumed is not None else None))
    return plan


def _finished(plan: Plan) -> Outcome:
    assert plan.resumed is not None
    # A restart by torchrun or Slurm resumes its own checkpoint, whatever --resume says.
    restart = "another --run_name starts a new run" if plan.resumed.restarts else "--resume no starts it over"
    if plan.world.is_main:
        print(f"{plan.resumed.path} is finished; nothing to do ({restart})", flush=True)
    return Outcome(0, True, plan.resumed.checkpoint.result)


class _Training:
    """A training run: the plan and its parts, connected to the loop, the records and the checkpoints."""

    def __init__(self, plan: Plan, parts: Parts, watchdog: Watchdog, on_evaluation: OnEvaluation | None) -> None:
        self.plan, self.parts, self.watchdog, self.on_evaluation = plan, parts, watchdog, on_evaluation
        self.step = parts.step
        self.progress = dataclasses.replace(plan.progress)
        self.last_result: dict[str, Any] = plan.resumed.checkpoint.result if plan.resumed is not None else {}
        self._is_best = False

    def run(self) -> Outcome:
        plan = self.plan
        resumed_path = None if plan.resumed is None else plan.resumed.path
        # All checks have passed, so files of an earlier run may be removed now.
        distributed.on_main(lambda: folder.prepare(plan.folder, plan.config, resumed_path))
        with self._open_trackers() as trackers:
            outcome = self._train(trackers)
            files = [plan.folder / name for name in ("config.yaml", "environment.json", "metrics.jsonl", "curves.png")]
            trackers.add_files([file for file in files if file.exists()])
            trackers.status = outcome.status
        return outcome

    def _open_trackers(self) -> Trackers:
        config, is_main = self.plan.config, self.plan.world.is_main
        settings = dataclasses.asdict(config) | provenance.environment() if is_main else {}
        tracked = TrackedRun(self.plan.folder, config.name, settings, self.progress.step)
        return Trackers(config.trackers if is_main else [], tracked, Recorder.warn)

    def _train(self, trackers: Trackers) -> Outcome:
        plan, config = self.plan, self.plan.config
        self.recorder = Recorder(
            plan.folder,
            main=plan.world.is_main,
            device=plan.world.device,
            step=self.progress.step,
            total_steps=plan.steps,
            steps_per_epoch=plan.steps_per_epoch,
            trackers=trackers,
            work=plan.sizes.pixels,
        )
        for line in opening_lines(plan, self.parts):
            self.recorder.say(line)
        if plan.world.is_main and (newer := provenance.newer_than_tested()):
            self.recorder.warn(f"warning: {newer}")
        hooks = Hooks(
            config.log_every_steps,
            config.eval_every_epochs,
            SaveDue(plan.world, config.save_every_steps, config.save_every_minutes),
            self._report,
            self._save,
            self._evaluate,
        )
        try:
            with Stop(plan.world, config.time_budget) as stop, self._make_writer() as self.writer:
                fit(self.step, self.parts.loader, self._watch, self.progress, config.num_epochs, hooks, stop)
        finally:
            self.recorder.close()
            self.parts.close()
        self._conclude(stop)
        return Outcome(stop.status, self.progress.finished, self.last_result)

    def _make_writer(self) -> Writer:
        return Writer(self.plan.folder, self.plan.config.keep_last, self.recorder.warn)

    def _watch(self, batches: Batches) -> Batches:
        where = f"epoch {self.progress.epoch + 1}"
        return self.recorder.watch(self.watchdog.watch(batches, where, self.progress.batch))

    # -- checkpoints

    def _save(self) -> None:
        plan, config = self.plan, self.plan.config
        # Each rank has its own BatchNorm statistics unless they are synchronised.
        is_per_rank = plan.world.size > 1 and not plan.sync_batchnorm
        rank_state = {"statistics": self.step.statistics.copy().cpu() if is_per_rank else None}
        ranks = distributed.gather_objects(rank_state)
        state = self.step.state().to_dict()
        if not plan.world.is_main:
            return
        content = Checkpoint(
            **state,
            architecture=dataclasses.asdict(self.parts.model.architecture),
            classes=list(plan.dataset.classes),
            mean=plan.dataset.mean,
            std=plan.dataset.std,
            # An absolute path, so that `eval` finds the data from any folder.
            config=dataclasses.asdict(config) | {"data_dir": str(Path(config.data_dir).absolute())},
            fingerprint=plan.dataset.fingerprint,
            progress=dataclasses.asdict(self.progress),
            result=self.last_result,
            ranks=ranks,
            images_per_pass=plan.max_images_per_pass,
            launch=distributed.launch(),
            schedule_start=plan.schedule_start,
        )
        self.writer.save(content.to_dict(), best=self._is_best)
        self._is_best = False

    def _save_bad_step(self, bad_step: int) -> None:
        """Save the state before the bad step, with its batch, and stop."""
        epoch, batch = divmod(bad_step, self.plan.steps_per_epoch)
        batches = distributed.gather_objects([t.cpu() for t in next(iter(self.parts.loader.epoch(epoch, batch)))])
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        state = self.step.state().to_dict()
        path = self.plan.folder / "not-finite.pt"
        if self.plan.world.is_main:
            bad = BadStep(**state, images=images, labels=labels, epoch=epoch, step=bad_step)
            checkpoint.save(path, bad.to_dict())
        raise FloatingPointError(
            f"the loss or gradient was not finite at step {bad_step} (epoch {epoch}, batch {batch}); the weights "
            f"before it and its batch are in {path}: try a lower --learning_rate, a smaller --clip_grad or bf16"
        )

    # -- reports and evaluations

    def _report(self) -> None:
        self.writer.check()
        reading = self.step.meters.read()
        if reading.bad_step is not None:
            self._save_bad_step(reading.bad_step)
        self.recorder.train(self.progress.step, reading, self.step.rate(self.progress.step - 1), self.plan.world.size)

    def _evaluate(self) -> None:
        start = time.perf_counter()
        if not self.plan.sync_batchnorm:
            self.step.statistics.average_over_ranks()
        raw = self._evaluate_weights()
        row: dict[str, Any] = {"split": self.plan.eval_split, "loss": raw.loss, "top1": raw.top1, "top5": raw.top5}
        if self.step.ema is not None:
            with self.step.ema.swapped():
                average = self._evaluate_weights()
            row |= {"ema_loss": average.loss, "ema_top1": average.top1, "ema_top5": average.top5}
        row["seconds"] = time.perf_counter() - start
        self.last_result = row | {"step": self.progress.step}
        self.recorder.evaluation(self.progress.step, row)
        score = metric(row, "top1")
        if self.plan.dataset.val is not None and score > self.progress.best:
            self.progress.best, self._is_best = score, True
        if self.on_evaluation is not None:
            self.on_evaluation(self.progress.epoch, row)

    def _evaluate_weights(self) -> Result:
        plan, model = self.plan, self.parts.model
        shared: dict[str, Any] = {"precision": plan.precision, "device": plan.world.device}
        if count := plan.precise_bn_batches(model.architecture.bn_momentum, last=self.progress.finished):
            batches = self.parts.loader.epoch(self.progress.epoch, end=count)
            watched = self.watchdog.watch(batches, "estimating BatchNorm statistics")
            precise_bn(model, watched, **shared)
        batches = self.watchdog.watch(self.parts.eval_loader.epoch(0), "evaluation")
        return evaluate(model, batches, num_classes=len(plan.dataset.classes), **shared)

    def _conclude(self, stop: Stop) -> None:
        plan = self.plan
        if not plan.world.is_main:
            return
        if not self.progress.finished:
            reason = "time is up" if stop.out_of_time else "stopped"
            repeats = plan.config.resume == "auto" or distributed.may_be_restart()
            command = "the same command" if repeats else "the same command without --resume"
            print(f"{reason} at step {self.progress.step} of {plan.steps}; {command} resumes from there")
        if not (plan.folder / "metrics.jsonl").stat().st_size:
            return
        print(self.recorder.summary())
        self._draw_curves()
        names = ("last.pt", "best.pt", "curves.png", "metrics.jsonl", "tensorboard/", "config.yaml", "environment.json")
        print(f"in {plan.folder}: {', '.join(name for name in names if (plan.folder / name).exists())}")

    def _draw_curves(self) -> None:
        try:
            from effnet_fast.report.curves import plot_curves

            plot_curves([self.plan.folder], self.plan.folder / "curves.png")
        except (ValueError, ImportError) as error:  # a full disk; all else is safe, and `effnet-fast plot` draws later
            self.recorder.warn(f"warning: {error}")
