"""One entry per method: what its tests need beyond the registry. A new method adds one here, and all tests take it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dlb_fast.methods import METHODS

CLASSES = 5


def nothing(z, generator):
    return {}


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


class Case(NamedTuple):
    """`settings`: options under which function and module are compared with the definition.

    `extras(z, generator)`: what the function takes beside logits and target, in float64. `arguments`: of the module.
    `options`: fields of the config for a short training run.
    """

    settings: tuple[dict[str, Any], ...] = ({},)
    extras: Callable[..., dict[str, torch.Tensor]] = nothing
    arguments: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "ce": Case(),
    "two_view": Case(arguments={"num_classes": CLASSES, "alpha": 0.0}),
    "dlb": Case(arguments={"num_classes": CLASSES}),
    "lsr_kd": Case(
        ({}, {"alpha": 0.3, "temperature": 5.0}, {"alpha": 0.4, "temperature": 2.0, "correct_share": 0.8}),
        options={"correct_share": 0.9, "amp": "bf16"},
    ),
    "tf_kd_reg": Case(
        ({}, {"alpha": 0.95, "temperature": 40.0, "multiplier": 1.0}), arguments={"num_classes": CLASSES}
    ),
    "mr_kd": Case(
        ({}, {"alpha": 0.3, "correct_share": 0.9}, {"temperature": 2.0, "swap": True}),
        lambda z, g: {"copies_logits": 2 * normal(g, 3, *z.shape)},
        {"copies": 2, "copy_every": 1, "ensemble_lr": 0.1},
        {"copies": 2, "copy_every": 2, "ensemble_lr": 0.05, "swap": True, "correct_share": 0.9},
    ),
    "bake": Case(
        ({}, {"omega": 0.0}, {"alpha": 0.5, "omega": 0.9, "temperature": 2.0}),
        lambda z, g: {"features": normal(g, len(z), 6)},
        options={"companions": 2, "omega": 0.9},
    ),
    "cs_kd": Case(({}, {"alpha": 3.0, "temperature": 2.0}), lambda z, g: {"partner_logits": 2 * normal(g, *z.shape)}),
    "ddgsd": Case(({}, {"alpha": 0.7, "ce_weight": 0.5})),
    "ps_kd": Case(
        ({}, {"alpha": 0.25}),
        lambda z, g: {"past": torch.softmax(3 * normal(g, *z.shape), 1)},
        {"num_samples": 8, "num_classes": CLASSES, "epochs": 4},
        {"ema": 0.9},
    ),
    "zipf": Case(({}, {"alpha": 1.0, "power": 2.0})),
    # Their defaults are for hundreds of epochs: a label of probability 0.1 teaches GCE a fifth of what it teaches CE.
    "gce": Case(({}, {"q": 0.3}, {"q": 1.0}), options={"q": 0.1}),
    "sce": Case(({}, {"alpha": 6.0, "beta": 0.1}, {"alpha": 0.5, "beta": 2.0}), options={"alpha": 1.0, "beta": 0.1}),
    "elr": Case(
        ({}, {"alpha": 7.0, "beta": 0.9}),
        lambda z, g: {"past": 0.7 * torch.softmax(3 * normal(g, *z.shape), 1)},
        {"num_samples": 8, "num_classes": CLASSES},
        {"ema": 0.9},
    ),
    "r_drop": Case(({}, {"alpha": 5.0})),
}

unmatched = sorted(set(CASES) ^ set(METHODS))
assert not unmatched, f"tests/method_cases.py: CASES needs one entry per method, and no other; see {unmatched}"


def module_of(name):
    """The file of a method."""
    return sys.modules[METHODS[name].criterion.__module__]


def function_of(name):
    """The method's function of tensors; None for those that have none of their own (ce, dlb)."""
    found = [n for n in getattr(module_of(name), "__all__", ()) if n.endswith("_loss")]
    return getattr(module_of(name), found[0]) if found and name not in ("dlb", "two_view") else None


def make(name, **options):
    """The criterion of a method for `CLASSES` classes."""
    return METHODS[name].criterion(**{**CASES[name].arguments, **options})


def takes(name, option):
    """Whether the function of a method, and with it its criterion, has an option."""
    return option in inspect.signature(function_of(name)).parameters


BANKS = ("ps_kd", "elr")
"""Those that keep a row for every sample, of which `make` gives them 8."""

SIBLINGS = [name for name in METHODS if function_of(name) is not None]
