"""Zipf's label smoothing: the ranks of the logits say how probable the wrong classes are.

    L = CE + alpha * mean KL(q || softmax of the logits without the right class),    q_k ~ rank_k^-power

Ranks are counted over all classes, the right one included; ties share the smallest rank.

Source: **official** code megvii-research/zipfls, `pytorch_zipfls/losses.py` with ``dense=False`` (ECCV 2022, arXiv
2207.12980). Its dense ranking and its auxiliary head need the network's feature maps and are not part of this.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import check_ignore_index, check_logits, check_number, check_target, check_tensor
from ..functional import LossParts, Teacher, distill
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar, compute_dtype
from ._common import labels
from .registry import Method, register

__all__ = ["ZipfLoss", "reference", "zipf_loss"]

ALPHA = 0.1  # README of the official code: lambda 0.1 on CIFAR-100 and ImageNet, 1 on TinyImageNet and INAT21
POWER = 1.0  # official code


def _ranks(op: str, inputs: Inputs, power: float) -> Teacher:
    """``rank^-power`` over the wrong classes; the student is the logits without the right class."""
    logits = inputs.logits
    target = labels(op, inputs.target, inputs.target_b, "the right class is left out")
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"{op}: needs at least 2 classes, got C = {classes}")
    label = target.clamp(0, classes - 1)[:, None]
    with torch.no_grad():
        z = logits.detach().to(compute_dtype(logits.dtype)).contiguous()
        larger = classes - torch.searchsorted(z.sort(1).values, z, right=True)  # ties share the smallest rank
        # In logarithms, because a large power makes rank^-power of every rank but the first underflow.
        log_q = -power * (1.0 + larger).to(z.dtype).log()
        teacher = log_q.scatter(1, label, -math.inf).softmax(1)
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter(1, label, True)
    student = logits.masked_fill(is_label, -math.inf)
    return Teacher("probabilities", teacher, mask=target != inputs.ignore_index, student=student)


def zipf_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = ALPHA,
    power: float = POWER,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Any:
    """Zipf's label smoothing: ``CE + alpha KL(q || softmax of the non-target logits)``, ``q_k ~ rank_k^-power``.

    Ranks have no gradient.

    Args:
        logits: ``(B, C)``, C >= 2.
        target: ``(B,)`` labels; a row with an ignored label has no loss.
        alpha: weight of the KL.
        power: exponent of the rank, >= 0.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **official** code megvii-research/zipfls.

    >>> z, y = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0])
    >>> zipf_loss(z, y, return_parts=True)[1].lb > 0
    tensor(True)
    """
    op = "zipf_loss"
    check_logits(op, logits, target)
    check_target(op, logits, check_tensor(op, "target", target))
    power, ignore_index = check_number(op, "power", power, positive=False), check_ignore_index(op, ignore_index)
    teacher = _ranks(op, Inputs(logits, target, 1.0, ignore_index=ignore_index), power)
    loss, parts = distill(
        op, logits, target, teacher, alpha=alpha, temperature=1.0,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask,
        reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class ZipfLoss(DistillationLoss):
    """Zipf's label smoothing as a criterion: the loss of :func:`zipf_loss`.

    Args:
        alpha: weight of the KL.
        power: exponent of the rank.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> ZipfLoss()(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        power: float = POWER,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        power = check_number("ZipfLoss", "power", power, positive=False)
        super().__init__(
            alpha=alpha, temperature=1.0, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.power = power

    def teacher(self, inputs: Inputs) -> Teacher:
        return _ranks("ZipfLoss", inputs, self.power)

    def cost(self) -> str:
        return "no state; a sort of every row and a second pass of the kernel per step"


def reference(logits: Tensor, target: Tensor, *, alpha: float = ALPHA, power: float = POWER) -> Tensor:
    """The definition, row by row, in the order of the official code."""
    rows = []
    for z, y in zip(logits, target.tolist(), strict=True):
        others = torch.arange(len(z), device=z.device) != y
        rank = (z.detach()[None, :] > z.detach()[:, None]).sum(1) + 1
        q = (1.0 / rank[others].to(z.dtype)) ** power
        rows.append(F.kl_div(torch.log_softmax(z[others], 0), q / q.sum(), reduction="sum"))
    return F.cross_entropy(logits, target) + alpha * torch.stack(rows).mean()


register(
    Method(
        "zipf",
        ZipfLoss,
        "Zipf's label smoothing from the logits' ranks",
        card="zipf",
        variants={"zipf": ("Zipf LS", {})},
    )
)
