"""The siblings of DLB as functions of tensors: the same kernel with another teacher, without memory.

Every function takes ``label_smoothing, weight, ignore_index, reduction, impl, return_parts`` as ``fused_lb_loss`` does
and raises as it does. The definitions they are tested against are in ``reference_family.py``; there each formula says
whether it was read from official code or reconstructed from an abstract.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._check import check_kd_mask, check_logits, check_rows, check_scalar, check_tensor
from .functional import LossParts, Scalar
from .lessons import (
    average_copies,
    check_features,
    check_omega,
    ensemble_batch,
    mirrored,
    ps_lesson,
    ranked,
    tf_kd_share,
)
from .teachers import Lesson, check_share, taught_loss

__all__ = [
    "bake_loss", "cs_kd_loss", "ddgsd_loss", "lsr_kd_loss", "mr_kd_loss", "ps_kd_loss", "tf_kd_reg_loss", "zipf_loss",
]  # fmt: skip


def _finish(
    op: str, logits: Tensor, target: Tensor | None, lesson: Lesson, return_parts: bool, options: dict[str, Any]
) -> Any:
    loss, parts = taught_loss(op, logits, target, lesson, **options)
    return (loss, LossParts.unpack(parts)) if return_parts else loss


def lsr_kd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 1.0,
    correct_share: float | None = None,
    kd_mask: Tensor | None = None,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """LsrKD and its teacher correction: ``(1 - alpha) CE + alpha tau^2 KL(u || softmax(z / tau))``.

    ``u`` is uniform, or ``correct_share`` on the right class and the rest even (TC); it is computed in registers,
    nothing is materialised. At temperature 1 the uniform form is label smoothing: ``lsr_kd_loss(alpha=e) + e log C``
    is the cross entropy with ``label_smoothing=e``, with the same gradient. For a large temperature the KL tends to
    half the variance of the logits over the classes, ``sum_k (z_k - mean)^2 / 2C``.

    Args:
        logits: ``(B, C)``. target: ``(B,)`` labels (``(B, C)`` with the uniform teacher).
        alpha: in [0, 1]. temperature: of the student; the teacher is not tempered. correct_share: in [0, 1] or None.
        kd_mask: ``(B,)`` bool, False takes a row out of the KL; an ignored label alone does not with a uniform teacher.
        options: ``label_smoothing, weight, ignore_index, reduction, impl`` as in ``fused_lb_loss``.

    Returns the loss, or ``(loss, LossParts)``. Source: Wang et al., arXiv 2009.05226: a **reconstruction** from the
    abstract (whether the paper has tau^2 and 1 - alpha, and its defaults, is not known; 0.1 is label smoothing's).

    >>> import torch
    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(lsr_kd_loss(z, y, alpha=0.1).item(), 4) == round(0.9 * 1.386294, 4)
    True
    """
    check_logits("lsr_kd_loss", logits)
    lesson = Lesson("virtual", correct_share=correct_share)
    if kd_mask is not None:
        check_kd_mask("lsr_kd_loss", logits, kd_mask, logits.shape[0])
        lesson = lesson._replace(mask=kd_mask)
    settings = {"alpha": alpha, "temperature": temperature, "ce_alpha": -1.0, **options}
    return _finish("lsr_kd_loss", logits, target, lesson, return_parts, settings)


def tf_kd_reg_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = 0.1,
    temperature: float = 20.0,
    multiplier: float = 100.0,
    share: float = 0.99,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """Tf-KD's regularisation as its official code computes it: a setting of the virtual teacher.

    ``(1 - alpha) CE + alpha (multiplier / C) KL(v' || softmax(z))`` with ``v' = softmax(v / temperature)`` of the
    virtual probabilities ``v`` (``share`` on the right class): the student is not tempered, there is no tau^2, and
    ``multiplier / C`` undoes the division of ``KLDivLoss()`` by the number of classes.

    Defaults are those of its ResNet-18 on CIFAR-100. Source: **official** code yuanli2333/Teacher-free-Knowledge-
    Distillation (Yuan et al., CVPR 2020). Other arguments as in :func:`lsr_kd_loss`.

    >>> import torch
    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> tf_kd_reg_loss(z, y).shape
    torch.Size([])
    """
    op = "tf_kd_reg_loss"
    check_logits(op, logits)
    check_scalar(op, "multiplier", multiplier, positive=True)
    classes = logits.shape[1]
    lesson = Lesson("virtual", correct_share=tf_kd_share(classes, temperature, share), weight=multiplier / classes)
    settings = {"alpha": alpha, "temperature": 1.0, "ce_alpha": -1.0, **options}
    return _finish(op, logits, target, lesson, return_parts, settings)


def mr_kd_loss(
    logits: Tensor,
    target: Tensor,
    copies_logits: Tensor,
    *,
    alpha: Scalar = 0.5,
    temperature: Scalar = 3.0,
    correct_share: float | None = None,
    swap: bool = False,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """MrKD: ``(1 - alpha) CE + alpha tau^2 KL(mean_k softmax(c_k / tau) || softmax(z / tau))``, c copies of the model.

    Averaging the distributions has the gradient of averaging the K losses. ``swap`` is knowledge adjustment (2021):
    in every copy the logits of its largest and of the right class change places. ``correct_share`` is teacher
    correction: the right class gets this share and the others are scaled to the rest.

    Args:
        logits: ``(B, C)``. target: ``(B,)``. copies_logits: ``(K, B, C)``, K >= 1, detached here.
        alpha, temperature: numbers or 0-d tensors. The defaults are ours. Others as in :func:`lsr_kd_loss`.

    Source: arXiv 2009.05226 and Sensors 2021, 21(8), 2792: a **reconstruction** from the abstracts.

    >>> import torch
    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(mr_kd_loss(z, y, z[None]).item(), 4) == round(0.5 * 1.386294, 4)
    True
    """
    op = "mr_kd_loss"
    check_logits(op, logits)
    check_tensor(op, "copies_logits", copies_logits)
    check_share(op, correct_share)
    if copies_logits.dim() != 3 or copies_logits.shape[0] < 1 or copies_logits.shape[1:] != logits.shape:
        raise ValueError(
            f"{op}: copies_logits must have shape (K, {', '.join(map(str, logits.shape))}) with K >= 1, "
            f"got {tuple(copies_logits.shape)}"
        )
    teacher = average_copies(copies_logits, target, temperature, correct_share, swap)
    settings = {"alpha": alpha, "temperature": temperature, "ce_alpha": -1.0, **options}
    return _finish(op, logits, target, Lesson("probabilities", teacher), return_parts, settings)


def bake_loss(
    logits: Tensor,
    features: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = 1.0,
    temperature: Scalar = 4.0,
    omega: float = 0.5,
    cross_rank: bool = False,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """BAKE: ``CE + alpha T^2 KL(Q || softmax(z / T))``, the batch's knowledge ensembled by the samples' likeness.

    ``Q = (1 - w) (I - w A)^-1 softmax(Z / T)``, ``A`` the row-softmax of the cosines of ``features`` with a zero
    diagonal. Q carries no gradient. The batch should hold companions of the same class (``ClassBatchSampler``).

    Args:
        logits: ``(B, C)``. features: ``(B, D...)`` what goes into the classifier, any dtype; detached and flattened.
        target: ``(B,)`` or ``(B, C)``. omega: in [0, 1). alpha, temperature, omega: defaults of the official code.
        cross_rank: ensemble over all ranks' batches (equal sizes), keep the local rows.
        Others as in :func:`lsr_kd_loss`.

    Source: **official** code yxgeee/BAKE, ``knowledge_ensemble`` (Ge et al., arXiv 2104.13298).

    >>> import torch
    >>> z, f, y = torch.zeros(2, 4), torch.eye(2), torch.tensor([0, 1])
    >>> round(bake_loss(z, f, y).item(), 4) == round(1.386294, 4)
    True
    """
    check_logits("bake_loss", logits)
    check_omega("bake_loss", omega)
    check_features("bake_loss", features, logits)
    teacher = ensemble_batch(features, logits, temperature, omega, cross_rank)
    settings = {"alpha": alpha, "temperature": temperature, **options}
    return _finish("bake_loss", logits, target, Lesson("probabilities", teacher), return_parts, settings)


def cs_kd_loss(
    logits: Tensor,
    target: Tensor,
    partner_logits: Tensor,
    *,
    alpha: Scalar = 1.0,
    temperature: Scalar = 4.0,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """CS-KD: ``CE(anchors) + alpha T^2 KL(softmax(partner / T) || softmax(z / T))``, partners of the same class.

    Args:
        logits: ``(B, C)`` of the anchors. target: ``(B,)``. partner_logits: ``(B, C)`` of other samples of the same
            classes, from a second forward without gradient; detached here. Others as in :func:`lsr_kd_loss`.

    Source: **official** code alinlab/cs-kd (Yun et al., CVPR 2020): T=4, alpha (lamda) 1 on CIFAR, 3 on CUB.

    >>> import torch
    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(cs_kd_loss(z, y, z).item(), 4) == round(1.386294, 4)
    True
    """
    check_logits("cs_kd_loss", logits)
    lesson = Lesson("logits", check_rows("cs_kd_loss", "partner_logits", partner_logits, logits).detach())
    settings = {"alpha": alpha, "temperature": temperature, **options}
    return _finish("cs_kd_loss", logits, target, lesson, return_parts, settings)


def ddgsd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = 1.0,
    temperature: Scalar = 4.0,
    ce_weight: float = 1.0,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """Two views of each sample teach each other within the step (lag 0): the control for DLB's lag of one.

    ``ce_weight CE(all rows) + alpha T^2 [KL(p2 || p1) + KL(p1 || p2)]``, each KL a mean over its half.

    Args:
        logits: ``(2n, C)``, rows ``[n first views | the same n samples, second views]``. target: ``(2n,)``.
        Others as in :func:`lsr_kd_loss`.

    Source: Xu & Liu, AAAI 2019 in **third-party** code (winycg/Self-KD-Lib: ``ce_weight=0.5``, T=4, and a term on the
    features' means that is not part of this). Defaults are ours.

    >>> import torch
    >>> z, y = torch.zeros(2, 4), torch.tensor([1, 1])
    >>> round(ddgsd_loss(z, y).item(), 4) == round(1.386294, 4)
    True
    """
    check_logits("ddgsd_loss", logits)
    settings = {"alpha": alpha, "temperature": temperature, "ce_weight": ce_weight, **options}
    return _finish("ddgsd_loss", logits, target, mirrored("ddgsd_loss", logits), return_parts, settings)


def ps_kd_loss(
    logits: Tensor,
    target: Tensor,
    past: Tensor,
    *,
    alpha: Scalar = 0.8,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """PS-KD: ``CE(z, (1 - a) y + a p)``, p the model's own prediction when it saw the sample last.

    Computed as ``(1 - a) CE(z, y) + a [KL(p || z) + H(p)]``, which is the same value and gradient.

    Args:
        logits: ``(B, C)``. target: ``(B,)``. past: ``(B, C)`` **probabilities** (not logits), detached here.
        alpha: ``a_t = a_T (epoch + 1) / epochs`` with ``a_T = 0.8`` in the official code. Others as in
            :func:`lsr_kd_loss`; the temperature is 1. A row with an ignored label costs nothing.

    Source: **official** code lgcnsai/PS-KD-Pytorch (Kim et al., ICCV 2021).

    >>> import torch
    >>> z, y = torch.zeros(1, 4), torch.tensor([1])
    >>> round(ps_kd_loss(z, y, torch.tensor([[0.1, 0.7, 0.1, 0.1]])).item(), 4) == round(1.386294, 4)
    True
    """
    check_logits("ps_kd_loss", logits)
    check_rows("ps_kd_loss", "past", past, logits)
    settings = {"alpha": alpha, "temperature": 1.0, "ce_alpha": -1.0, **options}
    lesson = ps_lesson(past)
    if isinstance(target, Tensor) and target.dim() == 1:
        lesson = lesson._replace(mask=target != options.get("ignore_index", -100))
    return _finish("ps_kd_loss", logits, target, lesson, return_parts, settings)


def zipf_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = 0.1,
    power: float = 1.0,
    return_parts: bool = False,
    **options: Any,
) -> Any:
    """Zipf's label smoothing from the logits' own ranks: ``CE + alpha KL(q || softmax of the non-target logits)``.

    ``q_k ~ rank_k^-power`` over the wrong classes, ranks counted over all classes (ties share the smallest).

    Args:
        logits: ``(B, C)``, C >= 2. target: ``(B,)``. alpha: 0.1 on CIFAR-100 and ImageNet, 1 on TinyImageNet and INAT21
            (lambda of the README). Others as in :func:`lsr_kd_loss`.

    Source: **official** code megvii-research/zipfls with ``dense=False``, without the auxiliary head (ECCV 2022).

    >>> import torch
    >>> z, y = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0])
    >>> zipf_loss(z, y, return_parts=True)[1].lb > 0
    tensor(True)
    """
    check_logits("zipf_loss", logits)
    check_tensor("zipf_loss", "target", target)
    lesson = ranked(logits, target, power, options.get("ignore_index", -100))
    settings = {"alpha": alpha, "temperature": 1.0, **options}
    return _finish("zipf_loss", logits, target, lesson, return_parts, settings)
