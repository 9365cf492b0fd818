"""Compile the launches that the heuristics choose, without a GPU: `python op_launches.py ARCH DTYPE [MODEL...]`.

Meta tensors with a model's shapes go through the launchers, while `launch.launches_go_to` records the launches instead
of starting them. Each distinct launch is compiled for the architecture, and its resources are printed as one JSON
object per line. The tests run this script in a process without TRITON_INTERPRET: the interpreter compiles nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effnet_fast.model import scaling
from effnet_kernels import batch_norm, block, bn_silu_squeeze, gate_mlp, launch, mbconv, silu

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def blocks(model: int, size: int | None = None, output_stride: int = 32) -> list[tuple[int, ...]]:
    """Distinct MBConv blocks of a B0..B7 as (input channels, output channels, map size, kernel, stride, expansion).

    `size` is the image size; default the model's own.
    """
    variant = scaling.VARIANTS[f"efficientnet-b{model}"]
    layout = scaling.layout(variant.width, variant.depth, output_stride)
    size = -(-(size or scaling.scaled_size(scaling.BASE_RESOLUTION, variant.resolution)) // layout.stem_stride)
    inputs, result = layout.stem_channels, []
    for stage in layout.stages:
        for stride in [stage.stride] + [1] * (stage.repeats - 1):
            result.append((inputs, stage.channels, size, stage.kernel, stride, stage.expand))
            inputs, size = stage.channels, -(-size // stride)
    return list(dict.fromkeys(result))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.empty(shape, device="meta", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def block_step(n: int, block: tuple[int, ...], dtype: torch.dtype) -> None:
    """Launch all kernels of one training step of a block: mbconv, and the projection's BatchNorm with its residual."""
    inputs, outputs, size, k, stride, expansion = block
    c, r, pad = inputs * expansion, max(1, inputs // 4), [k // 2] * 4
    x, w = meta(n, c, size, size, dtype=dtype), meta(c, 1, k, k)
    se = [meta(r, c, 1, 1), meta(r), meta(c, r, 1, 1), meta(c)]
    first = (None, None) if expansion == 1 else (meta(c), meta(c))
    second = (meta(c), meta(c))
    y, d, *saved = mbconv._mbconv._init_fn(x, *first, w, *second, *se, stride, pad, 1e-3, False)
    mbconv._mbconv_backward._init_fn(y, x, d, *first, w, *second, se, saved, stride, pad, False)
    p, affine = meta(n, outputs, *y.shape[2:], dtype=dtype), (meta(outputs), meta(outputs))
    z, stats = batch_norm._batch_norm._init_fn(p, *affine, p, meta(n, dtype=dtype), False, 1e-3, False)
    batch_norm._batch_norm_backward._init_fn(z, p, stats, *affine, meta(n, dtype=dtype), False, False)


def whole_block_step(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Launch all kernels of one training step of a block as one op, its 1x1 convolutions included."""
    inputs, outputs, size, k, stride, expansion = shape
    c, r, pad = inputs * expansion, max(1, inputs // 4), [k // 2] * 4
    x, scale = meta(n, inputs, size, size, dtype=dtype), meta(n, dtype=dtype)
    expand = [] if expansion == 1 else [meta(c, inputs, 1, 1), meta(c), meta(c)]
    layers = expand, [meta(c, 1, k, k), meta(c), meta(c)], [meta(r, c, 1, 1), meta(r), meta(c, r, 1, 1), meta(c)]
    layers += ([meta(outputs, c, 1, 1), meta(outputs), meta(outputs)],)
    residual = stride == 1 and inputs == outputs
    y, *saved = block._block._init_fn(x, *layers, scale, residual, stride, pad, 1e-3, False)
    block._block_backward._init_fn(y, x, *layers, saved, scale, residual, stride, pad, False)


def wide_gate_step(n: int) -> None:
    """Launch the kernels of a gate of 480 channels, in both directions: its products are split into spans."""
    c, r = 480, 20
    se = gate_mlp.SqueezeExcite(meta(r, c, 1, 1), meta(r), meta(c, r, 1, 1), meta(c))
    gate, hidden = gate_mlp.gate_forward(meta(n, c), se)
    gate_mlp.gate_backward(meta(5, n, c), gate, meta(n, c), hidden, se, 64)


def ends_step(n: int, model: int, size: int, dtype: torch.dtype) -> None:
    """Launch all kernels outside the blocks: the stem's BatchNorm with Swish, the head's with the mean, Swish alone."""
    variant = scaling.VARIANTS[f"efficientnet-b{model}"]
    stem, head = (scaling.round_channels(base, variant.width) for base in (32, scaling.HEAD_CHANNELS))
    x, affine = meta(n, stem, size // 2, size // 2, dtype=dtype), (meta(stem), meta(stem))
    y, stats = batch_norm._batch_norm._init_fn(x, *affine, None, None, True, 1e-3, False)
    batch_norm._batch_norm_backward._init_fn(y, x, stats, *affine, None, True, False)
    x, affine = meta(n, head, size // 32, size // 32, dtype=dtype), (meta(head), meta(head))
    pool, stats = bn_silu_squeeze._bn_silu_squeeze._init_fn(x, *affine, 1e-3, False)
    bn_silu_squeeze._bn_silu_squeeze_backward._init_fn(pool, x, stats, *affine, False)
    silu._silu_backward._init_fn(silu._silu._init_fn(x), x)


def record(function, *args) -> list[tuple]:
    """(kernel, grid, arguments, constants) of every launch that `function(*args)` makes."""
    launches = []
    with launch.launches_go_to(lambda op, kernel, grid, *a, **k: launches.append((kernel, grid, a, k))):
        function(*args)
    return launches


def source(kernel, args, constants) -> tuple[ASTSource, dict]:
    """Specialise a launch as Triton's runtime does: types, constants, divisibility by 16, integers equal to 1."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature, values, hints = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not kernel.params[i].do_not_specialize:
            signature[name], values[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or not (kernel.params[i].do_not_specialize or value % 16):
            hints[(i,)] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        signature[name], values[(kernel.arg_names.index(name),)] = "constexpr", value
    signature = {name: signature[name] for name in kernel.arg_names}
    return ASTSource(kernel, signature, constexprs=values, attrs=hints), options


def innermost_loops(listing: str) -> list[list[str]]:
    """Instructions of each loop without an inner loop, from nvdisasm's output."""
    labels, jumps, instructions = {}, [], []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s*(.*)", line):
            if jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line):
                jumps.append((len(instructions), jump[1]))
            instructions.append(instruction[1])
    loops = {(labels[target], end) for end, target in jumps if labels.get(target, len(instructions)) < end}
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [instructions[start : end + 1] for start, end in sorted(inner)]


def longest_loop(listing: str) -> int:
    """Number of instructions in the longest innermost loop; 0 without a loop."""
    return max(map(len, innermost_loops(listing)), default=0)


def late_loads(listing: str) -> int:
    """Number of global loads after a global store in an innermost loop.

    A load cannot move above a store that it may alias, so it waits for the computation of the whole iteration.
    """
    late = 0
    for loop in innermost_loops(listing):
        stores = [i for i, line in enumerate(loop) if re.search(r"\bSTG\b", line)]
        late += sum(bool(re.search(r"\bLDG\b", line)) for line in loop[stores[0] :]) if stores else 0
    return late


def values_a_turn(constants: dict) -> float:
    """Values of the map that a thread processes in one loop iteration: of y in the depthwise forward kernel."""
    rows = constants.get("BLOCK_M", constants.get("BLOCK_P", 0))
    columns = constants.get("STRIP", 1) * (1 if "MOMENTS" in constants else constants.get("STRIDE", 1))
    return rows * constants.get("BLOCK_C", 0) / (32 * constants["num_warps"]) * columns


def resources(kernel, args, constants, arch: int) -> dict:
    """Compile a launch; return registers, spilled and shared bytes, instruction counts, access widths in bytes."""
    src, options = source(kernel, args, constants)
    compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = re.findall(r"\b(ld|st)\.global(?:\.[a-z]\w*(?:::\w+)?)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    widths = Counter(f"{op}{int(vector or 1) * int(bits) // 8}" for op, vector, bits in accesses)
    copies = re.findall(r"\bcp\.async\.\w+\.shared\.global\b[^;]*?\], (0x[0-9a-f]+|\d+)", compiled.asm["ptx"])
    widths.update(f"ld{int(size, 0)}" for size in copies)  # loads into shared memory
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", listing, re.MULTILINE))
    return {
        "registers": sizes["REG"],
        "spilled": sizes["STACK"] + sizes["LOCAL"],
        "shared": compiled.metadata.shared,
        "instructions": instructions,
        "loop": longest_loop(listing),
        "late_loads": late_loads(listing),
        "widths": dict(widths),
    }


def main(arch: int, dtype: torch.dtype, models: list[int]) -> None:
    """Print the resources of each distinct launch of the models, at their own image sizes and at 32 px.

    Without models: of two blocks of B0 at 32 px, and of the kernels around a wide gate.
    """
    if not models:
        steps = [(step, shape) for shape in blocks(0, 32, 8)[2:5:2] for step in (block_step, whole_block_step)]
        launches = [call for step, shape in steps for call in record(step, 512, shape, dtype)]
        launches += record(wide_gate_step, 512)
    else:
        launches = record(ends_step, 128, 0, 224, dtype)
    for model in models:
        for step in (block_step, whole_block_step):
            for shape in blocks(model):
                launches += record(step, 128, shape, dtype)
            for shape in blocks(model, 32, 8):
                launches += record(step, 512, shape, dtype)
    compiled = set()
    for kernel, _, args, constants in launches:
        src, options = source(kernel, args, constants)
        if (key := src.hash() + str(options)) in compiled:
            continue
        compiled.add(key)
        types = [str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)]
        header = {"kernel": kernel.__name__, "arch": arch, "type": types[0], "constants": constants}
        print(json.dumps(header | resources(kernel, args, constants, arch)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), [int(m) for m in sys.argv[3:]])
