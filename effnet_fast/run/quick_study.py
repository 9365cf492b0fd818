"""The study that cam uses if no model is given: the newest one, else a small one that is trained first."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from effnet_fast.config import CamConfig, StudyConfig
from effnet_fast.explain.models import newest_study
from effnet_fast.run.study import study


def recipe() -> dict[str, Any]:
    """Return the settings of the recipe quick-study."""
    text = resources.files("effnet_fast.recipes").joinpath("quick-study.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def find_or_train(config: CamConfig) -> tuple[Path, int]:
    """Return the folder of the newest finished study under --save_dir, after training quick-study if there is none.

    An interrupted training resumes at the next call.

    Returns:
        The folder, and 0, or 128 + the signal that stopped the training.

    Raises:
        ValueError, OSError: see `study`.
    """
    save_dir = Path(config.save_dir)
    if folder := newest_study(save_dir):
        print(f"models: the newest study, {folder}")
        return folder, 0
    settings = StudyConfig(**recipe(), seed=config.seed or 0, save_dir=str(save_dir), device=config.device)
    print(
        f"no model is given and {save_dir} has no finished study: training five small models on {settings.dataset} "
        f"images (recipe quick-study, about ten minutes on two cores). They are kept in {save_dir / settings.name}; "
        "if interrupted, the same command resumes. They only know procedural shapes: for maps of your own classes, run "
        "effnet-fast study on your images.",
        flush=True,
    )
    return save_dir / settings.name, study(settings).status
