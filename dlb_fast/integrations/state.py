"""The criterion and the loader as one object with a state, which is what checkpoints of frameworks take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from dlb_fast.buffer import rank_and_size

VERSION = 1


class LastBatchState:
    """The position in the data and the state of the criterion, as one object for a framework's checkpoint.

    Frameworks let rank 0 write the checkpoint, but every rank stores other rows. So `state_dict()` gathers the states
    of all ranks (all ranks must call it, as Accelerate's `save_state` and Lightning do), and `load_state_dict()` gives
    each rank its own. The state has tensors and plain values only, so `torch.load(weights_only=True)` reads it.

    Args:
        criterion: `LastBatchLoss`, or another criterion with a memory in its `state_dict`.
        loader: a loader of `dlb_fast.data`, or torchdata's `StatefulDataLoader` with one of its batch samplers.

    Raises:
        TypeError: the loader has no state.

    Example:
        >>> from dlb_fast import LastBatchLoss
        >>> from dlb_fast.data import ResidentLoader, synthetic
        >>> state = LastBatchState(LastBatchLoss(10), ResidentLoader(synthetic(), 20))
        >>> sorted(state.state_dict())
        ['criteria', 'loader', 'version']
    """

    def __init__(self, criterion: nn.Module, loader: Any) -> None:
        if not hasattr(loader, "state_dict") or not hasattr(loader, "load_state_dict"):
            why = ", which draws batches ahead of those it delivers" if isinstance(loader, DataLoader) else ""
            raise TypeError(
                f"LastBatchState: expected a loader with a state, got {type(loader).__name__}{why}; use a loader of "
                "dlb_fast.data, or StatefulDataLoader(dataset, batch_sampler=OverlapBatchSampler(...)) of torchdata"
            )
        self.criterion = criterion
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader and the criteria of all ranks in rank order; a collective on several ranks."""
        return {"version": VERSION, "loader": self.loader.state_dict(), "criteria": gather_states(self.criterion)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; on another number of ranks the criterion starts empty, with a warning.

        Raises:
            ValueError: it is not a state of this class, or the loader has other data or options.
            RuntimeError: an iteration over the loader is active.
        """
        if not isinstance(state, Mapping) or state.get("version") != VERSION:
            version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"LastBatchState.load_state_dict: expected version {VERSION}, got {version!r}")
        self.loader.load_state_dict(state["loader"])
        rank, size = rank_and_size()
        states = state["criteria"]
        if len(states) == size:
            self.criterion.load_state_dict(states[rank])
            return
        warnings.warn(
            f"LastBatchState: saved by {len(states)} ranks, loaded on {size}; the remembered rows belong to other "
            "batches now, so the criterion starts empty and the next batch has no last-batch term",
            stacklevel=2,
        )
        reset(self.criterion)


def gather_states(criterion: nn.Module) -> list[dict[str, Any]]:
    """The `state_dict()` of the criterion on every rank; a collective on several ranks."""
    own, (_, size) = criterion.state_dict(), rank_and_size()
    if size == 1:
        return [own]
    states: list[dict[str, Any]] = [{} for _ in range(size)]
    dist.all_gather_object(states, own)
    return states


def reset(criterion: nn.Module) -> None:
    """Reset a criterion that has a memory; any other is left alone."""
    function: Any = getattr(criterion, "reset", None)
    if function is not None:
        function()


def stream_of(loader: Any) -> Any:
    """The object that knows the position in the data: a loader of `dlb_fast.data`, or a DataLoader's batch sampler.

    timm's prefetcher has the batch sampler of its DataLoader.

    The sampler counts the batches that the DataLoader has drawn, which with workers are more than it has delivered.

    Raises:
        TypeError: neither of them.
    """
    stream = loader if hasattr(loader, "plan") else getattr(loader, "batch_sampler", loader)
    if not hasattr(stream, "plan") or not hasattr(stream, "load_state_dict"):
        sampler = f" with batch_sampler {type(stream).__name__}" if isinstance(loader, DataLoader) else ""
        raise TypeError(
            f"dlb_fast.integrations: expected a loader of dlb_fast.data, or a DataLoader with "
            f"batch_sampler=OverlapBatchSampler(...), got {type(loader).__name__}{sampler}; without repeated rows "
            "there is no last-batch term"
        )
    return stream


def check_ranks(loader: Any, rank: int, world_size: int) -> None:
    """Raise ValueError unless the loader was made for this rank of so many."""
    stream = stream_of(loader)
    made = (stream.rank, stream.plan.world_size)
    if made != (rank, world_size):
        raise ValueError(
            f"dlb_fast.integrations: {type(loader).__name__} was made as rank {made[0]} of {made[1]}, but this process "
            f"is rank {rank} of {world_size}; make it after the framework has started its processes (Lightning: in "
            "train_dataloader(); Accelerate: after Accelerator()), or pass rank= and world_size="
        )
