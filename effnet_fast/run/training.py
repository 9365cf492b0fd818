"""The verb train: a plan, its parts, and the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effnet_fast import checkpoint, data, distributed, provenance
from effnet_fast.config import TrainConfig
from effnet_fast.data.augment_params import Augment
from effnet_fast.data.choose_loader import choose_loader, make_loader
from effnet_fast.data.loader import Loader, LoaderSpec
from effnet_fast.distributed import World
from effnet_fast.model import (
    Network,
    batch_norms,
    create_model,
    default_output_stride,
    from_description,
    recompute_blocks,
    variant,
)
from effnet_fast.model.weights import Weights, read_weights
from effnet_fast.run import resume
from effnet_fast.run.rank_check import about_run, about_start, agree
from effnet_fast.run.resolve import (
    compile_model,
    load_dataset,
    loader_dtype,
    resolve_image_size,
    resolve_precision,
    resolve_step,
    set_backends,
    worker_count,
)
from effnet_fast.train import optim
from effnet_fast.train.ema import Ema
from effnet_fast.train.evaluate import Batches, Result, evaluate, recalibrate
from effnet_fast.train.loop import Every, Progress, fit
from effnet_fast.train.mixing import Mixing
from effnet_fast.train.record import Recorder
from effnet_fast.train.schedule import make_schedule
from effnet_fast.train.step import Step
from effnet_fast.train.stop import SaveDue, Stop
from effnet_fast.train.watchdog import Watchdog, watchdog
from effnet_fast.train.writer import Writer

if TYPE_CHECKING:
    from effnet_fast.model.complexity import Complexity

# A run of fewer steps than this many of BatchNorm's time constants re-estimates its statistics before evaluations.
STALE_TIME_CONSTANTS = 20
CALIBRATION_BATCHES = 50


@dataclass(frozen=True)
class Plan:
    """A training run after every `auto` is decided, before anything is built on a device.

    Attributes:
        weights: to begin with.
        description: of the architecture to go on with, see `model.from_description`; None for a run that begins.
    """

    config: TrainConfig
    world: World
    folder: Path
    dataset: data.Dataset
    weights: Weights | None
    image_size: int
    precision: str
    compile: bool
    graph: bool
    steps_per_epoch: int
    description: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.num_epochs

    @property
    def eval_split(self) -> str:
        """The split whose curve is shown: the held-out images where there are any."""
        return "val" if self.dataset.val is not None else "test"

    @property
    def arithmetic(self) -> str:
        """How it computes, to be read."""
        ways = {"compiled": self.compile, "in one CUDA graph": self.graph}
        return ", ".join(["fp32" if self.precision == "no" else self.precision, *(way for way in ways if ways[way])])


@dataclass(frozen=True)
class Outcome:
    """How a training run ended.

    Attributes:
        status: exit status: see `Stop.status`.
        finished: all epochs are done.
        result: row of the last evaluation: split, loss, top1, top5, and ema_* where there is an average.
    """

    status: int
    finished: bool
    result: dict[str, Any]


# Called after each evaluation with the epochs done and its row, on every rank; what it raises ends the run.
OnEvaluation = Callable[[int, dict[str, Any]], None]


def train(config: TrainConfig) -> int:
    """Run `effnet-fast train`; returns the exit status: see `Stop.status`.

    Raises:
        ValueError, OSError: for what the user can mend, each with one line.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    # The watchdog, which says more, comes first.
    world = distributed.init(config.device, 1.5 * config.hang_timeout or None)
    try:
        agree(about_start(config))
        if config.dry_run:
            plan = _plan(config, world)
            if world.is_main:
                print(_forecast(plan))
            return 0
        return train_in(world, config).status
    finally:
        distributed.shutdown()


def train_in(world: World, config: TrainConfig, on_evaluation: OnEvaluation | None = None) -> Outcome:
    """Train as `train` does, in a world that is there already; several runs may follow each other in one process.

    Raises:
        As `train`, and whatever `on_evaluation` raises.
    """
    with watchdog(world, config.hang_timeout) as watch:
        plan = _plan(config, world)
        if plan.compile:
            torch.compiler.reset()  # else the models of earlier runs count against the limit of recompilations
        with resume.alone(plan.folder):
            try:
                return _Training(plan, watch, on_evaluation).run()
            except torch.OutOfMemoryError as error:
                raise ValueError(_memory_advice(plan)) from error


def _plan(config: TrainConfig, world: World) -> Plan:
    folder = Path(config.save_dir) / config.name
    begins = not resume.goes_on(config, folder)
    if begins:
        resume.accumulation(config, world.size, None)
    variant(config.model)  # an unknown name is refused before any data is fetched
    if config.optimizer in optim.APEX:
        optim.apex_class(config.optimizer)
    weights = None
    if begins and config.pretrained:
        weights = read_weights(Path(config.pretrained), config.pretrained_layout)
    dataset = load_dataset(config)
    if weights is not None:
        dataset = dataclasses.replace(dataset, mean=weights.mean, std=weights.std)
    steps_per_epoch = len(dataset.train) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"--batch_size {config.batch_size} is larger than the {len(dataset.train)} training images")
    image_size = resolve_image_size(config.image_size, config.model, dataset.native_size)
    stride = config.output_stride or default_output_stride(config.model, image_size)
    images = steps_per_epoch * config.batch_size * config.num_epochs
    compiled, graph = resolve_step(config, world, stride, images)
    return Plan(
        config=config,
        world=world,
        folder=folder,
        dataset=dataset,
        weights=weights,
        image_size=image_size,
        precision=resolve_precision(str(config.mixed_precision), world.device),
        compile=compiled,
        graph=graph,
        steps_per_epoch=steps_per_epoch,
    )


def _as_saved(plan: Plan, saved: dict[str, Any]) -> Plan:
    """The plan of a run that goes on: weights' files may have changed since, or be gone."""
    dataset = dataclasses.replace(plan.dataset, mean=tuple(saved["mean"]), std=tuple(saved["std"]))
    return dataclasses.replace(plan, dataset=dataset, weights=None, description=saved["architecture"])


def _build_model(plan: Plan, device: torch.device) -> Network:
    config = plan.config
    torch.manual_seed(config.seed)
    model = _begin_model(plan) if plan.description is None else from_description(plan.description, config.kernels)
    if config.freeze:
        model.freeze(config.freeze)
    for norm in batch_norms(model):
        norm.synchronised = config.sync_batchnorm
    if config.activation_checkpointing:
        recompute_blocks(model)
    return model.to(device)


def _begin_model(plan: Plan) -> Network:
    config = plan.config
    return create_model(
        config.model,
        num_classes=len(plan.dataset.classes),
        image_size=plan.image_size,
        output_stride=config.output_stride,
        width=config.width,
        depth=config.depth,
        dropout=config.dropout,
        drop_path=config.drop_path,
        kernels=config.kernels,
        pretrained=plan.weights,
        allow_unmatched=config.allow_unmatched,
    )


def _callable_model(plan: Plan, module: Network, pieces: int) -> nn.Module:
    model: nn.Module = module
    if plan.world.size > 1:
        model = DistributedDataParallel(
            module,
            broadcast_buffers=False,  # synchronised, or averaged before each evaluation
            gradient_as_bucket_view=True,
            # Together with accumulation's no_sync it aborts in torch 2.13.
            static_graph=pieces == 1,
        )
    return compile_model(model, plan.world.device) if plan.compile else model


def _loader_spec(plan: Plan, augment: Augment | None) -> LoaderSpec:
    config, world = plan.config, plan.world
    return LoaderSpec(
        batch_size=config.batch_size // world.size,
        image_size=plan.image_size,
        mean=plan.dataset.mean,
        std=plan.dataset.std,
        device=world.device,
        dtype=loader_dtype(plan.precision, world.device),
        seed=config.seed,
        rank=world.rank,
        world=world.size,
        num_workers=worker_count(config.num_workers),
        augment=augment,
    )


def augmentation(config: TrainConfig) -> Augment:
    """What training does to an image."""
    return Augment(
        rotation=config.rotation,
        color_jitter=config.color_jitter,
        random_erasing=config.random_erasing,
        auto_augment=config.auto_augment,
    )


class _Training:
    """A training run's parts, joined."""

    def __init__(self, plan: Plan, watchdog: Watchdog, on_evaluation: OnEvaluation | None) -> None:
        self.watchdog, self.on_evaluation = watchdog, on_evaluation
        config, world = plan.config, plan.world
        set_backends(config.deterministic)
        self.folder = plan.folder
        self.progress = Progress()
        self.found = resume.read_checkpoint(config, plan.folder, plan.dataset.fingerprint)
        path, saved = self.found or (None, None)
        with resume.of_this_version(path):
            self.plan = plan = plan if saved is None else _as_saved(plan, saved)
            self.model = _build_model(plan, world.device)
        agree(about_run(plan.dataset, self.model, saved))
        # With other ranks than before, as many images in one pass as before.
        most_images = saved.get("images_per_pass") if saved else None
        pieces = resume.accumulation(config, world.size, most_images)
        self.images_per_pass = most_images or config.batch_size // (world.size * pieces)
        optimizer = optim.make_optimizer(
            config.optimizer,
            self.model,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
        self.step = Step(
            _callable_model(plan, self.model, pieces),
            self.model,
            optimizer,
            make_schedule(config.schedule, plan.steps, plan.steps_per_epoch, config.warmup_epochs),
            learning_rate=config.learning_rate,
            precision=plan.precision,
            clip_grad=config.clip_grad,
            accumulation=pieces,
            label_smoothing=config.label_smoothing,
            mixing=Mixing(config.mixup, config.cutmix, seed=config.seed, rank=world.rank),
            ema=Ema(self.model, config.ema_decay) if config.ema_decay > 0 else None,
            world=world,
            seed=config.seed,
            graph=plan.graph,
        )
        self.last_result: dict[str, Any] = {}
        self._is_best = False

    def run(self) -> Outcome:
        plan, config = self.plan, self.plan.config
        path, saved = self.found or (None, None)
        if saved is not None and saved["progress"]["finished"]:
            # What a launcher starts goes on from its own checkpoint, whatever --resume says.
            afresh = "another --run_name starts one" if distributed.launch() else "--resume no starts it"
            self._say(f"{path} is finished; nothing to do ({afresh} afresh)")
            return Outcome(0, True, saved["result"])
        self._make_loaders()
        self._open_folder()
        if saved is not None:
            with resume.of_this_version(path):
                self._restore(saved)
        self.recorder = Recorder(
            self.folder,
            main=plan.world.is_main,
            device=plan.world.device,
            step=self.progress.step,
            total_steps=plan.steps,
            steps_per_epoch=plan.steps_per_epoch,
        )
        self._announce()
        save_due = SaveDue(plan.world, config.save_every_steps, config.save_every_minutes)
        often = (config.log_every_steps, config.eval_every_epochs, save_due)
        every = Every(*often, self._report, self._save, self._evaluate)
        try:
            with Stop(plan.world, config.time_budget) as stop, self._make_writer() as self.writer:
                fit(self.step, self.loader, self._watch, self.progress, config.num_epochs, every, stop)
        finally:
            self.recorder.close()
            self.loader.close()
            self.eval_loader.close()
        self._conclude(stop)
        return Outcome(stop.status, self.progress.finished, self.last_result)

    def _watch(self, batches: Batches) -> Batches:
        where = f"epoch {self.progress.epoch + 1}"
        return self.recorder.watch(self.watchdog.watch(batches, where, self.progress.batch))

    # -- the folder

    def _open_folder(self) -> None:
        """Fit the run's folder out; an earlier run is cleared from it only here, once nothing is left to be refused."""
        distributed.on_main(self._fit_out)

    def _fit_out(self) -> None:
        with resume.writing(self.folder):
            resume.clear_leftovers(self.folder)
            if self.found is None:
                self._clear_folder()
            else:
                resume.set_damaged_aside(self.folder, self.found[0])
            settings = yaml.safe_dump(dataclasses.asdict(self.plan.config), sort_keys=False)
            checkpoint.write_atomically(self.folder / "config.yaml", settings.encode())
            environment = json.dumps(provenance.environment(), indent=2) + "\n"
            checkpoint.write_atomically(self.folder / "environment.json", environment.encode())

    def _clear_folder(self) -> None:
        old = checkpoint.generations(self.folder / checkpoint.LAST)
        for path in [*old, *(self.folder / name for name in (checkpoint.BEST, "metrics.jsonl"))]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)

    def _make_writer(self) -> Writer:
        return Writer(self.folder, self.plan.config.keep_last, self.recorder.warn)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step.load_state_dict(saved)
        self.progress = Progress(**saved["progress"])
        self.last_result = saved["result"]
        ranks = saved.get("ranks", [])
        own = ranks[self.plan.world.rank] if len(ranks) == self.plan.world.size else {}
        self.loader.load_state_dict(own.get("loader", {}))
        if own.get("statistics") is not None:
            self.step.statistics.load(own["statistics"].to(self.plan.world.device))

    def _save(self) -> None:
        plan, config = self.plan, self.plan.config
        # What only one rank knows; BatchNorm's statistics are all ranks' where they are shared.
        apart = plan.world.size > 1 and not config.sync_batchnorm
        own = {
            "loader": self.loader.state_dict(),
            "statistics": self.step.statistics.copy().cpu() if apart else None,
        }
        ranks = distributed.gather_objects(own)
        state = self.step.state_dict()
        if not plan.world.is_main:
            return
        about = {
            "progress": dataclasses.asdict(self.progress),
            "ranks": ranks,
            "images_per_pass": self.images_per_pass,
            "launch": distributed.launch(),
            "config": dataclasses.asdict(config),
            "architecture": dataclasses.asdict(self.model.architecture),
            "classes": list(plan.dataset.classes),
            "mean": list(plan.dataset.mean),
            "std": list(plan.dataset.std),
            "fingerprint": plan.dataset.fingerprint,
            "result": self.last_result,
        }
        self.writer.save({**state, **about}, best=self._is_best)
        self._is_best = False

    # -- what the loop calls

    def _make_loaders(self) -> None:
        plan, dataset = self.plan, self.plan.dataset
        held = dataset.val if dataset.val is not None else dataset.test
        augment = augmentation(plan.config)
        kind, self.loader_reason = choose_loader(plan.config.loader, dataset.train, plan.world.device, augment)
        self.loader: Loader = make_loader(kind, dataset.train, _loader_spec(plan, augment))
        self.eval_loader: Loader = make_loader(kind, held, _loader_spec(plan, None))

    def _report(self) -> None:
        self.writer.check()
        reading = self.step.meters.read()
        if reading.bad_step is not None:
            self._keep_bad_step(reading.bad_step)
        self.recorder.train(self.progress.step, reading, self.step.rate(self.progress.step - 1), self.plan.world.size)

    def _keep_bad_step(self, bad_step: int) -> None:
        """Save the state that the bad step met, with its batch, and stop."""
        epoch, batch = divmod(bad_step, self.plan.steps_per_epoch)
        pieces = distributed.gather_objects([t.cpu() for t in next(iter(self.loader.epoch(epoch, batch)))])
        images, labels = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        state = {**self.step.state_dict(), "images": images, "labels": labels, "epoch": epoch, "step": bad_step}
        path = self.folder / "not-finite.pt"
        if self.plan.world.is_main:
            checkpoint.save(path, state)
        raise FloatingPointError(
            f"the loss or gradient was not finite at step {bad_step} (epoch {epoch}, batch {batch}); the weights "
            f"before it and its batch are in {path}: try a lower --learning_rate, a smaller --clip_grad or bf16"
        )

    def _evaluate(self) -> None:
        config = self.plan.config
        start = time.perf_counter()
        if not config.sync_batchnorm:
            self.step.statistics.average_over_ranks()
        raw = self._evaluate_weights()
        row: dict[str, Any] = {"split": self.plan.eval_split, "loss": raw.loss, "top1": raw.top1, "top5": raw.top5}
        if self.step.ema is not None:
            with self.step.ema.swapped():
                average = self._evaluate_weights()
            row |= {"ema_loss": average.loss, "ema_top1": average.top1, "ema_top5": average.top5}
        row["seconds"] = time.perf_counter() - start
        self.last_result = row
        self.recorder.evaluation(self.progress.step, row)
        score = row.get("ema_top1", row["top1"])
        if self.plan.dataset.val is not None and score > self.progress.best:
            self.progress.best, self._is_best = score, True
        if self.on_evaluation is not None:
            self.on_evaluation(self.progress.epoch, row)

    def _evaluate_weights(self) -> Result:
        plan = self.plan
        shared: dict[str, Any] = {"precision": plan.precision, "device": plan.world.device}
        if self._stale:
            batches = self.watchdog.watch(self.loader.epoch(self.progress.epoch), "estimating BatchNorm's statistics")
            recalibrate(self.model, batches, CALIBRATION_BATCHES, **shared)
        batches = self.watchdog.watch(self.eval_loader.epoch(0), "evaluation")
        return evaluate(self.model, batches, num_classes=len(plan.dataset.classes), **shared)

    @property
    def _stale(self) -> bool:
        return self.plan.steps * self.model.architecture.bn_momentum < STALE_TIME_CONSTANTS

    # -- what the user reads

    def _say(self, text: str) -> None:
        if self.plan.world.is_main:
            print(text, flush=True)

    def _announce(self) -> None:
        plan, progress = self.plan, self.progress
        self.recorder.say(
            f"{plan.config.model} at {plan.image_size} px, output stride {self.model.architecture.output_stride}, on "
            f"{plan.world.size} x {plan.world.device.type} in {plan.arithmetic}; {self.loader_reason}"
        )
        dropped = self.loader.dropped
        tail = f"; {dropped} images, other ones each epoch, are left over and dropped" if dropped else ""
        self.recorder.say(
            f"{plan.dataset.name}: {len(plan.dataset.train)} training images, {plan.config.num_epochs} epochs of "
            f"{plan.steps_per_epoch} steps{tail}"
        )
        if self._stale:
            self.recorder.say(
                f"a short run ({plan.steps} steps): BatchNorm's statistics are re-estimated on "
                f"{min(CALIBRATION_BATCHES, plan.steps_per_epoch)} training batches before each evaluation"
            )
        if self.step.accumulation != plan.config.grad_accumulation:
            self.recorder.say(
                f"on {plan.world.size} rank(s) now: {self.step.accumulation} accumulation step(s) keep the batch of "
                f"{plan.config.batch_size}"
            )
        if progress.step:
            self.recorder.say(f"going on at step {progress.step} of {plan.steps} (epoch {progress.epoch + 1})")
        if plan.world.size == 1 and torch.cuda.device_count() > 1:
            self.recorder.say(
                f"one of {torch.cuda.device_count()} GPUs is used; for all: torchrun --standalone "
                f"--nproc_per_node={torch.cuda.device_count()} -m effnet_fast train ..."
            )

    def _conclude(self, stop: Stop) -> None:
        if not self.plan.world.is_main:
            return
        if not self.progress.finished:
            why = "time is up" if stop.out_of_time else "stopped"
            again = self.plan.config.resume == "auto" or distributed.launch()
            how = "the same command goes" if again else "the same command without --resume goes"
            print(f"{why} at step {self.progress.step} of {self.plan.steps}; {how} on from there")
        if not (self.folder / "metrics.jsonl").stat().st_size:
            return
        print(self.recorder.summary())
        from effnet_fast.report.curves import plot_curves

        try:
            plot_curves([self.folder], self.folder / "curves.png")
        except ValueError as error:  # a full disk; what was trained is safe, and `effnet-fast plot` draws it later
            self.recorder.warn(f"warning: {error}")
        found = (
            name for name in ("last.pt", "best.pt", "curves.png", "metrics.jsonl") if (self.folder / name).exists()
        )
        print(f"in {self.folder}: {', '.join(found)}, tensorboard/, config.yaml, environment.json")


def _image_bytes(plan: Plan, cost: Complexity) -> int:
    """Memory that an image of a piece of the batch takes on its device, estimated."""
    return cost.training_bytes_per_image(4 if plan.precision == "no" else 2)


def _memory_advice(plan: Plan) -> str:
    """What to do when a device's memory is full, in one line."""
    from effnet_fast.model.complexity import complexity

    config, device = plan.config, plan.world.device
    total = torch.cuda.get_device_properties(device).total_memory
    cost = complexity(_build_model(plan, torch.device("cpu")), plan.image_size)
    pieces = resume.accumulation(config, plan.world.size, None)
    ways = plan.world.size * pieces
    fits = max((total - cost.state_bytes) // _image_bytes(plan, cost), 0) * ways
    largest = f"--batch_size {fits} at most" if ways <= fits < config.batch_size else "half the --batch_size"
    afresh = [f"{largest} (estimated for {total / 2**30:.0f} GiB)", f"more --grad_accumulation than {pieces}"]
    remedies = [
        # A run that goes on keeps its batch, and its pieces if the ranks are as many.
        *(["more ranks"] if resume.goes_on(config, plan.folder) else afresh),
        *([] if config.activation_checkpointing else ["--activation_checkpointing"]),
        "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment",
    ]
    return f"the memory of {device} is full at --batch_size {config.batch_size}: try {', '.join(remedies)}"


def _forecast(plan: Plan) -> str:
    """What `--dry_run` says."""
    from effnet_fast.model.complexity import complexity

    model = _build_model(plan, torch.device("cpu"))
    cost = complexity(model, plan.image_size)
    config = plan.config
    kind, _ = choose_loader(config.loader, plan.dataset.train, plan.world.device, augmentation(config))
    pieces = resume.accumulation(config, plan.world.size, None)
    per_rank = config.batch_size // plan.world.size // pieces
    memory = per_rank * _image_bytes(plan, cost) + cost.state_bytes
    images = plan.steps * config.batch_size
    rows = {
        "model": f"{config.model}, {cost.parameters:,} parameters, {plan.image_size} px, output stride "
        f"{model.architecture.output_stride}, final map {cost.final_map}",
        "cost": f"{cost.macs:,} MACs an image; {3 * cost.macs * images:.3g} in all (backward counted as 2 forwards)",
        "data": f"{plan.dataset.name}: {len(plan.dataset.train)} train, "
        f"{len(plan.dataset.val) if plan.dataset.val is not None else 0} val, {len(plan.dataset.test)} test images; "
        f"loader {kind}",
        "steps": f"{plan.steps} ({config.num_epochs} epochs x {plan.steps_per_epoch}), batch {config.batch_size} = "
        f"{plan.world.size} rank(s) x {pieces} x {per_rank}",
        "memory": f"about {memory / 2**20:,.0f} MiB on each device (estimated)",
        "device": f"{plan.world.device.type}, {plan.arithmetic}",
        "folder": str(plan.folder),
    }
    return "\n".join(f"{name:8}{value}" for name, value in rows.items())
