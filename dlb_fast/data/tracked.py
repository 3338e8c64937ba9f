"""A torch DataLoader with the face of our loaders: its state counts the batches it delivered, not those prefetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from dlb_fast.data.plan import OverlapPlan
from dlb_fast.data.sampler import EpochListener, OverlapBatchSampler


class TrackedLoader:
    """A `DataLoader` around an `OverlapBatchSampler` that saves and resumes exactly, with any number of workers.

    A DataLoader draws batches ahead of those it delivers and has no state of its own; frameworks that resume loaders by
    `state_dict` (Lightning, Accelerate) then skip what was under way. Nobody re-shards this one either: it is no
    DataLoader, and its sampler already knows its rank.

    Args:
        loader: `DataLoader(dataset, batch_sampler=OverlapBatchSampler(...), ...)`, with any collate function.
        device: where the tensors of a batch are moved (batches with `to`, tensors, and lists, tuples and dicts of
            them); None leaves them where they are.

    Raises:
        TypeError: a loader without an `OverlapBatchSampler`, or one that a framework has re-sharded.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(6))
        >>> loader = TrackedLoader(DataLoader(data, batch_sampler=OverlapBatchSampler(data, 4, shuffle=False)))
        >>> [batch[0].tolist() for batch in loader], loader.state_dict()["epoch"]
        ([[0, 1], [0, 1, 2, 3], [2, 3, 4, 5]], 1)
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device | str | None = None) -> None:
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(sampler, OverlapBatchSampler):
            raise TypeError(
                "TrackedLoader: expected a DataLoader with batch_sampler=OverlapBatchSampler(...), got "
                f"{type(loader).__name__} with batch_sampler {type(sampler).__name__}; wrap the DataLoader before a "
                "framework does (no accelerator.prepare), the sampler knows its rank by itself"
            )
        self.loader = loader
        self.device = None if device is None else torch.device(device)
        self._sampler = sampler

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._sampler.track(self.loader):
            yield batch if self.device is None else _moved(batch, self.device)

    @property
    def plan(self) -> OverlapPlan:
        """The index plan it follows."""
        return self._sampler.plan

    @property
    def rank(self) -> int:
        """This process among `plan.world_size`."""
        return self._sampler.rank

    @property
    def batch_size(self) -> int:
        """Rows the model sees."""
        return self._sampler.batch_size

    @property
    def sampler(self) -> EpochListener:
        """For frameworks that announce the epoch by `loader.sampler.set_epoch` (Lightning, timm)."""
        return self._sampler.sampler

    @property
    def epoch(self) -> int:
        """Epoch of the next batch to deliver, whatever was drawn ahead."""
        return int(self._sampler.state_dict()["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; nothing happens when it is the current one."""
        self._sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches, O(1)."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; RuntimeError while an iteration is active, ValueError on any mismatch."""
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        """The DataLoader ends its workers by itself; here for the loaders' common face."""


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_moved(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
