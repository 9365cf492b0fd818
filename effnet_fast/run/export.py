"""The verb export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from effnet_fast import __version__, checkpoint
from effnet_fast.config import ExportConfig
from effnet_fast.model import Network
from effnet_fast.model.serialize import fold_batch_norms, to_onnx, to_safetensors, to_torch_export
from effnet_fast.model.trained import TrainedModel, load
from effnet_fast.run.output import check_writable

_FORMATS: dict[str, tuple[str, Callable[[Network, Mapping[str, str]], bytes]]] = {
    "safetensors": (".safetensors", to_safetensors),
    "onnx": (".onnx", to_onnx),
    "torch-export": (".pt2", to_torch_export),
}


def export(config: ExportConfig) -> int:
    """Run `effnet-fast export`: write the model and the metadata that its use needs.

    Raises:
        ValueError, OSError: a user's mistake, in one line.
    """
    path = Path(config.checkpoint)
    suffix, write = _FORMATS[config.format]
    output = Path(config.output) if config.output else path.with_suffix(suffix)
    if output.suffix != suffix:
        raise ValueError(f"--output {output}: the name of a {config.format} file must end in {suffix}")
    if output.resolve() == path.resolve():
        raise ValueError(f"{output} is the file to export: choose another --output")
    check_writable(output.parent, "--output")
    trained = load(path, config.weights, "cpu", kernels="torch")
    if config.fold_batchnorm and not trained.folded:
        fold_batch_norms(trained.model)
        trained = dataclasses.replace(trained, folded=True)
    content = write(trained.model, _metadata(trained))
    checkpoint.write_atomically(output, content)
    print(f"written: {output} ({len(content) / 1e6:.1f} MB, {len(trained.classes)} classes)")
    return 0


def _metadata(trained: TrainedModel) -> dict[str, str]:
    """Describe the model and its preprocessing, each value as JSON: pixels are scaled to 0..1 before mean and std."""
    facts = {
        "effnet_fast": __version__,
        "architecture": dataclasses.asdict(trained.model.architecture),
        "classes": trained.classes,
        "image_size": trained.image_size,
        "mean": trained.mean,
        "std": trained.std,
        "folded": trained.folded,
    }
    return {name: json.dumps(value) for name, value in facts.items()}
