"""Helpers of several methods."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._args import check_tensor


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
