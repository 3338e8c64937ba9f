"""Accelerate: `register_last_batch` makes `save_state` and `load_state` carry our criterion and our loader.

Our loaders know their rank and are not given to `accelerator.prepare`: it would shard the batches once more, which
tears apart what belongs together, and its prepared DataLoader counts epochs from 0 in every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dlb_fast.data import OverlapBatchSampler, TrackedLoader
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import LastBatchState, check_ranks

__all__ = ["register_last_batch"]


def register_last_batch(accelerator: Any, criterion: nn.Module, loader: Any) -> Any:
    """Register criterion and loader for `accelerator.save_state` / `load_state`; returns the loader to iterate over.

    A torch DataLoader is wrapped in `TrackedLoader`, which moves its batches to `accelerator.device` and counts what it
    delivers. The checkpoint holds the remembered rows of every rank.

    Args:
        accelerator: `accelerate.Accelerator`.
        criterion: `LastBatchLoss`; its class weights, if any, are moved to the device.
        loader: one of our loaders made with `device=accelerator.device`, or an unprepared
            `DataLoader(..., batch_sampler=OverlapBatchSampler(...))`.

    Raises:
        TypeError: a loader without an overlapping sampler, or one that `accelerator.prepare` has wrapped.
        ValueError: a loader made for other ranks or another device. ImportError: no Accelerate.

    Example: ``examples/accelerate_digits.py``.
    """
    accelerate = need("accelerate", "pip install 'dlb_fast[hf]'")
    if not isinstance(accelerator, accelerate.Accelerator):
        raise TypeError(f"register_last_batch: expected an accelerate.Accelerator, got {type(accelerator).__name__}")
    if _is_prepared(loader):
        raise TypeError(
            "register_last_batch: this DataLoader went through accelerator.prepare, which shards its batches once more "
            "and reads ahead; pass the DataLoader as it was made, and prepare model, optimizer and scheduler only"
        )
    if isinstance(loader, DataLoader):
        loader = TrackedLoader(loader, accelerator.device)
    device = getattr(loader, "device", None)
    if device is not None and _index(device) != _index(accelerator.device):
        raise ValueError(
            f"register_last_batch: {type(loader).__name__} makes batches on {device}, the model is on "
            f"{accelerator.device}; make it with device=accelerator.device"
        )
    check_ranks(loader, accelerator.process_index, accelerator.num_processes)
    criterion.to(accelerator.device)
    accelerator.register_for_checkpointing(LastBatchState(criterion, loader))
    return loader


def _is_prepared(loader: Any) -> bool:
    sampler = getattr(loader, "batch_sampler", None)
    wrapped = isinstance(getattr(sampler, "batch_sampler", None), OverlapBatchSampler)
    return wrapped or (isinstance(sampler, OverlapBatchSampler) and hasattr(loader, "gradient_state"))


def _index(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0
