"""The model card of `effnet-fast export --format hub`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from effnet_fast import __version__
from effnet_fast.checkpoint import Checkpoint
from effnet_fast.config import TrainConfig, identity
from effnet_fast.model.trained import TrainedModel
from effnet_fast.run.restore import config_of

_METRICS = {"top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)", "loss": "loss"}

MADE_BY = "trained with effnet_fast"  # words of each card


def model_card(checkpoint: Checkpoint, trained: TrainedModel, weights: str, layout: str) -> str:
    """Render a model card: results, use, recipe and classes.

    Args:
        checkpoint: the run's checkpoint.
        trained: the exported model.
        weights: auto, ema or raw; the card shows the results of these weights.
        layout: effnet-fast, timm or torchvision.

    Raises:
        ValueError: the checkpoint has no valid config of a run.
    """
    from jinja2 import Template

    config = config_of(checkpoint)
    step = checkpoint.progress.get("step")
    evaluated = checkpoint.result if checkpoint.result.get("step", step) == step else {}  # else of earlier weights
    prefix = "ema_" if weights != "raw" and checkpoint.ema is not None else ""
    results = {name: evaluated[key] for name in _METRICS if (key := prefix + name) in evaluated}
    template = Template(Path(__file__).with_name("model_card.jinja").read_text(), keep_trailing_newline=True)
    return template.render(
        front_matter=yaml.safe_dump(_front_matter(checkpoint, config, results, layout), sort_keys=False),
        title=f"{config.model} on {config.dataset}",
        version=__version__,
        layout=layout,
        trained=trained,
        parameters=sum(p.numel() for p in trained.model.parameters()),
        architecture=dataclasses.asdict(trained.model.architecture),
        split=checkpoint.result.get("split"),
        results={title: results[name] for name, title in _METRICS.items() if name in results},
        recipe=yaml.safe_dump(_recipe(config), sort_keys=False),
    )


def _front_matter(checkpoint: Checkpoint, config: TrainConfig, results: dict[str, Any], layout: str) -> dict[str, Any]:
    matter: dict[str, Any] = {
        "library_name": "timm" if layout == "timm" else "effnet_fast",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "efficientnet"],
        "metrics": ["accuracy"],
    }
    if config.dataset.startswith("cifar"):
        matter["datasets"] = [config.dataset]
    if "top1" in results:
        accuracy = {"type": "accuracy", "value": round(results["top1"], 2), "name": "top-1 accuracy (%)"}
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": config.dataset, "type": config.dataset, "split": checkpoint.result.get("split")},
            "metrics": [accuracy],
        }
        matter["model-index"] = [{"name": config.name, "results": [result]}]
    return matter


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that affect the result and differ from their defaults, and always model and data set."""
    defaults = identity(TrainConfig())
    changed = {name: value for name, value in identity(config).items() if value != defaults[name]}
    return {"model": config.model, "dataset": config.dataset, **changed}
