"""One optimizer step: batch -> loss -> gradients -> update. It never logs and never waits for the device.

The device's part of a step is one method, `Step._body`, a function of the batch and a few numbers from the schedules.
It is called directly, or captured in a CUDA graph and replayed.

Random numbers in a step depend only on (seed, rank, step), so a resumed run repeats them. If the gradient is not
finite, the device detects it and leaves weights, average and BatchNorm statistics unchanged, in this step and in all
later ones, until the host reads the meters and stops. The state saved then is the one before the bad step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.checkpoint import StepState
from effnet_fast.data.upload import upload
from effnet_fast.distributed import World
from effnet_fast.precision import autocast
from effnet_fast.train import optim
from effnet_fast.train.ema import Ema
from effnet_fast.train.flat_tensors import FlatTensors
from effnet_fast.train.graph import DDP_WARM_UP_CALLS, WARM_UP_CALLS, Captured
from effnet_fast.train.meters import Meters
from effnet_fast.train.mixing import Mixing, mix_images
from effnet_fast.train.resizing import ImageSizes, resize
from effnet_fast.train.schedule import Schedule


class LossScale:
    """Dynamic scale of the fp16 loss: halved after an overflow, doubled after 2000 steps without one.

    This is torch's GradScaler without its host synchronisation. With `enabled=False` the scale stays 1.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), 2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        if self.enabled:
            torch._amp_update_scale_(self.scale, self.good_steps, found_inf, 2.0, 0.5, 2000)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.good_steps.copy_(state["good_steps"])


@dataclass(frozen=True)
class StepOptions:
    """Settings of a training step; the defaults are those of `effnet-fast train`.

    Attributes:
        learning_rate: peak learning rate, which the schedule multiplies.
        precision: bf16, fp16 or no.
        clip_grad: largest norm of the gradient; 0 is off.
        accumulation: forward and backward passes per step, each on an equal part of the batch.
        label_smoothing: share of the target spread over all classes.
        class_weights: weight of each class in the loss; None weighs all alike.
        mixup, cutmix, mixup_prob, mixup_switch_prob: see `Mixing`.
        ema_decay: see `Ema`; 0 keeps no average.
        seed: seed of mixing, dropout and stochastic depth.
        graph: capture the step in a CUDA graph at the first call and replay it from then on. Requires CUDA, an
            optimizer whose state and learning rate are on the device, and batches of one shape; a new image size
            captures again. With several ranks `model` is a DDP wrapper made inside `capture_stream`.
    """

    learning_rate: float = 0.1
    precision: str = "no"
    clip_grad: float = 5.0
    accumulation: int = 1
    label_smoothing: float = 0.1
    class_weights: tuple[float, ...] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    ema_decay: float = 0.0
    seed: int = 0
    graph: bool = False


class Step:
    """The training step.

    Args:
        model: computes the logits: the plain module, its DDP wrapper, or a compiled one.
        module: the plain module inside `model`.
        optimizer: from `make_optimizer`.
        schedule: multiple of the learning rate at each step.
        options: settings.
        world: rank and device.
        sizes: size to which each step resizes its images, before it mixes them; None keeps the loader's.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        options: StepOptions,
        world: World,
        sizes: ImageSizes | None = None,
    ) -> None:
        self.model = model
        self.module = module
        self.optimizer = optimizer
        self.schedule = schedule
        self.options = options
        self.world = world
        self.sizes = sizes
        self.mixing = Mixing(
            options.mixup, options.cutmix, options.mixup_prob, options.mixup_switch_prob, options.seed, world.rank
        )
        self.ema = Ema(module, options.ema_decay) if options.ema_decay > 0 else None
        weights = options.class_weights
        self.class_weights = None if weights is None else torch.tensor(weights, device=world.device)
        self.meters = Meters(world.device)
        self.scale = LossScale(world.device, enabled=options.precision == "fp16")
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        live = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        self.buffers = FlatTensors(live.values())
        # BatchNorm statistics and their moving averages: they differ between ranks that do not share them.
        averages = self.ema.state_dict() if self.ema is not None else {}
        self.statistics = FlatTensors(
            [*live.values(), *(average for name, average in averages.items() if name in live)]
        )
        self._call = self._make_call()

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        return self.options.learning_rate * self.schedule(step)

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Take optimizer step number `step` (from 0) on this rank's share of the batch.

        Args:
            images: [N, 3, H, W], normalised; N divisible by `accumulation`.
            labels: int64 [N].
        """
        torch.manual_seed(_step_seed(self.options.seed, self.world.rank, step))
        optim.set_rate(self.optimizer, self.rate(step))
        if self.sizes is not None:
            images = resize(images, self.sizes(step))
        self._call(images, labels, self._numbers(step, images.shape[-1]))

    def close(self) -> None:
        """Free the captured graph and end the reference cycle through it; no step can follow.

        NCCL leaves its process group only once all graphs that hold its operations are gone.
        """
        self._call = None  # type: ignore[assignment]

    def _make_call(self) -> Callable[[Tensor, Tensor, Tensor], None]:
        if not self.options.graph:
            return self._body
        optim.make_capturable(self.optimizer)
        warm_up = WARM_UP_CALLS if self.world.size == 1 else DDP_WARM_UP_CALLS
        return Captured(self._body, self.tensors, warm_up=warm_up)

    def _numbers(self, step: int, size: int) -> Tensor:
        """Values that change every step, besides the batch: float64 [2] on the device, or [8] with mixing.

        They are the step number, `Ema.share`, and the six numbers of `Mixing.draw`.
        """
        share = 0.0 if self.ema is None else self.ema.share(step)
        mix = self.mixing.draw(step, size) if self.mixing.active else []
        return upload(np.array([step, share, *mix]), self.world.device)

    def _body(self, images: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """The device's part of a step; reads only constants from the host, so a CUDA graph can capture it."""
        saved = self.buffers.copy()
        self._gradients(images, labels, numbers[2:].float())
        self._update(saved, numbers[0], numbers[1].float())

    def _gradients(self, images: Tensor, labels: Tensor, mix: Tensor) -> None:
        self.module.zero_grad()
        partners, target = labels, labels.new_ones((), dtype=torch.float32)
        if self.mixing.active:
            images, partners, target = mix_images(images, mix), labels.flip(0), mix[1]
        parts = [t.chunk(self.options.accumulation) for t in (images, labels, partners)]
        for i, (x, y, partner) in enumerate(zip(*parts, strict=True)):
            with self._reduction(last=i == self.options.accumulation - 1):
                with autocast(self.options.precision, x.device):
                    logits = self.model(x)
                loss = self._loss(logits.float(), y, partner, target)
                (loss * (self.scale.scale / self.options.accumulation)).backward()
            self._count(loss.detach(), logits.detach(), torch.where(target >= 0.5, y, partner))

    def _loss(self, logits: Tensor, labels: Tensor, partners: Tensor, target: Tensor) -> Tensor:
        loss = self._label_loss(logits, labels)
        if not self.mixing.active:
            return loss
        return torch.lerp(self._label_loss(logits, partners), loss, target)

    def _label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over images of the smoothed cross-entropy times the weight of the label's class.

        The weight multiplies an image's whole loss, as if the data set had the image that many times. PyTorch's
        `weight=` multiplies the terms of the smoothed target instead, which pulls every image towards rare classes. It
        also divides by the sum of the batch's weights, so a step would depend on how accumulation and ranks split it.
        """
        smoothing = self.options.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return (losses * self.class_weights[labels]).mean()

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.meters.add_batch(loss * len(labels), (logits.argmax(1) == labels).sum(), len(labels))

    def _reduction(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Ranks reduce gradients only in the last pass of a step."""
        if last or self.world.size == 1:
            return contextlib.nullcontext()
        return self.model.no_sync()  # type: ignore[operator]  # DDP's

    @torch.no_grad()
    def _update(self, saved: Tensor, step: Tensor, share: Tensor) -> None:
        # The norm of the reduced gradient is equal on all ranks, and not finite if any rank's loss was not.
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.params if p.grad is not None) / self.scale.scale
        overflow = ~torch.isfinite(norm)
        # fp16 overflows are expected: the scale grows until one occurs. At scale 1 the gradient itself is not finite.
        bad = overflow & (self.scale.scale <= 1)
        skip = (overflow | ~self.meters.healthy).float()
        excess = (norm / self.options.clip_grad).clamp(min=1) if self.options.clip_grad > 0 else torch.ones_like(norm)
        self.optimizer.grad_scale = self.scale.scale * excess  # type: ignore[attr-defined]
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.buffers.restore(saved, skip > 0)
        if self.ema is not None:
            self.ema.update(share * (1 - skip))
        self.scale.update(skip)
        self.meters.add_step(norm, overflow & ~bad, bad, step)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        optimizer = [t for state in self.optimizer.state.values() for t in state.values()]
        average = [] if self.ema is None else self.ema.average
        counters = [self.scale.scale, self.scale.good_steps, self.meters.sums]
        return [*self.module.parameters(), *self.module.buffers(), *optimizer, *average, *counters]

    def state(self) -> StepState:
        """The state that a checkpoint saves, without copying tensors; all ranks must call this together."""
        return StepState(
            model=self.module.state_dict(),
            ema=self.ema.state_dict() if self.ema is not None else None,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scale.state_dict(),
            meters=self.meters.collect(),
        )

    def load_state(self, state: StepState) -> None:
        """Load what `state` returned."""
        self.module.load_state_dict(state.model)
        if self.ema is not None:
            self.ema.load_state_dict(state.ema or {})
        optim.load_state(self.optimizer, state.optimizer)
        self.scale.load_state_dict(state.scaler)
        self.meters.restore(state.meters, self.world.rank)
        self._call = self._make_call()  # the captured graph still uses the optimizer's previous tensors


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])
