"""Check the mean and std that a file of weights states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def checked_normalisation(file: Path, metadata: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return those of `mean` and `std` that `metadata` contains.

    Raises:
        ValueError: they are not three finite numbers, or std is not positive.
    """
    stated = {name: metadata[name] for name in ("mean", "std") if name in metadata}
    for name, values in stated.items():
        if not (isinstance(values, list | tuple) and len(values) == 3 and all(map(_is_finite_number, values))):
            raise ValueError(f"{file}: {name} must be three finite numbers, not {values!r}")
        if name == "std" and min(values) <= 0:
            raise ValueError(f"{file}: std must be three positive numbers, not {values!r}")
    return {name: tuple(values) for name, values in stated.items()}


def _is_finite_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]
