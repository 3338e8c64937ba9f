"""Learning rates as a pure function of the step, so that a resumed run needs no history."""

from __future__ import annotations

import bisect
import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import ScheduleConfig

__all__ = ["lr_factor", "make_scheduler"]


def lr_factor(step: int, config: ScheduleConfig, *, total_steps: int, steps_per_epoch: float, peak: float) -> float:
    """Factor on the peak rate in optimiser step `step` (from 0).

    warm-up: `(step + 1) / warmup_steps`; cosine: from 1 to `min_lr / peak` over the steps after the warm-up;
    multistep: `gamma ** (milestones passed)`, as `MultiStepLR` stepped once an epoch.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        # the last step still moves: the floor is reached one step after it, as with CosineAnnealingLR
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        floor = config.min_lr / peak
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "multistep":
        passed = bisect.bisect_right([round(m * steps_per_epoch) for m in config.milestones], step)
        return config.gamma**passed
    return 1.0


class _ConfiguredLR(LambdaLR):
    """Takes the step from a saved state and nothing else: the rates are those of this run's config."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = [
            base * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, base, lr in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group["initial_lr"], group["lr"] = base, lr


def make_scheduler(
    optimizer: Optimizer, config: ScheduleConfig, *, total_steps: int, steps_per_epoch: float
) -> LambdaLR:
    """A torch scheduler for the config, to be stepped once per optimiser step. A continuation with another rate or
    length goes on at its own rates.

    Args:
        optimizer: its current rates are the peak.
        config: which schedule.
        total_steps: optimiser steps of the whole run.
        steps_per_epoch: turns epochs (warm-up, milestones) into steps.
    """
    peak = max(group["lr"] for group in optimizer.param_groups)
    return _ConfiguredLR(
        optimizer,
        lambda step: lr_factor(step, config, total_steps=total_steps, steps_per_epoch=steps_per_epoch, peak=peak),
    )
