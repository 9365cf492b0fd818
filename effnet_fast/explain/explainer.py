"""Explain all images batch by batch, then write the tables and the gallery."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from PIL import Image

from effnet_fast.config import CamConfig
from effnet_fast.data.image import load_image
from effnet_fast.explain import overlay
from effnet_fast.explain.gallery import Card, render_gallery
from effnet_fast.explain.image_files import ImageFile
from effnet_fast.explain.maps import evidence
from effnet_fast.explain.models import ExplainedModel
from effnet_fast.explain.output import OutputFolder
from effnet_fast.explain.records import Maps, explain_batch
from effnet_fast.explain.tables import Record, Table, Tables
from effnet_fast.precision import autocast


class Explainer:
    """Explain images with several models.

    One batch is in memory at a time. Images that an earlier run finished are skipped.

    Args:
        config: the command's config.
        precision: autocast type: bf16, fp16 or no.
        models: the models; all on one device.
        files: the images.
        output: the output folder; it must be open when the batches are explained.

    Attributes:
        explained: files that have a record, in order.
        computed: number of images explained by this run.
        skipped: number of files that could not be explained; each is reported on stderr.
    """

    def __init__(
        self,
        config: CamConfig,
        precision: str,
        models: Sequence[ExplainedModel],
        files: Sequence[ImageFile],
        output: OutputFolder,
    ) -> None:
        self.config, self.precision, self.models, self.output = config, precision, models, output
        known = {name for model in models for name in model.trained.classes}
        self.files = [file if file.label in known else replace(file, label=None) for file in files]
        self.explained: list[ImageFile] = []
        self.computed = self.skipped = 0
        self._tables = Tables()

    def check_method(self) -> None:
        """Raise ValueError if the method or the layer does not fit one of the models."""
        for model in self.models:
            size, device = model.trained.image_size, model.trained.device
            image = torch.zeros(1, 3, size, size, device=device)
            target = torch.zeros(1, dtype=torch.int64, device=device)
            with autocast(self.precision, device):
                evidence(model.trained.model, image, target, method=self.config.method, layer=self.config.layer)

    def batches(self) -> Iterator[int]:
        """Explain one batch per iteration and yield the number of files processed so far.

        Raises:
            ValueError, OSError: a picture or file cannot be written, or a method does not fit a model.
        """
        size, number = self.config.batch_size, 0
        for number, start in enumerate(range(0, len(self.files), size), start=1):
            batch = self.files[start : start + size]
            self._process(number, batch)
            yield start + len(batch)
        self.output.remove_grids_after(number)

    def finish(self) -> Table:
        """Write the tables and the gallery, and return the summary: one row per model.

        Raises:
            ValueError: no file could be explained.
        """
        if not self.explained:
            raise ValueError(f"none of the {len(self.files)} files in {self.config.images_path} could be explained")
        for name, content in self._tables.files().items():
            self.output.write(name, content)
        summary = self._tables.summary.rows()
        self.output.write("gallery.html", self._gallery(summary).encode())
        return summary

    def _process(self, number: int, files: Sequence[ImageFile]) -> None:
        """Explain the unfinished images of a batch, and draw its grid if anything in it changed."""
        records = {file: record for file in files if (record := self.output.finished_record(file))}
        images = self._open([file for file in files if file not in records])
        if images:
            self.output.forget_grid(number)
            records |= self._explain(images)
        done = [file for file in files if file in records]
        for file in done:
            self._tables.add(records[file])
        self.explained += done
        names = [file.name for file in done]
        if done and not self.output.has_grid(number, names):
            rows = [
                overlay.make_row(
                    records[file], images.get(file) or load_image(file.path), self.output.load_maps(file.name)
                )
                for file in done
            ]
            self.output.save_grid(number, names, self._draw(rows))

    def _open(self, files: Sequence[ImageFile]) -> dict[ImageFile, Image.Image]:
        """Open the images; report and count those that cannot be explained."""
        images = {}
        for file in files:
            try:
                if self.config.target == "true" and file.label is None:
                    raise ValueError(
                        f"{file.path} has no true class: neither its folder nor a row in --labels names one"
                    )
                images[file] = load_image(file.path)
            except ValueError as error:
                print(f"skipped: {error}", file=sys.stderr)
                self.skipped += 1
        return images

    def _explain(self, images: dict[ImageFile, Image.Image]) -> dict[ImageFile, Record]:
        device = self.models[0].trained.device
        with autocast(self.precision, device):
            results = explain_batch(self.models, images, self.config)
        if not self.computed:
            _warn_about_single_pixels(results[0][1])
        records = {}
        for (file, image), (record, maps) in zip(images.items(), results, strict=True):
            records[file] = {**record, "stamp": file.stamp}
            self.output.save(records[file], maps, self._draw([overlay.make_row(record, image, maps)]))
            self.computed += 1
        return records

    def _draw(self, rows: Sequence[overlay.Row]) -> Figure:
        headings = [model.label for model in self.models]
        return overlay.draw(rows, headings, self.config.colormap, self.config.opacity)

    def _gallery(self, summary: Table) -> str:
        total = len(self.explained)
        count = min(self.config.gallery_images, total)
        files = [self.explained[i * total // count] for i in range(count)]
        cards = (
            Card(self.output.load_record(file.name), self.output.load_maps(file.name), load_image(file.path))
            for file in files
        )
        labels = {model.name: model.label for model in self.models}
        return render_gallery(
            "Where the models look", cards, labels, summary, self._gallery_note(count), self.config.colormap
        )

    def _gallery_note(self, count: int) -> str:
        """Describe which images and maps the gallery shows."""
        config, total = self.config, len(self.explained)
        images = f"All {total} images" if count == total else f"{count} of {total} images, spread evenly over them"
        targets = {"predicted": "the class that each model predicts", "true": "the true class"}
        return (
            f"{images}. Maps by {config.method}{f' at layer {config.layer}' if config.layer else ''} for "
            f"{targets.get(config.target, config.target)}; each map is divided by its own maximum. Models see the "
            "central square of an image: there is no map outside it. Agreement is Spearman's rank correlation."
        )


def _warn_about_single_pixels(maps: Maps) -> None:
    for name, values in maps.items():
        if values.size == 1:
            print(
                f"warning: {name}'s map has a single pixel, so it shows no location: train with a smaller "
                "--output_stride, or choose an earlier --layer",
                file=sys.stderr,
            )
