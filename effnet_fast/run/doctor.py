"""The verb doctor: a table of what works on this machine, and what every `auto` will choose."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from effnet_fast import distributed, provenance
from effnet_fast.config import DoctorConfig, TrainConfig
from effnet_fast.data.synthetic import load_synthetic
from effnet_fast.distributed import World
from effnet_fast.model.blocks import kernels_in_use
from effnet_fast.precision import resolve_precision
from effnet_fast.run.resolve import resolve_kernels, resolve_loader, resolve_step
from effnet_fast.run.self_check import CHECKS
from effnet_fast.run.verdicts import clear_cache, verdict

# Why `auto` means what it does.
KERNELS_REASON = {
    "triton": "the check of the kernels found no fault",
    "cpp": "the GPU's kernels are Triton's, the CPU's are in C++",
    "torch": "there are no other kernels that work here",
}
PRECISION_REASON = {"bf16": "GPUs compute it faster", "no": "float32 on a CPU; bf16 is faster only with AMX"}
STEP_REASON = {
    "graph": "the check of the graph found no fault",
    "compile": "a step cannot be captured here",
    "eager": "the C++ kernels leave little to compile",
}


def doctor(config: DoctorConfig) -> int:
    """Run `effnet-fast doctor`; returns 1 if something is broken, else 0."""
    device = distributed.choose_device(config.device)
    clear_cache(device)
    checks = []
    for name in CHECKS:
        check = verdict(name, device)
        checks.append(check)
        # With --json, stdout holds the JSON alone.
        print(f"{check.status:7} {check.name:14} {check.detail}", file=sys.stderr if config.json else sys.stdout)
    if newer := provenance.newer_than_tested():
        print(f"warning: {newer}", file=sys.stderr)
    choices = choose_automatically(device)
    broken = [check.name for check in checks if check.status == "broken"]
    if config.json:
        rows = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"environment": provenance.environment(), "checks": rows, "auto": choices}, indent=2))
    else:
        print()
        for flag, choice in choices.items():
            print(f"--{flag} auto: {choice}")
        print(f"broken: {', '.join(broken)}" if broken else "no check failed")
    return 1 if broken else 0


def choose_automatically(device: torch.device) -> dict[str, str]:
    """What each `auto` means on this device for B0 on CIFAR-100, with the reason."""
    config = TrainConfig()
    compiled, graph = resolve_step(config, World(0, 1, device), output_stride=8, images=50_000 * config.num_epochs)
    loader, reason = resolve_loader("auto", load_synthetic(8, 8).train, device)
    kernels = kernels_in_use(resolve_kernels("auto", device), device)
    step = "graph" if graph else "compile" if compiled else "eager"
    precision = resolve_precision("auto", device)
    return {
        "device": device.type,
        "kernels": f"{kernels} ({KERNELS_REASON[kernels]})",
        "mixed_precision": f"{precision} ({PRECISION_REASON[precision]})",
        "step": f"{step} ({STEP_REASON[step]})",
        "loader": f"{loader} ({reason})",
    }
