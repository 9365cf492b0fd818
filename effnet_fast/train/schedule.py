"""Learning-rate schedules: pure functions from the optimizer step to a multiple of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]

MAX_WARMUP = 0.25  # of the run
ONE_CYCLE_RISE = 0.3  # of the run, from 1/25 of the peak (Smith and Topin 2018)
STEP_MILESTONES = (0.3, 0.6, 0.8)
STEP_FACTOR = 0.2


def make_schedule(name: str, steps: int, steps_per_epoch: int, warmup_epochs: float) -> Schedule:
    """A function from the optimizer step, 0 to steps - 1, to a multiple of the peak learning rate.

    Args:
        name: cosine (Loshchilov and Hutter 2017), one-cycle (Smith and Topin 2018), step, exponential (0.97 every
            2.4 epochs, as in the EfficientNet paper) or constant. All but one-cycle start with a linear warm-up.
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps per epoch.
        warmup_epochs: length of the linear warm-up, capped at a quarter of the run.

    Raises:
        ValueError: the name is unknown.
    """
    warmup = int(min(warmup_epochs * steps_per_epoch, MAX_WARMUP * steps))
    shapes: dict[str, Schedule] = {
        "cosine": lambda step: _cosine((step - warmup) / max(steps - warmup, 1)),
        "step": lambda step: STEP_FACTOR ** sum(step >= share * steps for share in STEP_MILESTONES),
        "exponential": lambda step: 0.97 ** ((step - warmup) / (2.4 * steps_per_epoch)),
        "constant": lambda step: 1.0,
    }
    if name == "one-cycle":
        return lambda step: _one_cycle(step / max(steps, 1))
    if name not in shapes:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join([*shapes, 'one-cycle'])}")
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else shapes[name](step)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _one_cycle(progress: float) -> float:
    if progress < ONE_CYCLE_RISE:
        return 1 / 25 + (1 - 1 / 25) * (1 - _cosine(progress / ONE_CYCLE_RISE))
    return _cosine((progress - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))
