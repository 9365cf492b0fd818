"""The output folder of `effnet-fast cam`, which a later run can resume."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from effnet_fast.checkpoint import write_atomically, write_json
from effnet_fast.explain.image_files import ImageFile
from effnet_fast.explain.records import Maps
from effnet_fast.explain.tables import Record
from effnet_fast.report import picture


class OutputFolder:
    """OUTPUT_PATH: settings.json, records/, maps/, pictures/, grids/, the tables and the gallery.

    An image's record is written after its picture and its maps. The image is finished if the record exists and contains
    the file's current size and modification time.

    Args:
        folder: OUTPUT_PATH.
        picture_format: png, svg or pdf.
    """

    FOLDERS = ("records", "maps", "pictures", "grids")
    FILES = ("settings.json", "maps.csv", "agreement.csv", "summary.csv", "gallery.html")

    def __init__(self, folder: Path, picture_format: str) -> None:
        self.folder = folder
        self._format = picture_format
        self._grid_members: dict[str, list[str]] = {}

    def open(self, settings: dict[str, Any], restart: bool) -> None:
        """Create the folder, or resume an earlier run in it.

        Args:
            settings: all settings that determine the maps.
            restart: delete the output of an earlier run.

        Raises:
            ValueError: the folder contains other files, or maps computed with other settings.
            OSError: the folder cannot be written.
        """
        earlier = self._earlier_settings()
        if earlier is not None and restart:
            self._clear()
        elif earlier is not None and (self.folder / "records").is_dir():
            self._compare(earlier, settings)
        elif earlier is None and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} contains other files: choose a new or an empty folder as --output_path")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "settings.json", settings)
        members = self.folder / "grids" / "members.json"
        self._grid_members = json.loads(members.read_bytes()) if members.is_file() else {}

    def _earlier_settings(self) -> dict[str, Any] | None:
        """The settings of an earlier run; None if there is none, or settings.json is another program's."""
        try:
            earlier = json.loads((self.folder / "settings.json").read_bytes())
        except (OSError, ValueError):
            return None
        ours = isinstance(earlier, dict) and {"models", "method", "images_path"} <= earlier.keys()
        return earlier if ours else None

    def _compare(self, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
        differences = [f"{k} was {earlier.get(k)}, now {v}" for k, v in settings.items() if earlier.get(k) != v]
        if differences:
            raise ValueError(
                f"{self.folder} holds maps of other settings ({'; '.join(differences)}): "
                "choose another --output_path, or --resume no to start over"
            )

    def _clear(self) -> None:
        for name in self.FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in self.FILES:
            (self.folder / name).unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the folder atomically; `name` may contain subfolders."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)

    # -- images

    def finished_record(self, file: ImageFile) -> Record | None:
        """Return the record of an image that is finished, else None."""
        if not ((self.folder / _record_name(file.name)).is_file() and self._picture(file.name).is_file()):
            return None
        record = self.load_record(file.name)
        return record if record["stamp"] == file.stamp else None

    def load_record(self, name: str) -> Record:
        return json.loads((self.folder / _record_name(name)).read_bytes())

    def load_maps(self, name: str) -> Maps:
        with np.load(self.folder / _maps_name(name)) as maps:
            return dict(maps)

    def save(self, record: Record, maps: Maps, figure: Figure) -> None:
        """Write an image's picture and maps, then its record."""
        name = record["image"]
        content = _archive(maps)
        picture.save(figure, self._picture(name))
        self.write(_maps_name(name), content)
        self.write(_record_name(name), json.dumps(record).encode())

    def _picture(self, name: str) -> Path:
        return self.folder / "pictures" / f"{name}.{self._format}"

    # -- grids

    def has_grid(self, number: int, members: list[str]) -> bool:
        """Return whether grid `number` exists and shows exactly these images."""
        path = self._grid(number)
        return path.is_file() and self._grid_members.get(path.name) == members

    def forget_grid(self, number: int) -> None:
        """Let a grid be drawn anew, by a later run too, before an image in it changes."""
        if self._grid_members.pop(self._grid(number).name, None) is not None:
            self._save_grid_members()

    def save_grid(self, number: int, members: list[str], figure: Figure) -> None:
        path = self._grid(number)
        picture.save(figure, path)
        self._grid_members[path.name] = members
        self._save_grid_members()

    def remove_grids_after(self, count: int) -> None:
        """Remove grids that an earlier run with smaller batches or more images wrote after the first `count`."""
        stale = self._grid_members.keys() - {self._grid(number).name for number in range(1, count + 1)}
        for name in stale:
            (self.folder / "grids" / name).unlink(missing_ok=True)
            del self._grid_members[name]
        if stale:
            self._save_grid_members()

    def _grid(self, number: int) -> Path:
        return self.folder / "grids" / f"grid-{number:05d}.{self._format}"

    def _save_grid_members(self) -> None:
        self.write("grids/members.json", json.dumps(self._grid_members).encode())


def _archive(maps: Maps) -> bytes:
    """The maps as a compressed .npz file; np.savez_compressed refuses some names, such as `file`."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in maps.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, values, allow_pickle=False)
    return content.getvalue()


def _record_name(name: str) -> str:
    return f"records/{name}.json"


def _maps_name(name: str) -> str:
    return f"maps/{name}.npz"
