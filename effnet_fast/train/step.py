"""One optimizer step: batch -> loss -> gradients -> update. It never logs and never waits for the device.

What a step draws at random depends on (seed, rank, step) alone, so a resumed run repeats it. A step whose gradient is
not finite is found on the device and changes no weight, average or BatchNorm statistic; nor does any step after it,
until the host reads the meters and stops, so that what is saved then is the state that broke.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast import distributed
from effnet_fast.distributed import World
from effnet_fast.train import optim
from effnet_fast.train.ema import Ema
from effnet_fast.train.meters import Meters
from effnet_fast.train.mixing import Mixing, mix_images
from effnet_fast.train.schedule import Schedule

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of `--mixed_precision` bf16, fp16 or no."""
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS)


class LossScale:
    """Dynamic scale of the fp16 loss: halved after an overflow, doubled after 2000 steps without (torch's GradScaler).

    Off (`enabled=False`) it stays 1.
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


class Buffers:
    """Floating-point buffers (BatchNorm's statistics) as one tensor, e.g. to be put back after a bad step."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self.sizes = [b.numel() for b in self.buffers]

    def copy(self) -> Tensor:
        return torch.cat([b.flatten() for b in self.buffers])

    def restore(self, saved: Tensor, bad: Tensor) -> None:
        """Where `bad`, put `saved` back; a handful of launches however many buffers there are."""
        right = torch.where(bad, saved, self.copy()).split(self.sizes)
        self._set(right)

    def average_over_ranks(self) -> None:
        """Give every rank the mean of all ranks' buffers; ranks that synchronise BatchNorm have it already."""
        if distributed.world_size() > 1:
            mean = distributed.all_reduce_(self.copy()) / distributed.world_size()
            self.load(mean)

    def load(self, values: Tensor) -> None:
        """Put back what `copy` gave."""
        self._set(values.split(self.sizes))

    def _set(self, values: Iterable[Tensor]) -> None:
        torch._foreach_copy_(self.buffers, [v.view_as(b) for v, b in zip(values, self.buffers, strict=True)])


class Step:
    """The training step.

    Args:
        model: what is called: the plain module, its DDP wrapper, or a compiled one.
        module: the plain module inside.
        optimizer: of `make_optimizer`.
        schedule: multiple of `learning_rate` at each step.
        learning_rate: the peak.
        precision: bf16, fp16 or no.
        clip_grad: largest norm of the gradient; 0 is off.
        accumulation: pieces of a batch, one forward and backward pass each.
        label_smoothing: share of the target spread over all classes.
        mixing: mixup and CutMix.
        ema: average of the weights, or None.
        world: rank and device.
        seed: of dropout and stochastic depth.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        learning_rate: float,
        precision: str,
        clip_grad: float,
        accumulation: int,
        label_smoothing: float,
        mixing: Mixing,
        ema: Ema | None,
        world: World,
        seed: int,
    ) -> None:
        self.model = model
        self.module = module
        self.optimizer = optimizer
        self.schedule = schedule
        self.learning_rate = learning_rate
        self.precision = precision
        self.clip_grad = clip_grad
        self.accumulation = accumulation
        self.label_smoothing = label_smoothing
        self.mixing = mixing
        self.ema = ema
        self.world = world
        self.seed = seed
        self.meters = Meters(world.device)
        self.scale = LossScale(world.device, enabled=precision == "fp16")
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        live = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        self.buffers = Buffers(list(live.values()))
        # With the moving average's, what ranks that keep BatchNorm's statistics apart do not have in common.
        averages = ema.state_dict() if ema is not None else {}
        self.statistics = Buffers([*live.values(), *(average for name, average in averages.items() if name in live)])

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * self.schedule(step)

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Take optimizer step number `step` (from 0) on this rank's share of the batch.

        Args:
            images: [N, 3, H, W], normalised; N divisible by the accumulation.
            labels: int64 [N].
        """
        torch.manual_seed(_step_seed(self.seed, self.world.rank, step))
        optim.set_rate(self.optimizer, self.rate(step))
        saved = self.buffers.copy()
        self._gradients(images, labels, step)
        self._update(saved, step)

    def _gradients(self, images: Tensor, labels: Tensor, step: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        partners, target = labels, labels.new_ones((), dtype=torch.float32)
        if self.mixing.active:
            numbers = torch.tensor(self.mixing.draw(step, images.shape[-1]))
            numbers = numbers.to(images.device, non_blocking=True)
            images, partners, target = mix_images(images, numbers), labels.flip(0), numbers[1]
        pieces = [t.chunk(self.accumulation) for t in (images, labels, partners)]
        for i, (x, a, b) in enumerate(zip(*pieces, strict=True)):
            with self._reduction(last=i == self.accumulation - 1):
                with autocast(self.precision, x.device):
                    logits = self.model(x)
                loss = self._loss(logits.float(), a, b, target)
                (loss * (self.scale.scale / self.accumulation)).backward()
            self._count(loss.detach(), logits.detach(), torch.where(target >= 0.5, a, b))

    def _loss(self, logits: Tensor, labels: Tensor, partners: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if not self.mixing.active:
            return loss
        other = F.cross_entropy(logits, partners, label_smoothing=self.label_smoothing)
        return torch.lerp(other, loss, target)

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.meters.add_batch(loss * len(labels), (logits.argmax(1) == labels).sum(), len(labels))

    def _reduction(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Ranks add their gradients up in a batch's last piece only."""
        if last or self.world.size == 1:
            return contextlib.nullcontext()
        return self.model.no_sync()  # type: ignore[operator]  # DDP's

    @torch.no_grad()
    def _update(self, saved: Tensor, step: int) -> None:
        # The norm is of the reduced gradient, hence the same on all ranks, and not finite if any rank's loss was not.
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.params if p.grad is not None) / self.scale.scale
        overflow = ~torch.isfinite(norm)
        # fp16 overflows now and then by design; it is broken when the scale has nothing left to give.
        bad = overflow & (self.scale.scale <= 1)
        skip = (overflow | ~self.meters.healthy).float()
        excess = (norm / self.clip_grad).clamp(min=1) if self.clip_grad > 0 else torch.ones_like(norm)
        self.optimizer.grad_scale = self.scale.scale * excess  # type: ignore[attr-defined]
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.buffers.restore(saved, skip > 0)
        if self.ema is not None:
            self.ema.update(step, 1 - skip)
        self.scale.update(skip)
        self.meters.add_step(norm, overflow & ~bad, bad, step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; all ranks must ask for it together."""
        return {
            "model": self.module.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scale.state_dict(),
            "meters": self.meters.collect(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        optim.load_state(self.optimizer, state["optimizer"])
        self.scale.load_state_dict(state["scaler"])
        self.meters.restore(state["meters"], self.world.rank)


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])
