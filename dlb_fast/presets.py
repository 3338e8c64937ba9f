"""Recipes by name. Every number has its source beside it, because none of them was read from the paper's tables.

Sources: `base.py` is the official repository's cross-entropy baseline (Meta-knowledge-Lab/DLB@8949a46), whose schedule
is the only complete recipe it holds; `dlb.py` has no defaults for temperature, alpha, batch size, epochs or rate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dlb_fast.train.config import RunConfig, override, to_dict
from dlb_fast.train.methods import resolve

__all__ = ["PRESETS", "Preset", "get_preset", "to_yaml"]


@dataclass(frozen=True)
class Preset:
    """A recipe: what it is, its config, and where single numbers come from (field name -> reason)."""

    about: str
    config: RunConfig
    sources: dict[str, str]


_COMMUNITY = "community default, not a value read from the paper"
_DIGITS_SOURCES = {
    "per_class": "few images, so that plain cross entropy does not saturate (our choice)",
    "label_noise": "for the same reason (our choice)",
    "batch_size": "our choice",
    "epochs": "our choice: converged, and seconds long",
    "eval_every": "every second epoch (our choice)",
    "lr": "our choice, the same for every method",
    "weight_decay": "base.py",
    "momentum": "base.py",
    "alpha": _COMMUNITY,
    "temperature": _COMMUNITY,
    "padding": "our choice for 8x8 images",
    "flip": "a mirrored digit is another sign",
}
_CIFAR_SOURCES = {
    "batch_size": "128 rows = 64 drawn (base.py: --batch_size 64) + the 64 before",
    "padding": "my_dataloader.py: RandomCrop(32, padding=4)",
    "flip": "my_dataloader.py: RandomHorizontalFlip",
    "model": "models/resnet.py, resnet32",
    "alpha": _COMMUNITY,
    "temperature": _COMMUNITY,
    "lr": "base.py",
    "momentum": "base.py, dlb.py",
    "nesterov": "base.py, dlb.py",
    "weight_decay": "base.py, dlb.py",
    "milestones": "base.py: 150, 180, 210",
    "gamma": "base.py, dlb.py",
    "epochs": "base.py: 240; dlb.py at the same number makes as many steps of twice the rows",
}

_DIGITS = override(
    RunConfig(),
    source="digits",
    per_class=20,
    label_noise=0.2,
    batch_size=40,
    padding=1,
    flip=False,
    model="small_cnn",
    lr=0.05,
    weight_decay=5e-4,
    schedule="cosine",
    epochs=30,
    eval_every=20,
    log_every=10,
)


def _cifar(classes: int) -> RunConfig:
    return override(
        RunConfig(),
        source=f"cifar{classes}:data",
        batch_size=128,
        padding=4,
        flip=True,
        model="resnet32",
        lr=0.05,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        schedule=dataclasses.replace(RunConfig().schedule, schedule="multistep", milestones=(150.0, 180.0, 210.0)),
        epochs=240,
    )


def _controls(name: str, about: str, config: RunConfig, sources: dict[str, str]) -> dict[str, Preset]:
    """DLB and its controls over the same optimiser steps and rows per step."""
    twice = {"epochs": 2 * config.train.epochs}
    schedule = dataclasses.replace(config.schedule, milestones=tuple(2 * m for m in config.schedule.milestones))
    passes = "twice DLB's: an epoch of distinct samples has half the steps, so images seen are equal"
    ce = override(config, method="ce", schedule=schedule, **twice)
    ce_sources = {**sources, "epochs": passes, "milestones": "doubled with the epochs"}
    smoothing = {**ce_sources, "label_smoothing": "the usual 0.1"}
    return {
        f"{name}-dlb": Preset(f"{about}: DLB", config, sources),
        f"{name}-alpha0": Preset(
            f"{about}: control, the same two views without the KL", override(config, method="two_view"), sources
        ),
        f"{name}-ce": Preset(f"{about}: control, cross entropy at equal images seen", ce, ce_sources),
        f"{name}-ls": Preset(
            f"{about}: control, label smoothing at equal images seen", override(ce, label_smoothing=0.1), smoothing
        ),
    }


PRESETS: dict[str, Preset] = {
    "digits": Preset("handwritten digits 8x8, few and noisy labels, small CNN: DLB", _DIGITS, _DIGITS_SOURCES),
    **{n: p for n, p in _controls("digits", "digits", _DIGITS, _DIGITS_SOURCES).items() if n != "digits-dlb"},
    **_controls("cifar10-resnet32", "CIFAR-10, ResNet-32", _cifar(10), _CIFAR_SOURCES),
    **_controls("cifar100-resnet32", "CIFAR-100, ResNet-32", _cifar(100), _CIFAR_SOURCES),
}


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: unknown name; the message has the near ones.
    Example:
        >>> get_preset("digits").config.loss.method
        'dlb'
    """
    if name not in PRESETS:
        import difflib

        near = difflib.get_close_matches(name, PRESETS, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}Known: {', '.join(PRESETS)}")
    return PRESETS[name]


def to_yaml(preset: Preset) -> str:
    """The preset as a config file with its sources as comments."""
    import yaml

    lines = [f"# {preset.about}"]
    for group, fields in to_dict(resolve(preset.config)).items():
        lines.append(f"{group}:")
        for name, value in fields.items():
            plain = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
            source: Any = preset.sources.get(name if name != "source" else "data")
            lines.append(f"  {name}: {plain}" + (f"  # {source}" if source else ""))
    return "\n".join(lines) + "\n"
