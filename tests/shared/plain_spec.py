"""A loader's settings without augmentation, workers or other ranks, for tests to change."""

import torch

from effnet_fast.data.loader import LoaderSpec

PLAIN = LoaderSpec(
    batch_size=8,
    image_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    device=torch.device("cpu"),
    dtype=torch.float32,
    seed=0,
    rank=0,
    world=1,
    num_workers=0,
    augment=None,
)
