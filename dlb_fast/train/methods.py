"""What can be trained: each method is a criterion and a way to fill the batch.

`compare` puts methods side by side at equal optimiser steps and equal rows per step, hence equal images seen. DLB shows
every drawn sample twice in a row; `two_view` shows the same batches without the KL, which is what isolates the KL;
`ce` fills the batch with distinct samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dlb_fast import LastBatchLoss, LossParts, fused_lb_loss

from .config import LossConfig, RunConfig, override

__all__ = ["METHODS", "VARIANTS", "CrossEntropy", "make_criterion", "variant"]


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

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean loss `()` of logits `(B, C)`; smoothing applies in training only."""
        smoothing = self.label_smoothing if self.training else 0.0
        loss, self.parts = fused_lb_loss(
            logits, target, label_smoothing=smoothing, impl=self.impl, return_parts=True
        )
        return loss


def _last_batch(config: LossConfig, num_classes: int, half: int, alpha: float) -> nn.Module:
    return LastBatchLoss(
        num_classes,
        capacity=half,
        alpha=alpha,
        temperature=config.temperature,
        label_smoothing=config.label_smoothing,
        impl=config.impl,
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: whether half of every batch repeats the batch before, and its criterion."""

    about: str
    overlap: bool
    criterion: Callable[[LossConfig, int, int], nn.Module]


METHODS = {
    "dlb": Method(
        "self-distillation from the last mini-batch", True, lambda c, n, half: _last_batch(c, n, half, c.alpha)
    ),
    "two_view": Method(
        "the same batches with alpha=0: two views, no KL", True, lambda c, n, half: _last_batch(c, n, half, 0.0)
    ),
    "ce": Method(
        "cross entropy, no sample repeated", False, lambda c, n, half: CrossEntropy(c.label_smoothing, c.impl)
    ),
}

# name in `compare` -> fields it sets on top of the shared config
VARIANTS: dict[str, dict[str, Any]] = {
    "ce": {"method": "ce", "label_smoothing": 0.0},
    "ls": {"method": "ce", "label_smoothing": 0.1},
    "two_view": {"method": "two_view"},
    "dlb": {"method": "dlb"},
}
LABELS = {
    "ce": "CE",
    "ls": "CE + label smoothing 0.1",
    "two_view": "two views, alpha=0",
    "dlb": "DLB",
}


def make_criterion(config: LossConfig, num_classes: int, half: int) -> nn.Module:
    """The criterion of a config for `num_classes` logits and `half` repeated rows."""
    return METHODS[config.method].criterion(config, num_classes, half)


def variant(config: RunConfig, name: str) -> RunConfig:
    """The config of one of the compared methods.

    Raises:
        ValueError: unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"compare: unknown method {name!r}; known: {', '.join(VARIANTS)}")
    return override(config, **VARIANTS[name])
