"""What can be trained: each method is a criterion, its numbers, and a way to fill the batch.

`compare` puts methods side by side at equal optimiser steps and equal rows per step, hence equal images seen. DLB shows
every drawn sample twice in a row; `two_view` shows the same batches without the KL, which is what isolates the KL;
`ce` fills the batch with distinct samples.

A new teacher trains as it is, by `--method module:Class`; an entry of `METHODS` gives it numbers and batches of its
own, one of `_COMPARED` a place in `compare`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlb_fast import (
    BakeLoss,
    CsKDLoss,
    DdgsdLoss,
    LastBatchLoss,
    LossParts,
    LsrKDLoss,
    MrKDLoss,
    PsKDLoss,
    TaughtLoss,
    Teacher,
    TfKDRegLoss,
    ZipfLoss,
    fused_lb_loss,
)
from dlb_fast.data import ClassBatchSampler, ViewPairSampler

from .config import METHOD_FIELDS, LossConfig, RunConfig, override

__all__ = [
    "CARDS", "LABELS", "METHODS", "VARIANTS", "CrossEntropy", "Method", "Task", "drawn_rows", "find", "make_criterion",
    "numbers_of", "resolve", "variant",
]  # fmt: skip


class CrossEntropy(nn.Module):
    """Plain cross entropy with `parts`, from the same implementation as DLB's.

    Example:
        >>> import torch
        >>> round(CrossEntropy()(torch.zeros(2, 2), torch.tensor([0, 1])).item(), 4)
        0.6931
    """

    def __init__(self, label_smoothing: float = 0.0, impl: str = "auto") -> None:
        super().__init__()
        self.label_smoothing, self.impl = label_smoothing, impl
        self.parts: LossParts | None = None

    def forward(
        self, logits: Tensor, target: Tensor, *, target_b: Tensor | None = None, lam: Tensor | None = None
    ) -> Tensor:
        """The mean loss `()` of logits `(B, C)`; smoothing in training only. `target_b`, `lam`: mixed images."""
        smoothing = self.label_smoothing if self.training else 0.0
        loss, self.parts = fused_lb_loss(
            logits, target, label_smoothing=smoothing, impl=self.impl, return_parts=True, target_b=target_b, lam=lam
        )
        return loss


@dataclass(frozen=True)
class Task:
    """What a criterion may depend on beside its numbers."""

    num_classes: int
    rows: int  # per step
    samples: int  # of the training set
    epochs: int  # passes of the loader
    ranks: int = 1  # processes; `rows` are those of one


Numbers = Mapping[str, Any]
Sampler = Callable[[Tensor, int, Numbers, int], Any]  # targets, rows per step, numbers, seed


@dataclass(frozen=True)
class Method:
    """A method: what it is, its numbers with their defaults, its criterion, and how its batches are filled.

    `criterion(task, numbers, common)` gets the numbers (`defaults` under what the config sets) and the keyword
    arguments every criterion takes. `drawn` is how many of the rows of a step are newly drawn samples.
    """

    about: str
    criterion: Callable[[Task, Numbers, Numbers], nn.Module]
    defaults: Numbers = field(default_factory=dict)
    overlap: bool = False  # half of every batch repeats the batch before
    sampler: Sampler | None = None  # rows that belong together
    drawn: Callable[[int, Numbers], int] = lambda rows, numbers: rows
    forward: str | None = None  # a forward that the method cannot do without
    mixes: bool = False  # its teacher still fits when two images are mixed


def _last_batch(task: Task, alpha: float, numbers: Numbers, common: Numbers) -> nn.Module:
    half = task.rows // 2
    return LastBatchLoss(task.num_classes, capacity=half, alpha=alpha, temperature=numbers["temperature"], **common)


def _half(rows: int, numbers: Numbers) -> int:
    return rows // 2


def _mr_kd(task: Task, n: Numbers, common: Numbers) -> nn.Module:
    return MrKDLoss(
        alpha=n["alpha"], temperature=n["temperature"], copies=n["copies"], interval=n["copy_every"],
        dtype=_dtype(n["memory_dtype"]), device=n["memory_device"], correct_share=n["correct_share"], swap=n["swap"],
        ensemble=n["ensemble_lr"], **common,
    )  # fmt: skip


def _ps_kd(task: Task, n: Numbers, common: Numbers) -> nn.Module:
    return PsKDLoss(
        task.samples, task.num_classes, alpha=n["alpha"], epochs=task.epochs, device=n["memory_device"],
        dtype=_dtype(n["memory_dtype"]) or torch.float16,
        cross_rank=task.ranks > 1,  # a sample comes back on another rank
        **common,
    )  # fmt: skip


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


_COMMUNITY = {"alpha": 1.0, "temperature": 3.0}  # community defaults, not values read from the paper
_LSR = {"alpha": 0.1, "temperature": 3.0, "correct_share": None}  # ours: the paper's numbers were not available
_MR = {
    "alpha": 0.5, "temperature": 3.0, "copies": 2, "copy_every": 100, "correct_share": None, "swap": False,
    "ensemble_lr": None, "memory_dtype": None, "memory_device": None,
}  # fmt: skip

METHODS: dict[str, Method] = {
    "dlb": Method(
        "self-distillation from the last mini-batch", lambda t, n, c: _last_batch(t, n["alpha"], n, c), _COMMUNITY,
        overlap=True, drawn=_half, mixes=True,
    ),
    "two_view": Method(
        "the same batches with alpha=0: two views, no KL", lambda t, n, c: _last_batch(t, 0.0, n, c), _COMMUNITY,
        overlap=True, drawn=_half, mixes=True,
    ),
    "ce": Method("cross entropy, no sample repeated", lambda t, n, c: CrossEntropy(**c), mixes=True),
    "lsr_kd": Method(
        "LsrKD: a uniform teacher at a temperature; correct_share: teacher correction",
        lambda t, n, c: LsrKDLoss(**{k: n[k] for k in _LSR}, **c), _LSR, mixes=True,
    ),
    "tf_kd_reg": Method(
        "Tf-KD's regularisation by a virtual teacher",
        lambda t, n, c: TfKDRegLoss(
            t.num_classes, alpha=n["alpha"], temperature=n["temperature"], multiplier=n["multiplier"], **c
        ),
        {"alpha": 0.1, "temperature": 20.0, "multiplier": 100.0},
    ),
    "mr_kd": Method("MrKD: copies of the model along its training", _mr_kd, _MR, mixes=True),
    "bake": Method(
        "BAKE: the batch's knowledge, ensembled over companions of the class",
        lambda t, n, c: BakeLoss(alpha=n["alpha"], temperature=n["temperature"], omega=n["omega"], **c),
        {"alpha": 1.0, "temperature": 4.0, "omega": 0.5, "companions": 1},
        sampler=lambda y, rows, n, seed: ClassBatchSampler(y, rows, companions=n["companions"], seed=seed),
        drawn=lambda rows, n: rows // (n["companions"] + 1),
    ),
    "cs_kd": Method(
        "CS-KD: another sample of the class",
        lambda t, n, c: CsKDLoss(alpha=n["alpha"], temperature=n["temperature"], **c),
        {"alpha": 1.0, "temperature": 4.0},
        sampler=lambda y, rows, n, seed: ClassBatchSampler(y, rows, companions=1, include_anchor=True, seed=seed),
        drawn=_half, forward="partners",
    ),
    "ddgsd": Method(
        "two views teach each other within the step (lag 0)",
        lambda t, n, c: DdgsdLoss(alpha=n["alpha"], temperature=n["temperature"], **c),
        {"alpha": 1.0, "temperature": 4.0},
        sampler=lambda y, rows, n, seed: ViewPairSampler(len(y), rows, seed=seed), drawn=_half, mixes=True,
    ),
    "ps_kd": Method(
        "PS-KD: the sample's own last prediction", _ps_kd, {"alpha": 0.8, "memory_dtype": None, "memory_device": None}
    ),
    "zipf": Method(
        "Zipf's label smoothing from the logits' ranks",
        lambda t, n, c: ZipfLoss(alpha=n["alpha"], power=n["power"], **c), {"alpha": 0.1, "power": 1.0},
    ),
}  # fmt: skip

# the card of each method in docs/methods
CARDS = {
    "dlb": "dlb", "two_view": "dlb", "ce": "dlb", "lsr_kd": "lsrkd", "tf_kd_reg": "tfkdreg", "mr_kd": "mrkd",
    "bake": "bake", "cs_kd": "cskd", "ddgsd": "ddgsd", "ps_kd": "pskd", "zipf": "zipf",
}  # fmt: skip

# name in `compare` -> (its label, fields it sets on top of the shared config)
_COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("CE", {"method": "ce", "label_smoothing": 0.0}),
    "ls": ("CE + label smoothing 0.1", {"method": "ce", "label_smoothing": 0.1}),
    "two_view": ("two views, alpha=0", {"method": "two_view"}),
    "dlb": ("DLB", {"method": "dlb"}),
    "ddgsd": ("DDGSD (lag 0)", {"method": "ddgsd"}),
    "lsr_kd": ("LsrKD", {"method": "lsr_kd"}),
    "tc": ("LsrKD + TC 0.9", {"method": "lsr_kd", "correct_share": 0.9}),
    "tf_kd_reg": ("Tf-KD reg", {"method": "tf_kd_reg"}),
    "zipf": ("Zipf LS", {"method": "zipf"}),
    "ps_kd": ("PS-KD", {"method": "ps_kd"}),
    "cs_kd": ("CS-KD", {"method": "cs_kd"}),
    "bake0": ("class batches, alpha=0", {"method": "bake", "alpha": 0.0}),
    "bake": ("BAKE", {"method": "bake"}),
    "mr_kd": ("MrKD", {"method": "mr_kd"}),
}
VARIANTS: dict[str, dict[str, Any]] = {name: fields for name, (_, fields) in _COMPARED.items()}
LABELS = {name: label for name, (label, _) in _COMPARED.items()}


def _from_outside(name: str) -> Method:
    """`module:Class` of anybody's `Teacher` that can be made without arguments: trained as it is, unregistered."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        why = f"cannot import {module} ({error}); is it on PYTHONPATH?"
        raise ValueError(f"config: loss.method {name!r}: {why}") from None
    if found is None:
        raise ValueError(f"config: loss.method {name!r}: {module} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, Teacher)):
        raise ValueError(f"config: loss.method {name!r} is not a dlb_fast.Teacher")
    about = (found.__doc__ or attribute).strip().splitlines()[0]
    return Method(
        about, lambda t, n, c: TaughtLoss(found(), alpha=n["alpha"], temperature=n["temperature"], **c),
        {"alpha": 1.0, "temperature": 1.0}, mixes=getattr(found, "mixes", False),
    )  # fmt: skip


def find(name: str) -> Method:
    """The method of a name, or of `module:Class`; ValueError with the near ones for an unknown one."""
    if ":" in name:
        return _from_outside(name)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"config: loss.method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name]


def numbers_of(config: LossConfig) -> dict[str, Any]:
    """The method's numbers: what the config sets over the method's defaults.

    Raises:
        ValueError: an unknown method, or a number that the method does not use.
    """
    method = find(config.method)
    unused = [n for n in METHOD_FIELDS if getattr(config, n) is not None and n not in method.defaults]
    if unused:
        users = ", ".join(name for name, other in METHODS.items() if unused[0] in other.defaults)
        raise ValueError(f"config: loss.{unused[0]} is not used by method {config.method} (it is by {users}); leave it")
    given = {name: getattr(config, name) for name in method.defaults}
    return {name: method.defaults[name] if value is None else value for name, value in given.items()}


def resolve(config: RunConfig) -> RunConfig:
    """The config with the method's numbers and the forward it needs written into it: what a run folder holds.

    Raises:
        ValueError: a number, a forward or mixed images that the method cannot use.
    """
    method = find(config.loss.method)
    _check_mixing(config, method)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **numbers_of(config.loss)))
    if method.forward is not None:
        return override(config, forward=method.forward)
    if config.train.forward == "partners":
        raise ValueError(f"config: forward=partners belongs to cs_kd, not to {config.loss.method}; use joint")
    if config.train.forward == "two_pass" and not method.overlap:
        able = " and ".join(name for name, other in METHODS.items() if other.overlap)
        raise ValueError(
            f"config: forward=two_pass belongs to {able}, whose batches repeat rows, not to {config.loss.method}; use "
            "joint"
        )
    return config


def _check_mixing(config: RunConfig, method: Method) -> None:
    name, numbers = config.loss.method, numbers_of(config.loss)
    if config.augment.mix() is None:
        return
    single = [n for n in ("correct_share", "swap") if numbers.get(n)]
    if method.mixes and not single:
        return
    why = f"{single[0]} needs" if single else "its teacher needs"
    able = ", ".join(n for n, m in METHODS.items() if m.mixes)
    raise ValueError(
        f"config: mixup_alpha and cutmix_alpha must be 0 with method {name}: {why} one class per image, or remembers "
        f"images that were not mixed like this; methods for mixed images: {able} (a Teacher class of your own: "
        "mixes = True)"
    )


def drawn_rows(config: RunConfig) -> int:
    """Newly drawn samples per step."""
    return find(config.loss.method).drawn(config.data.batch_size, numbers_of(config.loss))


def make_criterion(config: LossConfig, task: Task) -> nn.Module:
    """The criterion of a config."""
    common = {"label_smoothing": config.label_smoothing, "impl": config.impl}
    return find(config.method).criterion(task, numbers_of(config), common)


def variant(config: RunConfig, name: str) -> RunConfig:
    """The config of one of the compared methods, all its numbers written out.

    `alpha` and `temperature` of the shared config belong to its own method; the other methods have their defaults.

    Raises:
        ValueError: unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"compare: unknown method {name!r}; known: {', '.join(VARIANTS)}")
    fields = dict(VARIANTS[name])
    used = find(fields["method"]).defaults
    dropped = [n for n in METHOD_FIELDS if n not in used]
    if fields["method"] not in (config.loss.method, "two_view"):
        dropped += ["alpha", "temperature"]
    method, forward = find(fields["method"]), config.train.forward
    if method.forward is None and (forward == "partners" or (forward == "two_pass" and not method.overlap)):
        fields["forward"] = "joint"
    return resolve(override(config, **{**dict.fromkeys(dropped), **fields}))
