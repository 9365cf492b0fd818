"""The command `cam`: class activation maps of several models side by side, as pictures, tables and a gallery."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from effnet_fast import distributed
from effnet_fast.config import CamConfig, identity
from effnet_fast.consoles import line_console, progress_bar
from effnet_fast.explain.explainer import Explainer
from effnet_fast.explain.image_files import ImageFile, list_image_files, read_labels
from effnet_fast.explain.models import ExplainedModel, file_digest, load_models
from effnet_fast.explain.output import OutputFolder
from effnet_fast.explain.overlay import check_colormap
from effnet_fast.explain.tables import SCORES, format_summary
from effnet_fast.precision import resolve_precision
from effnet_fast.report.table import as_text
from effnet_fast.run.quick_study import find_or_train
from effnet_fast.run.resolve import set_backends

LINE_EVERY = 80  # images between two progress lines if there is no terminal for a progress bar
SKIPPED = 1  # exit status if some files could not be explained


def explain_images(config: CamConfig) -> int:
    """Run `effnet-fast cam`; return the exit status: 0, 1 if files were skipped, or 128 + a signal number.

    Raises:
        ValueError, OSError: the user's input is wrong or the disk is full; the message is one line.
    """
    check_colormap(config.colormap)
    labels = None if config.labels is None else read_labels(Path(config.labels))
    excluded = {Path(config.output_path), *([Path(config.labels)] if config.labels else [])}
    files = list_image_files(Path(config.images_path), labels, excluded)
    if not (config.checkpoints or config.run):
        folder, status = find_or_train(config)
        if status:
            return status
        config = dataclasses.replace(config, checkpoints=str(folder))
    return _explain(config, files)


def _explain(config: CamConfig, files: list[ImageFile]) -> int:
    device = distributed.choose_device(config.device)
    set_backends(deterministic=device.type == "cuda")
    models = load_models(config, device)
    if config.target not in ("predicted", "true"):
        for model in models:
            model.class_index(config.target)
    output = OutputFolder(Path(config.output_path), config.format)
    explainer = Explainer(config, resolve_precision(str(config.mixed_precision), device), models, files, output)
    if config.resume == "no":  # before the earlier output is deleted
        explainer.check_method()
    output.open(_settings(config, models), restart=config.resume == "no")
    with _progress(len(files)) as advance_to:
        for count in explainer.batches():
            advance_to(count)
    summary = explainer.finish()

    done, earlier = len(explainer.explained), len(explainer.explained) - explainer.computed
    print(f"{done} images explained, {earlier} of them by an earlier run; models: {len(models)}")
    print(as_text(format_summary(summary)))
    print(f"in {output.folder}: gallery.html, summary.csv, maps.csv, agreement.csv, grids/, pictures/, maps/")
    if explainer.skipped:
        print(f"{explainer.skipped} of {len(files)} files were skipped; they are listed above", file=sys.stderr)
    return SKIPPED if explainer.skipped else 0


def _settings(config: CamConfig, models: list[ExplainedModel]) -> dict[str, Any]:
    """Return the settings that determine the maps; an output folder contains maps of one combination only."""
    return {
        **identity(config),
        "models": {model.name: model.digest for model in models},
        "labels": config.labels and file_digest(Path(config.labels)),
        "scores": list(SCORES),
    }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many files are done: as a bar on a terminal or in a notebook, or as lines."""
    console = line_console(stderr=True)
    bar = progress_bar(console, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if bar is not None:
        with bar:
            task = bar.add_task("images", total=total)
            yield lambda count: bar.update(task, completed=count, refresh=True)
        return
    printed = 0

    def advance_to(count: int) -> None:
        nonlocal printed
        if count - printed >= LINE_EVERY:
            console.print(f"{count}/{total} images")
            printed = count

    yield advance_to
