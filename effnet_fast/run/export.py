"""The verb export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from effnet_fast import __version__, checkpoint
from effnet_fast.config import ExportConfig
from effnet_fast.model import Network
from effnet_fast.model.export import fold_batch_norms, to_onnx, to_safetensors, to_torch_export
from effnet_fast.run.restore import load_model

_FORMATS: dict[str, tuple[str, Callable[[Network, Mapping[str, str]], bytes]]] = {
    "safetensors": (".safetensors", to_safetensors),
    "onnx": (".onnx", to_onnx),
    "torch-export": (".pt2", to_torch_export),
}


def export(config: ExportConfig) -> int:
    """Run `effnet-fast export`: write the model and what is needed to use it.

    Raises:
        ValueError, OSError: for what the user can mend, each with one line.
    """
    path = Path(config.checkpoint)
    suffix, write = _FORMATS[config.format]
    output = Path(config.output) if config.output else path.with_suffix(suffix)
    if output.suffix != suffix:  # which also keeps the checkpoint from being written over
        raise ValueError(f"--output {output}: end a {config.format} file's name in {suffix}")
    saved = checkpoint.load(path)
    model = load_model(saved, config.weights, torch.device("cpu"), kernels="torch").eval()
    if config.fold_batchnorm:
        fold_batch_norms(model)
    content = write(model, _metadata(saved, model, config.fold_batchnorm))
    checkpoint.write_atomically(output, content)
    print(f"written: {output} ({len(content) / 1e6:.1f} MB, {len(saved['classes'])} classes)")
    return 0


def _metadata(saved: dict[str, Any], model: Network, folded: bool) -> dict[str, str]:
    """What a user of the file must know, each as JSON: pixels are scaled to 0..1 before mean and std."""
    facts = {
        "effnet_fast": __version__,
        "architecture": dataclasses.asdict(model.architecture),
        "classes": saved["classes"],
        "image_size": model.architecture.image_size,
        "mean": saved["mean"],
        "std": saved["std"],
        "folded": folded,
    }
    return {name: json.dumps(value) for name, value in facts.items()}
