"""LsrKD and teacher correction (TC): a virtual teacher that nobody trained.

    L = (1 - alpha) CE + alpha * tau^2 * mean KL(u || softmax(z / tau))

``u`` is uniform (LsrKD), or ``correct_share`` on the right class with the rest divided equally (TC); ``u`` itself is
not softened. The kernel computes it in registers. At ``tau = 1`` the uniform form is label smoothing: LsrKD(alpha=e) +
e log C is the cross entropy with label_smoothing=e, with the same gradient. For a large tau the KL tends to half the
variance of the logits over the classes.

Source: Wang et al., arXiv 2009.05226. A **reconstruction** from the abstract: whether the paper has tau^2 and
(1 - alpha), and whether TC's teacher is softened, is not known to us.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import check_correct_share, check_logits
from ..functional import LossParts, Teacher, distill
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar, teacher_kl
from .registry import Method, register

__all__ = ["LsrKDLoss", "lsr_kd_loss", "reference"]

ALPHA = 0.1  # that of label smoothing; the paper's was not available
TEMPERATURE = 3.0  # ours: at 1 the method is label smoothing, which is there without it


def lsr_kd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = ALPHA,
    temperature: Scalar = TEMPERATURE,
    correct_share: float | None = None,
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
    """LsrKD and teacher correction: ``(1 - alpha) CE + alpha tau^2 KL(u || softmax(z / tau))``.

    ``u`` is uniform, or ``correct_share`` on the right class and the rest divided equally. A row with an ignored label
    still learns from a uniform teacher unless ``kd_mask`` takes it out; with ``correct_share`` it does not.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` labels; with the uniform teacher also ``(B, C)`` probabilities.
        alpha: weight of the KL in ``[0, 1]``.
        temperature: of the student; the teacher is not softened.
        correct_share: probability of the right class in the teacher, in ``[0, 1]``; None: uniform.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: arXiv 2009.05226, a **reconstruction** (see the module).

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(lsr_kd_loss(z, y, alpha=0.1).item(), 4) == round(0.9 * 1.386294, 4)
    True
    """
    op = "lsr_kd_loss"
    check_logits(op, logits, target)
    teacher = Teacher("uniform", correct_share=correct_share)
    loss, parts = distill(
        op, logits, target, teacher, alpha=alpha, temperature=temperature, ce_alpha=-1.0,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b,
        lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class LsrKDLoss(DistillationLoss):
    """LsrKD and teacher correction as a criterion: the loss of :func:`lsr_kd_loss` (a **reconstruction**).

    Args:
        alpha: weight of the KL in ``[0, 1]``.
        temperature: of the student; the teacher is not softened.
        correct_share: probability of the right class in the teacher (teacher correction); None: uniform.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> LsrKDLoss(alpha=0.1, temperature=2.0)(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    mixes = True

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        temperature: Scalar = TEMPERATURE,
        correct_share: float | None = None,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        correct_share = check_correct_share("LsrKDLoss", correct_share)
        super().__init__(
            alpha=alpha, temperature=temperature, ce_alpha=-1.0, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.correct_share = correct_share

    def teacher(self, inputs: Inputs) -> Teacher:
        return Teacher("uniform", correct_share=self.correct_share)


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    correct_share: float | None = None,
) -> Tensor:
    """The definition: the teacher as a tensor."""
    classes = logits.shape[1]
    teacher = torch.full_like(logits, 1.0 / classes)
    if correct_share is not None:
        hot = F.one_hot(target, classes).to(logits.dtype)
        teacher = correct_share * hot + (1.0 - correct_share) / max(classes - 1, 1) * (1.0 - hot)
    return (1.0 - alpha) * F.cross_entropy(logits, target) + alpha * teacher_kl(teacher, logits, temperature)


register(
    Method(
        "lsr_kd",
        LsrKDLoss,
        "LsrKD: a uniform teacher at a temperature; correct_share: teacher correction",
        card="lsrkd",
        one_class=("correct_share",),
        variants={"lsr_kd": ("LsrKD", {}), "tc": ("LsrKD + TC 0.9", {"correct_share": 0.9})},
    )
)
