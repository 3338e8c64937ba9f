"""Cross entropy without a teacher: the baseline of every comparison, measured like the methods."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import Teacher
from ..losses import DistillationLoss, Inputs
from .registry import Method, register

__all__ = ["CrossEntropy", "reference"]


class CrossEntropy(DistillationLoss):
    """torch's cross entropy from the implementation of the methods, with ``parts``.

    Args:
        label_smoothing: as in torch.
        weight: ``(C,)`` class weights, as in torch.
        ignore_index: rows with this label do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: as in :func:`~dlb_fast.fused_lb_loss`.

    >>> round(CrossEntropy()(torch.zeros(2, 2), torch.tensor([0, 1])).item(), 4)
    0.6931
    """

    mixes = True

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, reduction=reduction, impl=impl
        )

    def teacher(self, inputs: Inputs) -> Teacher:
        return Teacher("none")


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """torch's cross entropy."""
    return torch.nn.functional.cross_entropy(logits, target)


register(
    Method(
        "ce",
        CrossEntropy,
        "cross entropy, no sample repeated",
        card="dlb",
        variants={
            "ce": ("CE", {"label_smoothing": 0.0}),
            "ls": ("CE + label smoothing 0.1", {"label_smoothing": 0.1}),
        },
    )
)
