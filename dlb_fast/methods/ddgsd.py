"""DDGSD: two views of each sample teach each other within the step.

    L = ce_weight * CE(all 2n rows) + alpha * T^2 * [mean KL(p2 || p1) + mean KL(p1 || p2)]

``p1`` and ``p2`` are the softened predictions for the two views, detached where they teach. It is the control for the
lag of DLB, whose teacher is one step old.

Source: Xu & Liu, AAAI 2019, in **third-party** code (winycg/Self-KD-Lib: T=4, ``ce_weight=0.5``, and a term on the
means of the features that is not part of this). No official code was found.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import check_logits
from ..functional import LossParts, Teacher, distill
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar, teacher_kl
from .registry import Method, register

__all__ = ["DdgsdLoss", "ddgsd_loss", "reference"]

TEMPERATURE = 4.0  # third-party code
ALPHA, CE_WEIGHT = 1.0, 1.0  # ours; the third-party code has ce_weight 0.5, the paper's numbers were not available


def _other_view(op: str, logits: Tensor) -> Teacher:
    if logits.shape[0] % 2:
        raise ValueError(f"{op}: rows must be [first views | second views], an even number, got {logits.shape[0]}")
    # The mean over all rows times 2 is the sum of the means over the two halves.
    return Teacher("logits", logits.detach().roll(logits.shape[0] // 2, 0), kl_weight=2.0)


def ddgsd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = ALPHA,
    temperature: Scalar = TEMPERATURE,
    ce_weight: float = CE_WEIGHT,
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
    """DDGSD: ``ce_weight CE(all rows) + alpha T^2 [KL(p2 || p1) + KL(p1 || p2)]``, each KL a mean over its half.

    A view is detached where it teaches.

    Args:
        logits: ``(2n, C)``, rows ``[n first views | the same n samples, second views]``.
        target: ``(2n,)`` labels or ``(2n, C)`` probabilities.
        alpha: weight of the KL.
        temperature: T > 0 of both distributions.
        ce_weight: weight of the cross entropy.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **third-party** code winycg/Self-KD-Lib.

    >>> z, y = torch.zeros(2, 4), torch.tensor([1, 1])
    >>> round(ddgsd_loss(z, y).item(), 4) == round(1.386294, 4)
    True
    """
    op = "ddgsd_loss"
    check_logits(op, logits, target)
    loss, parts = distill(
        op, logits, target, _other_view(op, logits), alpha=alpha, temperature=temperature, ce_weight=ce_weight,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b,
        lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class DdgsdLoss(DistillationLoss):
    """DDGSD as a criterion over rows ``[first views | second views]``: the loss of :func:`ddgsd_loss`.

    Args:
        alpha: weight of the KL.
        temperature: of both distributions.
        ce_weight: weight of the cross entropy.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> DdgsdLoss()(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([])
    """

    mixes = True

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        temperature: Scalar = TEMPERATURE,
        ce_weight: float = CE_WEIGHT,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha, temperature=temperature, ce_weight=ce_weight, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip

    def teacher(self, inputs: Inputs) -> Teacher:
        return _other_view("DdgsdLoss", inputs.logits)


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    ce_weight: float = CE_WEIGHT,
) -> Tensor:
    """The definition: two halves, two KLs."""
    one, two = logits.chunk(2)
    first = teacher_kl(torch.softmax(two / temperature, 1), one, temperature)
    second = teacher_kl(torch.softmax(one / temperature, 1), two, temperature)
    return ce_weight * F.cross_entropy(logits, target) + alpha * (first + second)


register(
    Method(
        "ddgsd",
        DdgsdLoss,
        "two views teach each other within the step (lag 0)",
        card="ddgsd",
        batches="two_views",
        variants={"ddgsd": ("DDGSD (lag 0)", {})},
    )
)
