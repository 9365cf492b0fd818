"""Weights of other libraries: whose they are, what their names are here, and what computation they were trained in.

A layout is told by its names. It decides the padding and BatchNorm's eps too: weights trained with TensorFlow's SAME
padding or eps 1e-3 give wrong logits with the other, without any error. timm's `efficientnet_b*` and
`tf_efficientnet_b*` have the same names but differ in both, so those two are told by what else is known of the file.
"""

from __future__ import annotations

import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_fast import distributed
from effnet_fast.config import LayoutName
from effnet_fast.model.blocks import Padding
from effnet_fast.model.efficientnet import EfficientNet
from effnet_fast.model.network import Network

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# AdvProp's weights, of timm and of EfficientNet-PyTorch, and those of timm's recipe ra4 saw pixels from -1 to 1.
_CENTRED = re.compile(r"tf_efficientnet_b\d[._]ap(?![a-z0-9])|adv-efficientnet-b\d|efficientnet_b\d[._]ra4(?![a-z0-9])")
_HALF = (0.5, 0.5, 0.5)

_SHOWN = 4  # names of each kind in a refusal

# What trainers put a state dict under: timm's averages and torchvision's come first, as timm reads them.
_AVERAGES = ("state_dict_ema", "model_ema")
_WRAPPERS = (*_AVERAGES, "state_dict", "model", "model_state_dict")
_COUNTERS = ("num_batches_tracked", "n_averaged")  # of BatchNorm, and of torch's AveragedModel


@dataclass(frozen=True)
class Names:
    """A library's names of EfficientNet's layers, by ours.

    Attributes:
        ends: layers outside of the blocks.
        block: prefix of a block; `stage` and `stage1` count stages from 0 and 1, `place` blocks of the stage, `index`
            blocks of the network.
        plain: layers of a block without expansion.
        expanded: layers of a block with one.
    """

    ends: Mapping[str, str]
    block: str
    plain: Mapping[str, str]
    expanded: Mapping[str, str]

    def of(self, model: EfficientNet) -> dict[str, str]:
        """Our layer -> theirs."""
        names, index = dict(self.ends), 0
        for stage, blocks in enumerate(model.stages):
            for place, block in enumerate(blocks.children()):
                prefix = self.block.format(stage=stage, stage1=stage + 1, place=place, index=index)
                layers = self.expanded if hasattr(block.expand, "conv") else self.plain
                names |= {f"stages.{stage}.{place}.{ours}": f"{prefix}.{theirs}" for ours, theirs in layers.items()}
                index += 1
        return names


def _torchvision_block(first: int) -> dict[str, str]:
    """Layers behind the expansion, which torchvision numbers."""
    return {
        "depthwise.conv": f"{first}.0",
        "depthwise.norm": f"{first}.1",
        "se.reduce": f"{first + 1}.fc1",
        "se.expand": f"{first + 1}.fc2",
        "project.conv": f"{first + 2}.0",
        "project.norm": f"{first + 2}.1",
    }


_TORCHVISION = Names(
    ends={
        "stem.conv": "features.0.0",
        "stem.norm": "features.0.1",
        "head.conv": "features.8.0",
        "head.norm": "features.8.1",
        "classifier": "classifier.1",
    },
    block="features.{stage1}.{place}.block",
    plain=_torchvision_block(0),
    expanded={"expand.conv": "0.0", "expand.norm": "0.1", **_torchvision_block(1)},
)
_TIMM = Names(
    ends={
        "stem.conv": "conv_stem",
        "stem.norm": "bn1",
        "head.conv": "conv_head",
        "head.norm": "bn2",
        "classifier": "classifier",
    },
    block="blocks.{stage}.{place}",
    plain={
        "depthwise.conv": "conv_dw",
        "depthwise.norm": "bn1",
        "se.reduce": "se.conv_reduce",
        "se.expand": "se.conv_expand",
        "project.conv": "conv_pw",
        "project.norm": "bn2",
    },
    expanded={
        "expand.conv": "conv_pw",
        "expand.norm": "bn1",
        "depthwise.conv": "conv_dw",
        "depthwise.norm": "bn2",
        "se.reduce": "se.conv_reduce",
        "se.expand": "se.conv_expand",
        "project.conv": "conv_pwl",
        "project.norm": "bn3",
    },
)
_PYTORCH_BLOCK = {
    "depthwise.conv": "_depthwise_conv",
    "depthwise.norm": "_bn1",
    "se.reduce": "_se_reduce",
    "se.expand": "_se_expand",
    "project.conv": "_project_conv",
    "project.norm": "_bn2",
}
_EFFICIENTNET_PYTORCH = Names(
    ends={
        "stem.conv": "_conv_stem",
        "stem.norm": "_bn0",
        "head.conv": "_conv_head",
        "head.norm": "_bn1",
        "classifier": "_fc",
    },
    block="_blocks.{index}",
    plain=_PYTORCH_BLOCK,
    expanded={"expand.conv": "_expand_conv", "expand.norm": "_bn0", **_PYTORCH_BLOCK},
)


def _torchvision_eps(model: str) -> float:
    """torchvision builds B0 to B4 with torch's default and B5 to B7 with the authors' eps."""
    return 1e-3 if model in ("efficientnet-b5", "efficientnet-b6", "efficientnet-b7") else 1e-5


def _own_eps(model: str) -> float:
    """As `create_model` builds them: reference models have torch's default."""
    return 1e-3 if model.startswith("efficientnet") else 1e-5


@dataclass(frozen=True)
class Layout:
    """A library's EfficientNet or reference models: a name that only they have, and what they compute with."""

    title: str
    sign: str
    padding: Padding = "symmetric"
    bn_eps: Callable[[str], float] = lambda model: 1e-5
    names: Names | None = None  # None: as here


_LAYOUTS = {
    "effnet-fast": Layout("effnet_fast's", "stem.conv.weight", bn_eps=_own_eps),
    "torchvision": Layout("torchvision's", "features.0.0.weight", bn_eps=_torchvision_eps, names=_TORCHVISION),
    "timm": Layout("timm's", "conv_stem.weight", names=_TIMM),
    "timm-tf": Layout("timm's (tf_)", "conv_stem.weight", "same", lambda model: 1e-3, names=_TIMM),
    "efficientnet-pytorch": Layout(
        "EfficientNet-PyTorch's", "_conv_stem.weight", "same", lambda model: 1e-3, names=_EFFICIENTNET_PYTORCH
    ),
}
_REFERENCE = {
    "layer1.0.conv1.weight": Layout("torchvision's ResNet's", "layer1.0.conv1.weight"),
    "features.conv0.weight": Layout("torchvision's DenseNet's", "features.conv0.weight"),
}


@dataclass(frozen=True)
class Weights:
    """Tensors of a file and how they are to be computed with.

    Attributes:
        path: of the file.
        layout: whose names they have.
        tensors: by those names, without counters of batches.
        mean, std: of each channel, that the images they were trained on were normalised with.
        description: of the architecture, where the file is of this project.
        classes: their names, where the file is of this project.
        average: name under which a trainer's file holds them, where they are a moving average.
    """

    path: Path
    layout: Layout
    tensors: dict[str, Tensor]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    description: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    average: str | None = None

    @property
    def padding(self) -> Padding:
        return (self.description or {}).get("padding", self.layout.padding)

    def bn_eps(self, model: str) -> float:
        """eps of BatchNorm for a model of that name."""
        return (self.description or {}).get("bn_eps", self.layout.bn_eps(model))


def read_weights(path: Path, layout: LayoutName = "auto") -> Weights:
    """Read EfficientNet weights of torchvision, timm, EfficientNet-PyTorch or this project, or torchvision's ResNet or
    DenseNet, from .safetensors, or from .pth or .pt of which no code can run.

    A state dict may be wrapped as trainers do ({"state_dict": ...}, {"model": ...}, `module.` before every name). Where
    there is a moving average of the weights, of a run here, timm's or torchvision's trainer, it is taken.

    Args:
        path: the file.
        layout: whose names it has; auto tells by the names, and `timm` from `timm-tf` by the architecture named in the
            file, else in timm's config.json beside it, else in its own name, else in the nearest folder's.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it holds no weights, or weights of an unknown layout, or it cannot be told which of timm's; there is
            no such `layout`; what timm's config.json tells is impossible.
    """
    if layout not in ("auto", *_LAYOUTS):
        raise ValueError(f"unknown layout {layout!r} of weights: choose one of auto, {', '.join(_LAYOUTS)}")
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    content, facts = _read_exported(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = {_bare(name): tensor for name, tensor in content.items() if not name.endswith(_COUNTERS)}
    names = [*facts.get("architectures", ()), *reversed(path.absolute().parts)]  # the nearest to the tensors first
    chosen = _LAYOUTS[layout] if layout != "auto" else _recognise(path, tensors, names)
    mean, std = (_HALF, _HALF) if _is_centred(names) else (IMAGENET_MEAN, IMAGENET_STD)
    return Weights(
        path,
        chosen,
        {_without_dot(name): tensor for name, tensor in tensors.items()},
        mean=tuple(facts.get("mean", mean)),  # type: ignore[arg-type]
        std=tuple(facts.get("std", std)),  # type: ignore[arg-type]
        description=facts.get("description"),
        classes=tuple(facts.get("classes", ())),
        average=facts.get("average"),
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the metadata that `effnet-fast export` wrote into it (none, if another did).

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is damaged, or lacks some of that metadata.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    path.open("rb").close()  # of a file that may not be read safetensors says that there is none
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if "effnet_fast" not in metadata:
        return tensors, {}
    try:
        told = {name: json.loads(value) for name, value in metadata.items()}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its metadata is not what effnet-fast export writes ({error})") from error
    _require(path, told, "architecture", "classes", "mean", "std", "folded")
    return tensors, told


def _read_exported(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, told = read_safetensors(path)
    if not told:
        return tensors, _facts_beside(path)
    if told["folded"]:
        raise ValueError(f"{path} has its BatchNorm folded, for use only: export without --fold_batchnorm")
    return tensors, _facts_of_run(path, told)


def _read_run(path: Path, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _require(path, state, "model", "ema", "classes", "mean", "std")
    average = _tensors_by_name(path, state["ema"]) if state["ema"] else {}
    facts = _facts_of_run(path, state) | ({"average": "ema"} if average else {})
    return _tensors_by_name(path, state["model"]) | average, facts


def _facts_of_run(path: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    for name, kind in (("architecture", dict), ("classes", list)):
        if not isinstance(told[name], kind):
            raise ValueError(f"{path} is damaged: {name} is {told[name]!r}")
    return {"description": told["architecture"], "classes": told["classes"], **_normalisation(path, told)}


def _require(path: Path, told: Mapping[str, Any], *names: str) -> None:
    if lacking := [name for name in names if name not in told]:
        raise ValueError(f"{path} is damaged or of another version: it lacks {', '.join(lacking)}; take another file")


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import pickle

    with path.open("rb") as file, torch.serialization.safe_globals([Namespace]):  # the arguments that trainers keep
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, which could run code: save its state dict alone"
            ) from error
        except Exception as error:  # damaged bytes can raise anything
            raise ValueError(f"{path} is damaged or holds no weights") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict")
    if "architecture" in state and "format" in state:
        return _read_run(path, state)
    facts = _facts_beside(path)
    if isinstance(state.get("arch"), str):  # of timm's trainer
        facts["architectures"] = [state["arch"], *facts.get("architectures", ())]
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), dict) and state[wrapper]:
            state = state[wrapper]
            facts |= {"average": wrapper} if wrapper in _AVERAGES else {}
    return _tensors_by_name(path, state), facts


def _tensors_by_name(path: Path, state: object) -> dict[str, Tensor]:
    content = state if isinstance(state, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path} holds no state dict (tensors by name)")
    return tensors


def _facts_beside(path: Path) -> dict[str, Any]:
    """Architecture, mean and std that timm's config.json in the same folder tells of its weights."""
    file = path.parent / "config.json"
    try:
        told = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        return {}
    if not isinstance(told, dict) or "architecture" not in told:  # not of timm
        return {}
    if not isinstance(told["architecture"], str):
        raise ValueError(f"{file}: architecture must be a name, not {told['architecture']!r}")
    settings = told.get("pretrained_cfg", told) or {}  # in older ones mean and std stand beside the architecture
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: pretrained_cfg must hold mean and std, not be {settings!r}")
    return {"architectures": [told["architecture"]], **_normalisation(file, settings)}


def _normalisation(file: Path, told: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean and std, where they are told."""
    found = {name: told[name] for name in ("mean", "std") if name in told}
    for name, values in found.items():
        if not (isinstance(values, list | tuple) and len(values) == 3 and all(map(_is_finite_number, values))):
            raise ValueError(f"{file}: {name} must be three finite numbers, not {values!r}")
        if name == "std" and min(values) <= 0:
            raise ValueError(f"{file}: std must be three positive numbers, not {values!r}")
    return {name: tuple(values) for name, values in found.items()}


def _is_finite_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]


def _bare(name: str) -> str:
    """A name without what DistributedDataParallel and torch.compile put before it."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def _without_dot(name: str) -> str:
    """`norm.1` as torchvision's first DenseNets were saved -> `norm1`."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _recognise(path: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Layout:
    for sign, layout in _REFERENCE.items():
        if sign in tensors:
            return layout
    found = [name for name, layout in _LAYOUTS.items() if layout.sign in tensors]
    if not found:
        raise ValueError(
            f"{path} has names of no layout known here (torchvision, timm, EfficientNet-PyTorch, effnet_fast): "
            f"{_some(tensors)}"
        )
    if found == ["timm", "timm-tf"]:
        return _LAYOUTS[_which_of_timm(path, names)]
    return _LAYOUTS[found[0]]


def _which_of_timm(path: Path, names: Sequence[str]) -> str:
    for name in names:
        named = {"timm-tf" if tf else "timm" for tf in re.findall(r"(tf_)?efficientnet_b\d", name)}
        if len(named) == 1:
            return named.pop()
    raise ValueError(
        f"{path}: timm's efficientnet_b* and tf_efficientnet_b* have the same names but other padding and eps, and "
        "nothing says which this is: add --pretrained_layout timm or timm-tf"
    )


def _is_centred(names: Sequence[str]) -> bool:
    """Whether the nearest name of an EfficientNet is one whose images were normalised by 0.5."""
    nearest = next((name for name in names if re.search(r"efficientnet[-_]b\d", name)), "")
    return bool(_CENTRED.search(nearest))


@torch.no_grad()
def load_weights(model: Network, weights: Weights, allow_unmatched: bool = False) -> None:
    """Copy weights into a model of the same architecture.

    A classifier of another size stays as it is. That, or for which classes it is kept, and which layout it was, is said
    on stderr.

    Args:
        allow_unmatched: take the tensors that fit; the others are listed on stderr.

    Raises:
        ValueError: tensors are missing, have no place or differ in shape.
    """
    if not isinstance(model, EfficientNet) and any(layout.sign in weights.tensors for layout in _LAYOUTS.values()):
        raise ValueError(
            f"{weights.path} holds an EfficientNet's weights ({weights.layout.title} names) and does not fit this "
            f"{type(model).__name__}: name the --model it was saved from"
        )
    ours, theirs = model.state_dict(), dict(weights.tensors)
    names = _their_names(model, weights.layout)
    lines = _notes(model, weights)
    head = {key: names[key] for key in _head_keys(model)}
    if _only_classes_differ(model, [theirs.get(name) for name in head.values()]):
        classes = len(theirs[next(iter(head.values()))])
        lines.append(f"its head of {classes} classes is replaced by a new one of {model.architecture.num_classes}")
        theirs = {name: tensor for name, tensor in theirs.items() if name not in head.values()}
        names = {key: name for key, name in names.items() if key not in head}
    there = {key: name for key, name in names.items() if name in theirs}
    misshapen = [name for key, name in there.items() if theirs[name].shape != ours[key].shape]
    broken = [name for name in there.values() if not _is_finite(theirs[name])]
    unfit = {*misshapen, *broken}
    fitting = {key: name for key, name in there.items() if name not in unfit}
    if weights.classes and head.keys() <= fitting.keys():
        lines.append(f"its head is kept, for its {len(weights.classes)} classes: {_some(map(str, weights.classes))}")
    misfits = {
        "missing in it": [name for name in names.values() if name not in theirs],
        "without a place here": sorted(set(theirs) - set(names.values())),
        "of another shape": misshapen,
        "not of finite floating-point numbers": broken,
    }
    if any(misfits.values()) and not (allow_unmatched and fitting):
        raise ValueError(_refusal(model, weights, misfits))
    lines += [f"{kind}: {name}" for kind, unmatched in misfits.items() for name in unmatched]
    model.load_state_dict({key: theirs[name] for key, name in fitting.items()}, strict=False)
    if distributed.is_main():
        print(*(f"{weights.path}: {line}" for line in lines), sep="\n", file=sys.stderr)


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _their_names(model: Network, layout: Layout) -> dict[str, str]:
    """Our tensor -> theirs."""
    keys = list(model.state_dict())
    if layout.names is None or not isinstance(model, EfficientNet):
        return {key: key for key in keys}
    layers = layout.names.of(model)
    parts = {key: key.rpartition(".") for key in keys}
    return {key: f"{layers[layer]}.{tensor}" for key, (layer, _, tensor) in parts.items()}


def _head_keys(model: Network) -> list[str]:
    """Names of the classifier's weight and bias."""
    own = [id(p) for p in model.classifier.parameters()]
    return [name for name, p in model.named_parameters() if id(p) in own]


def _only_classes_differ(model: Network, head: Sequence[Tensor | None]) -> bool:
    """Whether a file's weight and bias of the classifier fit but for the number of classes."""
    weight, bias = head
    classes, features = model.classifier.weight.shape
    return weight is not None and bias is not None and weight.shape[1:] == (features,) and len(weight) != classes


def _notes(model: Network, weights: Weights) -> list[str]:
    build = model.architecture
    padding = "TensorFlow's SAME" if getattr(build, "padding", None) == "same" else "symmetric"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (weights.mean, weights.std))
    average = f"the moving average it holds ({weights.average}) is taken, not the weights it is of"
    return [
        f"{weights.layout.title} names; {padding} padding, BatchNorm eps {build.bn_eps:g}",
        f"images normalised with mean {mean} and std {std}",
        *([average] if weights.average else []),
    ]


def _refusal(model: Network, weights: Weights, misfits: Mapping[str, list[str]]) -> str:
    parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in misfits.items() if names]
    return (
        f"{weights.path} ({weights.layout.title} names) does not fit this {type(model).__name__}; tensors "
        f"{'; '.join(parts)}: name the --model it was saved from (with --output_stride 32 for a published stem), or "
        "take what fits with --allow_unmatched"
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
