"""The verb predict, and a trained model as a Python object."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from effnet_fast import checkpoint, distributed
from effnet_fast.config import PredictConfig
from effnet_fast.data.dataset import Channels
from effnet_fast.data.image import load_image, preprocess
from effnet_fast.model import Network, from_description
from effnet_fast.model.export import fold_batch_norms
from effnet_fast.model.weights import read_safetensors
from effnet_fast.run.restore import load_model

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class Prediction(NamedTuple):
    """A class and its probability, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Predictor:
    """A trained model with all that its use needs.

    Attributes:
        model: in evaluation mode, on its device.
        classes: names, in the order of the logits.
        image_size: pixels of the model's input.
        mean, std: of each channel, for pixels scaled to 0..1.
    """

    model: Network
    classes: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels

    def preprocess(self, image: Image.Image) -> Tensor:
        """An image as evaluation sees it: float32 [3, image_size, image_size]."""
        return preprocess(image, self.image_size, self.mean, self.std)

    @torch.no_grad()
    def predict(self, images: Sequence[Image.Image | str | Path], top: int = 5) -> list[list[Prediction]]:
        """The `top` most probable classes of each image or image file, the most probable first; one forward pass.

        Raises:
            ValueError: an image cannot be read.
        """
        if not images:
            return []
        pictures = (load_image(Path(image)) if isinstance(image, str | Path) else image for image in images)
        batch = torch.stack([self.preprocess(picture) for picture in pictures])
        device = next(self.model.parameters()).device
        logits = self.model(batch.contiguous(memory_format=torch.channels_last).to(device))
        best = logits.float().softmax(1).topk(min(top, len(self.classes)))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[Prediction(self.classes[i], p) for i, p in zip(*row, strict=True)] for row in rows]


def load(path: str | Path, weights: str = "auto", device: str = "auto") -> Predictor:
    """A trained model, ready for use.

    Args:
        path: checkpoint of a run, or its safetensors export.
        weights: of a checkpoint: auto (the moving average where the run kept one), ema or raw.
        device: auto, cuda or cpu.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint or export of this project, or has not what is asked for.
    """
    path, place = Path(path), distributed.choose_device(device)
    if path.suffix == ".safetensors":
        model, facts = _load_export(path)
    else:
        facts = checkpoint.load(path)
        model = load_model(facts, weights, place)
    return Predictor(
        model.to(place).eval(),
        tuple(facts["classes"]),
        model.architecture.image_size,
        tuple(facts["mean"]),
        tuple(facts["std"]),
    )


def _load_export(path: Path) -> tuple[Network, dict[str, Any]]:
    tensors, facts = read_safetensors(path)
    if "classes" not in facts:
        raise ValueError(f"{path} was not written by effnet-fast export; to train from it, use --pretrained")
    model = from_description(facts["architecture"], "torch" if facts["folded"] else "auto")
    if facts["folded"]:
        fold_batch_norms(model)
    model.load_state_dict(tensors)
    return model, facts


def predict(config: PredictConfig) -> int:
    """Run `effnet-fast predict`; returns 1 where an image could not be read, else 0.

    Raises:
        ValueError, OSError: for what the user can mend, each with one line.
    """
    paths = _image_files(config.images)
    if config.output and not Path(config.output).parent.is_dir():
        raise ValueError(f"--output {config.output}: there is no folder {Path(config.output).parent}; make it first")
    predictor = load(config.checkpoint, config.weights, config.device)
    found: dict[Path, list[Prediction]] = {}
    try:
        with _progress(len(paths)) as advance:
            for at in range(0, len(paths), config.batch_size):
                batch = paths[at : at + config.batch_size]
                new = _predict_readable(predictor, batch, config.top)
                for path, predictions in new.items():
                    print(f"{path}  " + "  ".join(f"{label} {100 * p:.1f} %" for label, p in predictions))
                found |= new
                advance(len(batch))
    finally:  # what an interrupted run has found is not lost
        if config.output:
            _write_table(Path(config.output), found)
    if config.output:
        print(f"written: {config.output}")
    bad = len(paths) - len(found)
    if bad:
        print(f"warning: skipped {bad} unreadable of {len(paths)} images", file=sys.stderr)
    return 1 if bad else 0


def _image_files(named: Sequence[str]) -> list[Path]:
    """The files that are named, and those with the suffix of an image in the folders that are, sorted; each once."""
    files: list[Path] = []
    for path in map(Path, named):
        if not path.exists():
            raise FileNotFoundError(f"there is no image or folder at {path}")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
        if path.is_dir() and not inside:
            raise ValueError(f"{path} holds no image ({', '.join(sorted(_SUFFIXES))})")
        files += inside if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def _predict_readable(predictor: Predictor, paths: Sequence[Path], top: int) -> dict[Path, list[Prediction]]:
    images = {}
    for path in paths:
        try:
            images[path] = load_image(path)
        except ValueError as error:
            print(f"warning: skipped: {error}", file=sys.stderr)
    return dict(zip(images, predictor.predict(list(images.values()), top), strict=True))


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal; elsewhere the lines of the images show how far it is."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)


def _write_table(path: Path, found: dict[Path, list[Prediction]]) -> None:
    """CSV has a row for each image and rank, JSON an object for each image."""
    if path.suffix == ".json":
        rows = [{"image": str(image), "predictions": [p._asdict() for p in best]} for image, best in found.items()]
        text = json.dumps(rows, indent=1) + "\n"
    else:
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(["image", "rank", "label", "probability"])
        for image, best in found.items():
            table.writerows([image, rank, p.label, f"{p.probability:.6f}"] for rank, p in enumerate(best, start=1))
        text = buffer.getvalue()
    checkpoint.write_atomically(path, text.encode())
