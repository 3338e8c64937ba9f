"""The index plan every loader of this room follows: which samples are new in which step, on which rank.

Training with the last mini-batch needs batches `[new half of the step before | new half of this step]`. What is
planned, shuffled and sharded is therefore the *half*: a rank that draws a sample keeps it for both of its uses, every
rank takes the same number of steps, and each sample that an epoch keeps is seen exactly twice, in two consecutive
steps.

Halves run on across epochs: the last half of epoch e is the old half of the first batch of epoch e + 1. So that no
batch holds a sample twice, a sample of that last half may not be in the first half of epoch e + 1. How this is kept
without walking through all the epochs before (`half` is a pure function) depends on the number of halves in an epoch:

- three or more: an offending entry of the first half trades places with the first later entry of the same permutation
  that is not in the last half of e either. Entries of the last half never take part, so the last half of an epoch is
  always that of its raw permutation, and the rule looks back one epoch only. There is always such an entry.
- two: a batch then holds (nearly) the whole set, and the sets of the two halves are forced: an epoch's first half can
  only be what the last half before it left over. One split of the set, drawn from the seed, serves all epochs; the
  order inside the halves (hence the ranks' shares, and with `drop_last` which surplus samples are dropped) is new
  each epoch.
- one: impossible with fewer samples than two halves. A batch may hold a sample twice, as an old and as a new row, drawn
  in different epochs and hence augmented differently.

Where no batch repeats the one before (`overlap=False`) nothing of this is needed: the order is the raw permutation.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlb_fast.data import _hash

Ids = NDArray[np.int64]
_CACHED_EPOCHS = 3  # the running one, the one before its boundary, the one a prefetcher has already entered


def as_int(value: object, operation: str, name: str, minimum: int) -> int:
    """`value` as a plain int; bools, floats and values below `minimum` raise naming operation and argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{operation}: {name} must be an integer, got {value!r} ({type(value).__name__})")
    number = operator.index(value)
    if number < minimum:
        raise ValueError(f"{operation}: {name} must be at least {minimum}, got {number}")
    return number


def as_bool(value: object, operation: str, name: str) -> bool:
    """`value` as a plain bool; anything but True and False raises (a string "False" would be true)."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{operation}: {name} must be True or False, got {value!r} ({type(value).__name__})")
    return bool(value)


class OverlapPlan:
    """Which sample ids form which half: a pure function of (seed, epoch, index, rank), knowing nothing of images.

    The global half `index` of an epoch is `half * world_size` consecutive entries of the epoch's permutation; rank r
    owns rows `[r * half, (r + 1) * half)` of it. Batch i of an epoch is `[half i-1 | half i]`; before half 0 of epoch
    e comes the last half of epoch e - 1, and before half 0 of epoch 0 nothing.

    Args:
        length: number of samples N, at least `half * world_size`.
        half: rows per half on one rank, H (half of the rows the model sees).
        shuffle: a new order each epoch; False keeps 0..N-1.
        seed: non-negative integer.
        world_size: number of ranks W.
        drop_last: True keeps `N // (H * W)` full halves per epoch (with shuffling, other samples are left out each
            epoch). False covers every sample: the last half may be short, with equal rows on all ranks; where its s
            samples do not divide by W it is padded by wrapping around itself (at most W - 1 duplicates, each on another
            rank than the original).

    Raises:
        ValueError: fewer samples than one global half, a size below 1, a negative seed.
        TypeError: an argument that is not an integer (or not a bool).

    Example:
        >>> plan = OverlapPlan(10, 2, shuffle=False)
        >>> plan.halves_per_epoch, plan.half(0, 1).tolist()
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
        if self.length < self.global_rows:
            raise ValueError(
                f"{name}: needs at least one global half of half * world_size = {self.rows} * {self.world_size} = "
                f"{self.global_rows} samples, got {self.length}; use a smaller batch or fewer ranks"
            )
        full, rest = divmod(self.length, self.global_rows)
        short = rest > 0 and not self.drop_last
        self._halves = full + short
        self._last_rows = rest if short else self.global_rows  # samples of an epoch's last global half, unpadded
        self._kept = full * self.global_rows if self.drop_last else self.length
        self._forget_orders()

    def _forget_orders(self) -> None:
        self._orders: OrderedDict[int, Ids] = OrderedDict()
        self._lock = threading.Lock()  # loader threads share one plan

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_orders", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_orders()

    @property
    def halves_per_epoch(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self._halves

    def rows_of(self, index: int) -> int:
        """Rows of half `index` on every rank: `half`, or fewer for the short last one."""
        self._check_index("rows_of", index)
        if index < self._halves - 1:
            return self.rows
        return -(-self._last_rows // self.world_size)

    def num_old(self, epoch: int, index: int) -> int:
        """Rows of batch (epoch, index) that repeat the batch before; with `overlap` 0 only at the very start."""
        before = self.before(epoch, index) if self.overlap else None
        return 0 if before is None else self.rows_of(before[1])

    def before(self, epoch: int, index: int) -> tuple[int, int] | None:
        """(epoch, index) of the half before, or None before (0, 0)."""
        if index > 0:
            return epoch, index - 1
        return (epoch - 1, self._halves - 1) if epoch > 0 else None

    def after(self, epoch: int, index: int) -> tuple[int, int]:
        """(epoch, index) of the half after."""
        return (epoch, index + 1) if index + 1 < self._halves else (epoch + 1, 0)

    def half(self, epoch: int, index: int, rank: int = 0) -> Ids:
        """Sample ids (rows_of(index),) int64 of one half on one rank; a fresh array."""
        as_int(rank, "OverlapPlan.half", "rank", 0)
        if rank >= self.world_size:
            raise ValueError(f"OverlapPlan.half: rank must be below world_size = {self.world_size}, got {rank}")
        ids = self.global_half(epoch, index)
        rows = self.rows_of(index)
        return ids[np.arange(rank * rows, (rank + 1) * rows) % len(ids)]

    def batch(self, epoch: int, index: int, rank: int = 0) -> tuple[Ids, Ids]:
        """(old ids, new ids) of batch `index` of an epoch on one rank; with `overlap` old ids are missing at (0, 0)."""
        before = self.before(epoch, index) if self.overlap else None
        old = np.empty(0, np.int64) if before is None else self.half(*before, rank)
        return old, self.half(epoch, index, rank)

    def global_half(self, epoch: int, index: int) -> Ids:
        """Ids of one half over all ranks, in rank order, without padding; a read-only view of the epoch's order."""
        self._check_index("half", index)
        start = index * self.global_rows
        return self.order(epoch)[start : min(start + self.global_rows, self._kept)]

    def order(self, epoch: int) -> Ids:
        """The epoch's final order (N,): its first `halves_per_epoch` global halves are used, the rest is dropped."""
        epoch = as_int(epoch, "OverlapPlan.order", "epoch", 0)
        with self._lock:
            found = self._orders.get(epoch)
            if found is not None:
                self._orders.move_to_end(epoch)
                return found
        order = self._make_order(epoch)
        order.flags.writeable = False
        with self._lock:
            self._orders[epoch] = order
            while len(self._orders) > _CACHED_EPOCHS:
                self._orders.popitem(last=False)
        return order

    def _make_order(self, epoch: int) -> Ids:
        if not self.shuffle:
            return np.arange(self.length, dtype=np.int64)
        if self.overlap and self._halves == 2:
            return self._two_half_order(epoch)
        order = self._raw_order(epoch)
        if self.overlap and self._halves >= 3 and epoch > 0:
            self._swap_collisions(order, self._last_of_raw(epoch - 1))
        return order

    def _raw_order(self, epoch: int) -> Ids:
        return _hash.permutation(_hash.key_of(self.seed, _hash.ORDER, epoch), self.length)

    def _last_of_raw(self, epoch: int) -> Ids:
        with self._lock:
            known = self._orders.get(epoch)  # equal to the raw one there: swaps never touch the last half
        order = self._raw_order(epoch) if known is None else known
        return order[self._kept - self._last_rows : self._kept]

    def _swap_collisions(self, order: Ids, last: Ids) -> None:
        """Trade entries of the first half that are in `last` for later ones that are not; `order` is changed in place.

        There is always a partner: between the first and the last half stand at least s entries (s = len(last), three
        halves or more), and the c <= s collisions leave at most s - c of those forbidden.
        """
        forbidden = np.zeros(self.length, dtype=bool)
        forbidden[last] = True
        collisions = np.flatnonzero(forbidden[order[: self.global_rows]])
        between = np.arange(self.global_rows, self._kept - self._last_rows)
        partners = between[~forbidden[order[between]]][: len(collisions)]
        order[collisions], order[partners] = order[partners], order[collisions]

    def _two_half_order(self, epoch: int) -> Ids:
        split = _hash.permutation(_hash.key_of(self.seed, _hash.SPLIT), self.length)
        surplus = self.length - self.global_rows - self._last_rows
        cut = self.global_rows + surplus // 2  # both sides share the samples that drop_last leaves out
        raw = self._raw_order(epoch)
        in_first = np.zeros(self.length, dtype=bool)
        in_first[split[:cut]] = True
        first, last = raw[in_first[raw]], raw[~in_first[raw]]
        used, spare = first[: self.global_rows], first[self.global_rows :]
        return np.concatenate([used, last[: self._last_rows], spare, last[self._last_rows :]])

    def _check_index(self, operation: str, index: int) -> None:
        as_int(index, f"OverlapPlan.{operation}", "index", 0)
        if index >= self._halves:
            raise ValueError(
                f"OverlapPlan.{operation}: index must be below halves_per_epoch = {self._halves}, got {index}"
            )

    def __repr__(self) -> str:
        return (
            f"OverlapPlan({self.length}, {self.rows}, shuffle={self.shuffle}, seed={self.seed}, "
            f"world_size={self.world_size}, drop_last={self.drop_last}, overlap={self.overlap})"
        )
