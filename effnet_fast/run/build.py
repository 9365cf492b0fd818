"""Build what a plan describes: model, loaders, optimizer, step."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effnet_fast.data.augment_params import Augment
from effnet_fast.data.choose_loader import make_loader
from effnet_fast.data.loader import Loader, LoaderSpec
from effnet_fast.model import ModelOptions, Network, batch_norms, from_description, model_from_options, recompute_blocks
from effnet_fast.model.blocks import use_launches
from effnet_fast.run.cold_start import compile_kernels
from effnet_fast.run.plan import Plan
from effnet_fast.run.rank_check import about_model, compare_ranks
from effnet_fast.run.resolve import compile_model, loader_dtype, set_backends, worker_count
from effnet_fast.run.resume import explain_checkpoint_errors
from effnet_fast.train.evaluate import evaluating
from effnet_fast.train.graph import capture_stream
from effnet_fast.train.optim import make_optimizer
from effnet_fast.train.schedule import Schedule, make_schedule
from effnet_fast.train.step import Step, StepOptions

EVAL_BATCHES = 4  # passes of training in a batch of evaluation, at most, where the host limits it


@dataclass(frozen=True)
class Parts:
    """The objects of a training run.

    Attributes:
        model: the plain module, in training mode.
        step: trains the model on a batch.
        loader: loads the training images, augmented.
        eval_loader: loads the images of `Plan.eval_split`.
    """

    model: Network
    step: Step
    loader: Loader
    eval_loader: Loader

    def close(self) -> None:
        """Free the step's graph and the loaders' threads and processes."""
        self.step.close()
        self.loader.close()
        self.eval_loader.close()


def build(plan: Plan) -> Parts:
    """Build a run on the plan's device and load the checkpoint to resume, if any; all ranks must call this together.

    Raises:
        ValueError: impossible settings, a checkpoint of another version, or ranks whose models differ.
    """
    dataset = plan.dataset
    set_backends(plan.config.deterministic)
    use_launches(plan.launches)
    if plan.compile:
        torch.compiler.reset()  # models of earlier runs in this process count against the limit of recompilations
    model = build_model(plan, plan.world.device)
    compare_ranks(about_model(model, plan.kernels, plan.world.device))
    sizes = {plan.image_size, *plan.sizes.sizes}
    compile_kernels(model, plan.kernels, plan.precision, plan.world.device, plan.images_per_pass, sizes)
    step = _build_step(plan, model)
    loader = make_loader(plan.loader, dataset.train, _loader_spec(plan, plan.augment))
    eval_images = dataset.val if dataset.val is not None else dataset.test
    parts = Parts(model, step, loader, make_loader(plan.loader, eval_images, _eval_spec(plan, len(eval_images))))
    if plan.resumed is not None:
        with explain_checkpoint_errors(plan.resumed.path):
            _restore(plan, parts)
    return parts


def build_model(plan: Plan, device: torch.device) -> Network:
    """The model of a plan: the checkpoint's architecture, or a new model with the pretrained weights if any."""
    config = plan.config
    torch.manual_seed(config.seed)
    if plan.resumed is not None:
        with explain_checkpoint_errors(plan.resumed.path):
            model = from_description(plan.resumed.checkpoint.architecture, plan.kernels)
    else:
        model = _new_model(plan)
    if config.freeze:
        model.freeze(config.freeze)
    for norm in batch_norms(model):
        norm.synchronised = plan.sync_batchnorm
    _check_smallest_images(plan, model)
    if config.activation_checkpointing:
        recompute_blocks(model)
    return model.to(device)


def _check_smallest_images(plan: Plan, model: Network) -> None:
    """Refuse images that are too small for the model, and passes of one image whose final map is one pixel.

    Raises:
        ValueError: a layer would have no output, or BatchNorm one value per channel.
    """
    config, size = plan.config, plan.sizes.sizes[0]
    images = plan.images_per_pass * (plan.world.size if plan.sync_batchnorm else 1)
    one_image = images == 1 and any(norm.weight.requires_grad for norm in batch_norms(model))
    if not one_image and size >= model.architecture.output_stride:
        return
    try:
        with evaluating(model):
            height, width = model.forward_features(torch.zeros(1, 3, size, size)).shape[2:]
    except RuntimeError as error:
        raise ValueError(
            f"images of {size} px are too small for {config.model} at output stride "
            f"{model.architecture.output_stride}: use larger ones (--image_size, --resize_schedule) or a smaller "
            "--output_stride"
        ) from error
    if one_image and height * width == 1:
        raise ValueError(
            f"--batch_size {config.batch_size} leaves one image per pass ({plan.world.size} rank(s) x "
            f"{plan.accumulation} accumulation step(s)), and the final map is 1 x 1: BatchNorm needs more than one "
            "value per channel; use a larger --batch_size, larger images (--image_size, --resize_schedule) or a "
            "smaller --output_stride"
        )


def _new_model(plan: Plan) -> Network:
    config = plan.config
    options = ModelOptions(
        config.model,
        num_classes=len(plan.dataset.classes),
        image_size=plan.image_size,
        output_stride=config.output_stride,
        width=config.width,
        depth=config.depth,
        dropout=config.dropout,
        drop_path=config.drop_path,
        zero_init_residual=config.zero_init_residual,
        depthwise_init=config.depthwise_init,
        kernels=plan.kernels,
    )
    return model_from_options(options, plan.weights, config.allow_unmatched)


def _build_step(plan: Plan, model: Network) -> Step:
    config = plan.config
    optimizer = make_optimizer(
        config.optimizer,
        model,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )
    options = StepOptions(
        learning_rate=config.learning_rate,
        precision=plan.precision,
        clip_grad=config.clip_grad,
        accumulation=plan.accumulation,
        label_smoothing=config.label_smoothing,
        class_weights=plan.class_weights,
        mixup=config.mixup,
        cutmix=config.cutmix,
        mixup_prob=config.mixup_prob,
        mixup_switch_prob=config.mixup_switch_prob,
        ema_decay=config.ema_decay,
        seed=config.seed,
        graph=plan.graph,
    )
    return Step(_callable(plan, model), model, optimizer, _schedule(plan), options, plan.world, plan.sizes)


def _callable(plan: Plan, module: Network) -> nn.Module:
    """The module, wrapped for several ranks and compiled if the plan says so."""
    model: nn.Module = module
    if plan.world.size > 1:
        with capture_stream(plan.world.device) if plan.graph else nullcontext():
            # With accumulation's no_sync, a static graph aborts in torch 2.13.
            model = data_parallel(module, static_graph=plan.accumulation == 1)
    return compile_model(model, plan.world.device) if plan.compile else model


def data_parallel(module: nn.Module, static_graph: bool) -> DistributedDataParallel:
    """Wrap a module in DDP. Buffers are not broadcast: ranks share or average BatchNorm statistics themselves.

    Args:
        module: on its device.
        static_graph: the same parameters get a gradient in every step.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_with_strides, tuple(parameter.stride())))
    # torch 2.13 renames the argument.
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=static_graph, **buffers)


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """The gradient with its parameter's strides if they differ in dimensions of size 1 only.

    Such strides address the same memory, but DDP warns that they do not match its buckets.
    """
    pairs = zip(gradient.shape, gradient.stride(), strides, strict=True)
    same_memory = all(actual == wanted for size, actual, wanted in pairs if size > 1)
    return gradient.as_strided(gradient.shape, strides) if same_memory else gradient


def _schedule(plan: Plan) -> Schedule:
    config, start = plan.config, plan.schedule_start
    schedule = make_schedule(config.schedule, plan.steps - start, plan.steps_per_epoch, config.warmup_epochs)
    return lambda step: schedule(step - start)


def _eval_spec(plan: Plan, images: int) -> LoaderSpec:
    """How to load `images` for the evaluation.

    On a GPU the host limits it, since it launches the kernels one by one: fewer, larger batches. Only of the resident
    loader, whose images are small and on the device already.
    """
    spec = _loader_spec(plan, None)
    if plan.loader != "resident" or spec.device.type != "cuda":
        return spec
    batch = plan.images_per_pass
    return replace(spec, batch_size=min(EVAL_BATCHES * batch, max(batch, -(-images // spec.world))))


def _loader_spec(plan: Plan, augment: Augment | None) -> LoaderSpec:
    config, world = plan.config, plan.world
    return LoaderSpec(
        batch_size=config.batch_size // world.size,
        image_size=plan.image_size,
        mean=plan.dataset.mean,
        std=plan.dataset.std,
        device=world.device,
        dtype=loader_dtype(plan.precision, world.device),
        seed=config.seed,
        rank=world.rank,
        world=world.size,
        num_workers=worker_count(config.num_workers),
        augment=augment,
    )


def _restore(plan: Plan, parts: Parts) -> None:
    assert plan.resumed is not None
    checkpoint, world = plan.resumed.checkpoint, plan.world
    parts.step.load_state(checkpoint)
    # Statistics of single ranks only fit the same number of ranks.
    rank_state = checkpoint.ranks[world.rank] if len(checkpoint.ranks) == world.size else {}
    if rank_state.get("statistics") is not None:
        parts.step.statistics.load(rank_state["statistics"].to(world.device))
