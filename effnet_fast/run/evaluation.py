"""The verb eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from effnet_fast import data, distributed
from effnet_fast.checkpoint import Checkpoint
from effnet_fast.config import EvalConfig, TrainConfig
from effnet_fast.data import Dataset, Split
from effnet_fast.data.choose_loader import choose_loader, make_loader
from effnet_fast.data.dataset import limit
from effnet_fast.data.loader import LoaderSpec
from effnet_fast.model.trained import TrainedModel, from_checkpoint
from effnet_fast.model.tta import with_tta
from effnet_fast.run.output import check_writable
from effnet_fast.run.resolve import loader_dtype, resolve_precision, set_backends, worker_count
from effnet_fast.run.restore import config_of
from effnet_fast.train.evaluate import Result
from effnet_fast.train.evaluate import evaluate as evaluate_model


@dataclass(frozen=True)
class EvalResult(Result):
    """Result of `effnet_fast.evaluate`: loss, top1, top5, the confusion matrix, and where its table and picture are.

    Attributes:
        classes: names of the classes, in the order of the confusion matrix.
        folder: folder with SPLIT-per-class.csv and SPLIT-confusion.png.
        tta: the figures with test-time augmentation; None if the config has none.
    """

    classes: tuple[str, ...]
    folder: Path
    tta: Result | None = None


def evaluate(config: EvalConfig) -> EvalResult:
    """Run `effnet-fast eval`: print loss, top-1 and top-5; write per-class accuracy (CSV) and confusion matrix (PNG).

    The figures of `--tta` are printed on a line of their own.

    Raises:
        ValueError, OSError: a user's mistake, in one line.

    >>> from effnet_fast import EvalConfig, evaluate
    >>> result = evaluate(EvalConfig("results/tiny/last.pt", limit_eval=32, device="cpu"))
    results/tiny/last.pt: test loss ...
    >>> result.images, result.confusion.shape, result.top1 <= result.top5
    (32, torch.Size([100, 100]), True)
    """
    from effnet_fast.report.confusion import plot_confusion, write_per_class

    path = Path(config.checkpoint)
    checkpoint = Checkpoint.read(path)
    folder = Path(config.output_dir) if config.output_dir else path.parent
    check_writable(folder, "--output_dir", create=True)
    device = distributed.choose_device(config.device)
    set_backends(deterministic=False)
    split = _load_split(config, checkpoint)
    trained = from_checkpoint(checkpoint, config.weights, device)
    precision = resolve_precision(str(config.mixed_precision), device)
    kind, reason = choose_loader(config.loader, split, device)
    loader = make_loader(kind, split, _loader_spec(config, trained, len(split), loader_dtype(precision, device)))

    def measure(model: nn.Module) -> Result:
        classes = len(trained.classes)
        return evaluate_model(model, loader.epoch(0), num_classes=classes, precision=precision, device=device)

    result = measure(trained.model)
    averaged = None if config.tta == "none" else measure(with_tta(trained.model, config.tta))
    loader.close()
    print(
        f"{path}: {config.split} loss {result.loss:.4f}  top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %"
        f"  ({result.images} images; {reason})"
    )
    if averaged is not None:
        print(
            f"{path}: {config.split} with --tta {config.tta}: loss_tta {averaged.loss:.4f}  top1_tta "
            f"{averaged.top1:.2f} %  top5_tta {averaged.top5:.2f} %"
        )
    table, picture = folder / f"{config.split}-per-class.csv", folder / f"{config.split}-confusion.png"
    write_per_class(table, trained.classes, result.confusion.numpy())
    plot_confusion(picture, trained.classes, result.confusion.numpy())
    print(f"written: {table}, {picture}")
    return EvalResult(**vars(result), classes=trained.classes, folder=folder, tta=averaged)


def _load_split(config: EvalConfig, checkpoint: Checkpoint) -> Split:
    """Load the images to evaluate.

    Raises:
        ValueError: the classes differ from the checkpoint's; the split does not exist, or cannot be drawn again because
            the data differ; a limit is invalid.
        OSError: the data set cannot be read.
    """
    settings = config_of(checkpoint)
    dataset = _load_dataset(config, settings)
    _check_dataset(config, settings, checkpoint, dataset)
    split = getattr(dataset, config.split)
    if split is None:
        raise ValueError(
            f"the run held out no validation images (--val_fraction 0); use --split test, not {config.split}"
        )
    limit_train = settings.limit_train if config.split == "train" else None
    for count in (limit_train, config.limit_eval):
        split = split if count is None else limit(split, count, settings.seed)
    return split


def _load_dataset(config: EvalConfig, settings: TrainConfig) -> Dataset:
    try:
        return data.load_dataset(
            settings.dataset,
            config.data_dir or settings.data_dir,
            seed=settings.seed,
            val_fraction=0.0 if config.split == "test" else settings.val_fraction,
            on_bad_image=settings.on_bad_image,
            download=config.data_dir is not None,  # the run's own folder had the data: do not download it again
        )
    except FileNotFoundError as error:
        if config.data_dir is not None:
            raise
        raise FileNotFoundError(f"{error}; if the run's data set has moved, name its folder with --data_dir") from error


def _check_dataset(config: EvalConfig, settings: TrainConfig, checkpoint: Checkpoint, dataset: Dataset) -> None:
    source, path = config.data_dir or settings.data_dir, config.checkpoint
    if list(dataset.classes) != list(checkpoint.classes):
        present, expected = (", ".join(classes[:3]) for classes in (dataset.classes, checkpoint.classes))
        raise ValueError(
            f"{source} has {len(dataset.classes)} classes ({present}, ...), {path} was trained on "
            f"{len(checkpoint.classes)} others ({expected}, ...): give the --data_dir of its data set"
        )
    # Which training images were held out, or left out by a limit, depends on all of them.
    is_drawn = config.split == "train" or (config.split == "val" and settings.val_fraction > 0)
    if is_drawn and dataset.fingerprint != checkpoint.fingerprint:
        raise ValueError(
            f"{source} is not the data that {path} was trained on (the images or labels differ), so its {config.split} "
            "split cannot be drawn again: restore the data, or use --split test"
        )


def _loader_spec(config: EvalConfig, trained: TrainedModel, images: int, dtype: torch.dtype) -> LoaderSpec:
    return LoaderSpec(
        batch_size=min(config.batch_size, images),
        image_size=trained.image_size,
        mean=trained.mean,
        std=trained.std,
        device=trained.device,
        dtype=dtype,
        seed=0,
        rank=0,
        world=1,
        num_workers=worker_count(config.num_workers),
        augment=None,
    )
