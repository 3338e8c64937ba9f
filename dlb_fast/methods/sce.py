"""Symmetric cross entropy (SCE): the cross entropy and its reverse, with label and prediction exchanged.

    L = alpha * CE(y, p) + beta * RCE,    RCE = - mean sum_k p_k log y_k = -A (1 - p_y)

``log y_k`` of a wrong class is A, the logarithm of what the official code clips the label to: ``A = log 1e-4 = -9.21``.
The gradient is that of the cross entropy times ``alpha - A beta p_y``. Computed from the cross entropy of the rows,
which the kernel gives with its gradient: ``1 - p_y = 1 - exp(-CE)``.

Source: **official** code YisenWang/symmetric_cross_entropy_for_noisy_labels, `loss.py` (Wang et al., ICCV 2019), which
also clips ``p_y`` in the cross entropy to 1e-7, so that rows below have no gradient of it. The PyTorch version that it
names, HanxunH/SCELoss-Reproduce, does not, and neither does this; that one clips ``p_k`` in the RCE to 1e-7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import check_number, check_reduction
from ..functional import LossParts, prepare, row_loss
from ..losses import DistillationLoss, Inputs
from ..reference import RowTerms, Scalar, reduce_rows
from ._common import label_costs, one_minus_exp
from .registry import Method, register

__all__ = ["SceLoss", "reference", "sce_loss"]

ALPHA, BETA = 0.1, 1.0  # official code, CIFAR-10; it has alpha 6, beta 0.1 on CIFAR-100 and alpha 0.01, beta 1 on MNIST
A = math.log(1e-4)  # official code


def _sce(
    op: str,
    logits: Tensor,
    target: Tensor | None,
    *,
    alpha: Scalar,
    beta: float,
    label_smoothing: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    beta = check_number(op, "beta", beta, positive=False)
    check_reduction(op, reduction)
    why = "the reverse cross entropy is a function of the label's probability"
    given: dict[str, Any] = {"alpha": alpha, "ignore_index": ignore_index, "impl": impl}
    cost, target, correct = label_costs(op, logits, target, why, **given)
    count = (target != ignore_index).sum().to(cost)
    options = prepare(op, label_smoothing=label_smoothing, weight=weight, reduction=reduction, **given)
    if weight is None and options.label_smoothing == 0:
        ce = reduce_rows(RowTerms(cost, count), reduction)
    else:
        ce, _ = row_loss(options, logits, target)
    reverse = reduce_rows(RowTerms(-A * one_minus_exp(cost), count), reduction)
    factor = options.alpha.to(ce) if isinstance(options.alpha, Tensor) else options.alpha
    loss = factor * ce + beta * reverse
    with torch.no_grad():
        return loss, torch.stack([loss.sum(), ce.sum(), reverse.sum(), correct])


def sce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = ALPHA,
    beta: float = BETA,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Any:
    """Symmetric cross entropy: ``alpha CE + beta RCE``, ``RCE = 9.21 mean (1 - p_y)``.

    Class weights and label smoothing belong to the cross entropy only.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` labels.
        alpha: weight of the cross entropy, a number >= 0 or a 0-d tensor.
        beta: weight of the reverse cross entropy, >= 0.
        label_smoothing: of the cross entropy, as in torch.
        weight: ``(C,)`` class weights of the cross entropy, as in torch.
        ignore_index: rows with this label have no loss.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: as in :func:`~dlb_fast.fused_lb_loss`.
        return_parts: also return :class:`~dlb_fast.LossParts`; ``lb`` is the RCE.

    Returns:
        The loss, or ``(loss, LossParts)``, as :func:`~dlb_fast.fused_lb_loss`.

    Raises:
        ValueError, TypeError: arguments that do not fit together; targets that are no labels.

    Source: **official** code YisenWang/symmetric_cross_entropy_for_noisy_labels.

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(sce_loss(z, y, alpha=0.1, beta=1.0).item(), 3)                 # 0.1 log 4 + 9.21 * 3/4
    7.046
    """
    loss, parts = _sce(
        "sce_loss", logits, target, alpha=alpha, beta=beta, label_smoothing=label_smoothing, weight=weight,
        ignore_index=ignore_index, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class SceLoss(DistillationLoss):
    """Symmetric cross entropy as a criterion: the loss of :func:`sce_loss`. It has no ``kd_mask``.

    Args:
        alpha: weight of the cross entropy.
        beta: weight of the reverse cross entropy.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> SceLoss()(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        beta: float = BETA,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        beta = check_number("SceLoss", "beta", beta, positive=False)
        super().__init__(
            alpha=alpha, label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index,
            reduction=reduction, impl=impl,
        )  # fmt: skip
        self.beta = beta

    def objective(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if inputs.kd_mask is not None:
            raise ValueError(
                "SceLoss: kd_mask must be None, because no row has a teacher; leave rows out by ignore_index"
            )
        return _sce(
            "SceLoss", inputs.logits, inputs.target, alpha=self.alpha, beta=self.beta,
            label_smoothing=self.label_smoothing, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, impl=self.impl,
        )  # fmt: skip

    def cost(self) -> str:
        return "no state, no extra forward; the gradient is multiplied by a factor per row"


def reference(logits: Tensor, target: Tensor, *, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """The definition, in the order of the official code, with its clip of the label."""
    clipped = F.one_hot(target, logits.shape[1]).to(logits.dtype).clamp(1e-4, 1.0)
    reverse = -(torch.softmax(logits, 1) * clipped.log()).sum(1)
    return alpha * F.cross_entropy(logits, target) + beta * reverse.mean()


register(
    Method("sce", SceLoss, "symmetric cross entropy: CE and its reverse", card="sce", variants={"sce": ("SCE", {})})
)
