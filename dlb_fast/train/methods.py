"""Make the criterion and the sampler of a config's method; list the methods of `compare`.

The methods are in `dlb_fast.methods`. `compare` trains them with equal optimiser steps and equal rows per step, hence
equal images seen. DLB has every sample in two consecutive steps; `two_view` has the same batches without the KL, which
isolates the effect of the KL; `ce` has distinct samples in every batch.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn

from dlb_fast.data import ClassBatchSampler, ViewPairSampler
from dlb_fast.methods import METHODS, Method, Option, find

from .config import METHOD_FIELDS, LossConfig, RunConfig, check_effects, override
from .optim import resolve_optimizer

__all__ = [
    "LABELS", "METHODS", "VARIANTS", "find", "make_criterion", "make_sampler", "method_options", "resolve",
    "sampled_rows", "variant",
]  # fmt: skip

# name in `compare` -> fields that it sets on top of the shared config
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"method": method.name, **fields}
    for method in METHODS.values()
    for name, (_, fields) in method.variants.items()
}
LABELS = {name: label for method in METHODS.values() for name, (label, _) in method.variants.items()}


def method_options(config: LossConfig) -> dict[str, Any]:
    """The options of the config's method: its defaults, overridden by the config.

    Raises:
        ValueError: an unknown method, or an option that the method does not have.
    """
    method = find(config.method)
    for name in METHOD_FIELDS:
        value = getattr(config, name)
        if value is None or name in method.options:
            continue
        if name not in method.fixed:
            users = ", ".join(other.name for other in METHODS.values() if name in other.options)
            raise ValueError(
                f"config: loss.{name} is not used by method {method.name} (it is by {users}); leave it out"
            )
        if value != method.fixed[name]:
            raise ValueError(
                f"config: loss.{name} is {method.fixed[name]:g} with method {method.name}, got {value:g}; leave it out"
            )
    given = {name: getattr(config, name, None) for name in method.options}
    return {
        name: _plain(option.default) if given[name] is None else given[name] for name, option in method.options.items()
    }


def _plain(value: Any) -> Any:
    """A default value in the form that a config stores."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def resolve(config: RunConfig) -> RunConfig:
    """The config with all options of its method and the method's forward filled in, as saved in a run folder.

    Raises:
        ValueError: an option, a forward or mixed images that the method cannot use, or an option without effect.
    """
    config = dataclasses.replace(config, optim=resolve_optimizer(config.optim))
    check_effects(config)
    method, options = find(config.loss.method), method_options(config.loss)
    _check_mixing(config, method, options)
    known = {name: value for name, value in {**method.fixed, **options}.items() if name in METHOD_FIELDS}
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **known))
    if method.forward is not None:
        return override(config, forward=method.forward)
    if config.train.forward == "partners":
        able = " and ".join(other.name for other in METHODS.values() if other.forward == "partners")
        raise ValueError(f"config: forward=partners belongs to {able}, not to {method.name}; use joint")
    if config.train.forward == "two_pass" and method.batches != "overlap":
        able = " and ".join(other.name for other in METHODS.values() if other.batches == "overlap")
        raise ValueError(
            f"config: forward=two_pass belongs to {able}, whose batches repeat rows, not to {method.name}; use joint"
        )
    return config


def _check_mixing(config: RunConfig, method: Method, options: dict[str, Any]) -> None:
    if config.augment.mix() is None:
        return
    single = [name for name in method.one_class if options[name]]
    if method.mixes and not single:
        return
    why = f"{single[0]} needs" if single else "its teacher needs"
    able = ", ".join(other.name for other in METHODS.values() if other.mixes)
    raise ValueError(
        f"config: mixup_alpha and cutmix_alpha must be 0 with method {method.name}: {why} one class per image, or "
        f"remembers images that were not mixed like this; methods for mixed images: {able} (a class of your own: "
        "mixes = True)"
    )


def sampled_rows(config: RunConfig) -> int:
    """Number of newly sampled rows per step."""
    return find(config.loss.method).sampled_rows(config.data.batch_size, method_options(config.loss))


def make_sampler(config: LossConfig, targets: Any, rows: int, seed: int) -> Any:
    """The sampler of a method that needs view pairs or classmates; None for methods with distinct or overlapping rows.

    Args:
        config: the method and its options.
        targets: ``(N,)`` class of every training sample.
        rows: rows per step on this rank.
        seed: seed of the run.
    """
    method, options = find(config.method), method_options(config)
    if method.batches == "two_views":
        return ViewPairSampler(len(targets), rows, seed=seed)
    if method.batches == "same_class":
        arranged = {n: options[n] if isinstance(v, Option) else v for n, v in method.batch_options.items()}
        return ClassBatchSampler(torch.as_tensor(targets), rows, seed=seed, **arranged)
    return None


def make_criterion(config: LossConfig, *, num_classes: int, num_samples: int, rows: int, epochs: int) -> nn.Module:
    """The criterion of a config.

    Args:
        config: the method, its options, and those of every criterion.
        num_classes: number of classes.
        num_samples: size of the training set.
        rows: rows per step on this rank.
        epochs: passes of the loader in the whole run.
    """
    method = find(config.method)
    values: dict[str, Any] = {
        "num_classes": num_classes, "num_samples": num_samples, "capacity": rows // 2, "epochs": epochs,
        "label_smoothing": config.label_smoothing, "impl": config.impl, **method.fixed, **method_options(config),
    }  # fmt: skip
    for name in ("label_smoothing", "impl"):
        if name not in method.arguments and getattr(config, name) != getattr(LossConfig, name):
            raise ValueError(f"config: loss.{name} is not an argument of {method.criterion.__name__}; leave it out")
    if isinstance(dtype := values.get("memory_dtype"), str):
        values["memory_dtype"] = getattr(torch, dtype)
    missing = [n for n, p in method.arguments.items() if p.default is inspect.Parameter.empty and n not in values]
    if missing:
        raise ValueError(
            f"config: loss.method {method.name!r}: the trainer cannot give {', '.join(missing)} of "
            f"{method.criterion.__name__}; give them a default"
        )
    return method.criterion(**{name: values[name] for name in method.arguments if name in values})


def variant(config: RunConfig, name: str) -> RunConfig:
    """The config of one of the compared methods, with all its options.

    Options of the shared config apply to methods with the same criterion; other methods use their defaults.

    Raises:
        ValueError: unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"compare: unknown method {name!r}; known: {', '.join(VARIANTS)}")
    fields = dict(VARIANTS[name])
    method, own = find(fields["method"]), find(config.loss.method)
    dropped = [n for n in METHOD_FIELDS if n not in method.options]
    if method.criterion is not own.criterion:
        dropped += ["alpha", "beta", "temperature"]  # another criterion means something else by them
    if method.forward is None and (
        config.train.forward == "partners" or (config.train.forward == "two_pass" and method.batches != "overlap")
    ):
        fields["forward"] = "joint"
    return resolve(override(config, **{**dict.fromkeys(dropped), **fields}))
