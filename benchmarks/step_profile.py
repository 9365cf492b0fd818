"""Where the time of a training step goes: `python benchmarks/step_profile.py [--trace FILE]`.

Profiles a few steps fed by a loader, with a range for the loader, the step and each stage of the model (also in NVTX on
CUDA, for Nsight). Prints the top kernels (on the CPU: operators), the time by category, and on CUDA the gaps between
kernels. On the CPU a category sums the operators' self time, and idle is the rest of the wall time.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from effnet_fast.model import Network

# The first category with a pattern in the name of a kernel or operator is taken; effnet_kernels' names come first.
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
    (
        "gate",
        (
            "effnet_cpu::squeeze",
            "effnet_cpu::excite",
            "effnet_cpu::gate_",
            "_squeeze_kernel",
            "_excite_kernel",
            "_spans_kernel",
            "_gate_kernel",
            "_dpool_kernel",
            "_parameters_backward_kernel",
            "_add_splits",
            "_five_sums",
            "sigmoid",
            "aten::mean",
            "aten::mul",
        ),
    ),
    ("depthwise", ("depthwise", "dwconv", "c1_k1", "grouped_direct", "_forward_kernel", "_backward_kernel")),
    # A C++ op's self time is what surrounds its matrix products, mostly BatchNorm; these are aten::mm.
    (
        "normalisation",
        (
            "effnet_cpu::",
            "batch_norm",
            "_moments",
            "_merge",
            "_add_kernel",
            "_apply",
            "_grad",
            "bn_fw",
            "bn_bw",
            "batchnorm",
        ),
    ),
    ("loader", ("loader", "Memcpy HtoD")),
    ("convolution", ("conv", "gemm", "cutlass", "cudnn", "splitKreduce", "nvjet", "xmma", "aten::mm", "aten::addmm")),
    ("activation", ("silu",)),
)


def category(name: str, shapes: list | None = None) -> str:
    """The category of a kernel or operator; a convolution with weights [C, 1, k, k] is depthwise."""
    if "conv" in name and any(len(s) == 4 and s[1] == 1 and s[0] > 1 for s in (shapes or [])[1:3]):
        return "depthwise"
    return next((label for label, patterns in CATEGORIES if any(p in name for p in patterns)), "other")


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A named range in the trace and, on CUDA, in NVTX."""
    with record_function(name):
        if harness.DEVICE == "cuda":
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if harness.DEVICE == "cuda":
                torch.cuda.nvtx.range_pop()


def mark_layers(model: Network) -> None:
    """Put a range around the forward pass of the stem, each stage, and the head."""
    for name, modules in model.layers().items():
        for module in modules:
            inner = module.forward

            def forward(*inputs, inner=inner, name=name):
                with span(name):
                    return inner(*inputs)

            module.forward = forward  # type: ignore[method-assign]


def profiled(case: harness.Case, mode: str, kind: str, steps: int) -> tuple[profile, float]:
    """The profile of `steps` steps, and their wall time in ms."""
    step = harness.make_step(case, mode)
    if mode == "eager":  # compiling merges the stages
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
        start = time.perf_counter()
        for _ in range(steps):
            once()
        harness.synchronise()
        wall = (time.perf_counter() - start) * 1e3
    loader.close()
    return prof, wall


def kernels_of(prof: profile) -> list[tuple[str, str, float, float]]:
    """(name, category, start us, us) of all kernels, or of all operators on the CPU, in order."""
    if harness.DEVICE == "cuda":
        kernels = [
            (event.name, category(event.name), event.time_range.start, event.time_range.elapsed_us())
            for event in harness.kernels(prof)
        ]
    else:
        kernels = [
            (
                event.name,
                _category_by_range(event) or category(event.name, event.input_shapes),
                event.time_range.start,
                event.self_cpu_time_total,
            )
            for event in prof.events()
            if event.self_cpu_time_total > 0 and not event.is_user_annotation
        ]
    return sorted(kernels, key=lambda kernel: kernel[2])


def _category_by_range(event) -> str | None:
    """The loader's or the optimizer's, for operators within their ranges."""
    while event is not None:
        if event.name == "loader":
            return "loader"
        if event.name.startswith("Optimizer."):
            return "optimizer"
        event = event.cpu_parent
    return None


def by_category(kernels: list, wall_ms: float) -> list[dict]:
    """ms and share of the wall time, largest first; idle is the rest."""
    spent: Counter[str] = Counter()
    for _, label, _, us in kernels:
        spent[label] += us / 1e3
    spent["idle"] = max(wall_ms - spent.total(), 0.0)
    return [
        {"category": label, "ms": round(ms, 3), "share": round(ms / wall_ms, 4)} for label, ms in spent.most_common()
    ]


def top(kernels: list, count: int) -> list[dict]:
    """The kernels with the most time."""
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
    """Times between the end of a kernel and the start of the next, in us: count, sum, p50, p80, longest."""
    end, idle = kernels[0][2] + kernels[0][3], []
    for _, _, start, us in kernels[1:]:
        if start > end:
            idle.append(start - end)
        end = max(end, start + us)
    _, middle, high = harness.quantiles(idle or [0.0])
    return {
        "gaps": len(idle),
        "in all us": sum(idle),
        "p50 us": middle,
        "p80 us": high,
        "longest us": max(idle or [0]),
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
    categories, longest = by_category(kernels, wall), top(kernels, args.top)
    print(f"\n{args.steps} steps in {wall:.1f} ms (profiling slows them down)\n\n{harness.table(categories)}")
    print(f"\n{harness.table(longest)}\n")
    between = gaps(kernels) if harness.DEVICE == "cuda" else None
    print(f"gaps between kernels: {between or 'none, the CPU launches none'}")
    if args.trace:
        prof.export_chrome_trace(str(args.trace))
        print(f"written: {args.trace}")
    settings = harness.settings_of(case, step=args.step, loader=args.loader, steps=args.steps, wall_ms=wall)
    result = harness.result("step_profile", settings, categories)
    harness.write(args.out, result | {"top": longest, "gaps": between})


if __name__ == "__main__":
    harness.run(main)
