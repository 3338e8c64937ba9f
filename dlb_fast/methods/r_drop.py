"""R-Drop: two forwards of each sample, drawn with different dropout, agree; both learn from the other.

    L = CE(all 2n rows) + alpha / 4 * [mean KL(p2 || p1) + mean KL(p1 || p2)]

This is half of the paper's ``CE1 + CE2 + alpha / 2 [KL + KL]``, so that the cross entropy is torch's mean over the
rows. Unlike DDGSD, no side is detached: a view also learns as a teacher, which no kernel of this package has, so the KL
is plain torch; the cross entropy is the kernel's.

Source: **official** code dropreg/R-Drop (Liang, Wu et al., NeurIPS 2021). Its fairseq criteria are the formula above
with sums over the tokens; the others differ in the weight and in what they average (see the card).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import check_logits, check_target
from ..functional import LossParts
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar, compute_dtype
from ._common import add_term
from .registry import Method, register

__all__ = ["RDropLoss", "r_drop_loss", "reference"]

ALPHA = 0.6  # official code of the image task: CE1 + CE2 + 0.3 [KL + KL], with sums over the batch instead of means


def _disagreement(op: str, logits: Tensor) -> Tensor:
    """Half of ``KL(other view || own)`` per row (2n,), with its gradient in both."""
    if logits.shape[0] % 2:
        raise ValueError(f"{op}: rows must be [first views | second views], an even number, got {logits.shape[0]}")
    own = torch.log_softmax(logits.to(compute_dtype(logits.dtype)), 1)
    other = own.roll(logits.shape[0] // 2, 0)
    p = other.exp()
    return 0.5 * (p * torch.where(p == 0, torch.zeros_like(own), other - own)).sum(1)


def r_drop_loss(
    logits: Tensor,
    target: Tensor | None,
    *,
    alpha: Scalar = ALPHA,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Any:
    """R-Drop: ``CE(all rows) + alpha / 4 [KL(p2 || p1) + KL(p1 || p2)]``, each KL a mean over the pairs.

    Both sides of each KL have a gradient. ``lb`` of the parts is what alpha multiplies.

    Args:
        logits: ``(2n, C)``, rows ``[n samples | the same n samples again]``, from forwards that differ (dropout, and in
            the trainer the augmentation).
        target: ``(2n,)`` labels or ``(2n, C)`` probabilities; None for the second term alone.
        alpha: weight of the KL, that of the paper.
        kd_mask: ``(2n,)`` bool, False takes a row's ``KL(other || row)`` out.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **official** code dropreg/R-Drop.

    >>> z, y = torch.zeros(2, 4), torch.tensor([1, 1])
    >>> round(r_drop_loss(z, y).item(), 4)                                   # log 4: equal rows have no second term
    1.3863
    """
    op = "r_drop_loss"
    check_logits(op, logits, target)
    if target is not None:
        target = check_target(op, logits, target)
    loss, parts = add_term(
        op, logits, target, _disagreement(op, logits), alpha=alpha, label_smoothing=label_smoothing, weight=weight,
        ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b, lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class RDropLoss(DistillationLoss):
    """R-Drop as a criterion over rows ``[first views | second views]``: the loss of :func:`r_drop_loss`.

    Args:
        alpha: weight of the KL, that of the paper.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> RDropLoss()(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([])
    """

    mixes = True

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha, label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index,
            reduction=reduction, impl=impl,
        )  # fmt: skip

    def objective(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return add_term(
            "RDropLoss", inputs.logits, inputs.target, _disagreement("RDropLoss", inputs.logits), alpha=self.alpha,
            label_smoothing=self.label_smoothing, weight=self.weight, ignore_index=self.ignore_index,
            kd_mask=inputs.kd_mask, target_b=inputs.target_b, lam=inputs.lam, reduction=self.reduction, impl=self.impl,
        )  # fmt: skip

    def cost(self) -> str:
        return "no state; every sample is forwarded twice"


def reference(logits: Tensor, target: Tensor, *, alpha: float = ALPHA) -> Tensor:
    """The definition: half of CE1 + CE2 + alpha / 2 [KL + KL], the KLs in the order of the official code."""
    (one, two), (y1, y2) = logits.chunk(2), target.chunk(2)
    p, q = torch.log_softmax(one, 1), torch.log_softmax(two, 1)
    kl = F.kl_div(p, torch.softmax(two, 1), reduction="none").sum(1).mean()
    reverse = F.kl_div(q, torch.softmax(one, 1), reduction="none").sum(1).mean()
    return 0.5 * (F.cross_entropy(one, y1) + F.cross_entropy(two, y2) + alpha * (kl + reverse) / 2)


register(
    Method(
        "r_drop",
        RDropLoss,
        "R-Drop: two forwards agree, both with gradient",
        card="rdrop",
        batches="two_views",
        variants={"r_drop": ("R-Drop", {})},
    )
)
