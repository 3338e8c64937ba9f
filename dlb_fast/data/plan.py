"""The index plan that every loader follows: which samples are new in which step, on which rank.

Training with the last mini-batch needs batches `[new half of the step before | new half of this step]`. So the plan
shuffles and shards *halves*: a rank trains on both views of its samples, every rank takes the same number of steps, and
each sample of an epoch is in exactly two consecutive steps.

The stream continues across epochs: the last half of epoch e is repeated in the first batch of epoch e + 1. So that no
batch holds a sample twice, the first half of epoch e + 1 must not contain a sample of that last half. `half` is a pure
function, so the plan ensures this without a walk through the epochs before. The rule depends on the halves per epoch:

- Three or more: each such sample of the first half is swapped with the first later entry of the permutation that is
  not in the last half of e either. Swaps never touch an epoch's last half, so the last half is that of the raw
  permutation, and the rule looks back one epoch only. There are always enough entries to swap with.
- Two: a batch holds (nearly) the whole dataset, so the first half of an epoch must be the complement of the last half
  before it. One split of the dataset, chosen by the seed, serves all epochs. The order inside the halves (hence the
  ranks' shares, and with `drop_last` the dropped samples) is new each epoch.
- One: impossible, because there are fewer samples than two halves. A batch may hold a sample as a repeated and as a new
  row; the two belong to different epochs, so they are augmented differently.

With `overlap=False` no batch repeats rows, and the order is the raw permutation.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from dlb_fast._args import as_int
from dlb_fast.data._args import as_bool
from dlb_fast.data.rng import ORDER, SPLIT, key_of, permutation

Ids = NDArray[np.int64]
_CACHED_EPOCHS = 3  # the current epoch, the one before it, and the next one, which a prefetcher reads ahead


class OverlapPlan:
    """The sample ids of every half: a pure function of (seed, epoch, index, rank).

    The global half `index` of an epoch is `half * world_size` consecutive entries of the epoch's permutation; rank r
    has rows `[r * half, (r + 1) * half)` of it. Batch i of an epoch is `[half i-1 | half i]`. The half before half 0 of
    epoch e is the last half of epoch e - 1; before half 0 of epoch 0 there is none.

    Args:
        length: number of samples N, at least `half * world_size` with `drop_last`, else at least 1.
        half: rows per half on one rank, H: half of the rows of a batch.
        shuffle: a new order each epoch; False keeps 0..N-1.
        seed: non-negative integer.
        world_size: number of ranks W.
        drop_last: True keeps `N // (H * W)` full halves per epoch (with shuffling, each epoch drops other samples).
            False covers every sample: the last half may be short, with equal rows on all ranks. If W does not divide
            its length, the half is padded with its own first samples (at most W - 1 duplicates, each on another rank
            than the original).
        overlap: False turns repetition off: a batch is one half.

    Raises:
        ValueError: too few samples, a size below 1, a negative seed.
        TypeError: an argument that is not an integer or not a bool.

    Example:
        >>> plan = OverlapPlan(10, 2, shuffle=False)
        >>> plan.steps_per_epoch, plan.half(0, 1).tolist()
        (5, [2, 3])
    """

    def __init__(
        self,
        length: int,
        half: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        overlap: bool = True,
    ) -> None:
        name = "OverlapPlan"
        self.length = as_int(length, name, "length", 0)
        self.rows = as_int(half, name, "half", 1)
        self.seed = as_int(seed, name, "seed", 0)
        self.world_size = as_int(world_size, name, "world_size", 1)
        self.shuffle = as_bool(shuffle, name, "shuffle")
        self.drop_last = as_bool(drop_last, name, "drop_last")
        self.overlap = as_bool(overlap, name, "overlap")
        self.global_rows = self.rows * self.world_size
        full, rest = divmod(self.length, self.global_rows)
        if not full and (self.drop_last or not rest):
            raise ValueError(
                f"{name}: the new rows of one step on all ranks need {self.rows} * {self.world_size} = "
                f"{self.global_rows} samples, got {self.length}; use a smaller batch_size, fewer ranks or "
                "drop_last=False"
            )
        short = rest > 0 and not self.drop_last
        self.steps_per_epoch = full + short  # equal on all ranks
        self._last_rows = rest if short else self.global_rows  # samples of an epoch's last global half, unpadded
        self._last_rank_rows = -(-self._last_rows // self.world_size)  # rows of it on one rank, padded
        self._kept = full * self.global_rows if self.drop_last else self.length
        self._forget_orders()

    def _forget_orders(self) -> None:
        self._orders: dict[int, Ids] = {}
        self._lock = threading.Lock()  # loader threads share one plan

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_orders", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_orders()

    def rows_of(self, index: int) -> int:
        """Rows of half `index` on every rank: `half`, or fewer for the short last one."""
        return self.rows if index < self.steps_per_epoch - 1 else self._last_rank_rows

    def before(self, epoch: int, index: int) -> tuple[int, int] | None:
        """(epoch, index) of the half before, or None before (0, 0)."""
        if index > 0:
            return epoch, index - 1
        return (epoch - 1, self.steps_per_epoch - 1) if epoch > 0 else None

    def after(self, epoch: int, index: int) -> tuple[int, int]:
        """(epoch, index) of the half after."""
        return (epoch, index + 1) if index + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def num_old(self, epoch: int, index: int) -> int:
        """Number of repeated rows of batch (epoch, index); with `overlap` 0 only at (0, 0)."""
        before = self.before(epoch, index) if self.overlap else None
        return 0 if before is None else self.rows_of(before[1])

    def half(self, epoch: int, index: int, rank: int = 0) -> Ids:
        """Sample ids (rows_of(index),) int64 of one half on one rank; a new array."""
        last = self.steps_per_epoch - 1
        if not 0 <= index <= last or epoch < 0 or not 0 <= rank < self.world_size:
            raise ValueError(
                f"OverlapPlan.half: needs an epoch >= 0, an index below steps_per_epoch = {last + 1} and a rank below "
                f"world_size = {self.world_size}, got epoch {epoch}, index {index}, rank {rank}"
            )
        order = self._orders.get(epoch)
        if order is None:
            order = self.order(epoch)
        rows = self.rows if index < last else self._last_rank_rows
        start = index * self.global_rows
        ids = order[start : min(start + self.global_rows, self._kept)]
        return ids[np.arange(rank * rows, (rank + 1) * rows) % len(ids)]

    def batch(self, epoch: int, index: int, rank: int = 0) -> tuple[Ids, Ids]:
        """(repeated ids, new ids) of batch `index` of an epoch on one rank; at (0, 0) there are no repeated ids."""
        ids, _, views = self.views(epoch, index, rank)
        return ids[views == 1], ids[views == 0]

    def views(self, epoch: int, index: int, rank: int = 0) -> tuple[Ids, Ids, Ids]:
        """The rows of a batch: (sample ids, epochs in which the samples were new, views 0 or 1), each (n,) int64.

        The repeated rows come first: the second views (1) of the samples that were new one step before.
        """
        new = self.half(epoch, index, rank)
        if not self.overlap or (epoch == 0 and index == 0):
            return new, np.full(len(new), epoch), np.zeros(len(new), np.int64)
        before = (epoch, index - 1) if index else (epoch - 1, self.steps_per_epoch - 1)
        old = self.half(*before, rank)
        counts = [len(old), len(new)]
        return np.concatenate([old, new]), np.repeat([before[0], epoch], counts), np.repeat([1, 0], counts)

    def order(self, epoch: int) -> Ids:
        """The order (N,) of an epoch, read-only; its first `steps_per_epoch` global halves are used."""
        order = self._orders.get(epoch)
        if order is None:
            order = self._make_order(int(epoch))
            order.flags.writeable = False
            with self._lock:
                self._orders[epoch] = order
                while len(self._orders) > _CACHED_EPOCHS:
                    del self._orders[next(iter(self._orders))]  # the oldest entry
        return order

    def _make_order(self, epoch: int) -> Ids:
        if not self.shuffle:
            return np.arange(self.length, dtype=np.int64)
        if self.overlap and self.steps_per_epoch == 2:
            return self._two_half_order(epoch)
        order = self._raw_order(epoch)
        if self.overlap and self.steps_per_epoch >= 3 and epoch > 0:
            self._swap_collisions(order, self._last_of_raw(epoch - 1))
        return order

    def _raw_order(self, epoch: int) -> Ids:
        return permutation(key_of(self.seed, ORDER, epoch), self.length)

    def _last_of_raw(self, epoch: int) -> Ids:
        known = self._orders.get(epoch)  # its last half is that of the raw order, because swaps never touch it
        order = self._raw_order(epoch) if known is None else known
        return order[self._kept - self._last_rows : self._kept]

    def _swap_collisions(self, order: Ids, last: Ids) -> None:
        """Swap, in place, entries of the first half that are in `last` with later entries that are not.

        There are enough later entries: with three or more halves at least s = len(last) entries are between the first
        and the last half, and after c collisions at most s - c of these are in `last`.
        """
        forbidden = np.zeros(self.length, dtype=bool)
        forbidden[last] = True
        collisions = np.flatnonzero(forbidden[order[: self.global_rows]])
        between = np.arange(self.global_rows, self._kept - self._last_rows)
        partners = between[~forbidden[order[between]]][: len(collisions)]
        order[collisions], order[partners] = order[partners], order[collisions]

    def _two_half_order(self, epoch: int) -> Ids:
        split = permutation(key_of(self.seed, SPLIT), self.length)
        surplus = self.length - self.global_rows - self._last_rows
        cut = self.global_rows + surplus // 2  # both sides get half of the samples that drop_last drops
        raw = self._raw_order(epoch)
        in_first = np.zeros(self.length, dtype=bool)
        in_first[split[:cut]] = True
        first, last = raw[in_first[raw]], raw[~in_first[raw]]
        used, spare = first[: self.global_rows], first[self.global_rows :]
        return np.concatenate([used, last[: self._last_rows], spare, last[self._last_rows :]])

    def __repr__(self) -> str:
        return (
            f"OverlapPlan({self.length}, {self.rows}, shuffle={self.shuffle}, seed={self.seed}, "
            f"world_size={self.world_size}, drop_last={self.drop_last}, overlap={self.overlap})"
        )


def make_plan(
    operation: str,
    length: int,
    batch_size: int,
    *,
    overlap: bool,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    rank: int | None,
    world_size: int | None,
) -> tuple[OverlapPlan, int]:
    """(plan, rank) of a loader whose batches have `batch_size` rows, half of them new with `overlap`."""
    overlap = as_bool(overlap, operation, "overlap")
    rows = half_of(operation, batch_size) if overlap else as_int(batch_size, operation, "batch_size", 1)
    rank, world_size = resolve_ranks(operation, rank, world_size)
    return OverlapPlan(
        length, rows, shuffle=shuffle, seed=seed, world_size=world_size, drop_last=drop_last, overlap=overlap
    ), rank


def half_of(operation: str, batch_size: int) -> int:
    """`batch_size / 2`; ValueError unless `batch_size` is even and at least 2."""
    batch_size = as_int(batch_size, operation, "batch_size", 2)
    if batch_size % 2:
        raise ValueError(
            f"{operation}: batch_size must be even (half of the rows repeat the batch before), got {batch_size}; "
            f"use {batch_size - 1} or {batch_size + 1}"
        )
    return batch_size // 2


def resolve_ranks(operation: str, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world_size); a None is taken from torch.distributed, or is 0 or 1 without a process group."""
    grouped = dist.is_available() and dist.is_initialized()
    processes = os.environ.get("WORLD_SIZE", "1")
    if rank is None and world_size is None and not grouped and processes not in ("", "1"):
        warnings.warn(
            f"{operation}: WORLD_SIZE={processes}, but torch.distributed is not initialised, so this process is rank 0 "
            "of 1 and trains on all data, like every other process; make the loader after the process group (in "
            "Lightning: in train_dataloader()), or pass rank= and world_size=",
            stacklevel=4,
        )
    if world_size is None:
        world_size = dist.get_world_size() if grouped else 1
    if rank is None:
        if not grouped and world_size != 1:
            raise ValueError(
                f"{operation}: world_size={world_size} needs rank as well, because torch.distributed is not "
                "initialised; pass rank=... or call torch.distributed.init_process_group first"
            )
        rank = dist.get_rank() if grouped else 0
    world_size = as_int(world_size, operation, "world_size", 1)
    rank = as_int(rank, operation, "rank", 0)
    if rank >= world_size:
        raise ValueError(f"{operation}: rank must be below world_size = {world_size}, got {rank}")
    return rank, world_size
