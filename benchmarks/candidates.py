"""The training options that `choose_recipe.py` compares: changes of a recipe, and what each one is compared with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from harness import Case
from throughput import make_peer
from torch import Tensor, nn

from effnet_fast.model import Architecture, Network
from effnet_fast.run import build
from effnet_fast.run.plan import Plan

PEER_BN_MOMENTUM = 0.1  # timm's, torch's default


@dataclass(frozen=True)
class Candidate:
    """A recipe with changes.

    Attributes:
        changes: FIELD=VALUE words, applied to the recipe.
        against: the candidate that this one builds on, with which it is compared; None is compared with nothing.
        peer: the library whose model is trained, with our loader and step; None is this package.
    """

    changes: str = ""
    against: str | None = None
    peer: str | None = None


_BARE = "label_smoothing=0.1 zero_init_residual=false alternating_flip=false resize_schedule=null"
# SGD's rate is 0.1 for batches of 128 (Goyal et al. 2017: proportional to the batch).
_PLAIN = f"{_BARE} batch_size=64 optimizer=sgd learning_rate=0.05 weight_decay=5e-4"
_ZERO = f"{_BARE} zero_init_residual=true batch_size=128 weight_decay=0.05"
_ADAMW = f"{_ZERO} optimizer=adamw learning_rate=3e-3"
_MUON = f"{_ZERO} optimizer=muon learning_rate=5e-3"


def _muon_with(change: str) -> Candidate:
    return Candidate(f"{_MUON} {change}", against="muon")


CANDIDATES = {
    "plain": Candidate(_PLAIN, against="timm"),
    "timm": Candidate(_PLAIN, peer="timm"),
    "zero-init": Candidate(f"{_PLAIN} zero_init_residual=true", against="plain"),
    "adamw": Candidate(_ADAMW, against="zero-init"),
    "muon": Candidate(_MUON, against="adamw"),
    "muon-resize": _muon_with("resize_schedule=20:0.2,24:0.5,32"),
    "alternating-flip": _muon_with("alternating_flip=true"),
    "trivial-augment": _muon_with("auto_augment=trivial"),
    "rand-augment": _muon_with("auto_augment=rand"),
    "identity-depthwise": _muon_with("depthwise_init=identity"),
    "mixup-cutmix": _muon_with("mixup=0.2 cutmix=1 mixup_prob=0.5"),
    "smoothing-0": _muon_with("label_smoothing=0"),
    "smoothing-0.05": _muon_with("label_smoothing=0.05"),
    "smoothing-0.2": _muon_with("label_smoothing=0.2"),
    "smoothing-0.4": _muon_with("label_smoothing=0.4"),
}


class Peer(Network):
    """Another library's EfficientNet in place of ours: [N, 3, H, W] -> logits [N, num_classes]."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.model = model
        self.architecture = architecture

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)

    def layers(self) -> dict[str, list[nn.Module]]:
        return {"model": [self.model]}


@contextlib.contextmanager
def building(candidate: Candidate) -> Iterator[None]:
    """In this context, training builds the candidate's model: ours, or its peer's.

    The peer's model has the strides, dropout and stochastic depth of ours; its initial values are its library's.
    """
    if candidate.peer is None:
        yield
        return
    ours = build._new_model

    def new_model(plan: Plan) -> Peer:
        architecture: Architecture = ours(plan).architecture
        size, stride, classes = plan.image_size, architecture.output_stride, architecture.num_classes
        case = Case(plan.config.model, size, stride, num_classes=classes)
        options = {"drop_rate": architecture.dropout, "drop_path_rate": architecture.drop_path}
        model = make_peer(candidate.peer, case, **options).to(memory_format=torch.channels_last)
        return Peer(model, dataclasses.replace(architecture, bn_momentum=PEER_BN_MOMENTUM))

    with mock.patch.object(build, "_new_model", new_model):
        yield
