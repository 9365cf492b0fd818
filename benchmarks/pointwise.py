"""Is a 1x1 convolution faster as a convolution or as a matrix product? `python benchmarks/pointwise.py [--out FILE]`.

For each distinct 1x1 convolution of EfficientNet-B0, channels last: y = x w, dx = dy w and dw = dy x, by torch's
convolution (on CUDA cuDNN's) and by a matrix product on the same memory (cuBLAS's). Reports milliseconds
(p20/p50/p80), GB/s of the least traffic, and its share of the copy bandwidth measured in the same run. Kernels are
replayed from a CUDA graph over rotating buffers. On the CPU the default is a batch of 2.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import DEVICE, PRECISIONS, copy_bandwidth, parser, replayed, result, rotations, run, table, write
from torch import Tensor

from effnet_fast import create_model
from effnet_fast.model.blocks import Conv
from effnet_fast.run.resolve import set_backends

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}  # float32: products in TF32


@dataclass(frozen=True)
class Layer:
    """A 1x1 convolution of x [n, inputs, size, size]."""

    n: int
    inputs: int
    outputs: int
    size: int

    def __str__(self) -> str:
        return f"{self.n}x{self.inputs}x{self.size}x{self.size} -> {self.outputs}"

    @property
    def bytes(self) -> int:
        """Least traffic of each of the three results, in elements."""
        return self.n * self.size**2 * (self.inputs + self.outputs) + self.inputs * self.outputs


def layers(batch: int, pixels: int) -> list[Layer]:
    """B0's distinct 1x1 convolutions, without those of squeeze-and-excitation, collected from the model."""
    model = create_model("efficientnet-b0", image_size=pixels, kernels="torch")
    seen: dict[Layer, None] = {}

    def note(conv: Conv, inputs: tuple[Tensor]) -> None:
        if conv.kernel_size == (1, 1) and inputs[0].shape[-1] > 1:
            seen[Layer(batch, conv.in_channels, conv.out_channels, inputs[0].shape[-1])] = None

    for module in model.modules():
        if isinstance(module, Conv):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, pixels, pixels))
    return list(seen)


@dataclass(frozen=True)
class Operands:
    """x, dy and w of a layer, channels last."""

    x: Tensor
    dy: Tensor
    w: Tensor

    @classmethod
    def of(cls, layer: Layer, dtype: torch.dtype) -> Operands:
        def map_of(channels: int) -> Tensor:
            x = torch.randn(layer.n, channels, layer.size, layer.size, device=DEVICE, dtype=dtype)
            return x.contiguous(memory_format=torch.channels_last)

        w = torch.randn(layer.outputs, layer.inputs, 1, 1, device=DEVICE, dtype=dtype) / layer.inputs**0.5
        return cls(map_of(layer.inputs), map_of(layer.outputs), w)

    def gradient(self, which: int) -> Tensor:
        mask = [i == which for i in range(3)]
        ones, zeros = [1, 1], [0, 0]
        arguments = (self.dy, self.x, self.w, None, ones, zeros, ones, False, zeros, 1, mask)
        return torch.ops.aten.convolution_backward(*arguments)[which]


def rows(x: Tensor) -> Tensor:
    """View [n, c, h, w], channels last, as [n h w, c]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


WAYS: dict[str, dict[str, Callable[[Operands], Tensor]]] = {
    "y": {
        "convolution": lambda b: torch.nn.functional.conv2d(b.x, b.w),
        "product": lambda b: rows(b.x) @ b.w.flatten(1).t(),
    },
    "dx": {"convolution": lambda b: b.gradient(0), "product": lambda b: rows(b.dy) @ b.w.flatten(1)},
    "dw": {"convolution": lambda b: b.gradient(1), "product": lambda b: rows(b.dy).t() @ rows(b.x)},
}


def as_rows(value: Tensor) -> Tensor:
    """A result of the convolution or of the product, as a matrix."""
    if value.dim() == 2:
        return value
    return value.flatten(1) if value.shape[-2:] == (1, 1) else rows(value)


def rows_of(layer: Layer, dtype: torch.dtype, bandwidth: float) -> Iterator[dict[str, Any]]:
    """One row per result (y, dx, dw) and way (convolution, product); without times if the two disagree."""
    size = layer.bytes * dtype.itemsize
    sets = [Operands.of(layer, dtype) for _ in range(rotations(size))]
    for what, ways in WAYS.items():
        one, other = (as_rows(way(sets[0])).float() for way in ways.values())
        error = ((one - other).norm() / other.norm()).item()
        for name, way in ways.items():
            row: dict[str, Any] = {"layer": str(layer), "result": what, "way": name, "error": error}
            if error <= TOLERANCE[dtype]:
                ms = replayed([lambda b=b, way=way: way(b) for b in sets], cpu_rounds=5)  # type: ignore[misc]
                rate = size / ms[1] / 1e6
                row |= {
                    "ms": tuple(round(t, 4) for t in ms),
                    "GB/s": round(rate, 1),
                    "share of copy": round(rate / bandwidth, 3),
                }
            yield row


def gain(rows: list[dict[str, Any]], what: str) -> str:
    """The convolution's time over the product's, as the geometric mean over the layers."""
    ms = {(row["layer"], row["way"]): row["ms"][1] for row in rows if row["result"] == what and "ms" in row}
    ratios = [ms[layer, "convolution"] / time for (layer, way), time in ms.items() if way == "product"]
    return f"{what}: {statistics.geometric_mean(ratios):.2f}" if ratios else f"{what}: no layer agreed"


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", choices=PRECISIONS, default="bfloat16" if DEVICE == "cuda" else "float32")
    options.add_argument("--batch-size", type=int, help="images; default 512 at 32 px and 128 at 224 px, on the CPU 2")
    options.add_argument("--limit", type=int, help="number of layers")
    args = options.parse_args(argv)
    set_backends(deterministic=False)
    dtype, bandwidth = getattr(torch, args.dtype), copy_bandwidth()
    if args.batch_size or DEVICE == "cpu":
        selected = layers(args.batch_size or 2, 32)
    else:
        selected = layers(512, 32) + layers(128, 224)
    settings = {"dtype": args.dtype, "copy_GBs": bandwidth}
    measured: list[dict[str, Any]] = []
    for layer in selected[: args.limit]:
        new = list(rows_of(layer, dtype, bandwidth))
        print(table(new), flush=True)
        measured += new
        write(args.out, result("pointwise", settings, measured), quiet=True)
        torch.cuda.empty_cache()
    print(f"convolution over product, geometric mean: {', '.join(gain(measured, what) for what in WAYS)}")
    write(args.out, result("pointwise", settings, measured))


if __name__ == "__main__":
    with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else contextlib.nullcontext():
        run(main)
