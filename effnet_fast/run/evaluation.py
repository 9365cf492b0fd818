"""The verb eval."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from effnet_fast import data, distributed
from effnet_fast.checkpoint import Checkpoint, store_temperature
from effnet_fast.config import EvalConfig, TrainConfig
from effnet_fast.data import Dataset, Split
from effnet_fast.data.choose_loader import make_loader
from effnet_fast.data.dataset import limit
from effnet_fast.data.loader import LoaderSpec
from effnet_fast.distributed import World
from effnet_fast.model.trained import TrainedModel, from_checkpoint, weights_used
from effnet_fast.model.tta import Tempered, with_tta
from effnet_fast.precision import resolve_precision
from effnet_fast.run.eval_report import Evaluated, describe, make_report, write_report
from effnet_fast.run.folder import locked
from effnet_fast.run.output import check_writable
from effnet_fast.run.resolve import (
    loader_dtype,
    resolve_kernels,
    resolve_loader,
    set_backends,
    worker_count,
)
from effnet_fast.run.restore import config_of
from effnet_fast.train.calibration import fit_temperature
from effnet_fast.train.evaluate import Predictions, Result, predict_logits


@dataclass(frozen=True)
class EvalResult(Result):
    """Result of `effnet_fast.evaluate`: loss, top1, top5, the confusion matrix, and where its tables and pictures are.

    Attributes:
        macro_f1: mean of the classes' F1, percent.
        ece: expected calibration error, percent.
        classes: names of the classes, in the order of the confusion matrix.
        folder: folder with the files of the report, SPLIT-evaluation.json among them.
        tta: the figures with test-time augmentation; None if the config has none.
    """

    macro_f1: float
    ece: float
    classes: tuple[str, ...]
    folder: Path
    tta: Result | None = None


def evaluate(config: EvalConfig) -> EvalResult:
    """Run `effnet-fast eval`: print and write the figures of a split, on any number of ranks.

    The figures of `--tta` are printed on a line of their own; the report is about the model without it.

    Raises:
        ValueError, OSError: a user's mistake, in one line.

    >>> from effnet_fast import EvalConfig, evaluate
    >>> result = evaluate(EvalConfig("results/tiny/last.pt", limit_eval=32, device="cpu"))
    results/tiny/last.pt: test loss ...
    >>> result.images, result.confusion.shape, result.top1 <= result.top5
    (32, torch.Size([100, 100]), True)
    """
    with (
        distributed.group(config.device) as world,
        _held(Path(config.checkpoint)) if config.calibrate else nullcontext(),
    ):
        return _evaluate(config, world)


def _held(path: Path) -> AbstractContextManager[None]:
    """Hold the checkpoint's folder: a run that is still training would replace the checkpoint.

    Raises:
        OSError: a run holds the folder, or it is not writable.
    """
    if not path.is_file():  # to read it fails with a better message
        return nullcontext()
    flag = "--checkpoint: --calibrate stores the temperature in it"
    distributed.on_main(lambda: check_writable(path.parent, flag))
    return locked(path.parent, "leave --calibrate out")


def _evaluate(config: EvalConfig, world: World) -> EvalResult:
    path = Path(config.checkpoint)
    checkpoint = Checkpoint.read(path)
    folder = Path(config.output_dir) if config.output_dir else path.parent
    distributed.on_main(lambda: check_writable(folder, "--output_dir", create=True))
    set_backends(deterministic=False)
    dataset = _load_dataset(config, checkpoint)
    split = _split(config, checkpoint, dataset)
    trained = from_checkpoint(checkpoint, config.weights, world.device, resolve_kernels("auto", world.device))
    predictions, reason = _predict(config, world, trained, trained.model, split)
    temperature, fitted_to = trained.temperature, None
    if config.calibrate:
        assert dataset.val is not None
        validation, _ = _predict(config, world, trained, trained.model, dataset.val)
        temperature, fitted_to = fit_temperature(validation), len(validation.labels)
    averaged = None
    if config.tta != "none":
        model = with_tta(Tempered(trained.model, temperature), config.tta)  # as predict does
        averaged = _predict(config, world, trained, model, split)[0].result()
    evaluated = Evaluated(
        config.split, split, trained.classes, dataset.superclasses, predictions, temperature, fitted_to
    )
    report, result = make_report(evaluated), predictions.result()
    if averaged is not None:
        report |= {"loss_tta": averaged.loss, "top1_tta": averaged.top1, "top5_tta": averaged.top5}
    if world.is_main:
        print(
            f"{path}: {config.split} loss {report['loss']:.4f}  top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %"
            f"  ({result.images} images; {reason})"
        )
        if averaged is not None:
            print(
                f"{path}: {config.split} with --tta {config.tta}: loss_tta {averaged.loss:.4f}  top1_tta "
                f"{averaged.top1:.2f} %  top5_tta {averaged.top5:.2f} %"
            )
        print(describe(report))
        if config.calibrate:
            store_temperature(path, weights_used(checkpoint, config.weights), temperature)
            print(f"the temperature is stored in {path}: predict, cam, export and eval use it")
        print(f"written: {', '.join(map(str, write_report(evaluated, report, folder)))}")
    figures = {name: report[name] for name in ("loss", "macro_f1", "ece")}
    return EvalResult(**vars(result) | figures, classes=trained.classes, folder=folder, tta=averaged)


def _predict(
    config: EvalConfig, world: World, trained: TrainedModel, model: nn.Module, split: Split
) -> tuple[Predictions, str]:
    """The predictions of `model` on a split, and the reason for the choice of the loader."""
    precision = resolve_precision(str(config.mixed_precision), world.device)
    kind, reason = resolve_loader(config.loader, split, world.device)
    dtype = loader_dtype(precision, world.device)
    loader = make_loader(kind, split, _loader_spec(config, world, trained, len(split), dtype))
    try:
        predictions = predict_logits(
            model, loader.epoch(0), images=len(split), precision=precision, device=world.device
        )
    finally:
        loader.close()
    return predictions, reason


def _split(config: EvalConfig, checkpoint: Checkpoint, dataset: Dataset) -> Split:
    """The images to evaluate.

    Raises:
        ValueError: the split does not exist, or a limit is invalid.
    """
    settings = config_of(checkpoint)
    split = getattr(dataset, config.split)
    if split is None:
        raise ValueError(
            f"the run held out no validation images (--val_fraction 0); use --split test, not {config.split}"
        )
    if config.split == "train":
        split = limit(split, settings.limit_train, settings.seed, "--limit_train")
    return limit(split, config.limit_eval, settings.seed, "--limit_eval")


def _load_dataset(config: EvalConfig, checkpoint: Checkpoint) -> Dataset:
    """Load the data set, with the run's validation images held out if they are needed.

    Raises:
        ValueError: the classes differ from the checkpoint's, or a split cannot be drawn again because the data differ.
        OSError: the data set cannot be read.
    """
    settings = config_of(checkpoint)
    try:
        dataset = data.load_dataset(
            settings.dataset,
            config.data_dir or settings.data_dir,
            seed=settings.seed,
            val_fraction=0.0 if config.split == "test" and not config.calibrate else settings.val_fraction,
            on_bad_image=settings.on_bad_image,
            download=config.data_dir is not None,  # the run's own folder had the data: do not download it again
        )
    except FileNotFoundError as error:
        if config.data_dir is not None:
            raise
        raise FileNotFoundError(f"{error}; if the run's data set has moved, name its folder with --data_dir") from error
    _check_dataset(config, settings, checkpoint, dataset)
    if config.calibrate and dataset.val is None:
        raise ValueError(
            "--calibrate fits the temperature to validation images, and the run held out none (--val_fraction 0): "
            "train with --val_fraction 0.1, for example"
        )
    return dataset


def _check_dataset(config: EvalConfig, settings: TrainConfig, checkpoint: Checkpoint, dataset: Dataset) -> None:
    source, path = config.data_dir or settings.data_dir, config.checkpoint
    if list(dataset.classes) != list(checkpoint.classes):
        present, expected = (", ".join(classes[:3]) for classes in (dataset.classes, checkpoint.classes))
        raise ValueError(
            f"{source} has {len(dataset.classes)} classes ({present}, ...), {path} was trained on "
            f"{len(checkpoint.classes)} others ({expected}, ...): give the --data_dir of its data set"
        )
    # Which training images were held out, or left out by a limit, depends on all of them.
    remedy = "leave --calibrate out" if config.calibrate else "use --split test"
    drawn = "val" if config.calibrate else config.split
    is_drawn = drawn == "train" or (drawn == "val" and settings.val_fraction > 0)
    if is_drawn and dataset.fingerprint != checkpoint.fingerprint:
        raise ValueError(
            f"{source} is not the data that {path} was trained on (the images or labels differ), so its {drawn} "
            f"split cannot be drawn again: restore the data, or {remedy}"
        )


def _loader_spec(
    config: EvalConfig, world: World, trained: TrainedModel, images: int, dtype: torch.dtype
) -> LoaderSpec:
    return LoaderSpec(
        batch_size=min(config.batch_size, -(-images // world.size)),
        image_size=trained.image_size,
        mean=trained.mean,
        std=trained.std,
        device=world.device,
        dtype=dtype,
        seed=0,
        rank=world.rank,
        world=world.size,
        num_workers=worker_count(config.num_workers),
        augment=None,
    )
