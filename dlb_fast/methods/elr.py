"""Early-learning regularisation (ELR): agree with the average of the model's own earlier predictions for the sample.

    L = CE + alpha * mean log(1 - <t, p>),    t = beta t + (1 - beta) p / sum p

``p`` is the prediction, clipped to [1e-4, 1 - 1e-4]; ``t`` is kept for every sample, starts at 0 and takes this batch's
prediction before it is used; it has no gradient. The term is no KL to a teacher, so no kernel of this package has it:
it is plain torch; the cross entropy is the kernel's.

Source: **official** code shengliu66/ELR, `ELR/model/loss.py` (Liu et al., NeurIPS 2020).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import (
    as_int,
    check_device,
    check_dtype,
    check_ignore_index,
    check_logits,
    check_rows,
    check_share,
    check_target,
    check_tensor,
)
from ..functional import LossParts
from ..losses import Inputs
from ..reference import Scalar, compute_dtype
from ._common import add_term, labels
from .bank import BankLoss, SampleBank
from .registry import Method, register

__all__ = ["ElrLoss", "elr_loss", "reference"]

ALPHA, BETA = 3.0, 0.7  # official code, CIFAR-10 with symmetric noise: lambda and beta
CLIP = 1e-4  # official code
MEMORY_DTYPE = torch.float32  # official code


def _averaged(logits: Tensor, past: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``log(1 - <t, p>)`` per row (B,), and the new average ``t`` (B, C)."""
    p = torch.softmax(logits.to(compute_dtype(logits.dtype)), 1).clamp(CLIP, 1.0 - CLIP)
    with torch.no_grad():
        average = beta * past.to(p.dtype) + (1.0 - beta) * (p / p.sum(1, keepdim=True))
    return torch.log(1.0 - (average * p).sum(1)), average


def elr_loss(
    logits: Tensor,
    target: Tensor,
    past: Tensor,
    *,
    alpha: Scalar = ALPHA,
    beta: float = BETA,
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
    """ELR: ``CE + alpha mean log(1 - <t, p>)`` with the average prediction ``t = beta past + (1 - beta) p / sum p``.

    ``p`` is the prediction clipped to [1e-4, 1 - 1e-4]. ``t`` has no gradient and is what a loop keeps for the sample's
    next visit (:class:`ElrLoss` does). The second term is negative.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` labels or ``(B, C)`` probabilities; a row with an ignored label has no loss.
        past: ``(B, C)`` the samples' averages before this batch, 0 at the first visit; detached here.
        alpha: weight of the second term; lambda in the paper.
        beta: momentum of the average, in [0, 1].
        kd_mask: ``(B,)`` bool, False takes a row out of the second term.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **official** code shengliu66/ELR.

    >>> z, y = torch.zeros(1, 2), torch.tensor([0])
    >>> loss, parts = elr_loss(z, y, torch.zeros(1, 2), beta=0.5, return_parts=True)
    >>> round(parts.lb.item(), 4)                                            # t = (1/4, 1/4), p = (1/2, 1/2): log 3/4
    -0.2877
    """
    op = "elr_loss"
    check_logits(op, logits, target)
    beta, ignore_index, mask = check_share(op, "beta", beta), check_ignore_index(op, ignore_index), None
    for name, given in (("target", check_tensor(op, "target", target)), ("target_b", target_b)):
        if given is not None and (checked := check_target(op, logits, given, name)).dim() == 1:
            mask = checked != ignore_index if mask is None else mask & (checked != ignore_index)
    rows, _ = _averaged(logits, check_rows(op, "past", past, logits).detach(), beta)
    loss, parts = add_term(
        op, logits, target, rows, mask=mask, alpha=alpha, label_smoothing=label_smoothing, weight=weight,
        ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b, lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class ElrLoss(BankLoss):
    """ELR as a criterion: the loss of :func:`elr_loss`, with a bank of every sample's average prediction.

    Every training batch needs ``ids``. ``cost()`` tells the size of the bank. A batch with the ids of the one before it
    is that batch once more (:class:`~dlb_fast.DistillationLoss`): a loop whose batches all have the same ids passes
    ``epoch`` or calls ``step()`` after every optimiser step.

    Args:
        num_samples: samples of the training set.
        num_classes: ``C``.
        alpha: weight of the second term; lambda in the paper.
        beta: momentum of the average prediction, in [0, 1].
        memory_dtype: how the averages are stored.
        memory_device: where the averages are stored; None: beside the model, on the host when they would not fit.
        cross_rank: store the averages of all ranks on every rank, because a sample comes back on another one; their
            batches must have equal sizes.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> criterion = ElrLoss(num_samples=10, num_classes=4)
    >>> criterion(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([7, 3])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        alpha: Scalar = ALPHA,
        beta: float = BETA,
        memory_dtype: torch.dtype = MEMORY_DTYPE,
        memory_device: torch.device | str | None = None,
        cross_rank: bool = True,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        op = "ElrLoss"
        num_samples, num_classes = as_int(num_samples, op, "num_samples", 1), as_int(num_classes, op, "num_classes", 1)
        memory_device = check_device(op, "memory_device", memory_device)
        check_dtype(op, "memory_dtype", memory_dtype)
        beta = check_share(op, "beta", beta)
        super().__init__(
            SampleBank(num_samples, num_classes, memory_dtype, memory_device), cross_rank,
            alpha=alpha, label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index,
            reduction=reduction, impl=impl,
        )  # fmt: skip
        self.beta = beta
        self._average: Tensor | None = None  # what this batch leaves

    def objective(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        op = "ElrLoss"
        target = labels(op, inputs.target, inputs.target_b, "a mixed image belongs to no single sample")
        rows, seen = self.meet(inputs)
        past = torch.where(seen[:, None], rows, torch.zeros_like(rows))
        rows, average = _averaged(inputs.logits, past, check_share(op, "beta", self.beta))
        self._average = average if torch.is_grad_enabled() else None
        return add_term(
            op, inputs.logits, target, rows, mask=target != inputs.ignore_index, alpha=self.alpha,
            label_smoothing=self.label_smoothing, weight=self.weight, ignore_index=self.ignore_index,
            kd_mask=inputs.kd_mask, reduction=self.reduction, impl=self.impl,
        )  # fmt: skip

    def record(self, inputs: Inputs) -> None:
        average, self._average = self._average, None
        assert average is not None
        self.leave(inputs, average)


def reference(logits: Tensor, target: Tensor, past: Tensor, *, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """The definition, in the order of the official code."""
    p = torch.clamp(torch.softmax(logits, 1), 1e-4, 1.0 - 1e-4)
    fixed = p.detach()
    average = beta * past + (1 - beta) * (fixed / fixed.sum(dim=1, keepdim=True))
    return F.cross_entropy(logits, target) + alpha * (1 - (average * p).sum(dim=1)).log().mean()


register(
    Method(
        "elr",
        ElrLoss,
        "ELR: agree with the sample's own average prediction",
        card="elr",
        variants={"elr": ("ELR", {})},
    )
)
