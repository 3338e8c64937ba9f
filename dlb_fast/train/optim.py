"""Optimisers from the config, and averaged weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from .config import OptimConfig
from .parallel import local, shared_like

__all__ = ["Ema", "make_optimizer"]


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """SGD or AdamW over the model's parameters that need a gradient.

    With `decay_norm_and_bias=False`, parameters with at most one dimension (norms, biases) form a group without weight
    decay. The official code decays everything, which is the default. A state that is loaded later brings its moments
    and leaves these numbers as they are.
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

    def keep(loaded: Optimizer) -> None:  # torch takes them from the saved state; the rates are the schedule's business
        for group, own in zip(loaded.param_groups, configured, strict=True):
            group.update(own)

    optimizer.register_load_state_dict_post_hook(keep)
    return optimizer


class Ema:
    """Exponential moving average of a model's weights: `average += (1 - d) * (weights - average)`.

    The decay warms up, `d = min(decay, (1 + t) / (10 + t))` after `t` updates, so that the random start is forgotten.
    Buffers (BatchNorm statistics) are copied. It averages the model only: the loss keeps its memory of real logits.

    Example:
        >>> average = Ema(nn.Linear(2, 1), decay=0.99)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights after an optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages: list[torch.Tensor] = [local(p) for p in self.model.parameters()]
        weights: list[torch.Tensor] = [local(p) for p in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: shared_like(own[name], value) for name, value in state["model"].items()})
        self.updates = int(state["updates"])
