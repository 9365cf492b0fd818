"""Checks of this machine: what is installed, whether it works together, and whether it computes the right values."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from effnet_fast import provenance
from effnet_fast.config import LoaderKind
from effnet_fast.data import ArraySplit
from effnet_fast.data.augment_params import Augment
from effnet_fast.data.choose_loader import make_loader
from effnet_fast.data.loader import LoaderSpec
from effnet_fast.distributed import World
from effnet_fast.faults import is_out_of_memory
from effnet_fast.model.blocks import ConvNormAct, Kernels, MBConv, Style, ahead
from effnet_fast.precision import autocast, resolve_precision
from effnet_fast.run.machine import Answer, Status, check_disk, check_fonts, check_shared_memory, check_speed
from effnet_fast.train.evaluate import evaluating
from effnet_fast.train.optim import make_optimizer
from effnet_fast.train.step import Step, StepOptions

# Builds of DALI; each needs the driver of its CUDA version.
DALI_BUILDS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")

# Oldest NVIDIA driver for each major version of CUDA (NVIDIA, CUDA compatibility, minor version compatibility).
OLDEST_DRIVER = {12: 525, 13: 580}
WHEELS = {13: "cu130", 12: "cu126"}  # torch's, by major version of CUDA, newest first

# Inputs, outputs, kernel, stride, expansion: both kernel sizes and strides, with and without expansion and residual.
# The last one has a gate of more than 256 channels, which needs one more kernel.
BLOCKS = ((16, 16, 3, 1, 6), (16, 24, 5, 2, 6), (24, 24, 5, 1, 6), (8, 12, 3, 2, 1), (48, 48, 3, 1, 6))
TOLERANCE = 1e-4  # relative RMS of a block's output and gradients in float32 against float64
# Relative RMS of layers against PyTorch's operators in the same precision; measured on a CPU: 0.05 and 6e-5.
LAYERS_TOLERANCE = {"bf16": 0.2, "no": 1e-3}


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: what was checked.
        status: ok; absent, if something optional is missing; broken, if the user should act.
        detail: what was found, and what to do if it is broken.
    """

    name: str
    status: Status
    detail: str


def run_check(name: str, device: torch.device) -> tuple[Check, bool]:
    """Run one check; if it raises, the result is broken. Also returns whether the result will hold."""
    try:
        return Check(name, *CHECKS[name](device)), True
    except Exception as error:  # any failure is a finding, not the end of the report
        reason = f"the check {name} failed ({type(error).__name__}: {_first_line(error)})"
        return Check(name, "broken", reason), not is_out_of_memory(error)  # another process may fill the GPU


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def check_gpu(device: torch.device) -> Answer:
    driver, cuda = provenance.driver(), torch.version.cuda
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return "ok", (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, driver {driver}, CUDA {cuda}"
        )
    if driver is None:
        return "absent", "no NVIDIA driver; everything runs on the CPU"
    wheels = _wheels_for(driver)
    if cuda is None:
        advice = (
            f"torch's {wheels} wheels" if wheels else f"driver {OLDEST_DRIVER[12]} or newer, then torch's cu126 wheels"
        )
        return "broken", f"driver {driver} is installed, but this torch is a CPU build: install {advice}"
    needed = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < needed:
        advice = f"driver {needed} or newer" + (f", or torch's {wheels} wheels" if wheels else "")
        return "broken", f"driver {driver} is too old for torch's CUDA {cuda}, so torch sees no GPU: install {advice}"
    if torch.cuda.is_available():
        return "ok", f"driver {driver}, CUDA {cuda}; not used (--device cpu)"
    return "broken", f"driver {driver} is installed, but torch sees no GPU: check CUDA_VISIBLE_DEVICES and nvidia-smi"


def _wheels_for(driver: str) -> str | None:
    """The newest kind of torch's wheels that a driver can run."""
    major = int(driver.partition(".")[0])
    return next((kind for cuda, kind in WHEELS.items() if major >= OLDEST_DRIVER[cuda]), None)


def check_torch(device: torch.device) -> Answer:
    return "ok", f"torch {torch.__version__}, {provenance.cores()} cores, {torch.get_num_threads()} threads"


def check_triton(device: torch.device) -> Answer:
    triton = provenance.version("triton")
    if triton is None:
        return ("broken" if device.type == "cuda" else "absent"), "Triton is not installed: pip install triton"
    wanted = [r.partition(";")[0] for r in metadata.requires("torch") or [] if r.startswith("triton")]
    exact = [r.partition("==")[2].strip() for r in wanted if "==" in r]
    if exact and triton not in exact:
        return (
            "broken",
            f"torch {torch.__version__} needs Triton {exact[0]}: pip install triton=={exact[0]} (not {triton})",
        )
    return "ok", f"Triton {triton}" + ("" if device.type == "cuda" else "; its kernels need a GPU")


def check_dali(device: torch.device) -> Answer:
    """Compare an augmented batch of DALI with the resident loader's, in levels 0 to 255."""
    builds = {name: version for name in DALI_BUILDS if (version := provenance.version(name))}
    if not builds:
        return "absent", "DALI is not installed: pip install nvidia-dali-cuda120"
    if len(builds) > 1:
        return "broken", (
            f"{' and '.join(builds)} share a folder, so one overwrites the other: pip uninstall {' '.join(builds)}, "
            "then install one of them"
        )
    (version,) = builds.values()
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    split = ArraySplit(images, np.arange(16, dtype=np.int64))
    spec = LoaderSpec(
        batch_size=8,
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        device=device,
        dtype=torch.float16 if device.type == "cuda" else torch.float32,  # as in training
        seed=0,
        rank=0,
        world=1,
        num_workers=1,
        augment=Augment(color_jitter=0.2, random_erasing=0.5),
    )
    batches = []
    kinds: tuple[LoaderKind, ...] = ("dali", "resident")
    for kind in kinds:
        loader = make_loader(kind, split, spec)
        batches.append(next(iter(loader.epoch(0)))[0].float())
        loader.close()
    difference = (batches[0] - batches[1]).abs().max().item() * 0.25 * 255
    if not difference <= 2:  # NaN too
        return "broken", f"DALI {version} differs from --loader resident by {difference:.0f} of 255: use that one"
    return "ok", f"DALI {version} equals --loader resident within {difference:.1f} of 255"


def check_kernels(device: torch.device) -> Answer:
    return _check_blocks(device, "triton" if device.type == "cuda" else "auto", "use --kernels torch")


def check_products(device: torch.device) -> Answer:
    """Compare blocks whose 1x1 convolutions are Triton products too; `auto` does not choose them."""
    if device.type != "cuda":
        return "absent", "--kernels triton-block needs a GPU"
    return _check_blocks(device, "triton-block", "do not use --kernels triton-block")


def _check_blocks(device: torch.device, kernels: Kernels, advice: str) -> Answer:
    """Compare MBConv blocks in float32 with PyTorch's operators in float64, and layers in the precision of training."""
    if device.type == "cuda" and ahead.HAS_FAKES:
        from effnet_fast.run import cold_start  # whose cache this module's results share

        cold_start.compile_found(lambda: block_launches(device, kernels), device, say=True)
    errors = [block_error(device, kernels, *block) for block in BLOCKS]
    worst = torch.tensor([*errors, ends_error(device, kernels)]).max().item()  # NaN if any is
    if not worst <= TOLERANCE:
        return "broken", f"the relative error of a block, stem or head against float64 is {worst:.1e}: {advice}"
    error, precision = layers_error(device, kernels), resolve_precision("auto", device)
    if not error <= LAYERS_TOLERANCE[precision]:
        return (
            "broken",
            f"layers with --mixed_precision {precision} differ from PyTorch's operators by {error:.1e}: {advice}",
        )
    return "ok", (
        f"{len(BLOCKS)} MBConv blocks, a stem and a head equal float64 within {worst:.1e} "
        "(relative RMS, output and gradients)"
    )


def block_launches(device: torch.device, kernels: Kernels) -> list[ahead.Launch]:
    """The kernels that the comparisons start, to be compiled side by side.

    One after the other, they take a minute.
    """

    def step(_: object) -> None:
        with device:
            for inputs, *shape in BLOCKS:
                block = MBConv(inputs, *shape, style=Style(kernels=kernels))
                x = torch.randn(3, inputs, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
                block(x).sum().backward()
            _results(_Layers(kernels, block=False), _layers_images(device))
            _layers_results(_Layers(kernels), _layers_images(device), device)

    return ahead.recorded(step)


def block_error(
    device: torch.device, kernels: Kernels, inputs: int, outputs: int, kernel: int, stride: int, expand: int
) -> float:
    """Largest relative RMS error of an MBConv block's output and gradients in float32, against torch in float64."""
    return _exact_error(
        lambda which: MBConv(inputs, outputs, kernel, stride, expand, style=Style(kernels=which)),
        kernels,
        lambda: torch.randn(3, inputs, 9, 7, device=device).to(memory_format=torch.channels_last),
    )


def ends_error(device: torch.device, kernels: Kernels) -> float:
    """The same of the stem and head of `_Layers`. The draws of stochastic depth in its block depend on the dtype."""
    return _exact_error(lambda which: _Layers(which, block=False), kernels, lambda: _layers_images(device))


def _exact_error(make: Callable[[Kernels], nn.Module], kernels: Kernels, images: Callable[[], Tensor]) -> float:
    torch.manual_seed(0)
    module, exact, x = make(kernels), make("torch"), images()
    exact.load_state_dict(module.state_dict())
    module, exact = module.to(x.device), exact.to(x.device, torch.float64)
    with _without_tf32():
        return _largest_error(_results(module, x), _results(exact, x.double()))


def _largest_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative RMS difference of a result; NaN if any is."""
    pairs = zip(ours, exact, strict=True)
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs]).max().item()


class _Layers(nn.Module):
    """A stem, a block with stochastic depth and a head, which BLOCKS leave out: [N, 3, H, W] -> [N, 32]."""

    def __init__(self, kernels: Kernels, *, block: bool = True) -> None:
        super().__init__()
        style = Style(kernels=kernels)
        self.stem = ConvNormAct(3, 16, 3, 2, style=style)
        self.block = MBConv(16, 16, 3, 1, 6, style=style, drop_path=0.5) if block else nn.Identity()
        self.head = ConvNormAct(16, 32, 1, style=style)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.pooled(self.block(self.stem(x)))


def layers_error(device: torch.device, kernels: Kernels) -> float:
    """Largest relative RMS difference of `_Layers` to PyTorch's operators, in the precision that training takes."""
    torch.manual_seed(0)
    layers, exact = _Layers(kernels).to(device), _Layers("torch").to(device)
    exact.load_state_dict(layers.state_dict())
    images = _layers_images(device)
    return _largest_error(*(_layers_results(model, images, device) for model in (layers, exact)))


def _layers_images(device: torch.device) -> Tensor:
    """Large enough for several strips of the depthwise kernels."""
    return torch.randn(8, 3, 36, 36, device=device).contiguous(memory_format=torch.channels_last)


def _layers_results(layers: _Layers, images: Tensor, device: torch.device) -> list[Tensor]:
    """Output and gradients of a training pass, and the output of an evaluation."""
    torch.manual_seed(0)  # for stochastic depth
    with autocast(resolve_precision("auto", device), device):
        results = _results(layers, images)
        with evaluating(layers):
            return [*results, layers(images).double()]


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Matrix products and cuDNN's convolutions in full float32: TF32 has only 10 mantissa bits."""
    products = torch.backends.cuda.matmul.fp32_precision  # get_float32_matmul_precision raises if a user set this one
    cudnn = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    convolutions = cudnn.fp32_precision
    torch.set_float32_matmul_precision("highest")
    cudnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
        cudnn.fp32_precision = convolutions


def _results(block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    # A gradient that is constant over a channel would vanish in BatchNorm.
    y.backward(torch.arange(y.numel(), device=y.device).view(y.shape).sin().to(y.dtype))
    gradients = [p.grad for p in (x, *block.parameters()) if p.grad is not None]
    return [t.detach().double() for t in (y, *gradients)]


def check_graph(device: torch.device) -> Answer:
    """Compare three optimizer steps captured in a CUDA graph with the same steps in eager mode."""
    if device.type != "cuda":
        return "absent", "CUDA graphs need a GPU"
    eager, graph = (_train_three_steps(device, graph=graph) for graph in (False, True))
    error = ((graph - eager).norm() / eager.norm()).item()
    if not error <= 1e-3:
        return "broken", f"weights after 3 captured steps differ by {error:.1e} (relative RMS): use --step compile"
    return "ok", f"weights after 3 captured steps equal eager ones within {error:.1e} (relative RMS)"


def _train_three_steps(device: torch.device, graph: bool) -> Tensor:
    """The weights, flattened, of a block and a classifier after three steps on fixed batches."""
    torch.manual_seed(0)
    block = MBConv(16, 16, 3, 1, 6, style=Style())
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).to(device)
    optimizer = make_optimizer("sgd", model, momentum=0.9, weight_decay=0.0, layer_decay=1.0)
    options = StepOptions(learning_rate=0.01, graph=graph)
    step = Step(model, model, optimizer, lambda _: 1.0, options, World(0, 1, device))
    for number in range(3):
        images = torch.randn(8, 16, 9, 9, device=device).to(memory_format=torch.channels_last)
        step(images, torch.arange(8, device=device), number)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def check_ranks(device: torch.device) -> Answer:
    """Create a process group of one rank on the real backend and reduce a tensor."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        return "ok", f"{backend}: this process is a rank already"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            value = torch.ones(3, device=device)
            dist.all_reduce(value)
        finally:
            dist.destroy_process_group()
    return ("ok" if value.sum().item() == 3 else "broken"), f"{backend}: one rank joins and reduces"


CHECKS: dict[str, Callable[[torch.device], Answer]] = {
    "gpu": check_gpu,
    "torch": check_torch,
    "triton": check_triton,
    "kernels": check_kernels,
    "products": check_products,
    "graph": check_graph,
    "dali": check_dali,
    "ranks": check_ranks,
    "speed": check_speed,
    "disk": check_disk,
    "shared memory": check_shared_memory,
    "fonts": check_fonts,
}
