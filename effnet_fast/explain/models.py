"""Load the models to explain from a study, a run, a checkpoint or an export."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effnet_fast.checkpoint import LAST
from effnet_fast.config import CamConfig
from effnet_fast.model import trained
from effnet_fast.model.trained import TrainedModel

STUDY_INDEX = "study.json"
_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class ExplainedModel:
    """A trained model to explain.

    Attributes:
        name: short and unique, e.g. compound.
        label: heading in pictures, e.g. compound (d = 1.4, w = 1.2, r = 1.3).
        trained: the model with its classes and preprocessing, loaded with kernels="torch" because hooks do not fire on
            modules that a fused kernel replaces.
        digest: first 16 hex digits of the file's SHA-256.
    """

    name: str
    label: str
    trained: TrainedModel
    digest: str

    def class_index(self, class_name: str) -> int:
        """Return the index of a class in the logits.

        Raises:
            ValueError: the model has no such class; the message suggests similar names.
        """
        classes = self.trained.classes
        if class_name not in classes:
            near = difflib.get_close_matches(class_name, classes, n=3, cutoff=0.4) or classes[:3]
            raise ValueError(f"{self.name} has no class {class_name!r}; did you mean {', '.join(near)}?")
        return classes.index(class_name)


class _ModelFile(NamedTuple):
    name: str
    label: str
    path: Path


def load_models(config: CamConfig, device: torch.device) -> list[ExplainedModel]:
    """Load the models given by --checkpoints and --run.

    Raises:
        FileNotFoundError: a checkpoint does not exist.
        ValueError: two models share a name, or a --run, checkpoint or study is invalid.
    """
    files = [] if config.checkpoints is None else _model_files(Path(config.checkpoints), config.seed)
    for argument in config.run or []:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--run must be NAME=PATH, not {argument!r}")
        files.append(_ModelFile(name, name, _checkpoint_file(Path(path))))
    names = [file.name for file in files]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two models are called {duplicates[0]}: give one another name with --run NAME=PATH")
    return [_load(file, config.weights, device) for file in files]


def newest_study(save_dir: Path) -> Path | None:
    """Return the folder of the newest finished study below `save_dir`; None if there is none.

    Newer studies that are unfinished or have a damaged index are reported on stderr.
    """
    indices = sorted(save_dir.glob(f"*/{STUDY_INDEX}"), key=lambda index: index.stat().st_mtime, reverse=True)
    for index in indices:
        try:
            models = json.loads(index.read_text(encoding="utf-8"))["models"]
            if all("top1" in model or "failed" in model for model in models):
                return index.parent
            reason = "not finished"
        except (ValueError, KeyError, TypeError):
            reason = "damaged"
        print(f"skipped: the study {index.parent} is {reason}", file=sys.stderr)
    return None


def file_digest(path: Path) -> str:
    """Return the first 16 hex digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _load(file: _ModelFile, weights: str, device: torch.device) -> ExplainedModel:
    # Keep headings from wrapping inside "w = 1.82".
    label = file.label.replace(" = ", f"{_NO_BREAK}={_NO_BREAK}")
    model = trained.load(file.path, weights, device, kernels="torch")
    return ExplainedModel(file.name, label, model, file_digest(file.path))


def _checkpoint_file(path: Path) -> Path:
    """Return last.pt if the path is a run's folder; otherwise the path itself, a checkpoint or an export."""
    return path / LAST if path.is_dir() else path


def _model_files(path: Path, seed: int | None) -> list[_ModelFile]:
    """List the models of a study, one seed per model; or the single model of a run, checkpoint or export."""
    index = path / STUDY_INDEX
    if not index.is_file():
        file = _checkpoint_file(path)
        name = file.resolve().parent.name
        return [_ModelFile(name, name, file)]
    try:
        models = _rename_by_cost(_with_checkpoint(path, json.loads(index.read_text(encoding="utf-8"))["models"]))
        seeds = {model["name"]: [m["seed"] for m in models if m["name"] == model["name"]] for model in models}
        files = [
            _ModelFile(model["name"], model["label"], path / model["checkpoint"])
            for model in models
            if model["seed"] == (min(seeds[model["name"]]) if seed is None else seed)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged or not a study: run effnet-fast study again to rewrite it") from error
    if not files:
        raise ValueError(f"{index} has no model{'' if seed is None else f' of seed {seed}'}")
    return files


def _with_checkpoint(folder: Path, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the models of a study that have a checkpoint; warn about the others.

    Raises:
        FileNotFoundError: no model has a checkpoint.
    """
    existing = []
    for model in models:
        if (folder / model["checkpoint"]).is_file():
            existing.append(model)
        else:
            reason = model.get("failed") or "not trained yet"
            print(f"skipped: {model['name']} of seed {model['seed']} has no checkpoint: {reason}", file=sys.stderr)
    if models and not existing:
        raise FileNotFoundError(f"no model of {folder} has a checkpoint: run effnet-fast study first")
    return existing


def _rename_by_cost(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Append the target MACs to names and labels if the study has several targets, so that names stay unique."""
    if len({model.get("target_macs") for model in models} - {None}) < 2:
        return models
    return [
        {**model, **{key: f"{model[key]}-{model['target_macs']:.4g}" for key in ("name", "label")}}
        if model.get("target_macs")
        else model
        for model in models
    ]
