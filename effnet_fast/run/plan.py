"""Plan a training run: decide every `auto` once, from the config, the ranks and the checkpoint to resume."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet_fast.config import LoaderKind, TrainConfig, resize_stages
from effnet_fast.data import Dataset
from effnet_fast.data.augment_params import Augment
from effnet_fast.data.dataset import balanced_weights
from effnet_fast.distributed import World
from effnet_fast.internals import check_operators
from effnet_fast.model import default_output_stride, model_name, variant
from effnet_fast.model.blocks import Kernels
from effnet_fast.model.weights import Weights, find_weights
from effnet_fast.precision import resolve_precision
from effnet_fast.run.resolve import (
    load_dataset,
    resolve_image_size,
    resolve_kernels,
    resolve_loader,
    resolve_step,
)
from effnet_fast.run.restore import config_of
from effnet_fast.run.resume import Resumed, explain_checkpoint_errors
from effnet_fast.run.tuned import Key, tuned_launches
from effnet_fast.train import optim, trackers
from effnet_fast.train.loop import Progress
from effnet_fast.train.resizing import ImageSizes, image_sizes

# Re-estimate BatchNorm statistics before each evaluation if the run is shorter than this many of their time constants
# (1 / momentum steps).
STALE_TIME_CONSTANTS = 20
AUTO_PRECISE_BN_BATCHES = 50

# `--sync_batchnorm auto` shares statistics among ranks up to this many images per rank and pass.
MOST_SHARED_IMAGES = 32


@dataclass(frozen=True)
class Plan:
    """All decisions about a training run. Nothing is built on a device yet.

    Attributes:
        resumed: the checkpoint to resume, or None.
        progress: where the run starts.
        schedule_start: step at which the learning-rate schedule starts; above 0 in a run that adds epochs to another.
        dataset: normalised by the mean and std of the checkpoint or of the pretrained weights, if there are any.
        weights: pretrained weights to start from, or None.
        image_size: pixels, of the loaders and of evaluation.
        precision: bf16, fp16 or no.
        compile: whether torch.compile compiles the model.
        graph: whether the step is captured in a CUDA graph.
        steps_per_epoch: optimizer steps.
        accumulation: forward and backward passes per step.
        max_images_per_pass: most images per pass on one rank; kept when the number of ranks changes.
        class_weights: weight of each class in the training loss, or None.
        augment: augmentation of the training images.
        kernels: auto, triton, triton-block, cpp or torch; torch where the Triton kernels fail their self-check.
        launches: launches that replace the Triton kernels' own choices, and ops that run on PyTorch's operators
            instead, chosen by `effnet-fast tune` on this GPU.
        loader, loader_reason: kind of the loader, and why in one line.
    """

    config: TrainConfig
    world: World
    folder: Path
    resumed: Resumed | None
    progress: Progress
    schedule_start: int
    dataset: Dataset
    weights: Weights | None
    image_size: int
    precision: str
    compile: bool
    graph: bool
    steps_per_epoch: int
    accumulation: int
    max_images_per_pass: int
    class_weights: tuple[float, ...] | None
    augment: Augment
    kernels: Kernels
    launches: dict[Key, Any]
    loader: LoaderKind
    loader_reason: str

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.config.num_epochs

    @property
    def sizes(self) -> ImageSizes:
        """Size of the training images at each step; `--resize_schedule` starts together with the learning rate's."""
        stages = resize_stages(self.config.resize_schedule, self.image_size) or [(self.image_size, 1.0)]
        return image_sizes(stages, self.schedule_start, self.steps)

    @property
    def images_per_pass(self) -> int:
        """Images of one forward and backward pass on one rank."""
        return self.config.batch_size // self.world.size // self.accumulation

    @property
    def sync_batchnorm(self) -> bool:
        """Whether ranks share BatchNorm statistics; the same however many ranks resume the run."""
        if self.config.sync_batchnorm == "auto":
            return self.max_images_per_pass <= MOST_SHARED_IMAGES
        return self.config.sync_batchnorm

    @property
    def eval_split(self) -> str:
        """The split that the curves show: val if there is one, else test."""
        return "val" if self.dataset.val is not None else "test"

    def precise_bn_batches(self, bn_momentum: float, last: bool) -> int:
        """Training batches on which BatchNorm statistics are re-estimated before an evaluation; 0 for none.

        So the last evaluation may score higher than earlier ones, which use running statistics. best.pt holds the
        statistics that its own evaluation used, so that the file reaches its score.

        Args:
            bn_momentum: momentum of the running statistics.
            last: whether it is the evaluation at the end of the run; others do so only if the run is short.
        """
        config = self.config
        is_short = self.steps * bn_momentum < STALE_TIME_CONSTANTS
        if config.precise_bn_images == "auto":
            differs = config.mixup > 0 or config.cutmix > 0 or config.resize_schedule is not None
            batches = AUTO_PRECISE_BN_BATCHES if is_short or differs else 0
        else:
            batches = -(-config.precise_bn_images // config.batch_size)
        return min(batches, self.steps_per_epoch) if is_short or last else 0

    @property
    def arithmetic(self) -> str:
        """Precision and step mode in words."""
        parts = ["fp32" if self.precision == "no" else self.precision]
        parts += ["compiled"] * self.compile + ["in one CUDA graph"] * self.graph
        return ", ".join(parts)


def run_folder(config: TrainConfig) -> Path:
    """The folder that a run writes to."""
    return Path(config.save_dir) / config.name


def make_plan(config: TrainConfig, world: World, resumed: Resumed | None) -> Plan:
    """Plan a run.

    Raises:
        ValueError: settings that contradict each other, the data or the checkpoint.
        OSError: the data or the pretrained weights cannot be read.
    """
    # Check what depends on the config alone before downloading data.
    variant(config.model)
    if config.optimizer in optim.APEX:
        optim.apex_class(config.optimizer)
    trackers.check_installed(config.trackers)
    check_operators()
    max_images = None if resumed is None else resumed.checkpoint.images_per_pass
    accumulation = accumulation_steps(config, world.size, max_images)

    weights = None
    if resumed is None and config.pretrained:
        weights = find_weights(
            config.pretrained, model_name(config.model), config.pretrained_layout, config.pretrained_revision
        )
        config = dataclasses.replace(config, pretrained_revision=weights.revision)
    dataset = load_dataset(config)
    if resumed is not None:
        resumed.check(config, dataset.fingerprint)
        config = dataclasses.replace(config, pretrained_revision=config_of(resumed.checkpoint).pretrained_revision)
    steps_per_epoch = len(dataset.train) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"--batch_size {config.batch_size} is larger than the {len(dataset.train)} training images")

    image_size = resolve_image_size(config.image_size, config.model, dataset.native_size)
    if any(size > image_size for size, _ in resize_stages(config.resize_schedule, image_size)):
        raise ValueError(
            f"--resize_schedule {config.resize_schedule}: images of {image_size} px are not enlarged; use sizes of at "
            f"most {image_size}, or a larger --image_size"
        )
    stride = config.output_stride or default_output_stride(config.model, image_size)
    images = steps_per_epoch * config.batch_size * config.num_epochs
    compiled, graph = resolve_step(config, world, stride, images)
    progress, schedule_start = _start(config, resumed)
    augment = augmentation(config)
    loader, reason = resolve_loader(config.loader, dataset.train, world.device)
    precision = resolve_precision(str(config.mixed_precision), world.device)
    kernels = resolve_kernels(config.kernels, world.device)
    return Plan(
        config=config,
        world=world,
        folder=run_folder(config),
        resumed=resumed,
        progress=progress,
        schedule_start=schedule_start,
        dataset=_normalised(dataset, resumed, weights),
        weights=weights,
        image_size=image_size,
        precision=precision,
        compile=compiled,
        graph=graph,
        steps_per_epoch=steps_per_epoch,
        accumulation=accumulation,
        max_images_per_pass=max_images or config.batch_size // (world.size * accumulation),
        class_weights=class_weights(config, dataset),
        augment=augment,
        kernels=kernels,
        launches=tuned_launches(
            world.device, precision, kernels, compiled=compiled, deterministic=config.deterministic
        ),
        loader=loader,
        loader_reason=reason,
    )


def accumulation_steps(config: TrainConfig, world_size: int, max_images: int | None) -> int:
    """Forward and backward passes per optimizer step on each rank.

    Args:
        config: the run's config.
        world_size: number of ranks now.
        max_images: most images per pass in the run that is resumed; the result is the fewest passes within this limit.
            None for a new run, which uses `--grad_accumulation`.

    Raises:
        ValueError: the batch does not divide evenly.
    """
    share, remainder = divmod(config.batch_size, world_size)
    passes = config.grad_accumulation if max_images is None else 1
    if remainder or share % passes:
        raise ValueError(
            f"--batch_size {config.batch_size} must divide evenly among {world_size} rank(s) x {passes} accumulation "
            "step(s)"
        )
    if max_images is None:
        return passes
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= max_images)


def class_weights(config: TrainConfig, dataset: Dataset) -> tuple[float, ...] | None:
    """Weight of each class in the training loss, None for no weights.

    Raises:
        ValueError: a class has no training image.
    """
    if config.class_weights == "none":
        return None
    return balanced_weights(dataset.train.labels, dataset.classes)


def augmentation(config: TrainConfig) -> Augment:
    """The augmentation of the training images."""
    return Augment(
        alternating_flip=config.alternating_flip,
        rotation=config.rotation,
        color_jitter=config.color_jitter,
        random_erasing=config.random_erasing,
        auto_augment=config.auto_augment,
    )


def _start(config: TrainConfig, resumed: Resumed | None) -> tuple[Progress, int]:
    """Where the run starts, and where its schedule starts."""
    if resumed is None:
        return Progress(), 0
    with explain_checkpoint_errors(resumed.path):
        progress = Progress(**resumed.checkpoint.progress)
    if resumed.from_path and resumed.path.resolve().parent != run_folder(config).resolve():
        progress.best = -1.0  # this folder has no best.pt yet
    if not resumed.extends(config):
        return progress, resumed.checkpoint.schedule_start
    return dataclasses.replace(progress, finished=False), progress.step


def _normalised(dataset: Dataset, resumed: Resumed | None, weights: Weights | None) -> Dataset:
    """The data set with the mean and std that its model was trained with."""
    if resumed is not None:
        return dataclasses.replace(dataset, mean=resumed.checkpoint.mean, std=resumed.checkpoint.std)
    if weights is not None:
        return dataclasses.replace(dataset, mean=weights.mean, std=weights.std)
    return dataset
