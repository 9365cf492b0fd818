"""The verb export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from effnet_fast import __version__
from effnet_fast.checkpoint import Checkpoint, write_atomically, write_json
from effnet_fast.config import ExportConfig
from effnet_fast.model import Network
from effnet_fast.model.serialize import (
    cast_weights,
    divide_logits,
    fold_batch_norms,
    to_onnx,
    to_safetensors,
    to_torch_export,
)
from effnet_fast.model.trained import TrainedModel, load
from effnet_fast.model.weights.timm import make_config, read_config
from effnet_fast.model.weights.write import to_foreign
from effnet_fast.run.hub import MADE_BY, model_card
from effnet_fast.run.output import check_writable

_FORMATS: dict[str, tuple[str, Callable[[Network, Mapping[str, str]], bytes]]] = {
    "safetensors": (".safetensors", to_safetensors),
    "onnx": (".onnx", to_onnx),
    "torch-export": (".pt2", to_torch_export),
}


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        path: the file, or the folder for the Hugging Face hub.
    """

    path: Path

    def model(self, device: str | torch.device = "auto") -> TrainedModel:
        """Load the exported model; `onnx` and `torch-export` files are for other programs.

        Raises:
            ValueError: the export is not a safetensors file of this project's layout.
        """
        return load(self.path / "model.safetensors" if self.path.is_dir() else self.path, device=device)


def export(config: ExportConfig) -> ExportResult:
    """Run `effnet-fast export`: write the model and the metadata needed to use it.

    Raises:
        ValueError, OSError: a user's mistake, in one line.

    >>> from effnet_fast import ExportConfig, export
    >>> result = export(ExportConfig("results/tiny/last.pt", format="safetensors"))
    written: results/tiny/last.safetensors ...
    >>> result.model().image_size
    16
    """
    path = Path(config.checkpoint)
    return ExportResult(_export_hub(config, path) if config.format == "hub" else _export_file(config, path))


def _export_file(config: ExportConfig, path: Path) -> Path:
    """Write the model to one file, of the layout timm also a config.json beside it, and return the file's path."""
    suffix, write = _FORMATS[config.format]
    output = Path(config.output) if config.output else path.with_suffix(suffix)
    if output.suffix != suffix:
        raise ValueError(f"--output {output}: the name of a {config.format} file must end in {suffix}")
    if output.resolve() == path.resolve():
        raise ValueError(f"{output} is the file to export: choose another --output")
    trained = load(path, config.weights, "cpu", kernels="torch")
    check_writable(output.parent, "--output")
    if config.layout != "effnet-fast":
        _write_layout(config, trained, output)
        return output
    if config.fold_batchnorm and not trained.folded:
        fold_batch_norms(trained.model)
        trained = dataclasses.replace(trained, folded=True)
    cast_weights(trained.model, getattr(torch, config.dtype))
    _write(output, write(trained.model, _metadata(trained)), trained)
    return output


def _write_layout(config: ExportConfig, trained: TrainedModel, output: Path) -> None:
    content, settings = _weights_and_config(config, trained)
    file = output.parent / "config.json"
    if config.layout == "timm":
        if file.exists() and not read_config(output.parent):
            raise ValueError(f"{file} is not timm's and would be overwritten: choose another folder with --output")
        others = [other for other in output.parent.iterdir() if other.name != output.name and _needs_config(other)]
        if others and (not file.exists() or json.loads(file.read_text()) != settings):
            raise ValueError(
                f"{file} would describe {others[0].name}, another model: choose another folder with --output"
            )
    _write(output, content, trained)  # first: it is what fails on a full disk
    if config.layout == "timm":
        write_json(file, settings)


def _needs_config(path: Path) -> bool:
    """Whether a file holds another library's weights, which are read as the config.json beside them says."""
    if path.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            return "effnet_fast" not in (file.metadata() or {})
    return path.is_file() and path.suffix in (".safetensors", ".bin", ".pth")


def _export_hub(config: ExportConfig, path: Path) -> Path:
    """Write a folder that `hf upload` takes, with weights, config.json and a model card; return it."""
    if path.suffix == ".safetensors":
        raise ValueError(f"--format hub needs a run's checkpoint, whose results the model card lists, not {path}")
    folder = Path(config.output) if config.output else path.with_name(f"{path.stem}-hub")
    trained = load(path, config.weights, "cpu", kernels="torch")
    check_writable(folder, "--output", create=True)
    weights = folder / "model.safetensors"
    present = [file.name for file in (folder / "config.json", folder / "README.md", weights) if file.exists()]
    if present and MADE_BY not in _text_of(folder / "README.md"):
        raise ValueError(f"{folder} is no export and its {present[0]} would be overwritten: choose another --output")
    content, settings = _weights_and_config(config, trained)
    card = model_card(Checkpoint.read(path), trained, config.weights, config.layout)
    _write(weights, content, trained)  # first: it is what fails on a full disk
    write_json(folder / "config.json", settings)
    write_atomically(folder / "README.md", card.encode(errors="backslashreplace"))
    return folder


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _weights_and_config(config: ExportConfig, trained: TrainedModel) -> tuple[bytes, dict[str, Any]]:
    """The content of the safetensors file in the requested layout, and of config.json."""
    if config.layout == "effnet-fast":
        cast_weights(trained.model, getattr(torch, config.dtype))
        return to_safetensors(trained.model, _metadata(trained)), {
            "library_name": "effnet_fast",
            **_description(trained),
        }
    if trained.folded:
        raise ValueError(f"{config.checkpoint} has its BatchNorm folded, which --layout {config.layout} needs")
    divide_logits(trained.model, trained.temperature)  # other libraries know no temperature
    cast_weights(trained.model, getattr(torch, config.dtype))
    foreign = to_foreign(trained.model, config.layout)
    features = trained.model.classifier.in_features
    settings = make_config(
        foreign.architecture, features, trained.classes, trained.image_size, trained.mean, trained.std
    )
    return save(foreign.tensors, {"format": "pt"}), settings


def _write(output: Path, content: bytes, trained: TrainedModel) -> None:
    write_atomically(output, content)
    print(f"written: {output} ({len(content) / 1e6:.1f} MB, {len(trained.classes)} classes)")


def _metadata(trained: TrainedModel) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in _description(trained).items()}


def _description(trained: TrainedModel) -> dict[str, Any]:
    """Describe the model and its preprocessing; pixels are scaled to 0..1 before mean and std."""
    return {
        "effnet_fast": __version__,
        "architecture": dataclasses.asdict(trained.model.architecture),
        "classes": trained.classes,
        "image_size": trained.image_size,
        "mean": trained.mean,
        "std": trained.std,
        "folded": trained.folded,
        "temperature": trained.temperature,
    }
