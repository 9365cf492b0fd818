"""The verbs that print or draw without training: plot, info, data."""

from __future__ import annotations

import json
from pathlib import Path

from effnet_fast import data
from effnet_fast.config import DataConfig, InfoConfig, PlotConfig
from effnet_fast.run.output import check_writable
from effnet_fast.run.resolve import resolve_image_size


def plot(config: PlotConfig) -> int:
    """Run `effnet-fast plot`: draw the curves of runs in one figure, or the trials of a search.

    Raises:
        ValueError, OSError: a user's mistake, in one line.
    """
    from effnet_fast.report.curves import plot_curves

    runs = [Path(run) for run in config.runs]
    if len(runs) == 1 and (runs[0] / "candidates.json").is_file():
        from effnet_fast.report.search_page import draw_trials

        for path in draw_trials(runs[0], Path(config.output) if config.output else None):
            print(f"written: {path}")
        return 0
    output = Path(config.output) if config.output else runs[0] / "curves.png"
    if output.parent.is_dir():  # else plot_curves reports the missing run
        check_writable(output.parent, "--output")
    plot_curves(runs, output)
    print(f"written: {output}")
    return 0


def info(config: InfoConfig) -> int:
    """Run `effnet-fast info`: print the cost of a model.

    Raises:
        ValueError: an unknown model, an impossible value, or images that the model cannot take.
    """
    from effnet_fast.model.complexity import costs_table, model_costs

    size = resolve_image_size(config.image_size, config.model, native=32)
    try:
        costs = model_costs(
            config.model, config.num_classes, size, config.output_stride, width=config.width, depth=config.depth
        )
    except RuntimeError as error:  # a layer has no output, or more elements than torch can count
        raise ValueError(
            f"{config.model} cannot take images of {size} px: use another --image_size, or a smaller --output_stride"
        ) from error
    print(json.dumps(costs, indent=2) if config.json else costs_table(costs))
    return 0


def show_data(config: DataConfig) -> int:
    """Run `effnet-fast data`: download, verify and summarize a data set, draw samples, export test images.

    Raises:
        ValueError, OSError: a user's mistake, in one line.
    """
    from effnet_fast.data.dataset import limit
    from effnet_fast.data.sheet import sample_sheet, save_images, summarize

    dataset = data.load_dataset(config.dataset, Path(config.data_dir))
    output = Path(config.output) if config.output else Path(config.data_dir) / f"{config.dataset}-samples.png"
    check_writable(output.parent, "--output", create=True)
    print(summarize(dataset))
    sample_sheet(dataset, output)
    print(f"written: {output}")
    if config.export:
        count = min(config.export_images, len(dataset.test))
        save_images(limit(dataset.test, count, 0, "--export_images"), dataset.classes, Path(config.export))
        print(f"written: {count} test images in {config.export}")
    return 0
