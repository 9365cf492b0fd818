"""The verb predict."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress

from effnet_fast import checkpoint, distributed
from effnet_fast.config import PredictConfig
from effnet_fast.consoles import line_console, progress_bar
from effnet_fast.data.listing import SUFFIXES, list_images, printable
from effnet_fast.model.trained import Prediction, TrainedModel, load
from effnet_fast.run.output import check_writable
from effnet_fast.run.resolve import resolve_kernels


def predict(config: PredictConfig) -> int:
    """Run `effnet-fast predict`; return 1 if an image could not be read, else 0.

    Raises:
        ValueError, OSError: a user's mistake, in one line.
    """
    paths = _image_files(config.images)
    if config.output:
        check_writable(Path(config.output).parent, "--output")
    if not Path(config.checkpoint).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {config.checkpoint}")
    device = distributed.choose_device(config.device)
    model = load(config.checkpoint, config.weights, device, resolve_kernels("auto", device))
    predictions: dict[Path, list[Prediction]] = {}
    try:
        with _progress(len(paths)) as advance:
            for start in range(0, len(paths), config.batch_size):
                batch = paths[start : start + config.batch_size]
                new = _predict_readable(model, batch, config)
                predictions |= new
                for path, best in new.items():
                    print(f"{printable(path)}  " + "  ".join(f"{label} {100 * p:.1f} %" for label, p in best))
                advance(len(batch))
    except BaseException:  # an interrupted run keeps its results, and the earlier table if it has none
        if config.output and predictions:
            _write_table(Path(config.output), predictions)
        raise
    if config.output:
        _write_table(Path(config.output), predictions)
        print(f"written: {config.output}")
    unreadable = len(paths) - len(predictions)
    if unreadable:
        print(f"warning: skipped {unreadable} unreadable of {len(paths)} images", file=sys.stderr)
    return 1 if unreadable else 0


def _image_files(named: Sequence[str]) -> list[Path]:
    """List the given files, and the images in the given folders, sorted, each once."""
    files: list[Path] = []
    for path in map(Path, named):
        if not path.exists():
            raise FileNotFoundError(f"there is no image or folder at {printable(path)}")
        if path.is_dir():
            inside = list_images(path).images
            if not inside:
                raise ValueError(f"{printable(path)} holds no image ({', '.join(sorted(SUFFIXES))})")
            files += inside
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _predict_readable(
    model: TrainedModel, paths: Sequence[Path], config: PredictConfig
) -> dict[Path, list[Prediction]]:
    """Classify the images that can be read; the others are listed on stderr."""
    inputs = {}
    for path in paths:
        try:
            inputs[path] = model.prepare([path])
        except ValueError as error:
            print(f"warning: skipped: {error}", file=sys.stderr)
    if not inputs:
        return {}
    batch = torch.cat(list(inputs.values()))
    return dict(zip(inputs, model.classify(batch, config.top, config.tta), strict=True))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal or in a notebook; elsewhere the printed results show the progress."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bar = progress_bar(line_console(stderr=True), *columns)
    if bar is None:
        yield lambda count: None
        return
    with bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.update(task, advance=count, refresh=True)


def _write_table(path: Path, predictions: dict[Path, list[Prediction]]) -> None:
    """Write CSV, a row for each image and rank, or JSON, an object for each image."""
    by_name = {printable(image): best for image, best in predictions.items()}
    if path.suffix == ".json":
        rows = [{"image": name, "predictions": [p._asdict() for p in best]} for name, best in by_name.items()]
        text = json.dumps(rows, indent=1) + "\n"
    else:
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(["image", "rank", "label", "probability"])
        for name, best in by_name.items():
            table.writerows([name, rank, p.label, f"{p.probability:.6f}"] for rank, p in enumerate(best, start=1))
        text = buffer.getvalue()
    checkpoint.write_atomically(path, text.encode(errors="backslashreplace"))  # class names are names of folders
