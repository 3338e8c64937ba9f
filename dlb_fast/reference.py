"""The definition of the objective in plain PyTorch, in the order of the paper.

The tests compare every implementation with this file, and ``impl="torch"`` runs it. It imports torch alone and is
differentiated by autograd. Sizes: ``B`` rows in a batch, ``C`` classes, ``H``
repeated rows (the first ones). Arithmetic is float32, or float64 when the logits are float64; losses come back in
that dtype.

Sources
    DLB   Shen et al., "Self-Distillation from the Last Mini-Batch for Consistency Regularization", CVPR 2022, and
          the official code Meta-knowledge-Lab/DLB ``dlb.py``: CE over all rows + alpha * tau^2 * KL ("batchmean")
          of the repeated rows, teacher detached, no (1 - alpha) on the CE.
    CE    ``torch.nn.functional.cross_entropy``: class weights, label smoothing, ignore_index, soft targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor


class RowTerms(NamedTuple):
    """Per-row losses and what ``mean`` divides their sum by."""

    rows: Tensor  # (B,) or (H,); 0 where the row does not count
    norm: Tensor  # 0-d


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss over logits of ``dtype`` is computed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _keep_finite_gradient(values: Tensor, keep: Tensor | None) -> Tensor:
    """Replace the rows that do not count by zeros, so that a NaN in them cannot reach the gradient as 0 * NaN."""
    return values if keep is None else values.masked_fill(~keep[:, None], 0.0)


def _label_rows(log_p: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
    """``-w[y] log p[y]`` per row; a label outside [0, C) gives NaN, which no caller can mistake for a loss."""
    classes = log_p.shape[1]
    inside = (label >= 0) & (label < classes)
    index = label.clamp(0, classes - 1)
    rows = -log_p.gather(1, index[:, None])[:, 0]
    if weight is not None:
        rows = rows * weight[index]
    return torch.where(inside, rows, torch.full_like(rows, float("nan")))


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    *,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> RowTerms:
    """Cross entropy per row as in torch, for labels (B,), dense targets (B, C) and the mixup pair form.

    ``CE_i = sum_c w_c q_ic (lse(z_i) - z_ic)`` with ``q = (1 - eps) y + eps / C``. The mean divides by the sum of
    ``w[y_i]`` over the rows that count (labels), or by their number (dense and pair form), as torch does.
    The pair form is ``y = lam * onehot(target) + (1 - lam) * onehot(target_b)``; a row counts if both labels do.
    """
    classes = logits.shape[1]
    dense = target.dim() == 2
    keep = None
    if not dense:
        keep = target != ignore_index
        if target_b is not None:
            keep = keep & (target_b != ignore_index)
    log_p = torch.log_softmax(_keep_finite_gradient(logits, keep), dim=1)

    if dense:
        share = target if weight is None else target * weight
        # 0 * -inf: a class without any target mass costs nothing even when its logit is -inf.
        rows = -(share * log_p.masked_fill((share == 0) & ~log_p.isfinite(), 0.0)).sum(1)
        norm = torch.full((), float(logits.shape[0]), dtype=logits.dtype, device=logits.device)
    else:
        assert keep is not None
        first = torch.where(keep, target, torch.zeros_like(target))
        rows = _label_rows(log_p, first, weight)
        if target_b is not None:
            second = torch.where(keep, target_b, torch.zeros_like(target_b))
            share_a = lam if isinstance(lam, Tensor) else rows.new_full((), 1.0 if lam is None else lam)
            rows_b = _label_rows(log_p, second, weight)
            # 0 * inf, as in a dense target: a label without any share costs nothing even when its logit is -inf.
            rows = rows.masked_fill((share_a == 0) & rows.isinf(), 0.0)
            rows_b = rows_b.masked_fill((share_a == 1) & rows_b.isinf(), 0.0)
            rows = share_a * rows + (1.0 - share_a) * rows_b
        counted = keep.to(logits.dtype)
        if weight is not None and target_b is None:
            counted = counted * weight[first.clamp(0, classes - 1)]
        norm = counted.sum()
    if label_smoothing > 0.0:
        even = -log_p.sum(1) if weight is None else -(log_p * weight).sum(1)
        rows = (1.0 - label_smoothing) * rows + (label_smoothing / classes) * even
    if keep is not None:
        rows = torch.where(keep, rows, torch.zeros_like(rows))
    return RowTerms(rows, norm)


def virtual_teacher(
    target: Tensor | None, rows: int, classes: int, correct_share: float | None, like: Tensor
) -> Tensor:
    """(rows, C) probabilities: uniform, or ``correct_share`` for the right class and the rest divided equally."""
    if correct_share is None:
        return torch.full((rows, classes), 1.0 / classes, dtype=like.dtype, device=like.device)
    assert target is not None and target.dim() == 1
    rest = (1.0 - correct_share) / max(classes - 1, 1)
    teacher = torch.full((rows, classes), rest, dtype=like.dtype, device=like.device)
    return teacher.scatter(1, target[:rows].clamp(0, classes - 1)[:, None], correct_share)


def finite_rows(teacher: Tensor) -> Tensor:
    """(H,) bool: the row's largest entry is finite, and with it the log-sum-exp of logits; NaN and +inf are not."""
    return teacher.detach().amax(1).abs() < float("inf")  # half of the launches of isfinite()


def _log_softmax(logits: Tensor, temperature: Scalar) -> Tensor:
    """``log softmax(z / tau)``. The derivative by tau of a class at -inf is 0, where autograd would say 0 * inf."""
    if isinstance(temperature, Tensor):
        none = logits == -float("inf")
        return torch.log_softmax((logits.masked_fill(none, 0.0) / temperature).masked_fill(none, -float("inf")), dim=1)
    return torch.log_softmax(logits / temperature, dim=1)


def kl_rows(
    logits: Tensor,
    teacher: Tensor,
    *,
    temperature: Scalar,
    keep: Tensor | None = None,
    teacher_is_probabilities: bool = False,
) -> RowTerms:
    """``tau^2 KL(teacher || softmax(z / tau))`` per row (H,), the teacher detached.

    The teacher is given as logits, softened here with the same temperature, or as probabilities, used as they are.
    ``keep`` (H,) bool names the valid rows; a teacher row that is not finite is not valid either. A class the teacher
    gives no mass costs nothing (0 log 0 = 0).
    """
    finite = finite_rows(teacher)
    keep = finite if keep is None else keep & finite
    teacher = _keep_finite_gradient(teacher.detach(), keep)
    log_p = _log_softmax(_keep_finite_gradient(logits, keep), temperature)
    log_t = teacher.log() if teacher_is_probabilities else _log_softmax(teacher, temperature)
    p_t = log_t.exp()
    gap = torch.where(p_t == 0, torch.zeros_like(log_p), log_t - log_p)
    rows = (p_t * gap).sum(1) * (temperature * temperature)
    rows = torch.where(keep, rows, torch.zeros_like(rows))
    return RowTerms(rows, keep.sum().to(rows.dtype))


def top_k_kl_rows(logits: Tensor, packed: Tensor, *, temperature: Scalar, keep: Tensor | None = None) -> RowTerms:
    """``tau^2 KL`` per row (H,) to a teacher of ``k`` classes and one bucket for the others.

    ``KL = sum_j p_j (log p_j - log q_j) + p_rest (log p_rest - log q_rest)``, ``p_j = exp(t_j / tau - s)``; ``q_rest``
    is the student's probability of all other classes. ``packed`` (H, 2 k + 1) holds the ``k`` logits ``t``, their
    classes and the log-sum-exp ``s`` of all teacher logits / tau; it is a constant. Where ``s`` is too small for the k
    (made at another tau) they have all mass. A class that is given twice, or is none, makes the row NaN.
    """
    classes, k = logits.shape[1], packed.shape[1] // 2
    finite = finite_rows(packed)
    keep = finite if keep is None else keep & finite
    packed = packed.detach()
    index = torch.where(keep[:, None], packed[:, k : 2 * k], torch.arange(k, device=packed.device)).long()
    values = _keep_finite_gradient(packed[:, :k], keep)
    log_sum = torch.where(keep, packed[:, -1], 0.0)
    in_range = ((index >= 0) & (index < classes)).all(1)
    index = index.clamp(0, classes - 1)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
    proper = in_range & (kept.sum(1) == k)

    log_p = values / (temperature.detach() if isinstance(temperature, Tensor) else temperature)
    log_kept = log_p.logsumexp(1)
    log_sum = log_kept if k == classes else torch.maximum(log_kept, log_sum)
    log_p = log_p - log_sum[:, None]
    p, p_rest = log_p.exp(), -torch.expm1(log_kept - log_sum)

    log_q = _log_softmax(_keep_finite_gradient(logits, keep), temperature)
    gap = torch.where(p == 0, torch.zeros_like(p), log_p - log_q.gather(1, index))
    rows = (p * gap).sum(1)
    if k < classes:
        # The sum over the other classes: 1 - sum q_j has no digits where the student is sure. 0 log 0 = 0 here too.
        none = p_rest == 0
        log_q_rest = log_q.masked_fill(kept, -float("inf")).masked_fill(none[:, None], 0.0).logsumexp(1)
        rows = rows + torch.where(none, torch.zeros_like(p_rest), p_rest * (p_rest.log() - log_q_rest))
    rows = torch.where(proper, rows, torch.full_like(rows, float("nan"))) * (temperature * temperature)
    rows = torch.where(keep, rows, torch.zeros_like(rows))
    return RowTerms(rows, keep.sum().to(rows.dtype))


def reduce_rows(terms: RowTerms, reduction: str) -> Tensor:
    """``mean`` (0 when no row counts: a defined choice, torch's CE gives NaN), ``sum`` or ``none``."""
    if reduction == "none":
        return terms.rows
    total = terms.rows.sum()
    if reduction == "sum":
        return total
    # An infinite divisor gives 0 with zero gradient, also where weightless rows still have a smoothed loss.
    return total / torch.where(terms.norm == 0, torch.full_like(terms.norm, float("inf")), terms.norm)


def top1_correct(logits: Tensor, target: Tensor | None, ignore_index: int = -100) -> Tensor:
    """Rows whose right class has the largest logit (a tie counts), as a 0-d float; 0 without a target.

    For dense targets the right class is the first of the largest shares; ignored rows are not counted, and neither are
    rows without a finite loss: those that hold a NaN or +inf, or nothing but -inf.
    """
    if target is None or logits.shape[0] == 0:
        return torch.zeros((), dtype=compute_dtype(logits.dtype), device=logits.device)
    label = target.argmax(1) if target.dim() == 2 else target
    index = label.clamp(0, logits.shape[1] - 1)
    at_label = logits.detach().gather(1, index[:, None])[:, 0]
    largest = logits.detach().amax(1)  # NaN where the row holds one
    hit = (at_label >= largest) & largest.isfinite() & (index == label)
    if target.dim() == 1:
        hit = hit & (target != ignore_index)
    return hit.sum().to(compute_dtype(logits.dtype))


def last_batch_loss(
    logits: Tensor,
    target: Tensor | None,
    teacher: Tensor | None = None,
    *,
    alpha: Scalar = 1.0,
    temperature: Scalar = 3.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    reduction: str = "mean",
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    ce_weight: Scalar = 1.0,
    teacher_kind: str = "logits",
    correct_share: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective: ``ce_weight * L_CE + alpha * L_LB``.

    ``teacher_kind``: ``"logits"`` (H, C), ``"probabilities"`` (H, C), ``"top_k"`` (H, 2 k + 1) as
    :func:`top_k_kl_rows` takes it, or ``"virtual"`` (no tensor: all rows learn from :func:`virtual_teacher`). Returns
    ``(loss, parts)``: the loss 0-d or (B,), and ``parts`` (4,) detached ``[loss, L_CE, L_LB, correct]``; with
    ``reduction="none"`` the parts are sums over the rows.

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> loss, parts = last_batch_loss(z, y, z[:1])
    >>> round(loss.item(), 6), parts[2].item()
    (1.386294, 0.0)
    """
    dtype = compute_dtype(logits.dtype)
    z = logits.to(dtype)
    batch, classes = z.shape
    weight = None if weight is None else weight.to(dtype)
    lam = lam.to(dtype) if isinstance(lam, Tensor) else lam
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)
    # An empty sum is 0 and stays in the graph: a loss to which no row counts still has a (zero) gradient.
    zero = RowTerms(z[:, :0].sum(1), z.new_zeros(()))

    ce = zero
    if target is not None:
        target = target.to(dtype) if target.dim() == 2 else target
        ce = cross_entropy_rows(
            z, target, target_b=target_b, lam=lam, weight=weight,
            label_smoothing=label_smoothing, ignore_index=ignore_index,
        )  # fmt: skip

    lb = zero
    if teacher_kind == "virtual":
        teacher = virtual_teacher(target, batch, classes, correct_share, z)
        if correct_share is not None:  # an ignored row has no right class, so no such teacher
            assert target is not None
            labelled = target != ignore_index
            kd_mask = labelled if kd_mask is None else kd_mask & labelled
    if teacher is not None:
        rows = teacher.shape[0]
        if teacher_kind == "top_k":
            lb = top_k_kl_rows(z[:rows], teacher.to(dtype), temperature=temperature, keep=kd_mask)
        else:
            lb = kl_rows(
                z[:rows], teacher.to(dtype), temperature=temperature, keep=kd_mask,
                teacher_is_probabilities=teacher_kind != "logits",
            )  # fmt: skip
        lb = RowTerms(torch.cat([lb.rows, z.new_zeros(batch - rows)]), lb.norm)

    loss = ce_weight * reduce_rows(ce, reduction)
    if teacher is not None:
        loss = loss + alpha * reduce_rows(lb, reduction)
    with torch.no_grad():
        shown = "sum" if reduction == "none" else reduction
        parts = torch.stack(
            [loss.sum(), reduce_rows(ce, shown), reduce_rows(lb, shown), top1_correct(z, target, ignore_index)]
        )
    return loss, parts.detach()


def teacher_kl(teacher: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``tau^2 * sum p (log p - log q) / B`` for probabilities ``p`` and ``q = softmax(z / tau)``.

    The KDLoss of the official code of BAKE and CS-KD; the definitions in ``methods/`` are written with it.
    """
    student = torch.log_softmax(logits / temperature, dim=1)
    return torch.nn.functional.kl_div(student, teacher.detach(), reduction="sum") * temperature**2 / logits.shape[0]
