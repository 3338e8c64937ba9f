"""Criterion and loader as one thing with a state, as every framework's checkpoint wants it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from dlb_fast.data import OverlapBatchSampler

VERSION = 1


class LastBatchState:
    """What a run with a last-batch criterion has to remember beyond model and optimiser.

    Frameworks let rank 0 write what is registered with them, but every rank remembers rows of its own: `state_dict()`
    gathers them (all ranks must call it, as Accelerate's `save_state` and Lightning do), `load_state_dict()` gives each
    rank its own back. It is made of tensors and plain values, so `torch.load(weights_only=True)` reads it.

    Args:
        criterion: `LastBatchLoss`, or any module with memory in its `state_dict`.
        loader: one of our loaders, or `TrackedLoader` around a torch DataLoader.

    Raises:
        TypeError: a loader without a position that could be saved.

    Example:
        >>> from dlb_fast import LastBatchLoss
        >>> from dlb_fast.data import ResidentLoader, synthetic
        >>> state = LastBatchState(LastBatchLoss(10), ResidentLoader(synthetic(), 20))
        >>> sorted(state.state_dict())
        ['criteria', 'loader', 'version']
    """

    def __init__(self, criterion: nn.Module, loader: Any) -> None:
        self.criterion = criterion
        self.loader = stateful(loader)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position and the criteria of all ranks, in rank order; a collective on several ranks."""
        return {"version": VERSION, "loader": self.loader.state_dict(), "criteria": gathered(self.criterion)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there; on another number of ranks the criterion starts empty, with a warning.

        Raises:
            ValueError: no state of this kind, or a loader with other data or options. RuntimeError: an iteration is
                active.
        """
        if not isinstance(state, Mapping) or state.get("version") != VERSION:
            version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"LastBatchState.load_state_dict: version {VERSION} expected, got {version!r}")
        self.loader.load_state_dict(state["loader"])
        give_back(self.criterion, state["criteria"])


def rank_and_size() -> tuple[int, int]:
    """This process among those of the process group; (0, 1) without one."""
    grouped = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)


def gathered(criterion: nn.Module) -> list[dict[str, Any]]:
    """The criterion's state on every rank; a collective on several."""
    _, size = rank_and_size()
    mine = criterion.state_dict()
    if size == 1:
        return [mine]
    states: list[dict[str, Any]] = [{} for _ in range(size)]
    dist.all_gather_object(states, mine)
    return states


def give_back(criterion: nn.Module, states: list[dict[str, Any]]) -> None:
    """Load this rank's own state."""
    rank, size = rank_and_size()
    if len(states) == size:
        criterion.load_state_dict(states[rank])
        return
    warnings.warn(
        f"LastBatchState: saved by {len(states)} ranks, loaded on {size}; the remembered rows belong to other batches "
        "now, so the criterion starts empty and the next batch has no last-batch term",
        stacklevel=3,
    )
    forget(criterion)


def forget(criterion: nn.Module) -> None:
    """Reset a criterion that can be reset."""
    reset: Any = getattr(criterion, "reset", None)
    if reset is not None:
        reset()


def stateful(loader: Any) -> Any:
    """`loader`, if its position can be saved exactly."""
    if isinstance(loader, DataLoader) or isinstance(getattr(loader, "batch_sampler", None), OverlapBatchSampler):
        raise TypeError(
            f"dlb_fast.integrations: a {type(loader).__name__} draws batches ahead of those it delivers, so its place "
            "cannot be saved; wrap it: TrackedLoader(DataLoader(..., batch_sampler=OverlapBatchSampler(...)))"
        )
    if not hasattr(loader, "state_dict") or not hasattr(loader, "load_state_dict"):
        raise TypeError(
            f"dlb_fast.integrations: expected a loader of dlb_fast.data with a state, got {type(loader).__name__}"
        )
    return loader


def check_ranks(loader: Any, rank: int, world_size: int) -> None:
    """Raise unless the loader's plan was made for this process among as many as the framework runs."""
    plan = getattr(loader, "plan", None)
    made = (getattr(loader, "rank", None), None if plan is None else plan.world_size)
    if plan is not None and made != (rank, world_size):
        raise ValueError(
            f"dlb_fast.integrations: {type(loader).__name__} was made as rank {made[0]} of {made[1]}, but this process "
            f"is rank {rank} of {world_size}; make it once the framework has started its processes (Lightning: in "
            "train_dataloader(); Accelerate: after Accelerator()), or pass rank= and world_size="
        )
