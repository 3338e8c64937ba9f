"""Accelerate: `register_last_batch` makes `save_state` and `load_state` save the criterion and the loader.

The loaders here know their rank and are not given to `accelerator.prepare`. It would shard the batches once more, which
separates repeated rows from the rows they repeat, and its prepared DataLoader counts epochs from 0 in every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlb_fast.buffer import rank_and_size
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import LastBatchState, check_ranks, stream_of

__all__ = ["register_last_batch"]


def register_last_batch(accelerator: Any, criterion: nn.Module, loader: Any) -> Any:
    """Register criterion and loader for `accelerator.save_state` and `load_state`; returns the loader.

    The checkpoint holds the position in the data and the remembered rows of every rank. After `load_state` the loader
    continues at the next batch, so `skip_first_batches` would skip twice. `split_batches`, `dispatch_batches` and
    `even_batches` act on prepared loaders only. With `accelerator.accumulate` a micro-batch learns from the one before.

    Args:
        accelerator: `accelerate.Accelerator`.
        criterion: `LastBatchLoss`; its class weights, if any, are moved to the device.
        loader: a loader of `dlb_fast.data` made with `device=accelerator.device`, or an unprepared
            `StatefulDataLoader(..., batch_sampler=OverlapBatchSampler(...))` of torchdata, whose batches stay where
            they are.

    Raises:
        TypeError: a loader without an overlapping sampler or without a state, or one that `accelerator.prepare` has
            wrapped; one that it wraps later makes `save_state` raise.
        ValueError: a loader made for other ranks or another device, an Accelerator that does not know its ranks.
        ImportError: Accelerate is missing.

    Example: ``examples/accelerate_images.py``.
    """
    accelerate = need("accelerate", "pip install 'dlb_fast[hf]'")
    if not isinstance(accelerator, accelerate.Accelerator):
        raise TypeError(f"register_last_batch: expected an accelerate.Accelerator, got {type(accelerator).__name__}")
    if hasattr(loader, "gradient_state"):  # the class of prepared DataLoaders
        raise _prepared_error()
    if accelerator.num_processes < (ranks := rank_and_size()[1]):
        raise ValueError(
            f"register_last_batch: torch.distributed has {ranks} ranks, but this Accelerator trains each alone, as "
            "it does under torchrun without a GPU; set ACCELERATE_USE_CPU=true, or make it with Accelerator(cpu=True)"
        )
    check_ranks(loader, accelerator.process_index, accelerator.num_processes)
    device = getattr(loader, "device", None)
    if device is not None and _index(device) != _index(accelerator.device):
        raise ValueError(
            f"register_last_batch: {type(loader).__name__} makes batches on {device}, the model is on "
            f"{accelerator.device}; make it with device=accelerator.device"
        )
    state = _Registered(criterion.to(accelerator.device), loader)
    state.accelerator = accelerator
    state.check()
    accelerator.register_for_checkpointing(state)
    return loader


class _Registered(LastBatchState):
    accelerator: Any

    def check(self) -> None:
        """Raise if `accelerator.prepare` has a DataLoader over the same batches."""
        stream = stream_of(self.loader)
        for prepared in self.accelerator._dataloaders:
            sampler = prepared
            while (sampler := getattr(sampler, "batch_sampler", None)) is not None and sampler is not stream:
                pass
            if sampler is not None:
                raise _prepared_error()

    def state_dict(self) -> dict[str, Any]:
        self.check()
        return super().state_dict()


def _prepared_error() -> TypeError:
    return TypeError(
        "register_last_batch: this DataLoader went through accelerator.prepare, which shards its batches once more and "
        "reads ahead; train on the DataLoader as it was made, and prepare model, optimizer and scheduler only"
    )


def _index(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0
