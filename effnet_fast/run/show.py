"""The verbs that only show: plot, info, data."""

from __future__ import annotations

import json
from pathlib import Path

from effnet_fast import data
from effnet_fast.config import DataConfig, InfoConfig, PlotConfig
from effnet_fast.run.resolve import resolve_image_size


def plot(config: PlotConfig) -> int:
    """Run `effnet-fast plot`: overlay the curves of runs."""
    from effnet_fast.report.curves import plot_curves

    runs = [Path(run) for run in config.runs]
    output = Path(config.output) if config.output else runs[0] / "curves.png"
    plot_curves(runs, output)
    print(f"written: {output}")
    return 0


def info(config: InfoConfig) -> int:
    """Run `effnet-fast info`: what a model costs."""
    from effnet_fast.model.complexity import costs_table, model_costs

    size = resolve_image_size(config.image_size, config.model, native=32)
    facts = model_costs(
        config.model, config.num_classes, size, config.output_stride, width=config.width, depth=config.depth
    )
    print(json.dumps(facts, indent=2) if config.json else costs_table(facts))
    return 0


def show_data(config: DataConfig) -> int:
    """Run `effnet-fast data`: download, verify and summarize a data set, draw samples, export test images."""
    from effnet_fast.data.dataset import limit
    from effnet_fast.data.sheet import sample_sheet, save_images, summarize

    dataset = data.load_dataset(config.dataset, Path(config.data_dir))
    print(summarize(dataset))
    output = Path(config.output) if config.output else Path(config.data_dir) / f"{config.dataset}-samples.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    sample_sheet(dataset, output)
    print(f"written: {output}")
    if config.export:
        save_images(limit(dataset.test, config.export_images, seed=0), dataset.classes, Path(config.export))
        print(f"written: {config.export_images} test images in {config.export}")
    return 0
