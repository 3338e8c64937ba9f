"""Tf-KD's regularisation: a virtual teacher, as its official code computes it.

    L = (1 - alpha) CE + alpha * (multiplier / C) * mean KL(v' || softmax(z)),    v' = softmax(v / T)

``v`` has ``correct_share`` on the right class and the rest divided equally. The official code has three surprises: the
probabilities ``v`` go through a softmax once more, the student is not softened, and there is no T^2. ``KLDivLoss()``
divides by B * C, which ``multiplier / C`` undoes. At C = 100, T = 20 the teacher has 0.0105 on the right class against
0.0100 elsewhere, so the loss is nearly label smoothing.

Source: **official** code yuanli2333/Teacher-free-Knowledge-Distillation (Yuan et al., CVPR 2020).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import as_int, check_logits, check_number, check_share, check_temperature
from ..functional import LossParts, Teacher, distill
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar
from ._common import labels
from .registry import Method, register

__all__ = ["TfKDRegLoss", "reference", "tf_kd_reg_loss"]

ALPHA, TEMPERATURE, MULTIPLIER = 0.1, 20.0, 100.0  # official code, ResNet-18 on CIFAR-100
CORRECT_SHARE = 0.99  # official code


def softened_share(num_classes: int, temperature: float, correct_share: float) -> float:
    """The right class's probability in ``v'``.

    >>> round(softened_share(100, 20.0, 0.99), 4)                      # nearly uniform
    0.0105
    """
    # As a softmax computes it: relative to the larger of the two, so that no temperature overflows.
    gap = (correct_share - (1.0 - correct_share) / max(num_classes - 1, 1)) / temperature
    right, other = math.exp(min(gap, 0.0)), math.exp(-max(gap, 0.0))
    return right / (right + (num_classes - 1) * other)


def _checked(op: str, temperature: Scalar, multiplier: float, correct_share: float) -> tuple[float, float, float]:
    check_temperature(op, temperature)
    return (
        check_number(op, "temperature", temperature, positive=True),
        check_number(op, "multiplier", multiplier, positive=True),
        check_share(op, "correct_share", correct_share),
    )


def _virtual_teacher(op: str, inputs: Inputs, temperature: float, multiplier: float, correct_share: float) -> Teacher:
    labels(op, inputs.target, inputs.target_b, "the teacher knows the right class")
    classes = inputs.logits.shape[1]
    share = softened_share(classes, temperature, correct_share)
    return Teacher("uniform", correct_share=share, kl_weight=multiplier / classes)


def tf_kd_reg_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = ALPHA,
    temperature: float = TEMPERATURE,
    multiplier: float = MULTIPLIER,
    correct_share: float = CORRECT_SHARE,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Any:
    """Tf-KD's regularisation: ``(1 - alpha) CE + alpha (multiplier / C) KL(softmax(v / T) || softmax(z))``.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` labels.
        alpha: weight of the KL in ``[0, 1]``.
        temperature: T > 0 of the teacher; the student is not softened.
        multiplier: > 0, times the KL; C undoes the division by the number of classes.
        correct_share: probability of the right class in ``v``, in ``[0, 1]``.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **official** code yuanli2333/Teacher-free-Knowledge-Distillation.

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> tf_kd_reg_loss(z, y).shape
    torch.Size([])
    """
    op = "tf_kd_reg_loss"
    check_logits(op, logits, target)
    temperature, multiplier, correct_share = _checked(op, temperature, multiplier, correct_share)
    teacher = _virtual_teacher(op, Inputs(logits, target, temperature), temperature, multiplier, correct_share)
    loss, parts = distill(
        op, logits, target, teacher, alpha=alpha, temperature=1.0, ce_alpha=-1.0,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask,
        reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class TfKDRegLoss(DistillationLoss):
    """Tf-KD's regularisation as a criterion: the loss of :func:`tf_kd_reg_loss`.

    Args:
        num_classes: ``C``.
        alpha: weight of the KL in ``[0, 1]``.
        temperature: of the teacher; the student is not softened.
        multiplier: times the KL; C undoes the division by the number of classes.
        correct_share: probability of the right class in the teacher before its softmax.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> TfKDRegLoss(num_classes=4)(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    softens_student = False

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: Scalar = ALPHA,
        temperature: float = TEMPERATURE,
        multiplier: float = MULTIPLIER,
        correct_share: float = CORRECT_SHARE,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        op = "TfKDRegLoss"
        num_classes = as_int(num_classes, op, "num_classes", 1)
        temperature, multiplier, correct_share = _checked(op, temperature, multiplier, correct_share)
        super().__init__(
            alpha=alpha, temperature=temperature, ce_alpha=-1.0, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.num_classes = num_classes
        self.multiplier, self.correct_share = multiplier, correct_share

    def teacher(self, inputs: Inputs) -> Teacher:
        if inputs.logits.shape[1] != self.num_classes:
            raise ValueError(
                f"TfKDRegLoss: logits must have C = {self.num_classes} classes, got {inputs.logits.shape[1]}; "
                f"make the criterion with num_classes={inputs.logits.shape[1]}"
            )
        numbers = _checked("TfKDRegLoss", self.temperature, self.multiplier, self.correct_share)  # may be reassigned
        return _virtual_teacher("TfKDRegLoss", inputs, *numbers)


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    multiplier: float = MULTIPLIER,
    correct_share: float = CORRECT_SHARE,
) -> Tensor:
    """The definition, in the order of the official code."""
    classes = logits.shape[1]
    hot = F.one_hot(target, classes).to(logits.dtype)
    virtual = correct_share * hot + (1.0 - correct_share) / (classes - 1) * (1.0 - hot)
    soft = F.kl_div(torch.log_softmax(logits, 1), torch.softmax(virtual / temperature, 1), reduction="none").mean()
    return (1.0 - alpha) * F.cross_entropy(logits, target) + alpha * soft * multiplier


register(
    Method(
        "tf_kd_reg",
        TfKDRegLoss,
        "Tf-KD's regularisation by a virtual teacher",
        card="tfkdreg",
        variants={"tf_kd_reg": ("Tf-KD reg", {})},
    )
)
