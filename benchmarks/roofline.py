"""A lower bound on the time of a training step: `python benchmarks/roofline.py [--chip h100] [--measure]`.

Computed from the model's shapes: the least bytes and FLOPs of a step, fused as in effnet_kernels (kernels/README.md),
their time at a chip's copy bandwidth and matrix rate, and the share of that speed that a measured step reaches. Without
`--chip` bandwidth and rate are measured here; with it they come from the data sheet, and no GPU is needed.

Passes over maps, forward and backward together; a pass reads or writes N * C * H * W elements once. On a GPU:
- expansion (1x1): x read, e written; de and x read again for the weight, de read for the input, dx written: 3 x + 3 e
- between the 1x1 convolutions, by the mbconv op: 7 e + 10 d; without expansion 3 e + 10 d
- projection (1x1): 3 d + 3 p; its BatchNorm, with the residual: 8 p, and 1 p more
On a CPU a block is one op (kernels/effnet_kernels/cpu/README.md): 3 x + 6 e + 7 d + 7 p, with
  the residual 1 p more, without expansion 3 e.
On both:
- head: as an expansion, then BatchNorm, Swish and the mean, which writes no map: 2 forward, 4 backward
- stem: 2 x (its input has no gradient) + 3 y, then BatchNorm and Swish: 3 forward, 5 backward
Weights: float32, read forward and backward, gradient written, and five passes of SGD with momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Case

from effnet_fast import create_model
from effnet_fast.model.blocks import ConvNormAct, MBConv
from effnet_fast.model.efficientnet import EfficientNet

WEIGHT_BYTES = 8 * 4  # of one parameter in a step
HEAD_NORM = 6
STEM_NORM = 8


@dataclass(frozen=True)
class Passes:
    """Passes of a block over the maps before (e) and after (d) the depthwise convolution, and after the projection."""

    e: int
    d: int
    projected: int


PASSES = {"cuda": Passes(10, 13, 11), "cpu": Passes(6, 7, 7)}


@dataclass(frozen=True)
class Chip:
    """Data-sheet figures: GB/s of memory, dense FLOP/s in bf16 and in TF32."""

    bandwidth: float
    bf16: float
    tf32: float


# NVIDIA A100 Tensor Core GPU data sheet (2021; SXM), H100 (2022; SXM5), H200 (2024; SXM); dense, without sparsity.
CHIPS = {
    "a100-40": Chip(1555, 312e12, 156e12),
    "a100-80": Chip(2039, 312e12, 156e12),
    "h100": Chip(3350, 989e12, 494.5e12),
    "h200": Chip(4800, 989e12, 494.5e12),
}


@dataclass(frozen=True)
class Layer:
    """Least bytes and FLOPs of a layer in a training step."""

    name: str
    bytes: float
    flops: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The longer of memory and arithmetic, which may overlap."""
        return max(self.bytes / (bandwidth * 1e9), self.flops / rate)


def layers(model: EfficientNet, case: Case, device: str = "cuda") -> list[Layer]:
    """The layers of a training step in order, from the shapes of a forward pass on the meta device.

    Args:
        device: cuda or cpu, whose kernels' passes are counted.
    """
    meta_model = model.to("meta").train()
    shapes: dict[int, tuple[int, int]] = {}  # of a convolution: values read and written, for the whole batch

    def note(conv: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        shapes[id(conv)] = inputs[0].numel(), output.numel()

    for module in meta_model.modules():
        if isinstance(module, ConvNormAct):
            module.conv.register_forward_hook(note)
    meta_model(torch.zeros(case.batch_size, 3, case.image_size, case.image_size, device="meta"))
    width = getattr(torch, case.dtype).itemsize
    result = [_stem(meta_model.stem, shapes, width)]
    for i, stage in enumerate(meta_model.stages):
        for j, block in enumerate(stage):
            result.append(_block(f"stage {i + 1}.{j + 1}", block, shapes, width, PASSES[device]))
    result.append(_head(meta_model, shapes, width, case.batch_size))
    return result


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters()) * WEIGHT_BYTES


def _flops(layer: ConvNormAct, shapes: dict, passes: int = 3) -> float:
    """Two per multiply-accumulate; forward, and the gradients of input and weight."""
    conv = layer.conv
    per_value = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
    return passes * 2 * shapes[id(conv)][1] * per_value


def _stem(stem: ConvNormAct, shapes: dict, width: int) -> Layer:
    x, y = shapes[id(stem.conv)]
    passes = 2 * x + (2 + STEM_NORM) * y
    return Layer("stem", passes * width + _parameters(stem), _flops(stem, shapes, passes=2))


def _block(name: str, block: MBConv, shapes: dict, width: int, count: Passes) -> Layer:
    e, d = shapes[id(block.depthwise.conv)]
    projected = shapes[id(block.project.conv)][1]
    passes = count.d * d + (count.projected + block.residual) * projected
    flops = _flops(block.depthwise, shapes) + _flops(block.project, shapes)
    if isinstance(block.expand, ConvNormAct):
        passes += 3 * shapes[id(block.expand.conv)][0] + count.e * e
        flops += _flops(block.expand, shapes)
    else:
        passes += 3 * e  # x read forward and backward, dx written
    return Layer(name, passes * width + _parameters(block), flops)


def _head(model: EfficientNet, shapes: dict, width: int, batch: int) -> Layer:
    x, y = shapes[id(model.head.conv)]
    linear = 3 * 2 * batch * model.classifier.in_features * model.classifier.out_features
    passes = 3 * x + (3 + HEAD_NORM) * y
    moved = passes * width + _parameters(model.head) + _parameters(model.classifier)
    return Layer("head", moved, _flops(model.head, shapes) + linear)


def rows_of(found: list[Layer], bandwidth: float, rate: float) -> list[dict]:
    """A row per layer and one for all: MB, GFLOP, least microseconds, and what bounds them."""
    rows = []
    for layer in [*found, Layer("all", sum(x.bytes for x in found), sum(x.flops for x in found))]:
        seconds = layer.seconds(bandwidth, rate) if layer.name != "all" else bound(found, bandwidth, rate)
        rows.append(
            {
                "layer": layer.name,
                "MB": round(layer.bytes / 1e6, 3),
                "GFLOP": round(layer.flops / 1e9, 4),
                "FLOP/byte": round(layer.flops / layer.bytes, 1),
                "least us": round(seconds * 1e6, 2),
                "bound by": "memory" if layer.bytes / (bandwidth * 1e9) >= layer.flops / rate else "arithmetic",
            }
        )
    return rows


def bound(found: list[Layer], bandwidth: float, rate: float) -> float:
    """Least seconds of the step: layers run one after the other, so their times add up."""
    return sum(layer.seconds(bandwidth, rate) for layer in found)


def picture(path: Path, rows: list[dict], title: str) -> None:
    """Draw each layer's least time, coloured by what bounds it."""
    from matplotlib.figure import Figure

    rows = rows[:-1]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for what, colour in (("memory", "tab:blue"), ("arithmetic", "tab:orange")):
        bounded = [row for row in rows if row["bound by"] == what]
        if bounded:
            axes.bar([row["layer"] for row in bounded], [row["least us"] for row in bounded], color=colour, label=what)
    axes.set_xticks(range(len(rows)), [row["layer"] for row in rows], rotation=60, ha="right")
    axes.set_ylabel("least time, us")
    axes.set_title(title, fontsize=10)
    axes.legend(title="bound by")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"written: {path}")


def rates(chip: str | None, dtype: str) -> tuple[str, float, float]:
    """Source, GB/s and FLOP/s: of a data sheet, or measured here."""
    if chip is None:
        return f"measured on this {harness.DEVICE}", harness.copy_bandwidth(), harness.matrix_rate(dtype)
    sheet = CHIPS[chip]
    return f"{chip}, data sheet", sheet.bandwidth, sheet.tf32 if dtype == "float32" else sheet.bf16


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--chip", choices=CHIPS, help="data-sheet figures instead of measured ones")
    parser.add_argument("--step-ms", type=float, help="milliseconds of a measured step")
    parser.add_argument("--measure", action="store_true", help="measure the step here")
    parser.add_argument("--step", choices=harness.MODES, default="eager", help="mode of the step that is measured")
    parser.add_argument("--picture", type=Path, help="write bars per layer (.png, .svg or .pdf)")
    args = parser.parse_args(argv)
    if args.measure and args.chip:
        raise ValueError("--measure measures this machine, which a data sheet does not describe: leave --chip out")
    if args.step_ms is not None and args.step_ms <= 0:
        raise ValueError(f"--step-ms must be above 0, not {args.step_ms:g}")
    case = harness.case_of(args)
    source, bandwidth, rate = rates(args.chip, args.dtype)
    model = create_model(case.model, case.num_classes, case.image_size, case.output_stride)
    if not isinstance(model, EfficientNet):
        raise ValueError(f"--model {case.model}: the roofline is that of EfficientNet's blocks; name one of those")
    step_layers = layers(model, case, "cuda" if args.chip else harness.DEVICE)
    rows = rows_of(step_layers, bandwidth, rate)
    least = bound(step_layers, bandwidth, rate)
    header = f"{case}; {source}: {bandwidth:.0f} GB/s, {rate / 1e12:.2f} TFLOP/s"
    print(f"{header}\n{harness.table(rows)}")
    print(f"a step takes at least {least * 1e3:.4g} ms: at most {case.batch_size / least:,.0f} img/s")
    reached = None
    step_ms = args.step_ms
    if args.measure:
        call = harness.make_step(case, args.step)
        batch = harness.make_batch(case)
        times = harness.alternating({"step": lambda: call(*batch, 0)}, 10, 3, harness.INNER)
        step_ms = harness.quantiles(times["step"])[1]
    if step_ms:
        reached = least * 1e3 / step_ms
        print(f"a measured step takes {step_ms:.2f} ms: {reached:.1%} of the bound's speed")
    if args.picture:
        picture(args.picture, rows, header)
    settings = harness.settings_of(
        case, rates=source, bandwidth_GBs=bandwidth, flops=rate, least_ms=least * 1e3, step_ms=step_ms, reached=reached
    )
    harness.write(args.out, harness.result("roofline", settings, rows))


if __name__ == "__main__":
    harness.run(main)
