"""The verb cam: models and images in; pictures, numbers and a page out, image by image."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from effnet_fast import distributed
from effnet_fast.checkpoint import write_atomically
from effnet_fast.config import CamConfig, identity
from effnet_fast.data.image import load_image
from effnet_fast.data.resize import central_square
from effnet_fast.explain import gallery, overlay, tables
from effnet_fast.explain.maps import place
from effnet_fast.explain.sources import Source, find_sources, read_labels
from effnet_fast.explain.subject import Maps, Settings, Subject, examine
from effnet_fast.model.trained import load
from effnet_fast.precision import autocast
from effnet_fast.report import picture
from effnet_fast.report.table import as_text
from effnet_fast.run.resolve import resolve_precision, set_backends

LINE_EVERY = 10  # batches between two lines of progress where there is no terminal for a bar
SKIPPED = 1  # exit status when some files were no images to explain


def explain_images(config: CamConfig) -> int:
    """Run `effnet-fast cam`; returns the exit status: 0, or 1 when files were skipped, each of which is named.

    Raises:
        ValueError, OSError: for what the user can mend, each with one line.
    """
    overlay.check_colormap(config.colormap)
    device = distributed.choose_device(config.device)
    set_backends(deterministic=device.type == "cuda")
    subjects = load_subjects(config, device)
    if config.target not in ("predicted", "true"):
        for subject in subjects:
            subject.class_index(config.target)
    labels = None if config.labels is None else read_labels(Path(config.labels))
    leave_out = {Path(config.output_path), *([Path(config.labels)] if config.labels else [])}
    sources = find_sources(Path(config.images_path), labels, leave_out)
    return _Explanation(config, device, subjects, sources).run()


# -- models


def load_subjects(config: CamConfig, device: torch.device) -> list[Subject]:
    """The models that --checkpoints and --run name.

    Raises:
        FileNotFoundError: there is no checkpoint where one is named.
        ValueError: two models of one name, or a name or a study that cannot be read.
    """
    found = [] if config.checkpoints is None else _checkpoints_at(Path(config.checkpoints), config.seed)
    for named in config.run or []:
        name, equals, path = named.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--run must be NAME=PATH, not {named!r}")
        found.append((name, name, checkpoint_file(Path(path))))
    names = [name for name, _, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two models are called {twice[0]}: name one of them otherwise with --run NAME=PATH")
    return [_load_subject(name, label, path, config.weights, device) for name, label, path in found]


def checkpoint_file(path: Path) -> Path:
    """A checkpoint, or the last.pt of a run's folder."""
    return path / "last.pt" if path.is_dir() else path


def _checkpoints_at(path: Path, seed: int | None) -> list[tuple[str, str, Path]]:
    """Name, label and file of each model of a study, with one seed each; or of the single run or checkpoint."""
    study = path / "study.json"
    if not study.is_file():
        file = checkpoint_file(path)
        name = file.resolve().parent.name
        return [(name, name, file)]
    try:
        models = _named_by_cost(_trained(path, json.loads(study.read_text(encoding="utf-8"))["models"]))
        seeds = {model["name"]: [m["seed"] for m in models if m["name"] == model["name"]] for model in models}
        chosen = {name: min(of_name) if seed is None else seed for name, of_name in seeds.items()}
        found = [(m["name"], m["label"], path / m["checkpoint"]) for m in models if m["seed"] == chosen[m["name"]]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{study} is damaged or no study: write it anew with effnet-fast study") from error
    if not found:
        raise ValueError(f"{study} has no model{'' if seed is None else f' of seed {seed}'}")
    return found


def _trained(folder: Path, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models of a study that have a checkpoint; the others are told and passed over.

    Raises:
        FileNotFoundError: none of them has one.
    """
    trained = []
    for model in models:
        if (folder / model["checkpoint"]).is_file():
            trained.append(model)
        else:
            reason = model.get("failed") or "not trained yet"
            print(f"skipped: {model['name']} of seed {model['seed']} has no checkpoint: {reason}", file=sys.stderr)
    if models and not trained:
        raise FileNotFoundError(f"no model of {folder} has a checkpoint: run effnet-fast study first")
    return trained


def _named_by_cost(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models of a study of several costs, each of which has one of every name, by names of their own."""
    if len({model.get("target_macs") for model in models} - {None}) < 2:
        return models
    return [
        {**model, **{key: f"{model[key]}-{model['target_macs']:.4g}" for key in ("name", "label")}}
        if model.get("target_macs")
        else model
        for model in models
    ]


def _load_subject(name: str, label: str, path: Path, weights: str, device: torch.device) -> Subject:
    trained = load(path, weights, device, kernels="torch")
    return Subject(
        name=name,
        label=label,
        model=trained.model,
        classes=trained.classes,
        image_size=trained.image_size,
        mean=trained.mean,
        std=trained.std,
        device=device,
        digest=_digest(path),
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# -- the output folder


class _Output:
    """OUTPUT_PATH: settings.json, records/, maps/, pictures/, grids/, the tables and the gallery.

    A record is written last of an image's files, whole or not at all: an image with a record of its present size and
    time is done.
    """

    FOLDERS = ("records", "maps", "pictures", "grids")
    FILES = ("settings.json", "maps.csv", "agreement.csv", "summary.csv", "gallery.html")

    def __init__(self, folder: Path, picture_format: str) -> None:
        self.folder = folder
        self._format = picture_format

    def open(self, settings: dict[str, Any], afresh: bool) -> None:
        """Make the folder, or go on in it.

        Raises:
            ValueError: it holds other files, or maps that were made with other settings.
            OSError: it cannot be written.
        """
        path = self.folder / "settings.json"
        if path.is_file():
            if afresh:
                self._clear()
            elif (self.folder / "records").is_dir():
                self._refuse_other(json.loads(path.read_text(encoding="utf-8")), settings)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} holds other files: choose a new or an empty folder as --output_path")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())

    def _refuse_other(self, before: dict[str, Any], asked: dict[str, Any]) -> None:
        differences = [f"{k} {before.get(k)} there, {asked[k]} here" for k in asked if before.get(k) != asked[k]]
        if differences:
            raise ValueError(
                f"{self.folder} was made with other settings ({'; '.join(differences)}): "
                "choose another --output_path, or --resume no to start afresh"
            )

    def _clear(self) -> None:
        for name in self.FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in self.FILES:
            (self.folder / name).unlink(missing_ok=True)

    def picture(self, name: str) -> Path:
        return self.folder / "pictures" / f"{name}.{self._format}"

    def grid(self, number: int) -> Path:
        return self.folder / "grids" / f"grid-{number:05d}.{self._format}"

    def _map(self, name: str) -> Path:
        return self.folder / "maps" / f"{name}.npz"

    def _record(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.json"

    def save(self, record: tables.Record, maps: Maps) -> None:
        """Keep an image's maps, then its record."""
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **maps)
        for path, data in (
            (self._map(record["image"]), content.getvalue()),
            (self._record(record["image"]), json.dumps(record).encode()),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)

    def load(self, name: str) -> tuple[tables.Record, Maps]:
        with np.load(self._map(name)) as maps:
            return json.loads(self._record(name).read_bytes()), dict(maps)

    def record(self, name: str) -> tables.Record:
        return json.loads(self._record(name).read_bytes())

    def is_done(self, source: Source) -> bool:
        if not (self._record(source.name).is_file() and self.picture(source.name).is_file()):
            return False
        return self.record(source.name)["stamp"] == source.stamp

    def grid_members(self) -> dict[str, list[str]]:
        """Which images are in each grid, by its file's name."""
        path = self.folder / "grids" / "members.json"
        return json.loads(path.read_bytes()) if path.is_file() else {}

    def save_grid_members(self, members: dict[str, list[str]]) -> None:
        write_atomically(self.folder / "grids" / "members.json", json.dumps(members).encode())

    def drop_grids(self, members: dict[str, list[str]], count: int) -> None:
        """Remove what a run of smaller batches, or of more images, left behind the first `count` grids."""
        stale = members.keys() - {self.grid(number).name for number in range(1, count + 1)}
        for name in stale:
            (self.folder / "grids" / name).unlink(missing_ok=True)
            del members[name]
        if stale:
            self.save_grid_members(members)

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.folder / name, data)


# -- the run


class _Explanation:
    """A run over all images, a batch at a time."""

    def __init__(self, config: CamConfig, device: torch.device, subjects: list[Subject], sources: list[Source]) -> None:
        self.config, self.device, self.subjects = config, device, subjects
        known = {name for subject in subjects for name in subject.classes}
        self.sources = [s if s.label in known else dataclasses.replace(s, label=None) for s in sources]
        self.output = _Output(Path(config.output_path), config.format)
        self.settings = Settings(
            method=config.method,
            layer=config.layer,
            target=config.target,
            curve_steps=config.curve_steps,
            infidelity=config.infidelity,
            sensitivity=config.sensitivity,
        )
        self.precision = resolve_precision(str(config.mixed_precision), device)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.explained: list[str] = []
        self.skipped = self.computed = 0

    def run(self) -> int:
        settings = identity(self.config)
        settings["models"] = {subject.name: subject.digest for subject in self.subjects}
        settings["labels"] = self.config.labels and _digest(Path(self.config.labels))
        self.output.open(settings, afresh=self.config.resume == "no")
        self._explain_all()
        if not self.explained:
            raise ValueError(f"none of the {len(self.sources)} files in {self.config.images_path} could be explained")
        self._conclude()
        return SKIPPED if self.skipped else 0

    def _explain_all(self) -> None:
        grids = self.output.grid_members()
        size = self.config.batch_size
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as bar:
            task = bar.add_task("images", total=len(self.sources))
            for number, start in enumerate(range(0, len(self.sources), size), 1):
                self._explain_batch(number, self.sources[start : start + size], grids)
                bar.update(task, completed=start + size)
                if not shown and number % LINE_EVERY == 0:
                    self.console.print(f"{start + size}/{len(self.sources)} images")
        self.output.drop_grids(grids, -(-len(self.sources) // size))

    def _explain_batch(self, number: int, sources: list[Source], grids: dict[str, list[str]]) -> None:
        """Explain what is not done yet of a batch, and draw its grid if anything in it is new."""
        pending = [source for source in sources if not self.output.is_done(source)]
        opened = self._open(pending)
        if opened:
            self._explain(opened)
        members = [source for source in sources if source in opened or source not in pending]
        names = [source.name for source in members]
        self.explained += names
        path = self.output.grid(number)
        if names and (opened or grids.get(path.name) != names or not path.is_file()):
            self._draw(path, [self._stored_row(source, opened.get(source)) for source in members])
            grids[path.name] = names
            self.output.save_grid_members(grids)

    def _open(self, sources: list[Source]) -> dict[Source, Image.Image]:
        """The images that can be explained; the others are named and counted."""
        opened = {}
        for source in sources:
            try:
                if self.config.target == "true" and source.label is None:
                    raise ValueError(f"{source.path} has no true class: its folder or its row in --labels names none")
                opened[source] = load_image(source.path)
            except ValueError as error:
                self.console.print(f"skipped: {error}", markup=False)
                self.skipped += 1
        return opened

    def _explain(self, opened: dict[Source, Image.Image]) -> None:
        sources = list(opened)
        with autocast(self.precision, self.device):
            found = examine(
                self.subjects,
                [source.name for source in sources],
                list(opened.values()),
                [source.label for source in sources],
                self.settings,
            )
        if not self.computed:
            self._warn_of_single_pixels(found[0][1])
        for source, (record, maps) in zip(sources, found, strict=True):
            row = _row(source.name, opened[source], record, maps)
            self._draw(self.output.picture(source.name), [row])
            self.output.save({**record, "stamp": source.stamp}, maps)
            self.computed += 1

    def _warn_of_single_pixels(self, maps: Maps) -> None:
        for name, found in maps.items():
            if found.size == 1:
                self.console.print(
                    f"warning: {name}'s map has a single pixel, which shows no place: train with a smaller "
                    "--output_stride, or choose an earlier --layer",
                    markup=False,
                )

    def _stored_row(self, source: Source, image: Image.Image | None) -> overlay.Row:
        record, maps = self.output.load(source.name)
        return _row(source.name, image or load_image(source.path), record, maps)

    def _draw(self, path: Path, rows: list[overlay.Row]) -> None:
        headings = [subject.label for subject in self.subjects]
        picture.save(overlay.draw(rows, headings, self.config.colormap, self.config.opacity), path)

    # -- what is written at the end

    def _conclude(self) -> None:
        summary = tables.Summary()
        for record in self._records():
            summary.add(record)
        rows = summary.rows()
        output = self.output
        output.write("maps.csv", tables.to_csv(row for r in self._records() for row in tables.map_rows(r)))
        output.write("agreement.csv", tables.to_csv(row for r in self._records() for row in tables.pair_rows(r)))
        output.write("summary.csv", tables.to_csv(rows))
        output.write("gallery.html", self._gallery(rows).encode())
        done_before = len(self.explained) - self.computed
        print(f"{len(self.explained)} images explained, {done_before} of them before; models: {len(self.subjects)}")
        print(as_text(tables.readable(rows)))
        print(f"in {output.folder}: gallery.html, summary.csv, maps.csv, agreement.csv, grids/, pictures/, maps/")
        if self.skipped:
            print(f"{self.skipped} of {len(self.sources)} files were skipped, each is named above", file=sys.stderr)

    def _records(self) -> Iterator[tables.Record]:
        return (self.output.record(name) for name in self.explained)

    def _gallery(self, summary: tables.Table) -> str:
        by_name = {source.name: source for source in self.sources}
        count = min(self.config.gallery_images, len(self.explained))
        shown = [self.explained[i * len(self.explained) // count] for i in range(count)]
        cards = (gallery.Card(*self._card(by_name[name])) for name in shown)
        return gallery.page(
            "Where the models look", cards, self._labels, summary, self._note(count), self.config.colormap
        )

    def _card(self, source: Source) -> tuple[tables.Record, Image.Image, Maps]:
        record, maps = self.output.load(source.name)
        return record, load_image(source.path), maps

    @property
    def _labels(self) -> dict[str, str]:
        return {subject.name: subject.label for subject in self.subjects}

    def _note(self, count: int) -> str:
        """What the gallery shows, in words."""
        total = len(self.explained)
        which = f"All {total} images" if count == total else f"{count} of {total} images, spread evenly over them"
        target = {"predicted": "the class that each model predicts", "true": "the true class"}
        return (
            f"{which}; maps by {self.config.method}{f' at {self.config.layer}' if self.config.layer else ''} of "
            f"{target.get(self.config.target, self.config.target)}, each scaled to its own maximum. Models see the "
            "central square of an image: outside of it there is no map. Agreement is Spearman's rank correlation."
        )


def _row(name: str, image: Image.Image, record: tables.Record, maps: Maps) -> overlay.Row:
    """A row of a picture, the maps brought to the image's size."""
    drawn = overlay.reduced(image)
    panels = [
        overlay.Panel(
            _over(maps[model], drawn), *(facts[k] for k in ("prediction", "confidence", "target", "target_probability"))
        )
        for model, facts in record["models"].items()
    ]
    return overlay.Row(name, np.asarray(drawn), record["label"], panels)


def _over(square: np.ndarray, image: Image.Image) -> np.ndarray:
    """A map [h, w] of the central square at the image's size, NaN where the model saw nothing."""
    whole = np.full((image.height, image.width), np.nan, np.float32)
    left, top, side = central_square(image.width, image.height)
    inside = np.s_[top : top + side, left : left + side]
    whole[inside] = place(torch.from_numpy(square), image.height, image.width).numpy()[inside]
    return whole
