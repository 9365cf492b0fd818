"""The verb eval."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from effnet_fast import distributed
from effnet_fast.checkpoint import Checkpoint
from effnet_fast.config import EvalConfig
from effnet_fast.data.choose_loader import choose_loader, make_loader
from effnet_fast.data.loader import LoaderSpec
from effnet_fast.model.trained import from_checkpoint
from effnet_fast.run.resolve import load_dataset, loader_dtype, resolve_precision, set_backends, worker_count
from effnet_fast.run.restore import config_of
from effnet_fast.train.evaluate import evaluate


def evaluate_checkpoint(config: EvalConfig) -> int:
    """Run `effnet-fast eval`: print loss, top-1 and top-5; write per-class accuracy (CSV) and confusion matrix (PNG).

    Raises:
        ValueError, OSError: for what the user can mend, each with one line.
    """
    from effnet_fast.report.confusion import plot_confusion, write_per_class

    path = Path(config.checkpoint)
    saved = Checkpoint.read(path)
    settings = config_of(saved)
    device = distributed.choose_device(config.device)
    set_backends(deterministic=False)
    source = config.data_dir or settings.data_dir
    dataset = load_dataset(
        dataclasses.replace(settings, data_dir=source, limit_train=None, limit_eval=config.limit_eval)
    )
    if list(dataset.classes) != list(saved.classes):
        present, expected = (", ".join(classes[:3]) for classes in (list(dataset.classes), saved.classes))
        raise ValueError(
            f"{source} has {len(dataset.classes)} classes ({present}, ...), {path} was trained on "
            f"{len(saved.classes)} others ({expected}, ...): give the --data_dir of its data set"
        )
    split = getattr(dataset, config.split)
    if split is None:
        raise ValueError(
            f"the run held out no validation images (--val_fraction 0); use --split test, not {config.split}"
        )
    trained = from_checkpoint(saved, config.weights, device)
    precision = resolve_precision(str(config.mixed_precision), device)
    spec = LoaderSpec(
        batch_size=min(config.batch_size, len(split)),
        image_size=trained.image_size,
        mean=trained.mean,
        std=trained.std,
        device=device,
        dtype=loader_dtype(precision, device),
        seed=0,
        rank=0,
        world=1,
        num_workers=worker_count(config.num_workers),
        augment=None,
    )
    kind, reason = choose_loader(config.loader, split, device)
    loader = make_loader(kind, split, spec)
    result = evaluate(
        trained.model, loader.epoch(0), num_classes=len(saved.classes), precision=precision, device=device
    )
    loader.close()
    print(
        f"{path}: {config.split} loss {result.loss:.4f}  top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %"
        f"  ({result.images} images; {reason})"
    )
    folder = Path(config.output_dir) if config.output_dir else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / f"{config.split}-per-class.csv", folder / f"{config.split}-confusion.png"
    write_per_class(table, saved.classes, result.confusion.numpy())
    plot_confusion(picture, saved.classes, result.confusion.numpy())
    print(f"written: {table}, {picture}")
    return 0
