"""The settings of every verb: one frozen dataclass each, whose field docstrings are the command line's help.

Nothing here imports torch, so that `effnet-fast --help` answers at once. A value that can never be right raises
ValueError with a line that says what to do; what depends on the data or the machine is checked where it is known.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

DatasetName = Literal["cifar100", "cifar10", "folder", "synthetic"]
LoaderName = Literal["auto", "dali", "resident", "torch"]
DeviceName = Literal["auto", "cuda", "cpu"]
LayoutName = Literal["auto", "effnet-fast", "torchvision", "timm", "timm-tf", "efficientnet-pytorch"]
Switch = Literal["auto", "yes", "no"]
StepMode = Literal["auto", "eager", "compile", "graph"]

# YAML 1.1 reads the bare words no, off, yes and on as booleans.
_WORDS: dict[object, str] = {False: "no", True: "yes", "off": "no", "on": "yes"}


def operational(default: Any) -> Any:
    """A field that changes how a run is carried out but not what it computes, so resuming may change it."""
    return dataclasses.field(default=default, metadata={"operational": True})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class TrainConfig:
    """Train a model, evaluate it after every epoch, and keep curves and checkpoints in SAVE_DIR/RUN_NAME."""

    model: str = "efficientnet-b0"
    """Architecture: efficientnet-b0 to efficientnet-b7, resnet50, resnet152 or densenet201."""
    dataset: DatasetName = "cifar100"
    """Data set; `folder` is DATA_DIR/{train,test}/CLASS/*.{jpg,png}, `synthetic` is procedural and needs no disk."""
    data_dir: str = operational("data")
    """Folder with the data set, or where it is downloaded to."""
    save_dir: str = operational("results")
    """Folder that holds one sub-folder per run."""
    run_name: str | None = operational(None)
    """Name of the run's folder; default MODEL-DATASET-SEED."""

    batch_size: int = 256
    """Images per optimizer step, over all ranks and accumulation steps together."""
    num_epochs: int = 200
    """Passes over the training images."""
    learning_rate: float = 0.1
    """Peak learning rate, per optimizer step."""
    weight_decay: float = 5e-4
    """Decay of convolution and linear weights (never of BatchNorm or biases)."""
    momentum: float = 0.9
    """Momentum of sgd and rmsprop (a fraction, 0 to 1)."""
    optimizer: Literal["sgd", "adamw", "rmsprop", "apex-sgd", "apex-lamb"] = "sgd"
    """sgd with Nesterov momentum, adamw, the EfficientNet paper's rmsprop (decay 0.9, eps 1e-3), or NVIDIA apex's
    FusedSGD and FusedLAMB where apex is installed."""
    schedule: Literal["cosine", "one-cycle", "step", "exponential", "constant"] = "cosine"
    """Learning rate over steps; `step` divides by 5 at 30, 60 and 80 % of the run, `exponential` is the paper's
    0.97 every 2.4 epochs, `one-cycle` rises for 30 % of the run."""
    warmup_epochs: float = 5.0
    """Linear warm-up from zero, in epochs, at most a quarter of the run (one-cycle has its own)."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes (0 to 1)."""
    mixup: float = 0.0
    """Alpha of the Beta distribution of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution of CutMix; 0 is off. With mixup too, each batch draws one of the two."""
    ema_decay: float = 0.0
    """Decay per step of the exponential moving average of the weights, e.g. 0.9995; 0 is off."""
    clip_grad: float = 5.0
    """Largest norm of the whole gradient; 0 is off."""
    grad_accumulation: int = 1
    """Pieces into which a rank's share of the batch is cut, one forward and backward pass each."""
    seed: int = 0
    """Seed of weights, order, augmentation, mixing, dropout and stochastic depth."""

    width: float | None = None
    """Multiplier of the baseline's channels; default the variant's own."""
    depth: float | None = None
    """Multiplier of the baseline's repeats; default the variant's own."""
    image_size: Literal["auto"] | int = "auto"
    """Pixels; auto scales the data set's own size (32 for CIFAR) by the variant's resolution ratio."""
    output_stride: Literal[4, 8, 16, 32] | None = None
    """Input pixels per pixel of the final map; default 8 below 128 px and 32 from there on. ResNet and DenseNet: 8 (a
    stem without strides) up to 64 px, 32 above."""
    dropout: float | None = None
    """Dropout before the classifier (0 to 1); default the variant's own (0.2 for B0)."""
    drop_path: float | None = None
    """Stochastic depth (0 to 1): block i of n is skipped with probability DROP_PATH * i / n; default 0.2 for
    EfficientNets, and none for others. For runs of a few epochs 0 is better."""

    pretrained: str | None = None
    """Weights to start from, .pth or .safetensors: of torchvision, timm, EfficientNet-PyTorch or a run here. Images are
    then normalised as those weights need."""
    pretrained_layout: LayoutName = "auto"
    """Whose names the weights have; auto tells by the names. timm-tf is timm's tf_efficientnet_b*."""
    allow_unmatched: bool = False
    """Take of the weights what fits and list the rest, rather than refuse them."""
    freeze: str | None = None
    """Hold everything up to and including this layer as it is: stem, stages.N (from 0), head, or backbone for all but
    the classifier."""
    layer_decay: float = 1.0
    """Layer-wise learning rate: each layer (stem, stages, head) before the classifier takes this much of the rate of
    the next one (above 0, at most 1)."""

    rotation: float = 0.0
    """Largest rotation in degrees, either way."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation (0 to 1)."""
    auto_augment: Literal["none", "rand", "trivial"] = "none"
    """RandAugment (2 operations, magnitude 9 of 31) or TrivialAugment, done by DALI."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image is blanked (0 to 1)."""

    val_fraction: float = 0.0
    """Share of the training images held out (stratified, seeded) to choose best.pt by; 0 holds out none."""
    eval_every_epochs: int = 1
    """Epochs between two evaluations, whose images the curves show; the last epoch is always evaluated."""
    limit_train: int | None = None
    """Use only this many training images (stratified, seeded)."""
    limit_eval: int | None = None
    """Evaluate on only this many images (stratified, seeded)."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """What an unreadable image of a folder does: it is named, counted and skipped, or the run fails."""

    mixed_precision: Literal["auto", "bf16", "fp16", "no"] | bool = "auto"
    """Autocast type; auto is bf16 on CUDA and no on the CPU, fp16 uses a gradient scaler, no is float32 (with TF32
    products on CUDA). The bare flag is bf16."""
    step: StepMode = operational("auto")
    """How a step is carried out: eager; compile, by torch.compile; or graph, compiled and captured whole in one CUDA
    graph (one GPU). auto is compile on CUDA, and on the CPU only for 200,000 image visits or more at output stride 8
    or 4, where it was measured to pay; else eager."""
    compile: Switch | bool = operational("auto")
    """An older way to say --step compile (yes, or the bare flag) and --step eager (no); --step graph --compile no
    captures the model uncompiled."""
    activation_checkpointing: bool = operational(False)
    """Compute the activations of each MBConv block anew in the backward pass rather than keep them: less memory, about
    a third more arithmetic, the same result."""
    sync_batchnorm: bool = True
    """Share BatchNorm statistics among ranks, so that any number of ranks computes the same step."""
    deterministic: bool = False
    """Only deterministic algorithms on CUDA, at some cost in speed; the CPU always repeats itself."""

    kernels: Literal["auto", "triton", "torch"] = operational("auto")
    """Fused Triton kernels of the MBConv block; auto uses them on CUDA, torch never (EFFNET_KERNELS=torch too)."""
    loader: LoaderName = operational("auto")
    """Data path; auto takes what was recorded as faster on the device, else DALI where it can be imported."""
    num_workers: int = operational(8)
    """Threads of DALI or processes of the torch loader, capped to the machine's cores."""
    device: DeviceName = operational("auto")
    """auto takes CUDA where there is a GPU."""
    resume: str | bool = operational("auto")
    """auto goes on from the run's last.pt where there is one; PATH starts from that checkpoint; no starts afresh."""
    save_every_steps: int = operational(0)
    """Write last.pt every so many optimizer steps besides every epoch; 0 is off."""
    save_every_minutes: float = operational(0.0)
    """Write last.pt every so many minutes besides every epoch; 0 is off."""
    keep_last: int = operational(2)
    """Checkpoints kept: last.pt, and the ones before it as last-1.pt, last-2.pt and so on, one of which serves where
    last.pt is damaged."""
    hang_timeout: float = operational(1800.0)
    """Seconds after which a rank that does not move is reported with its stack and the run ends; 0 waits for ever.
    It must be longer than compiling takes."""
    log_every_steps: int = operational(50)
    """Optimizer steps between two rows of metrics.jsonl."""
    time_budget: float = operational(0.0)
    """Stop cleanly, evaluated and saved, after this many seconds of training; 0 is no limit."""
    dry_run: bool = operational(False)
    """Say what would run (model, cost, data, steps, memory) and stop."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixed_precision", _precision(self.mixed_precision))
        object.__setattr__(self, "compile", _WORDS.get(self.compile, self.compile))
        object.__setattr__(self, "resume", _WORDS.get(self.resume, self.resume))
        for name in (
            "batch_size", "num_epochs", "grad_accumulation", "log_every_steps", "keep_last", "eval_every_epochs"
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "warmup_epochs", "mixup", "cutmix", "clip_grad", "rotation"):
            _require(getattr(self, name) >= 0, f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("save_every_steps", "save_every_minutes", "hang_timeout", "num_workers", "time_budget"):
            _require(getattr(self, name) >= 0, f"--{name} must not be negative, not {getattr(self, name)}")
        _require(self.hang_timeout <= 1e6, f"--hang_timeout {self.hang_timeout:g}: at most 1e6 s; 0 waits for ever")
        for name in ("momentum", "label_smoothing", "ema_decay", "drop_path", "dropout", "val_fraction"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, f"--{name} must be from 0 to below 1, not {value}")
        for name in ("color_jitter", "random_erasing"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"--{name} must be from 0 to 1, not {value}")
        for name in ("limit_train", "limit_eval"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name} must be at least 1, not {value}")
        for name in ("width", "depth"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"--{name} must be above 0, not {value}")
        _require(0 < self.layer_decay <= 1, f"--layer_decay must be above 0 and at most 1, not {self.layer_decay}")
        _require(self.image_size == "auto" or self.image_size >= 8, "--image_size must be auto or at least 8")
        for name, given in (
            ("pretrained_layout", self.pretrained_layout != "auto"),
            ("allow_unmatched", self.allow_unmatched),
            ("freeze", self.freeze and self.resume in ("auto", "no")),
        ):
            _require(
                bool(self.pretrained) or not given, f"--{name} is about weights to start from: add --pretrained FILE"
            )
        _require(
            (self.step, self.compile) not in (("eager", "yes"), ("compile", "no")),
            f"--step {self.step} and --compile {self.compile} contradict each other: leave --compile out",
        )
        _require(
            self.auto_augment == "none" or self.loader in ("auto", "dali"),
            f"--auto_augment {self.auto_augment} is done by DALI: use --loader dali, not {self.loader}",
        )

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self.run_name or f"{self.model}-{self.dataset}-{self.seed}"


@dataclass(frozen=True)
class _FamilyConfig(TrainConfig):
    """What the verbs that train a family of scaled models share: every setting of train but those that they scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.model.lower().replace("_", "-")
        _require(name == "efficientnet-b0", f"--model {self.model}: efficientnet-b0 is what is scaled")
        _require(self.width is None and self.depth is None, "--width and --depth are what is scaled: leave them out")
        _require(self.resume == "auto", "--resume is always auto here; to start afresh choose another --run_name")
        _require(self.time_budget == 0, "--time_budget is of one run: stop at any time, the same command goes on")


@dataclass(frozen=True)
class SearchConfig(_FamilyConfig):
    """Find how fast depth, width and resolution grow best together, as the paper's alpha, beta and gamma.

    In four steps, all of them where none is named, each going on where it was: plan (the candidates and what they
    cost), run (train them; any number of workers), collect (one table), choose (the best, and its scaled models).
    """

    stage: Literal["all", "plan", "run", "collect", "choose"] = operational("all")
    """Which step, also as the first word: effnet-fast search plan."""

    alpha: str = "1..1.5"
    """Depth factors to try, LOW..HIGH or one number, each at least 1."""
    beta: str = "1..1.3"
    """Width factors to try, LOW..HIGH or one number, each at least 1."""
    gamma: str = "1..1.3"
    """Resolution factors to try, LOW..HIGH or one number, each at least 1."""
    grid_step: float = 0.05
    """Distance of the grid's factors."""
    product: str = "1.9..2.1"
    """What alpha * beta^2 * gamma^2 must lie in: about the factor by which MACs grow from one phi to the next."""

    max_flops: float | None = None
    """Most MACs of one image (fvcore's "flops"), e.g. 1e10, of the scaled model at every phi."""
    max_params: float | None = None
    """Most parameters of the scaled model at every phi."""
    max_activations: float | None = None
    """Most numbers that the layers write for one image, of the scaled model at every phi."""
    max_latency_ms: float | None = None
    """Most milliseconds for one image (batch 1, inference), measured on this device, of the scaled model at every
    phi."""

    search_epochs: int = 10
    """Epochs that each candidate is trained for, at phi = 1."""
    seeds: int = operational(1)
    """Runs of each candidate, with seeds SEED, SEED + 1, ...; may be raised later."""
    val_fraction: float = 0.1
    """Share of the training images held out (stratified, seeded), by which alone candidates are pruned and chosen."""
    num_epochs: int = operational(200)
    """Epochs in the recipes of the scaled models that `choose` writes."""
    phi: str = operational("1..7")
    """Scaled models to write recipes for, LOW..HIGH or one number, 1 to 7."""

    pruner: Literal["median", "hyperband", "none"] = "median"
    """Stops a candidate whose validation accuracy lags behind: below the median of the others at its epoch, or by
    successive halving; none trains all to the end."""
    storage: str = operational("journal")
    """Where workers share the study: a journal file in the search's folder, or any database URL of Optuna."""
    keep_checkpoints: bool = operational(False)
    """Keep the weights of trials that ended; they are some hundred megabytes each."""
    lease_seconds: float = operational(60.0)
    """A trial whose worker has not been heard of for so long is taken up by another one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            low, high = span(name, getattr(self, name))
            _require(low >= 1, f"--{name} {getattr(self, name)}: a factor below 1 shrinks the model; start at 1")
        span("product", self.product)
        low, high = span("phi", self.phi)
        _require(low >= 1 and high <= 7 and low % 1 == high % 1 == 0, f"--phi {self.phi}: give whole numbers, 1 to 7")
        for name in ("grid_step", "lease_seconds", "max_flops", "max_params", "max_activations", "max_latency_ms"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"--{name} must be above 0, not {value}")
        for name in ("search_epochs", "seeds"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        _require(self.val_fraction > 0, "--val_fraction 0: candidates are chosen by held-out images; try 0.1")

    @property
    def name(self) -> str:
        """The search's folder name."""
        return self.run_name or f"search-{self.dataset}"

    @property
    def phis(self) -> list[int]:
        low, high = span("phi", self.phi)
        return list(range(int(low), int(high) + 1))


def span(name: str, text: str) -> tuple[float, float]:
    """The ends of `LOW..HIGH`, or one number twice.

    Raises:
        ValueError: it is neither, or the wrong way round.
    """
    low, dots, high = str(text).partition("..")
    try:
        ends = float(low), float(high if dots else low)
    except ValueError as error:
        raise ValueError(f"--{name} {text}: give LOW..HIGH or one number, e.g. 1..1.5") from error
    _require(all(map(math.isfinite, ends)), f"--{name} {text}: both ends must be finite")
    _require(ends[0] <= ends[1], f"--{name} {text}: the first number must not be the larger")
    return ends


@dataclass(frozen=True)
class StudyConfig(_FamilyConfig):
    """Train B0 made deeper, wider, of higher resolution and all three at once, and compare them with it."""

    target_flops: float | list[float] | None = None
    """MACs of one image (fvcore's "flops") that all four ways shall cost within 5 %, or a list of such costs; default
    the factors of the paper's table 7: d = 4, w = 2, r = 2, and d = 1.4, w = 1.2, r = 1.3 together."""
    references: list[str] | None = None
    """Other models to train alike beside them, e.g. resnet50; may be given several times."""
    seeds: int = operational(1)
    """Runs of each model, with seeds SEED, SEED + 1, ...; may be raised later."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seeds >= 1, f"--seeds must be at least 1, not {self.seeds}")

    @property
    def targets(self) -> list[float]:
        """The costs to solve for; none means the paper's factors."""
        if self.target_flops is None:
            return []
        return list(self.target_flops) if isinstance(self.target_flops, list) else [self.target_flops]

    @property
    def name(self) -> str:
        """The study's folder name."""
        return self.run_name or f"study-{self.dataset}"


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a checkpoint: loss, top-1, top-5, accuracy by class (CSV) and the confusion matrix (PNG)."""

    checkpoint: str
    """Checkpoint to evaluate, e.g. results/RUN/last.pt."""
    data_dir: str | None = None
    """Folder with the data set; default the one the run was trained from."""
    split: Literal["test", "val", "train"] = "test"
    """Images to evaluate on; val is what the run held out."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which weights; auto is the moving average where the run kept one."""
    batch_size: int = 256
    """Images per forward pass."""
    limit_eval: int | None = None
    """Evaluate on only this many images (stratified, seeded)."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] | bool = "auto"
    """Autocast type; auto is bf16 on CUDA and no on the CPU. The bare flag is bf16."""
    loader: LoaderName = "auto"
    """Data path; auto takes what was recorded as faster on the device, else DALI where it can be imported."""
    num_workers: int = 8
    """Threads of DALI or processes of the torch loader, capped to the machine's cores."""
    device: DeviceName = "auto"
    """auto takes CUDA where there is a GPU."""
    output_dir: str | None = None
    """Folder for the CSV and the PNG; default the checkpoint's own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixed_precision", _precision(self.mixed_precision))
        _require(self.batch_size >= 1, f"--batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class PredictConfig:
    """Classify an image, or every image of a folder: the most probable classes with their names."""

    checkpoint: str
    """Checkpoint of a run, e.g. results/RUN/best.pt, or a .safetensors export."""
    images: list[str]
    """Image files, or folders of them."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which weights of a checkpoint; auto is the moving average where the run kept one."""
    top: int = 5
    """Classes to tell of each image."""
    batch_size: int = 64
    """Images per forward pass."""
    output: str | None = None
    """Table to write, .csv or .json."""
    device: DeviceName = "auto"
    """auto takes CUDA where there is a GPU."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        _require(
            self.output is None or self.output.endswith((".csv", ".json")),
            f"--output must end in .csv or .json, not {self.output}",
        )


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint's model for use elsewhere: safetensors, ONNX or torch.export."""

    checkpoint: str
    """Checkpoint to export, e.g. results/RUN/best.pt."""
    format: Literal["safetensors", "onnx", "torch-export"] = "safetensors"
    """safetensors holds the weights; onnx and torch-export (.pt2) the computation too, for any batch size."""
    output: str | None = None
    """File to write; default the checkpoint's path with .safetensors, .onnx or .pt2."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which weights; auto is the moving average where the run kept one."""
    fold_batchnorm: bool = False
    """Fold BatchNorm into the convolutions before it: fewer operations, the same logits, no further training."""


@dataclass(frozen=True)
class PlotConfig:
    """Draw the curves of one or several runs over each other."""

    runs: list[str]
    """Folders of runs."""
    output: str | None = None
    """Picture to write (.png, .svg or .pdf); default curves.png in the first run's folder."""


@dataclass(frozen=True)
class InfoConfig:
    """Print a model's parameters, MACs, FLOPs, activations, final map and memory."""

    model: str = "efficientnet-b0"
    """Architecture: efficientnet-b0 to efficientnet-b7, resnet50, resnet152 or densenet201."""
    num_classes: int = 100
    """Classes of the head."""
    width: float | None = None
    """Multiplier of the baseline's channels; default the variant's own."""
    depth: float | None = None
    """Multiplier of the baseline's repeats; default the variant's own."""
    image_size: Literal["auto"] | int = "auto"
    """Pixels; auto scales 32 px by the variant's resolution ratio."""
    output_stride: Literal[4, 8, 16, 32] | None = None
    """Input pixels per pixel of the final map; default 8 below 128 px and 32 from there on. ResNet and DenseNet: 8 (a
    stem without strides) up to 64 px, 32 above."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class CamConfig:
    """Show where models look: class activation maps side by side, in pictures, numbers and a gallery."""

    images_path: str
    """Folder of images, or one image; the name of an image's folder is its true class unless --labels says so."""
    output_path: str = dataclasses.field(metadata={"operational": True})
    """Folder for pictures, tables and the gallery; a second run skips what is done."""
    checkpoints: str | None = operational(None)
    """Folder of a scaling study, folder of a run (its last.pt), or one checkpoint."""
    run: list[str] | None = operational(None)
    """NAME=PATH of a further checkpoint or run's folder, under that name; may be repeated."""
    seed: int | None = operational(None)
    """Which seed's runs of a study; default the lowest of each model."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which weights; auto is the moving average where the run kept one."""

    method: Literal["grad-cam", "cam", "integrated-gradients", "occlusion", "guided-grad-cam"] = "grad-cam"
    """How a map is made; cam is exact for a linear classifier on a pooled map, guided-grad-cam needs ReLU."""
    layer: str | None = None
    """Module whose output Grad-CAM takes, e.g. stages.5; default what the global pooling sees."""
    target: str = "predicted"
    """Class whose evidence is shown: predicted (by each model), true, or a class name."""
    labels: str | None = None
    """CSV with the columns image,class: true classes of images, named below IMAGES_PATH."""

    infidelity: bool = False
    """Compute Captum's infidelity too (slow)."""
    sensitivity: bool = False
    """Compute Captum's sensitivity_max too (slow)."""
    curve_steps: int = 20
    """Steps of the deletion and insertion curves."""

    colormap: str = "jet"
    """Any colour map of matplotlib; jet is the paper's blue to red."""
    opacity: float = 0.5
    """Of the maps over the images (0 to 1)."""
    format: Literal["png", "svg", "pdf"] = "png"
    """Of the pictures."""
    gallery_images: int = operational(500)
    """Most images in the HTML gallery, spread evenly over all; the tables and pictures have them all."""

    batch_size: int = operational(8)
    """Images computed at a time, and rows of a grid."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] | bool = "no"
    """Autocast type; no is float32, auto is bf16 on CUDA. The bare flag is bf16."""
    device: DeviceName = operational("auto")
    """auto takes CUDA where there is a GPU."""
    resume: Literal["auto", "no"] | bool = operational("auto")
    """auto goes on where the folder's run was; no clears what that run left and starts afresh."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixed_precision", _precision(self.mixed_precision))
        object.__setattr__(self, "resume", _WORDS.get(self.resume, self.resume))
        for name in ("batch_size", "gallery_images", "curve_steps"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        _require(0 <= self.opacity <= 1, f"--opacity must be from 0 to 1, not {self.opacity}")
        _require(self.resume in ("auto", "no"), f"--resume must be auto or no, not {self.resume}")
        _require(
            bool(self.checkpoints or self.run),
            "no model is named: use --checkpoints (a study, a run or a checkpoint) or --run NAME=PATH",
        )


@dataclass(frozen=True)
class DataConfig:
    """Download, verify and describe a data set, and write a sheet of sample images."""

    dataset: DatasetName = "cifar100"
    """Data set."""
    data_dir: str = "data"
    """Folder with the data set, or where it is downloaded to."""
    output: str | None = None
    """Sample sheet to write (PNG); default DATA_DIR/DATASET-samples.png."""
    export: str | None = None
    """Folder for test images as PNG files, CLASS/NUMBER.png; default none are written."""
    export_images: int = 100
    """Test images to export (stratified, seeded); needs --export."""


def _precision(value: str | bool) -> str:
    word = _WORDS.get(value, value)
    return "bf16" if word == "yes" else str(word)


def identity(config: TrainConfig | CamConfig) -> dict[str, Any]:
    """The fields that decide what a run computes: two runs that differ in one must not share a folder."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.metadata.get("operational")
    }
