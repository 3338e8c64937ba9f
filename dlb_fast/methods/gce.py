"""Generalised cross entropy (GCE): between the cross entropy (q to 0) and the mean absolute error (q = 1).

    L = mean (1 - p_y^q) / q

``p_y`` is the probability of the label. The gradient is that of the cross entropy times ``p_y^q``, so that labels which
the model does not believe teach less. Computed from the cross entropy of the rows, which the kernel gives with its
gradient: ``p_y^q = exp(-q CE)``. So a row whose ``p_y`` underflows has the loss ``1 / q`` and the gradient 0, where the
formula in probabilities has NaN.

The truncated form of the paper is not part of this: it drops samples by a pass over the whole training set every few
epochs. The published code does that with the best checkpoint so far.

Source: Zhang & Sabuncu, NeurIPS 2018, in **third-party** code (AlanChou/Truncated-Loss; the official code of SCE has
the same formula with the same q).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._args import as_number, check_reduction, check_scalar, check_weight
from ..functional import LossParts
from ..losses import DistillationLoss, Inputs
from ..reference import RowTerms, reduce_rows
from ._common import label_costs, one_minus_exp
from .registry import Method, register

__all__ = ["GceLoss", "gce_loss", "reference"]

Q = 0.7  # third-party code, and the official code of SCE


def _checked(op: str, q: float) -> float:
    number = as_number(op, "q", q)
    check_scalar(op, "q", number, positive=True, most=1.0)
    return number


def _gce(
    op: str,
    logits: Tensor,
    target: Tensor | None,
    *,
    q: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    q = _checked(op, q)
    check_reduction(op, reduction)
    why = "the loss is a function of the label's probability"
    cost, target, correct = label_costs(op, logits, target, why, ignore_index=ignore_index, impl=impl)
    share = (target != ignore_index).to(cost)
    if weight is not None:
        check_weight(op, logits, weight)
        share = share * weight.to(cost)[target.clamp(0, logits.shape[1] - 1)]
    count = share.sum()
    loss = reduce_rows(RowTerms(share * one_minus_exp(q * cost) / q, count), reduction)
    with torch.no_grad():
        ce = reduce_rows(RowTerms(share * cost, count), "sum" if reduction == "none" else reduction)
        return loss, torch.stack([loss.sum(), ce, loss.sum(), correct])


def gce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    q: float = Q,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Any:
    """Generalised cross entropy: ``mean (1 - p_y^q) / q``, ``p_y`` the probability of the label.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` labels.
        q: in ``(0, 1]``; towards 0 the loss becomes the cross entropy, at 1 it is ``1 - p_y``, half the mean absolute
            error.
        weight: ``(C,)`` class weights: a row counts ``weight[y]`` times, and the mean divides by their sum, as in
            torch's cross entropy.
        ignore_index: rows with this label have no loss.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: as in :func:`~dlb_fast.fused_lb_loss`.
        return_parts: also return :class:`~dlb_fast.LossParts`: ``ce`` is the cross entropy, which is shown and not
            trained, ``lb`` is the loss.

    Returns:
        The loss, or ``(loss, LossParts)``, as :func:`~dlb_fast.fused_lb_loss`.

    Raises:
        ValueError, TypeError: arguments that do not fit together; targets that are no labels.

    Source: Zhang & Sabuncu, NeurIPS 2018, in **third-party** code.

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> gce_loss(z, y, q=1.0).item(), gce_loss(z, y, q=0.5).item()           # 1 - 1/4, (1 - 1/2) / 0.5
    (0.75, 1.0)
    """
    loss, parts = _gce(
        "gce_loss", logits, target, q=q, weight=weight, ignore_index=ignore_index, reduction=reduction, impl=impl
    )
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class GceLoss(DistillationLoss):
    """Generalised cross entropy as a criterion: the loss of :func:`gce_loss`.

    It has no label smoothing, which would give the label's probability no single value, and no ``kd_mask``.

    Args:
        q: in (0, 1]; towards 0 the loss becomes the cross entropy, at 1 it is 1 - p of the label.
        weight: ``(C,)`` class weights, as in torch.
        ignore_index: rows with this label do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: as in :func:`~dlb_fast.fused_lb_loss`.

    >>> GceLoss(q=1.0)(torch.zeros(2, 4), torch.tensor([0, 1])).item()
    0.75
    """

    def __init__(
        self,
        *,
        q: float = Q,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        q = _checked("GceLoss", q)
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction, impl=impl)
        self.q = q

    def objective(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if inputs.kd_mask is not None:
            raise ValueError(
                "GceLoss: kd_mask must be None, because the loss has one term; leave rows out by ignore_index"
            )
        if self.label_smoothing:
            raise ValueError(f"GceLoss: label_smoothing must be 0, got {self.label_smoothing}; the loss has none")
        return _gce(
            "GceLoss", inputs.logits, inputs.target, q=self.q, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, impl=self.impl,
        )  # fmt: skip

    def cost(self) -> str:
        return "no state, no extra forward; the gradient is multiplied by a factor per row"


def reference(logits: Tensor, target: Tensor, *, q: float = Q) -> Tensor:
    """The definition, in the order of the third-party code, without the constant that truncation subtracts."""
    p = torch.softmax(logits, 1).gather(1, target[:, None])
    return ((1 - p**q) / q).mean()


register(Method("gce", GceLoss, "generalised cross entropy (1 - p^q) / q", card="gce", variants={"gce": ("GCE", {})}))
