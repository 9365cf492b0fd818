"""Where a training step's time goes: `python benchmarks/step_profile.py [--trace FILE]`.

Profiles a few steps fed by a loader, with a range for each stage of the model, the step and the loader (NVTX too on
CUDA, so that Nsight shows them), and prints the top kernels (on the CPU: operators), the time by category, and on CUDA
the gaps between kernels. On the CPU categories go by the operators' own time, and the idle share is what no operator
took.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from effnet_fast.model import Network

# The first pattern found in a kernel's or operator's name decides. The names of effnet_kernels come first.
CATEGORIES = (
    (
        "optimizer",
        (
            "fused_sgd",
            "fused_adam",
            "FusedSgd",
            "FusedAdam",
            "multi_tensor",
            "FusedOptim",
            "foreach",
            "linalg_vector_norm",
            "lpnorm",
        ),
    ),
    ("gate", ("_squeeze_kernel", "_excite_kernel", "_gate", "_five_sums", "sigmoid", "aten::mean", "aten::mul")),
    ("depthwise", ("depthwise", "dwconv", "conv_depthwise", "_forward_kernel", "_backward_kernel")),
    ("normalisation", ("batch_norm", "_moments", "_merge", "_apply", "_grad", "bn_fw", "bn_bw", "batchnorm")),
    ("loader", ("loader", "Memcpy HtoD")),
    ("convolution", ("conv", "gemm", "cutlass", "cudnn", "nvjet", "xmma", "aten::mm", "aten::addmm")),
    ("activation", ("silu",)),
)


def category(name: str, shapes: list | None = None) -> str:
    """Of a kernel or operator; a convolution with weights [C, 1, k, k], k > 1 or not, is depthwise."""
    if "conv" in name and any(len(s) == 4 and s[1] == 1 and s[0] > 1 for s in (shapes or [])[1:3]):
        return "depthwise"
    return next((label for label, patterns in CATEGORIES if any(p in name for p in patterns)), "other")


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A named range, in the trace and, on CUDA, in NVTX."""
    with record_function(name):
        if harness.DEVICE == "cuda":
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if harness.DEVICE == "cuda":
                torch.cuda.nvtx.range_pop()


def mark_layers(model: Network) -> None:
    """Put a range around the forward pass of the stem, of every stage, and of what follows them."""
    for name, modules in model.layers().items():
        for module in modules:
            inner = module.forward

            def forward(*inputs, inner=inner, name=name):
                with span(name):
                    return inner(*inputs)

            module.forward = forward  # type: ignore[method-assign]


def profiled(case: harness.Case, mode: str, kind: str, steps: int) -> tuple[profile, float]:
    """The profile of some steps, and their wall time in ms."""
    step = harness.make_step(case, mode)
    if mode == "eager":  # a compiled model's stages melt into one another
        mark_layers(step.module)  # type: ignore[arg-type]
    loader, batches = harness.make_batches(case, kind, 2)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if harness.DEVICE == "cuda" else [])

    def once() -> None:
        with span("loader"):
            batch = next(batches)
        with span("step"):
            step(*batch, 0)

    for _ in range(3):
        once()
    harness.synchronise()
    with profile(activities=activities, record_shapes=True) as prof:
        begin = time.perf_counter()
        for _ in range(steps):
            once()
        harness.synchronise()
        wall = (time.perf_counter() - begin) * 1e3
    loader.close()
    return prof, wall


def kernels_of(prof: profile) -> list[tuple[str, str, float, float]]:
    """(name, category, start us, us) of everything that took time on the device, in order."""
    found = []
    for event in prof.events():
        if event.is_user_annotation:  # a range of `span`, on the device's time line too
            continue
        if harness.DEVICE == "cuda":
            if event.device_type == DeviceType.CUDA:
                label = category(event.name)
                found.append((event.name, label, event.time_range.start, event.time_range.elapsed_us()))
        elif event.self_cpu_time_total > 0:
            label = _category_by_range(event) or category(event.name, event.input_shapes)
            found.append((event.name, label, event.time_range.start, event.self_cpu_time_total))
    return sorted(found, key=lambda kernel: kernel[2])


def _category_by_range(event) -> str | None:
    """The loader's and the optimizer's operators are theirs whatever they do."""
    while event is not None:
        if event.name == "loader":
            return "loader"
        if event.name.startswith("Optimizer."):
            return "optimizer"
        event = event.cpu_parent
    return None


def by_category(kernels: list, wall_ms: float) -> list[dict]:
    """ms and share of the wall time, largest first; idle is what is left."""
    spent: Counter[str] = Counter()
    for _, label, _, us in kernels:
        spent[label] += us / 1e3
    spent["idle"] = max(wall_ms - spent.total(), 0.0)
    return [
        {"category": label, "ms": round(ms, 3), "share": round(ms / wall_ms, 4)} for label, ms in spent.most_common()
    ]


def top(kernels: list, count: int) -> list[dict]:
    """The names that took most time."""
    spent: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for name, label, _, us in kernels:
        spent[name, label] += us / 1e3
        calls[name, label] += 1
    return [
        {"kernel": key[0][:80], "category": key[1], "calls": calls[key], "ms": round(ms, 3)}
        for key, ms in spent.most_common(count)
    ]


def gaps(kernels: list) -> dict[str, float]:
    """Time between the end of a kernel and the start of the next, in us: how many, in all, p50, p80, longest."""
    end, found = kernels[0][2] + kernels[0][3], []
    for _, _, start, us in kernels[1:]:
        if start > end:
            found.append(start - end)
        end = max(end, start + us)
    _, middle, high = harness.quantiles(found or [0.0])
    return {
        "gaps": len(found),
        "in all us": sum(found),
        "p50 us": middle,
        "p80 us": high,
        "longest us": max(found or [0]),
    }


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--step", choices=harness.MODES, default="eager")
    parser.add_argument("--loader", choices=("dali", "resident", "torch"), default="resident")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--top", type=int, default=15, help="kernels to list")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace (JSON)")
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    print(f"{case}, {args.step}, loader {args.loader}\n{harness.warning()}".rstrip())
    prof, wall = profiled(case, args.step, args.loader, args.steps)
    kernels = kernels_of(prof)
    categories, most = by_category(kernels, wall), top(kernels, args.top)
    print(f"\n{args.steps} steps in {wall:.1f} ms (profiled, hence slower than usual)\n\n{harness.table(categories)}")
    print(f"\n{harness.table(most)}\n")
    between = gaps(kernels) if harness.DEVICE == "cuda" else None
    print("gaps between kernels: " + (str(between) if between else "none to tell: there are no launches on the CPU"))
    if args.trace:
        prof.export_chrome_trace(str(args.trace))
        print(f"written: {args.trace}")
    settings = harness.settings_of(case, step=args.step, loader=args.loader, steps=args.steps, wall_ms=wall)
    made = harness.result("step_profile", settings, categories)
    harness.write(args.out, made | {"top": most, "gaps": between})


if __name__ == "__main__":
    harness.run(main)
