"""Describe a plan to the user: the dry run, the first lines of a run, and advice when memory is full."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from effnet_fast.model.blocks import tuning
from effnet_fast.model.launch_layers import launch_keys
from effnet_fast.precision import activation_type
from effnet_fast.run.build import Parts, build_model
from effnet_fast.run.plan import Plan

if TYPE_CHECKING:
    from effnet_fast.model.complexity import Complexity


def forecast(plan: Plan) -> str:
    """The table of `--dry_run`."""
    from effnet_fast.model.complexity import complexity

    config, dataset = plan.config, plan.dataset
    model = build_model(plan, torch.device("cpu"))
    cost = complexity(model, plan.image_size)
    memory = plan.images_per_pass * _image_bytes(plan, cost) + cost.state_bytes
    sizes = plan.sizes.counts(plan.schedule_start, plan.steps)
    macs = {size: cost.macs if size == plan.image_size else complexity(model, size).macs for size in sizes}
    total = sum(3 * macs[size] * steps * config.batch_size for size, steps in sizes.items())
    rows = {
        "model": f"{config.model}, {cost.parameters:,} parameters, {plan.image_size} px, output stride "
        f"{model.architecture.output_stride}, final map {cost.final_map}",
        "cost": f"{cost.macs:,} MACs an image; {total:.3g} for {plan.steps - plan.schedule_start} steps "
        "(backward counted as 2 forwards)",
        "data": f"{dataset.name}: {len(dataset.train)} train, {len(dataset.val) if dataset.val is not None else 0} "
        f"val, {len(dataset.test)} test images; loader {plan.loader}",
        "steps": f"{plan.steps} ({config.num_epochs} epochs x {plan.steps_per_epoch}), batch {config.batch_size} = "
        f"{plan.world.size} rank(s) x {plan.accumulation} x {plan.images_per_pass}",
        "memory": f"about {memory / 2**20:,.0f} MiB on each device (estimated)",
        "device": f"{plan.world.device.type}, {plan.arithmetic}",
        "folder": str(plan.folder),
    }
    if config.resize_schedule:
        rows["resize"] = resizing(plan)
    if plan.resumed is not None:
        done = "finished" if plan.progress.finished else f"from step {plan.progress.step}"
        rows["resume"] = f"{plan.resumed.path}, {done}"
    return "\n".join(f"{name:8}{value}" for name, value in rows.items())


def resizing(plan: Plan) -> str:
    """The sizes of `--resize_schedule` in words."""
    counts = plan.sizes.counts(plan.schedule_start, plan.steps)
    steps = ", ".join(f"{size} px for {count} steps" for size, count in counts.items())
    return f"training images of {steps}; evaluation at {plan.image_size} px"


def tuned(plan: Plan, parts: Parts) -> str:
    """How many of the run's launches and ops `effnet-fast tune` chose."""
    products = plan.kernels == "triton-block"
    keys = launch_keys(parts.model, plan.images_per_pass, plan.image_size, products=products)
    ops = {key for key in keys if key[0] in tuning.OPS}
    used = keys & plan.launches.keys()
    if used:
        return (
            f"{len(used - ops)} of {len(keys - ops)} kernel launches, and PyTorch's operators for {len(used & ops)} of "
            f"{len(ops)} ops, as effnet-fast tune timed them on this GPU"
        )
    if plan.config.width is not None or plan.config.depth is not None:
        return "no tuned launch fits, and effnet-fast tune does not time models of another --width or --depth"
    return (
        f"no tuned launch fits: effnet-fast tune --model {plan.config.model} --image_size {plan.image_size} "
        f"--output_stride {parts.model.architecture.output_stride} --batch_size {plan.images_per_pass} "
        f"--mixed_precision {plan.precision}{' --kernels triton-block' if products else ''} times this run's"
    )


def opening_lines(plan: Plan, parts: Parts) -> list[str]:
    """What a run prints before its first step."""
    config, world, progress = plan.config, plan.world, plan.progress
    architecture = parts.model.architecture
    dropped = parts.loader.dropped
    dropped_note = f"; the last {dropped} images of each shuffled epoch are dropped" if dropped else ""
    lines = [
        f"{config.model} at {plan.image_size} px, output stride {architecture.output_stride}, on {world.size} x "
        f"{world.device.type} in {plan.arithmetic}; {plan.loader_reason}",
        f"{plan.dataset.name}: {len(plan.dataset.train)} training images, {config.num_epochs} epochs of "
        f"{plan.steps_per_epoch} steps{dropped_note}",
    ]
    if plan.launches:
        lines.append(tuned(plan, parts))
    if config.resize_schedule:
        lines.append(resizing(plan))
    if batches := plan.precise_bn_batches(architecture.bn_momentum, last=True):
        is_short = plan.precise_bn_batches(architecture.bn_momentum, last=False) > 0
        reason, when = (f"a short run ({plan.steps} steps): ", "each") if is_short else ("", "the last")
        lines.append(
            f"{reason}BatchNorm statistics are re-estimated on {batches} training batches before {when} evaluation"
        )
    if plan.accumulation != config.grad_accumulation:
        lines.append(
            f"{world.size} rank(s) take {plan.accumulation} accumulation step(s), which keeps the batch of "
            f"{config.batch_size}"
        )
    if plan.resumed is not None and plan.resumed.extends(config):
        lines.append(
            f"continuing {plan.resumed.path} with its weights, optimizer and averages; schedule {config.schedule} "
            f"starts anew over the {plan.steps - plan.schedule_start} steps that are left"
        )
    if progress.step:
        lines.append(f"resuming at step {progress.step} of {plan.steps} (epoch {progress.epoch + 1})")
    if world.size == 1 and torch.cuda.device_count() > 1:
        lines.append(
            f"using one of {torch.cuda.device_count()} GPUs; to use all: torchrun --standalone "
            f"--nproc_per_node={torch.cuda.device_count()} -m effnet_fast train ..."
        )
    return lines


def memory_advice(plan: Plan) -> str:
    """Advice, in one line, for when a device's memory is full."""
    config, device = plan.config, plan.world.device
    if plan.resumed is None:
        remedies = [_batch_advice(plan), f"more --grad_accumulation than {plan.accumulation}"]
    else:  # a resumed run keeps its batch, and accumulation depends on the number of ranks
        remedies = ["more ranks"]
    if not config.activation_checkpointing:
        remedies.append("--activation_checkpointing")
    if device.type == "cuda":
        remedies.append("PYTORCH_ALLOC_CONF=expandable_segments:True in the environment")
    return f"the memory of {device} is full at --batch_size {config.batch_size}: try {', '.join(remedies)}"


def _total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or a rank's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _batch_advice(plan: Plan) -> str:
    from effnet_fast.model.complexity import complexity

    total = _total_memory(plan.world.device)
    cost = complexity(build_model(plan, torch.device("cpu")), plan.image_size)
    passes = plan.world.size * plan.accumulation
    largest = max((total - cost.state_bytes) // _image_bytes(plan, cost), 0) * passes
    if passes <= largest < plan.config.batch_size:
        return f"--batch_size {largest} at most (estimated for {total / 2**30:.0f} GiB)"
    return "half the --batch_size"


def _image_bytes(plan: Plan, cost: Complexity) -> int:
    """Estimated device memory per image of one pass."""
    return cost.training_bytes_per_image(activation_type(plan.precision).itemsize)
