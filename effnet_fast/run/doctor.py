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
from effnet_fast.model.blocks import chosen, kernels_in_use
from effnet_fast.precision import fastest_dtype, resolve_precision
from effnet_fast.run.resolve import resolve_kernels, resolve_loader, resolve_step
from effnet_fast.run.self_check import CHECKS
from effnet_fast.run.verdicts import clear_cache, verdict


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
        auto, reasons = ({flag: choice[i] for flag, choice in choices.items()} for i in range(2))
        report = {"environment": provenance.environment(), "checks": rows, "auto": auto, "reasons": reasons}
        print(json.dumps(report, indent=2))
    else:
        print()
        for flag, (choice, reason) in choices.items():
            print(f"--{flag} auto: {choice} ({reason})")
        print(f"broken: {', '.join(broken)}" if broken else "no check failed")
    return 1 if broken else 0


def choose_automatically(device: torch.device) -> dict[str, tuple[str, str]]:
    """What each `auto` means on this device for B0 on CIFAR-100, and the reason."""
    config = TrainConfig()
    compiled, graph = resolve_step(config, World(0, 1, device), output_stride=8, images=50_000 * config.num_epochs)
    step = "graph" if graph else "compile" if compiled else "eager"
    kernels = kernels_in_use(resolve_kernels("auto", device), device)
    on_gpu = device.type == "cuda"
    return {
        "device": (device.type, "torch sees a GPU" if on_gpu else "torch sees no GPU, or --device cpu"),
        "kernels": (kernels, _kernels_reason(kernels, on_gpu)),
        "mixed_precision": (resolve_precision("auto", device), _precision_reason(device)),
        "step": (step, _step_reason(step, kernels, on_gpu)),
        "loader": resolve_loader("auto", load_synthetic(8, 8).train, device),
    }


def _precision_reason(device: torch.device) -> str:
    if device.type == "cuda":
        return "the default on GPUs"
    faster = fastest_dtype(device) == torch.bfloat16
    return "the default on CPUs" + ("; bf16 trains faster on this one" if faster else "")


def _kernels_reason(kernels: str, on_gpu: bool) -> str:
    if chosen("auto") != "auto":
        return f"EFFNET_KERNELS={chosen('auto')}"
    if kernels == "torch":
        return "the Triton kernels are missing or failed their check" if on_gpu else "the C++ ops cannot be built"
    return "their check found no fault" if on_gpu else "the ops for the CPU"


def _step_reason(step: str, kernels: str, on_gpu: bool) -> str:
    if on_gpu:
        return "its check found no fault" if step == "graph" else "a captured step failed its check"
    if kernels == "cpp":
        return "the C++ ops leave little to compile"
    return f"the run is {'long enough' if step == 'compile' else 'too short'} to repay compiling"
