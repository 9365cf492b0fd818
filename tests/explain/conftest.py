"""Checkpoints of tiny untrained models, and a study of them."""

import dataclasses
import json

import pytest
import torch

from effnet_fast import checkpoint, create_model
from effnet_fast.config import TrainConfig

CLASSES = ["bear", "cat", "dog", "eel"]


def write_checkpoint(path, seed, image_size=32, width=0.25, depth=0.3, mean=(0.5, 0.4, 0.3)):
    torch.manual_seed(seed)
    model = create_model(
        "efficientnet-b0", len(CLASSES), image_size, 8, width=width, depth=depth, drop_path=0, bn_momentum=1.0
    )
    # Realistic BatchNorm statistics keep activations from vanishing, and a larger classifier gives confident
    # predictions, so that predictions and maps differ between images and models.
    with torch.no_grad():
        model(torch.randn(8, 3, image_size, image_size))
        model.classifier.weight.mul_(10)
    path.parent.mkdir(parents=True)
    state = checkpoint.Checkpoint(
        model=model.state_dict(),
        ema=None,
        optimizer={},
        scaler={},
        meters=None,
        progress={},
        config=dataclasses.asdict(TrainConfig(width=width, depth=depth)),
        architecture=dataclasses.asdict(model.architecture),
        classes=CLASSES,
        mean=list(mean),
        std=[0.25, 0.25, 0.25],
        fingerprint="",
        result={},
    )
    checkpoint.save(path, state.to_dict())


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The folder of a study with three models and two seeds, as `effnet-fast study` writes it."""
    folder = tmp_path_factory.mktemp("study")
    models = []
    for name, seed, size in [("baseline", 1, 32), ("baseline", 0, 32), ("deeper", 0, 32), ("higher-resolution", 0, 40)]:
        run = f"runs/{name}-{seed}"
        write_checkpoint(
            folder / run / "last.pt", seed=len(models), image_size=size, depth=0.3 + 0.2 * (name == "deeper")
        )
        label = f"{name} ({size} px)"
        models.append({"name": name, "label": label, "seed": seed, "run": run, "checkpoint": f"{run}/last.pt"})
    (folder / "study.json").write_text(json.dumps({"models": models}))
    return folder
