"""CS-KD: another sample of the same class is the teacher.

    L = CE(anchors) + alpha * T^2 * mean KL(softmax(partner / T) || softmax(anchor / T))

Partners are random samples of the anchor's class (possibly the anchor itself), forwarded without gradient but in train
mode, after the anchors.

Source: **official** code alinlab/cs-kd, `train.py` (Yun et al., CVPR 2020).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import check_logits, check_rows
from ..functional import LossParts, Teacher, distill
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar, teacher_kl
from .registry import Method, register

__all__ = ["CsKDLoss", "cs_kd_loss", "reference"]

ALPHA, TEMPERATURE = 1.0, 4.0  # official code, CIFAR; its command for CUB has alpha (lamda) 3


def cs_kd_loss(
    logits: Tensor,
    target: Tensor,
    partner_logits: Tensor,
    *,
    alpha: Scalar = ALPHA,
    temperature: Scalar = TEMPERATURE,
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
    """CS-KD: ``CE(anchors) + alpha T^2 KL(softmax(partner / T) || softmax(z / T))``, partners of the same class.

    Args:
        logits: ``(B, C)`` of the anchors.
        target: ``(B,)`` labels or ``(B, C)`` probabilities.
        partner_logits: ``(B, C)`` of other samples of the same classes, from a forward without gradient; detached here.
        alpha: weight of the KL.
        temperature: T > 0 of both distributions.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **official** code alinlab/cs-kd.

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(cs_kd_loss(z, y, z).item(), 4) == round(1.386294, 4)
    True
    """
    op = "cs_kd_loss"
    check_logits(op, logits, target)
    teacher = Teacher("logits", check_rows(op, "partner_logits", partner_logits, logits).detach())
    loss, parts = distill(
        op, logits, target, teacher, alpha=alpha, temperature=temperature,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b,
        lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class CsKDLoss(DistillationLoss):
    """CS-KD as a criterion over rows ``[anchors | partners of the same classes]``: the loss of :func:`cs_kd_loss`.

    The partners' rows come from a forward without gradient (here they are detached in any case); the cross entropy
    counts the anchors only.

    Args:
        alpha: weight of the KL.
        temperature: of both distributions.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> CsKDLoss()(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([])
    """

    mixes = True

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        temperature: Scalar = TEMPERATURE,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip

    def teacher(self, inputs: Inputs) -> Teacher:
        rows = inputs.logits.shape[0]
        if rows % 2:
            raise ValueError(f"CsKDLoss: rows must be [anchors | partners], an even number, got {rows}")
        return Teacher("logits", inputs.logits[rows // 2 :].detach(), rows=rows // 2)

    def cost(self) -> str:
        return "no state; half of the rows are partners, forwarded without gradient"


def reference(
    logits: Tensor,
    target: Tensor,
    partner_logits: Tensor,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The definition, in the order of the official code."""
    teacher = torch.softmax(partner_logits.detach() / temperature, dim=1)
    return F.cross_entropy(logits, target) + alpha * teacher_kl(teacher, logits, temperature)


register(
    Method(
        "cs_kd",
        CsKDLoss,
        "CS-KD: another sample of the class",
        card="cskd",
        batches="same_class",
        batch_options={"companions": 1, "include_anchor": True},
        forward="partners",
        variants={"cs_kd": ("CS-KD", {})},
    )
)
