"""Definition of a layout: the layer names of a library, and the padding and eps that its models compute with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effnet_fast.data.dataset import Channels
from effnet_fast.model.blocks import Padding
from effnet_fast.model.efficientnet import EfficientNet
from effnet_fast.model.network import Network

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SHOWN = 4  # names that a message lists


@dataclass(frozen=True)
class Names:
    """A library's names of EfficientNet's layers, keyed by ours.

    Attributes:
        ends: layers outside of the blocks.
        block: prefix of a block; `stage` and `stage1` count stages from 0 and 1, `place` counts the blocks of a stage,
            `index` the blocks of the network.
        plain: layers of a block without expansion.
        expanded: layers of a block with expansion.
    """

    ends: Mapping[str, str]
    block: str
    plain: Mapping[str, str]
    expanded: Mapping[str, str]

    def of(self, model: EfficientNet) -> dict[str, str]:
        """Map each of our layers to theirs."""
        names, index = dict(self.ends), 0
        for stage, blocks in enumerate(model.stages):
            for place, block in enumerate(blocks.children()):
                prefix = self.block.format(stage=stage, stage1=stage + 1, place=place, index=index)
                layers = self.expanded if hasattr(block.expand, "conv") else self.plain
                names |= {f"stages.{stage}.{place}.{ours}": f"{prefix}.{theirs}" for ours, theirs in layers.items()}
                index += 1
        return names


@dataclass(frozen=True)
class Layout:
    """The EfficientNet or the reference models of a library.

    Attributes:
        title: the library's name in messages, in the possessive.
        sign: a tensor name that only this layout has.
        padding: of the convolutions.
        bn_eps: eps of BatchNorm, by the model's name.
        names: of the layers; None if they are ours.
    """

    title: str
    sign: str
    padding: Padding = "symmetric"
    bn_eps: Callable[[str], float] = lambda model: 1e-5
    names: Names | None = None

    def tensor_names(self, model: Network) -> dict[str, str]:
        """Map each key of the model's state dict to the library's."""
        keys = list(model.state_dict())
        if self.names is None or not isinstance(model, EfficientNet):
            return {key: key for key in keys}
        layers = self.names.of(model)
        parts = {key: key.rpartition(".") for key in keys}
        return {key: f"{layers[layer]}.{tensor}" for key, (layer, _, tensor) in parts.items()}


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, and the settings that they were trained with.

    Attributes:
        source: of the tensors: a file, or `hf-hub:REPOSITORY@COMMIT`.
        layout: of the tensor names.
        tensors: keyed by those names, without BatchNorm's batch counters.
        mean, std: normalisation of the training images, of each channel, for pixels scaled to 0..1.
        description: of the architecture; only in files of this project.
        classes: their names; only in files of this project.
        average: key of the moving average in a trainer's file, if the tensors are one.
        revision: commit of the Hugging Face Hub; None for a file.
    """

    source: str
    layout: Layout
    tensors: dict[str, Tensor]
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    description: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    average: str | None = None
    revision: str | None = None

    @property
    def padding(self) -> Padding:
        return (self.description or {}).get("padding", self.layout.padding)

    def bn_eps(self, model: str) -> float:
        """eps of BatchNorm for the model of that name."""
        return (self.description or {}).get("bn_eps", self.layout.bn_eps(model))


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    all_names = list(names)
    hidden = len(all_names) - _SHOWN
    return ", ".join(all_names[:_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
