"""Optimisers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import bisect
import copy
import functools
import math
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import OptimConfig, ScheduleConfig
from .distributed import distribute_like, local_shard

__all__ = ["Ema", "lr_factor", "make_optimizer", "make_scheduler"]


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """SGD or AdamW over the model's parameters that need a gradient.

    With `decay_norm_and_bias=False`, parameters with at most one dimension (norms, biases) form a group without weight
    decay. The official code decays all parameters, which is the default. `load_state_dict` restores the moments but
    keeps the hyperparameters of `config`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    if not config.decay_norm_and_bias:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
    optimizer: Optimizer
    if config.optimizer == "adamw":
        optimizer = AdamW(groups, lr=config.lr, betas=config.betas)
    else:
        optimizer = SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    names = ("weight_decay", "momentum", "nesterov", "betas")
    configured = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]

    def keep(loaded: Optimizer) -> None:  # torch would restore the saved hyperparameters; the schedule sets the rates
        for group, own in zip(loaded.param_groups, configured, strict=True):
            group.update(own)

    optimizer.register_load_state_dict_post_hook(keep)
    return optimizer


def lr_factor(step: int, *, config: ScheduleConfig, total_steps: int, steps_per_epoch: float, peak: float) -> float:
    """Factor on the peak learning rate in optimiser step `step` (from 0).

    warm-up: `(step + 1) / warmup_steps`; cosine: from 1 to `min_lr / peak` over the steps after the warm-up;
    multistep: `gamma ** (milestones passed)`, as `MultiStepLR` stepped once an epoch.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        # the minimum is reached one step after the last one, as with CosineAnnealingLR, so the last step has an effect
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        floor = config.min_lr / peak
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "multistep":
        passed = bisect.bisect_right([round(m * steps_per_epoch) for m in config.milestones], step)
        return config.gamma**passed
    return 1.0


class _ConfiguredLR(LambdaLR):
    """Restores only the step from a saved state; the rates are those of this run's config."""

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
    """A torch scheduler for the config, stepped once per optimiser step.

    A resumed run with another learning rate or length uses its own rates.

    Args:
        optimizer: its current rates are the peak rates.
        config: the schedule.
        total_steps: optimiser steps of the whole run.
        steps_per_epoch: converts epochs (warm-up, milestones) to steps.
    """
    peak = max(group["lr"] for group in optimizer.param_groups)
    numbers = {"config": config, "total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "peak": peak}
    return _ConfiguredLR(optimizer, functools.partial(lr_factor, **numbers))


class Ema:
    """Exponential moving average of a model's weights: `average += (1 - d) * (weights - average)`.

    The decay warms up, `d = min(decay, (1 + t) / (10 + t))` after `t` updates, so that the random initial weights lose
    their influence. Buffers (BatchNorm statistics) are copied. The criterion stores logits of the trained model, not of
    the average.

    Example:
        >>> average = Ema(nn.Linear(2, 1), decay=0.99)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average after an optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages: list[torch.Tensor] = [local_shard(p) for p in self.model.parameters()]
        weights: list[torch.Tensor] = [local_shard(p) for p in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: distribute_like(own[name], value) for name, value in state["model"].items()})
        self.updates = int(state["updates"])
