"""Optimisers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import ast
import bisect
import copy
import dataclasses
import functools
import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dlb_fast._args import did_you_mean

from .config import OptimConfig, ScheduleConfig
from .distributed import distribute_like, local_shard

__all__ = ["Ema", "find_optimizer", "lr_factor", "make_optimizer", "make_scheduler", "resolve_optimizer"]

# The trainer's numbers for SGD: the official code's, except the rate, our choice. Other optimisers have their own.
OF_SGD = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
FIELDS = ("lr", "momentum", "nesterov", "betas", "weight_decay")  # options with a field in `OptimConfig`


@functools.cache
def find_optimizer(name: str) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class of an optimiser and its options with their defaults, read from its signature.

    Args:
        name: a class of torch.optim in any case (`adamw`), or a name of timm's (`lion`; `timm:adamw` means timm's own).

    Raises:
        ValueError: an unknown name, or an optimiser that cannot take the trainer's steps: it needs a closure, sparse
            gradients or second derivatives.

    Example:
        >>> find_optimizer("rmsprop")[1]["alpha"]
        0.99
    """
    found = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    defaults: dict[str, Any] = dict(OF_SGD) if name.lower() == "sgd" else {}
    if name.lower() in found:
        chosen = found[name.lower()]
    else:
        chosen, defaults = _timms(name.removeprefix("timm:").lower(), name, sorted(found))
    options = {
        key: parameter.default
        for key, parameter in list(inspect.signature(chosen).parameters.items())[1:]  # the first are the parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    _try(name, chosen, defaults)
    return chosen, {**options, **defaults}


def _timms(name: str, asked: str, of_torch: list[str]) -> tuple[type[Optimizer], dict[str, Any]]:
    """timm's class of a name, and the defaults that timm gives it."""
    try:
        from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
    except Exception as error:  # a broken torchvision raises RuntimeError inside timm's import
        raise ValueError(
            f"config: unknown optimizer {asked!r}{did_you_mean(name, of_torch)} (torch.optim has "
            f"{', '.join(of_torch)}; timm's need timm, whose import failed: {type(error).__name__}: {error})"
        ) from error
    if name not in list_optimizers():
        hint = did_you_mean(name, [*of_torch, *list_optimizers()])
        raise ValueError(
            f"config: unknown optimizer {asked!r}{hint} (torch.optim has {', '.join(of_torch)}; timm has "
            f"{', '.join(list_optimizers())})"
        )
    try:
        chosen: Any = get_optimizer_class(name, bind_defaults=False)
    except Exception as error:  # of a package that is missing, or needs a GPU
        raise ValueError(f"config: optimizer {asked!r} cannot be used here: {error}") from error
    info = get_optimizer_info(name)
    momentum = inspect.signature(create_optimizer_v2).parameters["momentum"].default
    return chosen, {**({"momentum": momentum} if info.has_momentum else {}), **(info.defaults or {})}


def _try(name: str, chosen: type[Optimizer], defaults: dict[str, Any]) -> None:
    """Take a step with a dense gradient and without a closure, as the trainer does.

    Raises:
        ValueError: the optimiser cannot.
    """
    closure = inspect.signature(chosen.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"config: optimizer {name!r} evaluates the loss several times per step (a closure), which the trainer does "
            "not offer; choose another, or use it in a loop of your own"
        )
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    try:
        with torch.random.fork_rng(devices=[]):
            chosen([weight], **{"lr": 0.1, **defaults}).step()
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"config: optimizer {name!r} cannot take the trainer's steps (dense gradients, no closure, no second "
            f"derivatives): {why}; choose another"
        ) from error


def resolve_optimizer(config: OptimConfig) -> OptimConfig:
    """The config with the optimiser's own defaults in place of None.

    Raises:
        ValueError: an unknown optimiser or option, or a value that the optimiser refuses.
    """
    chosen, options = find_optimizer(config.optimizer)
    own = {name: _plain(options[name]) for name in FIELDS if name in options and getattr(config, name) is None}
    config = dataclasses.replace(config, **own)
    if config.lr is None:
        raise ValueError(f"config: optimizer {config.optimizer!r} has no learning rate of its own; give lr")
    arguments = _arguments(config)
    betas = options.get("betas")
    if isinstance(betas, tuple) and len(arguments["betas"]) != len(betas):
        raise ValueError(
            f"config: betas: optimizer {config.optimizer!r} has {len(betas)}, such as {betas}, got {config.betas}"
        )
    try:
        chosen([nn.Parameter(torch.ones(2, 2))], **arguments)
    except Exception as error:  # torch and timm raise ValueError, TypeError or AssertionError
        raise ValueError(f"config: optimizer {config.optimizer!r}: {' '.join(str(error).split())}") from error
    return config


def _plain(value: Any) -> Any:
    """A default as the config stores it: floats, a truth value, or None where the class has no default."""
    if isinstance(value, (tuple, list)):
        return tuple(map(float, value))
    if isinstance(value, (bool, type(None))):
        return value
    return float(value) if isinstance(value, (int, float)) else None


def _arguments(config: OptimConfig) -> dict[str, Any]:
    """The arguments of the optimiser's class: the fields that it has, and `optimizer_options`."""
    _, options = find_optimizer(config.optimizer)
    arguments = {n: getattr(config, n) for n in FIELDS if n in options and getattr(config, n) is not None}
    for text in config.optimizer_options:
        name, _, value = text.partition("=")
        if name in FIELDS:
            raise ValueError(f"config: optimizer_options: {name} has a field of its own; use {name}, not {text!r}")
        if name not in options:
            has = f"; it has {', '.join(sorted(options.keys() - set(FIELDS)))}"
            hint = did_you_mean(name, options) or has
            raise ValueError(f"config: optimizer_options: {config.optimizer} has no {name!r}{hint}")
        try:
            arguments[name] = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(value, value))
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The config's optimiser over the model's parameters that need a gradient.

    With `decay_norm_and_bias=False`, parameters with at most one dimension (norms, biases) form a group without weight
    decay. The official code decays all parameters, which is the default. `load_state_dict` restores the moments but
    keeps the hyperparameters of `config`.

    Raises:
        ValueError: an unknown optimiser, an option that it refuses, or parameters that it refuses.
    """
    config = resolve_optimizer(config)
    chosen, options = find_optimizer(config.optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not config.decay_norm_and_bias:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
    try:
        optimizer = chosen(groups, **_arguments(config))
    except Exception as error:  # Muon takes matrices only
        raise ValueError(
            f"config: optimizer {config.optimizer!r} refuses this network: {' '.join(str(error).split())}; choose "
            "another"
        ) from error
    # what the class takes is a hyperparameter; what else it keeps in a group, such as timm's `step`, is state
    names = options.keys() - {"lr"}
    configured = [{name: group[name] for name in group.keys() & names} for group in optimizer.param_groups]

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
