"""One optimizer step: batch -> loss -> gradients -> update. It never logs and never waits for the device.

All that the device does in a step is one method, `Step._body`, a function of the batch and of a few numbers that the
schedules give: called as it is, or captured in a CUDA graph and replayed.

What a step draws at random depends on (seed, rank, step) alone, so a resumed run repeats it. A step whose gradient is
not finite is found on the device and changes no weight, average or BatchNorm statistic; nor does any step after it,
until the host reads the meters and stops, so that what is saved then is the state that broke.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.data.augment import upload
from effnet_fast.distributed import World
from effnet_fast.precision import autocast
from effnet_fast.train import optim
from effnet_fast.train.ema import Ema
from effnet_fast.train.flat_tensors import FlatTensors
from effnet_fast.train.graph import Captured
from effnet_fast.train.meters import Meters
from effnet_fast.train.mixing import Mixing, mix_images
from effnet_fast.train.schedule import Schedule


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
        graph: capture the step in a CUDA graph at the first call and replay it from then on. Needs a CUDA device, a
            world of one, an optimizer whose state and learning rate are on the device, and batches of one shape.
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
        graph: bool = False,
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
        self.buffers = FlatTensors(live.values())
        # With the moving average's, what ranks that keep BatchNorm's statistics apart do not have in common.
        averages = ema.state_dict() if ema is not None else {}
        self.statistics = FlatTensors(
            [*live.values(), *(average for name, average in averages.items() if name in live)]
        )
        self.graph = graph
        self._call = self._make_call()

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
        self._call(images, labels, self._numbers(step, images.shape[-1]))

    def _make_call(self) -> Callable[[Tensor, Tensor, Tensor], None]:
        if not self.graph:
            return self._body
        optim.let_capture(self.optimizer)
        return Captured(self._body, self._state)

    def _numbers(self, step: int, size: int) -> Tensor:
        """What differs from step to step besides the batch: float64 [2] on the device, or [8] with mixing.

        The number of the step, the share of the weights in the average, and the six numbers of `Mixing.draw`.
        """
        share = 0.0 if self.ema is None else self.ema.share(step)
        mix = self.mixing.draw(step, size) if self.mixing.active else []
        return upload(np.array([step, share, *mix]), self.world.device)

    def _body(self, images: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """The device's part of a step; reads nothing from the host that changes, so it can be captured."""
        saved = self.buffers.copy()
        self._gradients(images, labels, numbers[2:].float())
        self._update(saved, numbers[0], numbers[1].float())

    def _gradients(self, images: Tensor, labels: Tensor, mix: Tensor) -> None:
        self.module.zero_grad()
        partners, target = labels, labels.new_ones((), dtype=torch.float32)
        if self.mixing.active:
            images, partners, target = mix_images(images, mix), labels.flip(0), mix[1]
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
    def _update(self, saved: Tensor, step: Tensor, share: Tensor) -> None:
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
            self.ema.update(share * (1 - skip))
        self.scale.update(skip)
        self.meters.add_step(norm, overflow & ~bad, bad, step)

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        optimizer = [t for state in self.optimizer.state.values() for t in state.values()]
        average = [] if self.ema is None else self.ema.average
        own = [self.scale.scale, self.scale.good_steps, self.meters.sums]
        return [*self.module.parameters(), *self.module.buffers(), *optimizer, *average, *own]

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
        self._call = self._make_call()  # a graph would go on with the optimizer's tensors of before


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])
