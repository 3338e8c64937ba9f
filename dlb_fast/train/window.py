"""Small helpers of the loop: sums between two evaluations, and how long a run is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .distributed import Ranks

__all__ = ["Window", "length_of", "total_steps"]


class Window:
    """Sums since the last evaluation, kept on the device so that training never waits for them."""

    NAMES = ("loss", "ce", "lb", "correct")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.batches = self.rows = self.with_parts = 0
        self.waited = self.seconds = 0.0

    def add(self, loss: Tensor, parts: Any, rows: int) -> None:
        """Add one batch."""
        values = [loss.detach()] if parts is None else [getattr(parts, name) for name in self.NAMES]
        self.sums[: len(values)] += torch.stack([v.detach().double() for v in values])
        self.batches += 1
        self.with_parts += parts is not None
        self.rows += rows

    def summed(self, ranks: Ranks) -> Window:
        """A window of all ranks' rows, in their mean time; a collective that waits for the device."""
        if not ranks.several:
            return self
        own = [self.batches, self.rows, self.with_parts, self.waited, self.seconds]
        *sums, batches, rows, with_parts, waited, seconds = ranks.total([*self.sums.tolist(), *own])
        found = Window(torch.device("cpu"))
        found.sums = torch.tensor(sums, dtype=torch.float64)
        found.batches, found.rows, found.with_parts = int(batches), int(rows), int(with_parts)
        found.waited, found.seconds = waited / ranks.world_size, seconds / ranks.world_size
        return found

    def is_finite(self) -> bool:
        """Whether every sum is finite; waits for the device."""
        return bool(self.sums.isfinite().all())

    def means(self) -> dict[str, Any]:
        """The row of metrics these sums make; None for what is not known."""
        if not self.batches:
            return dict.fromkeys(("loss", "ce", "lb", "train_top1", "images_per_second", "data_wait"))
        loss, ce, lb, correct = self.sums.tolist()
        known = bool(self.with_parts)
        return {
            "loss": loss / self.batches,
            "ce": ce / self.batches if known else None,
            "lb": lb / self.batches if known else None,
            "train_top1": correct / self.rows if known else None,
            "images_per_second": self.rows / self.seconds if self.seconds else None,
            "data_wait": self.waited / self.seconds if self.seconds else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint between two evaluations."""
        return {**vars(self), "sums": self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        vars(self).update(state)
        self.sums = state["sums"].to(self.sums.device)


def total_steps(loader: Any, config: TrainConfig) -> int:
    """Optimiser steps of a run: `max_steps`, or the epochs' batches over the accumulation."""
    if config.max_steps is not None:
        return config.max_steps
    length = length_of(loader)
    if not length:
        raise ValueError("Trainer: the loader has no length; give max_steps")
    return max(1, config.epochs * length // config.accumulate)


def length_of(loader: Any) -> int:
    """Batches per epoch, or 0 where the loader does not say."""
    try:
        return len(loader)
    except TypeError:
        return 0
