"""Helpers of several methods."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._args import check_kd_mask, check_logits, check_pair, check_target, check_tensor
from ..functional import prepare, row_loss
from ..reference import RowTerms, Scalar, reduce_rows


@torch.no_grad()
def gather_rows(value: Tensor) -> tuple[Tensor, int]:
    """(world * B, D) of all ranks in rank order, and the index of this rank's first row; no gradient.

    Every rank must bring the same shape. Without a process group the result is ``(value, 0)``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value, 0
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts), dist.get_rank() * value.shape[0]


def chosen(again: bool | Tensor, before: Tensor, now: Tensor) -> Tensor:
    """``before`` where the batch is evaluated again (`Inputs.again`), else ``now``; a tensor decides on the device."""
    if isinstance(again, Tensor):
        return torch.where(again, before, now)
    return before if again else now


def autocast(near: Tensor, **options: Any) -> AbstractContextManager[Any]:
    """torch.autocast on the device of a tensor; nothing where that device has none (meta)."""
    device = near.device.type
    return torch.autocast(device, **options) if torch.amp.is_autocast_available(device) else nullcontext()


def format_bytes(count: int) -> str:
    """A number of bytes with a unit.

    >>> format_bytes(20_000_000)
    '19.1 MiB'
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def labels(op: str, target: Tensor | None, target_b: Tensor | None, why: str) -> Tensor:
    """The int64 labels (B,) of a method that needs one class per row; ValueError for none, dense or mixed ones."""
    if target is not None:
        check_tensor(op, "target", target)
    if target is None or target.dim() != 1 or target_b is not None:
        got = "no target" if target is None else f"a target of shape {tuple(target.shape)}"
        raise ValueError(
            f"{op}: needs one class per row, target (B,): {why}; got {got}"
            f"{' and target_b of mixed images; turn mixup and CutMix off' if target_b is not None else ''}"
        )
    return target.long()  # a narrow integer cannot be compared with every ignore_index


def label_costs(
    op: str, logits: Tensor, target: Tensor | None, why: str, *, alpha: Scalar = 1.0, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``-log p`` of every row's label (B,), 0 where it is ignored; the labels (B,); how many rows are right.

    For losses that are a function of the label's probability: ``p = exp(-cost)``, and the gradient of such a loss is
    that of the cross entropy times a factor per row. ``alpha`` is only checked: where it requires a gradient, a
    compiled ``impl`` is refused and ``auto`` is torch.
    """
    check_logits(op, logits, target)
    if target is not None:
        check_target(op, logits, target)
    target = labels(op, target, None, why)
    options = prepare(op, impl=impl, alpha=alpha, ignore_index=ignore_index, reduction="none")
    cost, parts = row_loss(options, logits, target)
    return cost, target, parts[3]


def one_minus_exp(cost: Tensor) -> Tensor:
    """``1 - exp(-cost)`` for costs >= 0, accurate for small ones; its gradient ``exp(-cost)`` for large ones too."""
    return torch.where(cost < 0.5, -torch.expm1(-cost), 1.0 - torch.exp(-cost))


def add_term(
    op: str,
    logits: Tensor,
    target: Tensor | None,
    rows: Tensor,
    *,
    mask: Tensor | None = None,
    alpha: Scalar,
    label_smoothing: float,
    weight: Tensor | None,
    ignore_index: int,
    kd_mask: Tensor | None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """``CE + alpha * mean of rows``, loss and parts, for a term (B,) with a gradient that no kernel has.

    ``mask`` and ``kd_mask`` (B,): False takes a row out of the term. Without a target the term is all.
    """
    options = prepare(
        op, impl=impl, alpha=alpha, label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index,
        reduction=reduction,
    )  # fmt: skip
    if target_b is not None or lam is not None:
        lam = check_pair(op, logits, target, target_b, lam)
    if kd_mask is not None:
        check_kd_mask(op, logits, kd_mask, logits.shape[0])
        mask = kd_mask if mask is None else mask & kd_mask
    if target is None:
        ce, parts = torch.zeros_like(rows if reduction == "none" else rows.sum()), rows.new_zeros(4)
    else:
        ce, parts = row_loss(options, logits, target, target_b=target_b, lam=lam)
    if mask is None:
        mask = torch.ones_like(rows, dtype=torch.bool)
    term = reduce_rows(RowTerms(torch.where(mask, rows, torch.zeros_like(rows)), mask.sum().to(rows)), reduction)
    factor = options.alpha.to(term) if isinstance(options.alpha, Tensor) else options.alpha
    loss = ce + factor * term
    with torch.no_grad():
        return loss, torch.stack([loss.sum(), parts[1], term.sum(), parts[3]]).detach()
