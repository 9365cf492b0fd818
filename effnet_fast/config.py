"""Settings: one frozen dataclass per verb. The docstring of a field is its `--help` text.

This module imports no torch, so `effnet-fast --help` is fast. `__post_init__` raises ValueError for values that are
never valid; values that depend on the data or the machine are checked where those are known.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DatasetName = Literal["cifar100", "cifar10", "folder", "synthetic"]
LoaderKind = Literal["dali", "resident", "torch"]
LoaderName = Literal["auto", "dali", "resident", "torch"]
DeviceName = Literal["auto", "cuda", "cpu"]
LayoutName = Literal["auto", "effnet-fast", "torchvision", "timm", "timm-tf", "efficientnet-pytorch"]
DepthwiseInit = Literal["default", "identity"]
Switch = Literal["auto", "yes", "no"]
CamMethod = Literal[
    "grad-cam", "grad-cam++", "layer-cam", "cam", "integrated-gradients", "occlusion", "guided-grad-cam"
]
TestTimeAugmentation = Literal["none", "flip"]
TRACKERS = ("tensorboard", "wandb", "mlflow")
StepMode = Literal["auto", "eager", "compile", "graph"]

# Settings in which `~` and `$VARIABLE` are expanded.
PATHS = {
    "data_dir", "save_dir", "pretrained", "resume", "checkpoint", "checkpoints", "runs", "images", "images_path",
    "labels", "output", "output_dir", "output_path", "export",
}  # fmt: skip

# YAML 1.1 reads the bare words no, off, yes and on as booleans.
_YAML_BOOLEANS: dict[object, str] = {False: "no", True: "yes", "off": "no", "on": "yes"}


def _word(value: str | bool, yes: str) -> str:
    """A setting's word, of which YAML may have made a boolean; `yes` is the word that yes and on stand for."""
    text = _YAML_BOOLEANS.get(value, str(value))
    return yes if text == "yes" else text


def operational(default: Any) -> Any:
    """A field that affects how a run executes but not its result; it may differ when a run is resumed."""
    return dataclasses.field(default=default, metadata={"operational": True})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class _Config:
    """Base of the configs: converts values to plain ones, expands paths, and checks types, which dataclasses do not."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = _plain(getattr(self, name))
            _require(_is_a(value, kind), f"--{name} must be {_describe(kind)}, not {value!r}")
            _require(not isinstance(value, float) or math.isfinite(value), f"--{name} must be finite, not {value}")
            if name in PATHS:
                value = expand(value)
            elif name == "run" and value is not None:
                value = [_expand_named(item) for item in value]
            object.__setattr__(self, name, value)


def _plain(value: Any) -> Any:
    """The value as YAML can write it: a path as text, NumPy's numbers as Python's, a tuple as a list."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: a class, a Literal, a union, or list[...]."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, option) for option in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _describe(kind: Any) -> str:
    """A type in words, for a message."""
    if get_origin(kind) is Literal:
        choices = list(map(str, get_args(kind)))
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None"}[kind]


def expand(value: Any) -> Any:
    """Replace `~` and `$VARIABLE` in a path, or in each item of a list; keep paths that exist."""
    if isinstance(value, list):
        return [expand(item) for item in value]
    if not isinstance(value, str) or os.path.exists(value):
        return value
    return os.path.expandvars(os.path.expanduser(value))


def _expand_named(argument: str) -> str:
    """Expand the path of NAME=PATH."""
    name, equals, path = argument.partition("=")
    return name + equals + expand(path)


@dataclass(frozen=True)
class TrainConfig(_Config):
    """Train a model, evaluate it after every epoch, and save curves and checkpoints in SAVE_DIR/RUN_NAME.

    >>> TrainConfig(dataset="cifar10", num_epochs=30).name
    'efficientnet-b0-cifar10-0'
    """

    model: str = "efficientnet-b0"
    """Architecture: efficientnet-b0 to efficientnet-b7, resnet50, resnet152 or densenet201."""
    dataset: DatasetName = "cifar100"
    """Data set; `folder` reads DATA_DIR/SPLIT/CLASS/IMAGE, where SPLIT is train and one of test, val or valid;
    `synthetic` generates images in memory."""
    data_dir: str = operational("data")
    """Folder of the data set; CIFAR is downloaded into it if missing."""
    save_dir: str = operational("results")
    """Parent folder of all runs."""
    run_name: str | None = operational(None)
    """Folder of this run inside SAVE_DIR; default MODEL-DATASET-SEED."""

    batch_size: int = 256
    """Images per optimizer step, summed over all ranks and accumulation steps."""
    num_epochs: int = 200
    """Passes over the training images."""
    learning_rate: float = 0.1
    """Peak learning rate, per optimizer step."""
    weight_decay: float = 5e-4
    """Weight decay of convolution and linear weights; BatchNorm and biases are exempt."""
    momentum: float = 0.9
    """Momentum of sgd, rmsprop and muon, from 0 to below 1."""
    optimizer: Literal["sgd", "adamw", "rmsprop", "muon", "apex-sgd", "apex-lamb"] = "sgd"
    """sgd uses Nesterov momentum; rmsprop is the EfficientNet paper's (decay 0.9, eps 1e-3); muon trains the weights of
    1x1 convolutions by Muon and the rest by AdamW, with learning rates and weight decays usual for AdamW; apex-sgd and
    apex-lamb are NVIDIA apex's FusedSGD and FusedLAMB and need apex."""
    schedule: Literal["cosine", "one-cycle", "step", "exponential", "constant"] = "cosine"
    """Learning rate schedule, updated every step. `step` divides by 5 at 30, 60 and 80 % of the run, `exponential` is
    the paper's 0.97 every 2.4 epochs, `one-cycle` rises for 30 % of the run."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from zero, capped at a quarter of the run; one-cycle has its own."""
    label_smoothing: float = 0.1
    """Label smoothing, from 0 to below 1."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the training loss, for classes of uneven size; balanced is n / (k * n_c) for n training
    images, n_c of them of the class, and k classes, as in scikit-learn."""
    mixup: float = 0.0
    """Alpha of the Beta distribution of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution of CutMix; 0 is off. With --mixup too, each batch uses one of the two."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed, by --mixup or --cutmix, 0 to 1."""
    mixup_switch_prob: float = 0.5
    """With both, the probability that a mixed batch uses CutMix, 0 to 1."""
    ema_decay: float = 0.0
    """Decay per step of the exponential moving average (EMA) of the weights, e.g. 0.9995; 0 is off."""
    precise_bn_images: Literal["auto"] | int = "auto"
    """Precise BN (Wu and Johnson 2021): re-estimate BatchNorm statistics, of the weights and of their EMA, on this many
    training images before the last evaluation; whole batches, at most an epoch; 0 is off. The images have the full size
    and are not mixed. auto is 50 batches if the run mixes or resizes images, else 0. Runs too short for running
    statistics do it before each evaluation, with auto too. best.pt holds the statistics that its evaluation used."""
    clip_grad: float = 5.0
    """Maximum norm of the gradient; 0 is off."""
    grad_accumulation: int = 1
    """Forward and backward passes per optimizer step; each takes an equal part of the rank's batch."""
    seed: int = 0
    """Seed of weight initialization, shuffling, augmentation, mixing, dropout and stochastic depth."""

    width: float | None = None
    """Width multiplier of B0's channels; default: the variant's."""
    depth: float | None = None
    """Depth multiplier of B0's layers; default: the variant's."""
    image_size: Literal["auto"] | int = "auto"
    """Input size in pixels; auto scales the data set's size (32 for CIFAR) as the variant scales 224."""
    resize_schedule: str | None = None
    """Progressive resizing: SIZE:SHARE,...,SIZE, e.g. 20:0.15,24:0.35,32 resizes the training images to 20 px for the
    first 15 % of the steps, to 24 px for the next 35 %, and to 32 px for the rest. Images are augmented at IMAGE_SIZE,
    then resized; sizes rise, up to IMAGE_SIZE, at which the model is evaluated. Sizes may be percentages of IMAGE_SIZE,
    e.g. 62.5%:0.4,75%:0.4,100%; in search and study they must be, since the models differ in image size."""
    output_stride: Literal[4, 8, 16, 32] | None = None
    """Downsampling factor of the final feature map. Default: 8 below 128 px, else 32; for ResNet and DenseNet 8 (stem
    without stride) up to 64 px, else 32."""
    dropout: float | None = None
    """Dropout before the classifier, from 0 to below 1; default: the variant's (0.2 for B0)."""
    drop_path: float | None = None
    """Stochastic depth, from 0 to below 1: block i of n is skipped with probability DROP_PATH * i / n. Default 0.2 for
    EfficientNets. Use 0 for runs of a few epochs."""
    zero_init_residual: bool = False
    """Set the last BatchNorm weight of each residual block to zero at the start, so that the block is its shortcut
    (Goyal et al. 2017); EfficientNets and ResNets."""
    depthwise_init: DepthwiseInit = "default"
    """Depthwise kernels at the start: default is normal by fan-out; identity is 1 at the centre and 0 elsewhere.
    EfficientNets only."""

    pretrained: bool | str | None = None
    """Initial weights, .pth or .safetensors, from torchvision, timm, EfficientNet-PyTorch or effnet_fast: a file; a
    folder that holds model.safetensors; hf-hub:REPOSITORY or hf-hub:REPOSITORY@REVISION of the Hugging Face Hub. The
    bare flag means timm's default weights of the model. Images are normalized as the weights expect."""
    pretrained_revision: str | None = operational(None)
    """Commit of the weights of the Hugging Face Hub; a run records here the one that it started from. With --pretrained
    on the command line, that of a --config does not count."""
    pretrained_layout: LayoutName = "auto"
    """Layout of the weights; auto infers it from the tensor names. timm-tf is timm's tf_efficientnet_b*."""
    allow_unmatched: bool = False
    """Load the tensors that match and list the others, rather than fail."""
    freeze: str | None = None
    """Freeze all layers up to and including this one: stem, stages.N (from 0), head, or backbone (all but the
    classifier)."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: each layer (stem, stages, head) uses this factor times the rate of the next;
    above 0, at most 1."""

    alternating_flip: bool = False
    """Mirror each image in every second epoch, rather than at random in each."""
    rotation: float = 0.0
    """Maximum rotation in degrees, in either direction."""
    color_jitter: float = 0.0
    """Maximum relative change of brightness, contrast and saturation, 0 to 1."""
    auto_augment: Literal["none", "rand", "trivial"] = "none"
    """RandAugment (2 operations, magnitude 9 of 31) or TrivialAugment Wide, as torchvision defines them."""
    random_erasing: float = 0.0
    """Probability of erasing a random rectangle of an image, 0 to 1."""

    val_fraction: float = 0.0
    """Fraction of the training images held out for validation (stratified, seeded); best.pt is chosen by it."""
    eval_every_epochs: int = 1
    """Evaluate every N epochs; the last epoch is always evaluated."""
    limit_train: int | None = None
    """Use only this many training images (stratified, seeded)."""
    limit_eval: int | None = None
    """Evaluate on only this many images (stratified, seeded)."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """For unreadable images of a folder: skip lists and counts them, fail stops the run."""

    mixed_precision: Literal["auto", "bf16", "fp16", "no"] | bool = "auto"
    """Autocast dtype; auto is bf16 on CUDA and no on the CPU; fp16 uses loss scaling; no is float32 (TF32 matrix
    products on CUDA). The bare flag means bf16."""
    step: StepMode = operational("auto")
    """How a training step executes: eager; compile (torch.compile); or graph (compiled, and the whole step captured in
    one CUDA graph on each GPU). auto is graph on one GPU and compile on several; on the CPU it is eager, except without
    the C++ kernels for runs of at least 200,000 images (training images times epochs) at output stride 8 or 4."""
    compile: Switch | bool = operational("auto")
    """Alias of --step: yes, or the bare flag, is --step compile; no is --step eager."""
    activation_checkpointing: bool = operational(False)
    """Recompute the activations of each MBConv block in the backward pass: less memory, about a third more arithmetic,
    the same result."""
    sync_batchnorm: Literal["auto"] | bool = "auto"
    """Share BatchNorm statistics among ranks, so that a step does not depend on the number of ranks. auto shares them
    up to 32 images per rank; above, a rank's own statistics are accurate enough, and sharing costs two small
    collectives per BatchNorm and step. Statistics that are not shared are averaged before each evaluation."""
    deterministic: bool = False
    """Use only deterministic algorithms on CUDA, at some cost in speed; CPU runs are always deterministic."""

    kernels: Literal["auto", "triton", "triton-block", "cpp", "torch"] = operational("auto")
    """Fused kernels in the MBConv blocks, in Triton on CUDA and in C++ on the CPU, which builds them once; auto uses
    them, torch never; EFFNET_KERNELS=torch disables them too. triton-block also makes a block's 1x1 convolutions Triton
    kernels in the forward pass; an H100 was 7 % slower with it, so auto does not choose it."""
    loader: LoaderName = operational("auto")
    """Data loader; auto takes the fastest one measured on this device, else DALI if it is installed."""
    num_workers: int = operational(8)
    """Threads of DALI or processes of the torch loader, at most one per core; with 0 the torch loader starts none."""
    device: DeviceName = operational("auto")
    """auto uses CUDA if a GPU is available."""
    resume: str | bool = operational("auto")
    """auto resumes from the run's last.pt if it exists; PATH resumes from that checkpoint; no starts over."""
    save_every_steps: int = operational(0)
    """Also save last.pt every N optimizer steps, in addition to every epoch; 0 is off."""
    save_every_minutes: float = operational(0.0)
    """Also save last.pt every N minutes, in addition to every epoch; 0 is off."""
    keep_last: int = operational(2)
    """Number of checkpoints to keep: last.pt, and older ones as last-1.pt, last-2.pt and so on, which are used if
    last.pt is damaged."""
    hang_timeout: float = operational(1800.0)
    """Seconds without progress after which a rank is reported with its stack and the run stops; 0 is off. Must be
    longer than compilation takes."""
    log_every_steps: int = operational(50)
    """Optimizer steps between two progress lines and rows of metrics.jsonl."""
    tracker: str = operational("tensorboard")
    """Where the figures of a run go besides metrics.jsonl: tensorboard, wandb and mlflow, separated by commas, or none.
    wandb and mlflow read their own environment variables."""
    time_budget: float = operational(0.0)
    """Evaluate, save and stop after this many seconds of training; 0 is no limit."""
    dry_run: bool = operational(False)
    """Print the model, cost, data, steps and memory of the run, and exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mixed_precision", _word(self.mixed_precision, yes="bf16"))
        object.__setattr__(self, "pretrained", self.pretrained or None)
        if (compiles := _YAML_BOOLEANS.get(self.compile, self.compile)) != "auto":
            mode = "compile" if compiles == "yes" else "eager"
            _require(
                self.step in ("auto", mode),
                f"--step {self.step} and --compile {compiles}, that is --step {mode}, contradict each other: leave "
                "--compile out",
            )
            object.__setattr__(self, "step", mode)
            object.__setattr__(self, "compile", "auto")
        object.__setattr__(self, "resume", _word(self.resume, yes="auto"))
        for name in (
            "batch_size", "num_epochs", "grad_accumulation", "log_every_steps", "keep_last", "eval_every_epochs"
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        _require(
            self.precise_bn_images == "auto" or self.precise_bn_images >= 0,
            f"--precise_bn_images must be auto, or a number of images from 0, not {self.precise_bn_images}",
        )
        for name in ("learning_rate", "weight_decay", "warmup_epochs", "mixup", "cutmix", "clip_grad", "rotation"):
            _require(getattr(self, name) >= 0, f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("save_every_steps", "save_every_minutes", "hang_timeout", "num_workers", "time_budget"):
            _require(getattr(self, name) >= 0, f"--{name} must not be negative, not {getattr(self, name)}")
        _require(
            self.hang_timeout <= 1e6, f"--hang_timeout {self.hang_timeout:g}: use at most 1e6 s, or 0 to turn it off"
        )
        for name in ("momentum", "label_smoothing", "ema_decay", "drop_path", "dropout", "val_fraction"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, f"--{name} must be from 0 to below 1, not {value}")
        for name in ("color_jitter", "random_erasing", "mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"--{name} must be from 0 to 1, not {value}")
        for name in ("limit_train", "limit_eval"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name} must be at least 1, not {value}")
        for name in ("width", "depth"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"--{name} must be above 0, not {value}")
        _require(
            self.mixup_prob == 1 or self.mixup > 0 or self.cutmix > 0,
            f"--mixup_prob {self.mixup_prob} applies to mixup and CutMix: add --mixup or --cutmix, or leave it out",
        )
        _require(
            self.mixup_switch_prob == 0.5 or (self.mixup > 0 and self.cutmix > 0),
            f"--mixup_switch_prob {self.mixup_switch_prob} chooses between mixup and CutMix: add both --mixup and "
            "--cutmix, or leave it out",
        )
        _require(0 <= self.seed < 2**64, f"--seed must be from 0 to 2**64 - 1, not {self.seed}")
        _require(0 < self.layer_decay <= 1, f"--layer_decay must be above 0 and at most 1, not {self.layer_decay}")
        _require(self.image_size == "auto" or self.image_size >= 8, "--image_size must be auto or at least 8")
        resize_stages(self.resize_schedule, image_size=100)  # checks the form; plan.py knows the image size
        unknown = [name for name in self.trackers if name not in TRACKERS]
        _require(not unknown, f"--tracker {self.tracker}: choose among {', '.join(TRACKERS)}, or none")
        for name, given in (
            ("pretrained_layout", self.pretrained_layout != "auto"),
            ("allow_unmatched", self.allow_unmatched),
            ("freeze", self.freeze and self.resume in ("auto", "no")),
        ):
            _require(
                bool(self.pretrained) or not given, f"--{name} applies to pretrained weights: add --pretrained FILE"
            )
        for name, given in (
            ("zero_init_residual", self.zero_init_residual),
            ("depthwise_init", self.depthwise_init != "default"),
        ):
            _require(
                not (self.pretrained and given),
                f"--{name} applies to training from scratch, --pretrained replaces the initial weights: leave one out",
            )

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self.run_name or f"{self.model}-{self.dataset}-{self.seed}"

    @property
    def trackers(self) -> list[str]:
        """The names in `tracker`."""
        return [] if self.tracker == "none" else [name.strip() for name in self.tracker.split(",")]


def resize_stages(schedule: str | None, image_size: int) -> list[tuple[int, float]]:
    """Parse `--resize_schedule` into the pixels and the share of the steps of each stage; None gives none.

    Args:
        image_size: pixels of 100 %.

    Raises:
        ValueError: the schedule is malformed.
    """
    if schedule is None:
        return []
    flag = f"--resize_schedule {schedule}"
    *early, last = schedule.split(",")
    _require(schedule.count("%") in (0, len(early) + 1), f"{flag}: use pixels or percentages for all sizes")
    try:
        pairs = [(size, float(share)) for size, share in (stage.split(":") for stage in early)]
        pairs.append((last, 1 - sum(share for _, share in pairs)))
        stages = [(_pixels(size, image_size), share) for size, share in pairs]
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{flag}: use SIZE:SHARE,...,SIZE, e.g. 20:0.15,24:0.35,32") from error
    sizes = [size for size, _ in stages]
    _require(all(share > 0 for _, share in stages), f"{flag}: shares must be above 0, and their sum below 1")
    _require(sizes == sorted(set(sizes)), f"{flag}: each size must be larger than the one before")
    _require(sizes[0] >= 8, f"{flag}: sizes must be at least 8 px")
    # torch.compile compiles a model for 8 sizes at most (torch._dynamo.config.recompile_limit).
    _require(len(sizes) <= 8, f"{flag}: use at most 8 sizes")
    return stages


def _pixels(size: str, image_size: int) -> int:
    """A size of `--resize_schedule` in pixels: "24", or "75%" of `image_size`, rounded."""
    return round(float(size[:-1]) / 100 * image_size) if size.endswith("%") else int(size)


@dataclass(frozen=True)
class _FamilyConfig(TrainConfig):
    """Settings shared by search and study: those of train, except the ones they vary."""

    model: str = "efficientnet-b0"
    """Only efficientnet-b0 can be scaled."""
    run_name: str | None = operational(None)
    """Folder inside SAVE_DIR; default search-DATASET or study-DATASET."""
    width: float | None = None
    """Refused: this verb varies it."""
    depth: float | None = None
    """Refused: this verb varies it."""
    resume: str | bool = operational("auto")
    """Always auto: the same command resumes; to start over, choose another --run_name."""
    time_budget: float = operational(0.0)
    """Refused: it applies to a single run. Stop with Ctrl-C instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.model.lower().replace("_", "-")
        _require(name == "efficientnet-b0", f"--model {self.model}: only efficientnet-b0 can be scaled")
        _require(self.width is None and self.depth is None, "--width and --depth are varied by this verb: remove them")
        _require(
            self.resume == "auto", "--resume is always auto for this verb; to start over, choose another --run_name"
        )
        _require(
            self.resize_schedule is None or "%" in self.resize_schedule,
            f"--resize_schedule {self.resize_schedule} is in pixels, and the models of this verb differ in image size: "
            "use percentages, e.g. 62.5%:0.4,75%:0.4,100%",
        )
        _require(
            self.time_budget == 0,
            "--time_budget applies to a single run: stop with Ctrl-C instead; the same command resumes",
        )


@dataclass(frozen=True)
class SearchConfig(_FamilyConfig):
    """Search for the compound-scaling factors alpha (depth), beta (width) and gamma (resolution) of the paper.

    Four stages, each resumable; all run if none is named: plan (list the candidates and their cost), run (train them,
    with any number of workers), collect (write one table), choose (pick the best and scale it).

    >>> SearchConfig(dataset="cifar10", alpha="1.1..1.4", phi="1..3").phis
    [1, 2, 3]
    """

    stage: Literal["all", "plan", "run", "collect", "choose"] = operational("all")
    """Stage to run; may also be the first argument: effnet-fast search plan."""

    alpha: str = "1..1.5"
    """Depth factors to try, LOW..HIGH or one number, each at least 1."""
    beta: str = "1..1.3"
    """Width factors to try, LOW..HIGH or one number, each at least 1."""
    gamma: str = "1..1.3"
    """Resolution factors to try, LOW..HIGH or one number, each at least 1."""
    grid_step: float = 0.05
    """Spacing of the grid."""
    product: str = "1.9..2.1"
    """Allowed range of alpha * beta^2 * gamma^2, roughly the growth of MACs from one phi to the next."""

    max_flops: float | None = 1e10
    """Maximum MACs per image (fvcore's "flops") of the scaled model at every phi; null for no limit."""
    max_params: float | None = None
    """Maximum parameters of the scaled model at every phi."""
    max_activations: float | None = None
    """Maximum activations (numbers written by the layers) per image of the scaled model at every phi."""
    max_latency_ms: float | None = None
    """Maximum inference latency in ms (batch 1, measured on this device) of the scaled model at every phi."""

    search_epochs: int = 10
    """Training epochs per candidate, at phi = 1."""
    seeds: int = operational(1)
    """Runs per candidate, with seeds SEED, SEED + 1, ...; may be increased later."""
    val_fraction: float = 0.1
    """Fraction of the training images held out (stratified, seeded); candidates are pruned and chosen by it alone."""
    num_epochs: int = operational(200)
    """Epochs in the recipes that `choose` writes for the scaled models."""
    phi: str = operational("1..7")
    """Values of phi to write recipes for, LOW..HIGH or one number, 1 to 7."""

    pruner: Literal["median", "hyperband", "none"] = "median"
    """Stop weak candidates early, in the run of their first seed: median stops those below the median of the others at
    the same epoch, hyperband uses successive halving, none trains all candidates to the end."""
    storage: str = operational("journal")
    """Storage shared by the workers: a journal file in the search's folder, or an Optuna database URL."""
    keep_checkpoints: bool = operational(False)
    """Keep the checkpoints of finished trials, some hundred megabytes each."""
    lease_seconds: float = operational(60.0)
    """Seconds without a heartbeat after which another worker takes over a trial."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            low, high = span(name, getattr(self, name))
            _require(low >= 1, f"--{name} {getattr(self, name)}: factors below 1 shrink the model; use at least 1")
        span("product", self.product)
        low, high = span("phi", self.phi)
        _require(
            low >= 1 and high <= 7 and low % 1 == high % 1 == 0, f"--phi {self.phi}: use whole numbers from 1 to 7"
        )
        for name in ("grid_step", "lease_seconds", "max_flops", "max_params", "max_activations", "max_latency_ms"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"--{name} must be above 0, not {value}")
        for name in ("search_epochs", "seeds"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")

    @property
    def name(self) -> str:
        """The search's folder name."""
        return self.run_name or f"search-{self.dataset}"

    @property
    def phis(self) -> list[int]:
        low, high = span("phi", self.phi)
        return list(range(int(low), int(high) + 1))


def span(name: str, text: str) -> tuple[float, float]:
    """Parse `LOW..HIGH`, or one number, into (low, high).

    Raises:
        ValueError: `text` is neither, or low is above high.
    """
    low, dots, high = str(text).partition("..")
    try:
        ends = float(low), float(high if dots else low)
    except ValueError as error:
        raise ValueError(f"--{name} {text}: use LOW..HIGH or one number, e.g. 1..1.5") from error
    _require(all(map(math.isfinite, ends)), f"--{name} {text}: both ends must be finite")
    _require(ends[0] <= ends[1], f"--{name} {text}: LOW must not be above HIGH")
    return ends


@dataclass(frozen=True)
class StudyConfig(_FamilyConfig):
    """Compare five ways to scale B0: not at all, deeper, wider, higher resolution, and all three (compound).

    >>> StudyConfig(dataset="cifar10", target_flops=6.4e7).targets
    [64000000.0]
    """

    target_flops: float | list[float] | None = None
    """Target MACs per image (fvcore's "flops") of the four scaled models, whose costs agree within 5 %; may be a list.
    Default: the factors of the paper's table 7 (d = 4, w = 2, r = 2, and d = 1.4, w = 1.2, r = 1.3 together)."""
    references: list[str] | None = None
    """Other models to train with the same settings, e.g. resnet50; may be repeated."""
    seeds: int = operational(1)
    """Runs per model, with seeds SEED, SEED + 1, ...; may be increased later."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seeds >= 1, f"--seeds must be at least 1, not {self.seeds}")

    @property
    def targets(self) -> list[float]:
        """Target MACs; an empty list means the paper's factors."""
        if self.target_flops is None:
            return []
        return list(self.target_flops) if isinstance(self.target_flops, list) else [self.target_flops]

    @property
    def name(self) -> str:
        """The study's folder name."""
        return self.run_name or f"study-{self.dataset}"


@dataclass(frozen=True)
class EvalConfig(_Config):
    """Evaluate a checkpoint: accuracy, macro-F1, calibration, superclasses, confused pairs, worst images.

    >>> EvalConfig("results/RUN/last.pt", split="val").weights
    'auto'
    """

    checkpoint: str
    """Checkpoint to evaluate, e.g. results/RUN/last.pt."""
    data_dir: str | None = None
    """Folder of the data set; default: the one used for training."""
    split: Literal["test", "val", "train"] = "test"
    """Split to evaluate; val is the run's held-out images."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Weights to use; auto is the moving average (EMA) if the run has one."""
    batch_size: int = 256
    """Images per forward pass."""
    limit_eval: int | None = None
    """Evaluate on only this many images (stratified, seeded)."""
    tta: TestTimeAugmentation = "none"
    """flip also evaluates the mean of the probabilities of each image and its mirror image, and prints it apart as
    loss_tta, top1_tta and top5_tta; all other figures stay those of the images alone."""
    calibrate: bool = False
    """Fit a temperature (Guo et al. 2017) to all validation images of the run, report the calibration error on SPLIT
    without and with it, and store it in the checkpoint; predict and export then use it."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] | bool = "auto"
    """Autocast dtype; auto is bf16 on CUDA and no on the CPU. The bare flag means bf16."""
    loader: LoaderName = "auto"
    """Data loader; auto takes the fastest one measured on this device, else DALI if it is installed."""
    num_workers: int = 8
    """Threads of DALI or processes of the torch loader, at most one per core; with 0 the torch loader starts none."""
    device: DeviceName = "auto"
    """auto uses CUDA if a GPU is available."""
    output_dir: str | None = None
    """Folder for the JSON, the tables and the pictures; default: the checkpoint's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mixed_precision", _word(self.mixed_precision, yes="bf16"))
        _require(self.batch_size >= 1, f"--batch_size must be at least 1, not {self.batch_size}")
        _require(self.num_workers >= 0, f"--num_workers must not be negative, not {self.num_workers}")
        _require(
            self.limit_eval is None or self.limit_eval >= 1, f"--limit_eval must be at least 1, not {self.limit_eval}"
        )
        _require(
            not self.calibrate or self.split != "val",
            "--calibrate fits the temperature to the val images, so it cannot report on them: use --split test",
        )


@dataclass(frozen=True)
class PredictConfig(_Config):
    """Classify images, or all images of a folder: print the most probable classes."""

    checkpoint: str
    """Checkpoint of a run, e.g. results/RUN/best.pt, or a .safetensors export."""
    images: list[str]
    """Image files, or folders of them."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Weights of a checkpoint to use; auto is the moving average (EMA) if the run has one."""
    top: int = 5
    """Number of classes to print per image."""
    batch_size: int = 64
    """Images per forward pass."""
    tta: TestTimeAugmentation = "none"
    """flip averages the probabilities of each image and its mirror image."""
    output: str | None = None
    """File for the predictions, .csv or .json."""
    device: DeviceName = "auto"
    """auto uses CUDA if a GPU is available."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top", "batch_size"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        _require(
            self.output is None or self.output.endswith((".csv", ".json")),
            f"--output must end in .csv or .json, not {self.output}",
        )


@dataclass(frozen=True)
class ExportConfig(_Config):
    """Export a checkpoint's model to safetensors, ONNX, torch.export or a folder for the Hugging Face hub.

    >>> ExportConfig("results/RUN/last.pt", format="onnx").layout
    'effnet-fast'
    """

    checkpoint: str
    """Checkpoint to export, e.g. results/RUN/best.pt."""
    format: Literal["safetensors", "onnx", "torch-export", "hub"] = "safetensors"
    """safetensors stores the weights; onnx and torch-export (.pt2) also store the graph, for any batch size; hub is a
    folder with weights, config.json and a model card, to upload to the Hugging Face hub."""
    layout: Literal["effnet-fast", "timm", "torchvision"] = "effnet-fast"
    """Names of the tensors, for safetensors and hub; timm also gets a config.json. Needs --output_stride 32."""
    output: str | None = None
    """Output file, or folder for hub; default: the checkpoint's path with .safetensors, .onnx, .pt2 or -hub."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Weights to use; auto is the moving average (EMA) if the run has one."""
    fold_batchnorm: bool = False
    """Fold BatchNorm into the preceding convolutions: fewer operations, same logits; for inference only."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored weights, for safetensors and hub; float16 halves the file, keeps BatchNorm's values and biases
    in float32, and is converted to float32 when loaded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.dtype == "float32" or self.format in ("safetensors", "hub"),
            f"--dtype {self.dtype} is for --format safetensors or hub, not {self.format}",
        )
        _require(
            self.layout == "effnet-fast" or self.format in ("safetensors", "hub"),
            f"--layout {self.layout} is for --format safetensors or hub, not {self.format}",
        )
        _require(
            not self.fold_batchnorm or (self.layout == "effnet-fast" and self.format != "hub"),
            "--fold_batchnorm is not for --layout timm or torchvision, nor for --format hub: leave it out",
        )


@dataclass(frozen=True)
class PlotConfig(_Config):
    """Plot the training curves of one or several runs in one figure, or the trials of a search."""

    runs: list[str]
    """Folders of runs, or the folder of a search after `collect`."""
    output: str | None = None
    """Figure to write (.png, .svg or .pdf); default: curves.png in the first run's folder, or trials.png and trials.svg
    in the search's."""


@dataclass(frozen=True)
class InfoConfig(_Config):
    """Print a model's parameters, MACs, FLOPs, activations, final feature map and memory."""

    model: str = "efficientnet-b0"
    """Architecture: efficientnet-b0 to efficientnet-b7, resnet50, resnet152 or densenet201."""
    num_classes: int = 100
    """Number of classes."""
    width: float | None = None
    """Width multiplier of B0's channels; default: the variant's."""
    depth: float | None = None
    """Depth multiplier of B0's layers; default: the variant's."""
    image_size: Literal["auto"] | int = "auto"
    """Input size in pixels; auto scales 32 as the variant scales 224."""
    output_stride: Literal[4, 8, 16, 32] | None = None
    """Downsampling factor of the final feature map. Default: 8 below 128 px, else 32; for ResNet and DenseNet 8 (stem
    without stride) up to 64 px, else 32."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.num_classes >= 1, f"--num_classes must be at least 1, not {self.num_classes}")


@dataclass(frozen=True)
class CamConfig(_Config):
    """Show where models look: class activation maps side by side, with scores and an HTML gallery."""

    images_path: str
    """Folder of images, or one image; an image's folder name is its true class unless --labels is given."""
    output_path: str = dataclasses.field(metadata={"operational": True})
    """Folder for pictures, tables and the gallery; a second run skips finished images."""
    checkpoints: str | None = operational(None)
    """Folder of a study, folder of a run (its last.pt), one checkpoint or one .safetensors export. Without
    --checkpoints and --run: the newest study under --save_dir, else a small one that is trained first."""
    run: list[str] | None = operational(None)
    """NAME=PATH of another checkpoint or run folder, shown as NAME; may be repeated."""
    save_dir: str = operational("results")
    """Folder with studies."""
    seed: int | None = operational(None)
    """Seed of the study's runs to use; default: the lowest of each model."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Weights to use; auto is the moving average (EMA) if the run has one."""

    method: CamMethod = "grad-cam"
    """Attribution method; cam is exact for a linear classifier on a pooled map, guided-grad-cam needs ReLU."""
    layer: str | None = None
    """Module whose output the Grad-CAM methods use, e.g. stages.5; default: the input of the global pooling."""
    target: str = "predicted"
    """Class to explain: predicted (by each model), true, or a class name."""
    labels: str | None = None
    """CSV with columns image,class; image paths are relative to IMAGES_PATH."""

    infidelity: bool = False
    """Also compute Captum's infidelity (slow)."""
    sensitivity: bool = False
    """Also compute Captum's sensitivity_max (slow)."""
    curve_steps: int = 20
    """Steps of the deletion and insertion curves."""

    colormap: str = "efficientnet"
    """efficientnet is the paper's blue to red in even steps, jet the paper's own; or any colormap of matplotlib."""
    opacity: float = 0.5
    """Opacity of the map over the image, 0 to 1."""
    format: Literal["png", "svg", "pdf"] = "png"
    """File format of the pictures."""
    gallery_images: int = operational(500)
    """Maximum images in the HTML gallery, spaced evenly; tables and pictures include all images."""

    batch_size: int = operational(8)
    """Images per batch, and rows per grid picture."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] | bool = "no"
    """Autocast dtype; no is float32, auto is bf16 on CUDA. The bare flag means bf16."""
    device: DeviceName = operational("auto")
    """auto uses CUDA if a GPU is available."""
    resume: Literal["auto", "no"] | bool = operational("auto")
    """auto continues an interrupted run in OUTPUT_PATH; no deletes its files and starts over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mixed_precision", _word(self.mixed_precision, yes="bf16"))
        object.__setattr__(self, "resume", _word(self.resume, yes="auto"))
        for name in ("batch_size", "gallery_images", "curve_steps"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        _require(0 <= self.opacity <= 1, f"--opacity must be from 0 to 1, not {self.opacity}")
        _require(self.resume in ("auto", "no"), f"--resume must be auto or no, not {self.resume}")


@dataclass(frozen=True)
class DataConfig(_Config):
    """Download, verify and summarize a data set, and write a sheet of sample images."""

    dataset: DatasetName = "cifar100"
    """Data set."""
    data_dir: str = "data"
    """Folder of the data set; CIFAR is downloaded into it if missing."""
    output: str | None = None
    """Sample sheet (PNG); default: DATA_DIR/DATASET-samples.png."""
    export: str | None = None
    """Export test images as PNG files to this folder, as CLASS/NUMBER.png."""
    export_images: int = 100
    """Number of test images to export (stratified, seeded); all if there are fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.export_images >= 1, f"--export_images must be at least 1, not {self.export_images}")


@dataclass(frozen=True)
class DoctorConfig(_Config):
    """Check this machine: GPU, driver, packages, kernels, loaders, ranks, disk; print what each auto will choose."""

    device: DeviceName = "auto"
    """auto uses CUDA if a GPU is available."""
    json: bool = False
    """Print JSON to stdout and the progress to stderr."""


@dataclass(frozen=True)
class TuneConfig(_Config):
    """Time the Triton kernels' launches, and PyTorch's operators, on this GPU; train uses the fastest. Resumable."""

    model: str = "efficientnet-b0"
    """Architecture whose layers are timed: efficientnet-b0 to efficientnet-b7, resnet50, resnet152 or densenet201."""
    image_size: Literal["auto"] | int = "auto"
    """Input size in pixels; auto scales 32 as the variant scales 224."""
    output_stride: Literal[4, 8, 16, 32] | None = None
    """Downsampling factor of the final feature map, as in train."""
    batch_size: int = 256
    """Images per forward pass on one GPU: train's --batch_size over ranks and accumulation steps."""
    kernels: Literal["triton", "triton-block"] = "triton"
    """triton-block also times the blocks' 1x1 convolutions, which train runs in Triton with --kernels triton-block."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] | bool = "auto"
    """Autocast dtype, as in train; auto is bf16."""
    seconds: float = 240
    """Seconds after which the search stops; what is left is timed by the next call."""
    workers: int = 12
    """Processes that compile ahead, at most one a core."""
    output: str | None = None
    """JSON file to write: every time, with its provenance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mixed_precision", _word(self.mixed_precision, yes="bf16"))
        for name in ("batch_size", "workers"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        _require(self.seconds > 0, f"--seconds must be above 0, not {self.seconds}")
        _require(self.image_size == "auto" or self.image_size >= 8, "--image_size must be auto or at least 8")


def identity(config: TrainConfig | CamConfig) -> dict[str, Any]:
    """The fields that determine a run's result; runs that differ in one must not share a folder."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.metadata.get("operational")
    }
