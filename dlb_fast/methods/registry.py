"""The methods that the trainer, the command line and `compare` offer; each method's file registers one `Method`."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .._args import did_you_mean
from ..losses import DistillationLoss, arguments_of

__all__ = ["METHODS", "Method", "Option", "find", "register"]

BATCHES = ("samples", "overlap", "same_class", "two_views")
COMMON = frozenset({"label_smoothing", "weight", "ignore_index", "reduction", "impl"})
"""Options that every criterion has; a method does not choose them."""
FROM_THE_RUN = frozenset({"num_classes", "num_samples", "capacity", "epochs"})
"""Arguments of a criterion that follow from the data and the length of a run."""


class Option(NamedTuple):
    """A number of a method that a config may set."""

    default: Any
    type: Any
    help: str


@dataclass(frozen=True)
class Method:
    """A method as it is trained: its criterion, the layout of its batches, and what a config may set.

    Defaults, types and help of the options come from the signature and the docstring of the criterion; they are
    written down nowhere else.

    Args:
        name: as in `--method NAME`.
        criterion: a `DistillationLoss`.
        about: one line.
        card: its page, `docs/methods/CARD.md`.
        batches: how the rows of a batch belong together. `samples`: all distinct; `overlap`: the first half repeats
            the last half of the batch before; `same_class`: samples and companions of their classes; `two_views`: two
            views of every sample.
        fixed: arguments of the criterion that no config may change.
        batch_options: arguments of the sampler: plain values are fixed, an `Option` may be set by a config.
        forward: a forward of the trainer without which the method does not work.
        one_class: options that need one class per image, so that images may not be mixed when they are set.
        hidden: options of the criterion that the trainer does not offer.
        variants: entries of `compare`: name -> (label, fields of the config on top of `method`).
    """

    name: str
    criterion: type[DistillationLoss]
    about: str
    card: str = ""
    batches: Literal["samples", "overlap", "same_class", "two_views"] = "samples"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    batch_options: Mapping[str, Any] = field(default_factory=dict)
    forward: str | None = None
    one_class: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batches not in BATCHES:
            raise ValueError(f"Method {self.name!r}: batches must be one of {', '.join(BATCHES)}, got {self.batches!r}")

    @property
    def mixes(self) -> bool:
        """Whether it trains on mixed images, which have no class to find companions of."""
        return self.criterion.mixes and self.batches != "same_class"

    @functools.cached_property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """Parameters of the criterion; `**options` stand for those of the class below it."""
        return arguments_of(self.criterion)

    @functools.cached_property
    def options(self) -> dict[str, Option]:
        """What a config may set, with the defaults of the criterion's signature."""
        types: dict[str, Any] = {}
        for base in (DistillationLoss, self.criterion):
            types |= typing.get_type_hints(base.__init__)
        texts = argument_texts(DistillationLoss) | argument_texts(self.criterion)
        left_out = {*COMMON, *FROM_THE_RUN, *self.fixed, *self.hidden}
        found = {
            name: Option(parameter.default, types.get(name, Any), texts.get(name, ""))
            for name, parameter in self.arguments.items()
            if name not in left_out and parameter.default is not inspect.Parameter.empty
        }
        return found | {name: value for name, value in self.batch_options.items() if isinstance(value, Option)}

    def sampled_rows(self, rows: int, options: Mapping[str, Any]) -> int:
        """How many of the rows of a step are newly sampled; the others repeat or accompany them."""
        companions = options.get("companions", self.batch_options.get("companions", 1))
        each = {"samples": 1, "overlap": 2, "two_views": 2, "same_class": companions + 1}
        return rows // each[self.batches]


METHODS: dict[str, Method] = {}
"""The methods by name; `dlb_fast.methods` fills it."""


def register(method: Method) -> Method:
    """Register a method under its name.

    Raises:
        ValueError: the name is taken.
    """
    if method.name in METHODS:
        raise ValueError(f"register: there is a method {method.name!r} already; choose another name")
    METHODS[method.name] = method
    return method


def find(name: str) -> Method:
    """The method of a name, or of `module:Class` for anybody's `DistillationLoss`.

    Raises:
        ValueError: nothing of this name; the message has a near one.
    """
    if ":" in name:
        return _from_outside(name)
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise ValueError(f"config: loss.method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name]


def _from_outside(name: str) -> Method:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        why = f"cannot import {module} ({error}); is it on PYTHONPATH?"
        raise ValueError(f"config: loss.method {name!r}: {why}") from None
    if found is None:
        raise ValueError(f"config: loss.method {name!r}: {module} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, DistillationLoss)):
        raise ValueError(f"config: loss.method {name!r} is not a dlb_fast.DistillationLoss")
    for method in METHODS.values():
        if method.criterion is found and not method.fixed:
            return method  # its own file registered it
    about = (inspect.getdoc(found) or attribute).splitlines()[0]
    batches: Any = getattr(found, "batches", "samples")
    return Method(name, found, about, batches=batches)


def argument_texts(documented: type) -> dict[str, str]:
    """Argument -> its text in the `Args` section of a class's docstring."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n(?=[ ]))+)", (inspect.getdoc(documented) or "") + "\n", re.M)
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()).replace("``", "") for name, text in entries}
