"""The ring of batch buffers and the order in which worker threads fill it.

Steps are numbered through the whole run: step g is batch g % K of epoch g // K, K = halves per epoch. A work item is
one sample of half g. It is decoded once and writes two views: the first into the new rows of slot g, the second into
the old rows of slot g + 1. A slot is ready when all its rows are written; that is a counter, there is no barrier, so
threads run ahead into later batches. The rules, each held by a test:

1. An item of half g is handed out only when slots g and g + 1 are both free, i.e. g + 1 < released + depth + 2.
2. A slot is delivered only when its counter of missing rows is 0, and slots are delivered in order.
3. A slot is reused (opened for step g + depth + 2) only after the consumer released it.
4. A failed item still counts its rows; its error belongs to the first batch that holds the sample and is raised there.

Without repeated halves (`repeat=False`) an item writes its first view only, needs slot g alone, in a ring of depth + 1.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.plan import OverlapPlan

__all__ = ["Item", "Slot", "SlotRing"]


class Slot:
    """One batch being built: host buffers, which step they hold and how many rows are missing.

    Attributes:
        step: the step being built. num_old, rows: repeated rows and all rows of it.
        images: (max rows, height, width, channels): a staging buffer that stays, or on a CPU the batch being made.
        fresh: no view of this step was written yet.
        meta: (2, max rows) int64: targets and sample ids. numbers: the same memory as a NumPy array.
        missing: rows not yet written. error: the failure of the lowest row, if any.
        ready: monotonic time at which the last row came. boxes: (5, rows) to erase, drawn once all rows are there.
    """

    __slots__ = (
        "boxes", "error", "error_row", "fresh", "images", "meta", "missing", "num_old", "numbers", "ready", "rows",
        "stage", "step",
    )

    def __init__(self) -> None:
        self.step = -1
        self.fresh = True
        self.num_old = self.rows = self.missing = 0
        self.images: torch.Tensor | None = None
        self.meta: torch.Tensor | None = None
        self.numbers: NDArray[np.int64] | None = None
        self.error: BaseException | None = None
        self.error_row = 0
        self.ready = 0.0
        self.boxes: NDArray[np.int64] | None = None
        self.stage: object = None  # what the device side keeps per slot (events, device buffers)

    def open(self, step: int, num_old: int, num_new: int) -> None:
        self.step, self.num_old, self.rows, self.fresh = step, num_old, num_old + num_new, True
        self.missing, self.error, self.error_row = self.rows, None, self.rows


@dataclass(slots=True)
class Item:
    """One sample of one half and where its views go.

    Attributes:
        epoch: epoch the half belongs to. sample: its id in the plan (a substitute may take its place).
        targets: up to two of (use, slot, row); a half carried into a resumed run has its second use only, and without
            repeated halves there is no second use.
    """

    epoch: int
    sample: int
    row: int
    targets: tuple[tuple[int, Slot, int], ...]


class SlotRing:
    """Hands out items, counts written rows and hands over finished batches, in order.

    Args:
        plan, rank: which samples. start: the first step to deliver. depth: finished batches kept ahead, at least 1.
        repeat: False shows every sample once: a batch is one half.
        on_full: called by the thread that wrote the last row of a slot, before the slot counts as ready
            (the device side launches its copy there).

    Example:
        >>> ring = SlotRing(OverlapPlan(4, 2, shuffle=False), 0, start=0, depth=1)
        >>> item = ring.take()
        >>> item.sample, [(use, slot.step, row) for use, slot, row in item.targets]
        (0, [(0, 0, 0), (1, 1, 0)])
    """

    def __init__(
        self,
        plan: OverlapPlan,
        rank: int,
        *,
        start: int,
        depth: int,
        repeat: bool = True,
        on_full: Callable[[Slot], None] | None = None,
    ) -> None:
        self._plan, self._rank = plan, rank
        self._per_epoch = plan.halves_per_epoch
        self._uses_after = int(repeat)  # batches after its own in which a half is used
        self.size = depth + 1 + self._uses_after
        self.slots = [Slot() for _ in range(self.size)]
        self._on_full = on_full
        self._lock = threading.RLock()  # the collector may run `stop` inside a locked region
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._stopped = False
        self._abort: BaseException | None = None
        self._idle, self._waiting, self._since = 0.0, 0, time.monotonic()
        self._released = start  # steps below are free
        self._delivered = start  # the next step to hand over
        self._opened = start  # steps below have a slot
        self._half = max(0, start - self._uses_after)  # half whose samples are being handed out
        self._row = 0
        self._first = start
        self._ids = self._half_ids(self._half)
        self._open_next()

    def _half_ids(self, step: int) -> NDArray[np.int64]:
        return self._plan.half(step // self._per_epoch, step % self._per_epoch, self._rank)

    def _rows(self, step: int) -> int:
        return self._plan.rows_of(step % self._per_epoch) if step >= 0 else 0

    def _open_next(self) -> None:
        step = self._opened
        old = self._rows(step - 1) if self._uses_after else 0
        self.slots[step % self.size].open(step, old, self._rows(step))
        self._opened += 1

    def _may_take(self) -> bool:
        return self._half + self._uses_after < self._released + self.size

    def take(self) -> Item | None:
        """The next item, waiting for a free slot; None after `stop()`."""
        with self._work:
            if not self._stopped and not self._may_take():
                self._count_waiting(1)
                while not self._stopped and not self._may_take():
                    self._work.wait()
                self._count_waiting(-1)
            if self._stopped:
                return None
            half, row = self._half, self._row
            if half + self._uses_after >= self._opened:
                self._open_next()
            item = self._item(half, row)
            self._row += 1
            turn = self._row == len(self._ids)
            if turn:
                self._half, self._row = half + 1, 0
                self._ids = self._half_ids(self._half)
        if turn and (half + 2) % self._per_epoch == 0:
            self._plan.order((half + 2) // self._per_epoch)  # sorted here, so not under the lock later
        return item

    def _count_waiting(self, more: int) -> None:
        now = time.monotonic()
        self._idle += self._waiting * (now - self._since)
        self._waiting, self._since = self._waiting + more, now

    def idle_seconds(self) -> float:
        """How long threads have waited for a free slot, all together: that long the consumer was the slower one."""
        with self._lock:
            self._count_waiting(0)
            return self._idle

    def _item(self, half: int, row: int) -> Item:
        sample, epoch = int(self._ids[row]), half // self._per_epoch
        if not self._uses_after:
            return Item(epoch, sample, row, ((0, self.slots[half % self.size], row),))
        later = (1, self.slots[(half + 1) % self.size], row)
        if half < self._first:  # carried into this run: its first use was delivered before
            return Item(epoch, sample, row, (later,))
        slot = self.slots[half % self.size]
        return Item(epoch, sample, row, ((0, slot, slot.num_old + row), later))

    def finish(self, item: Item, error: BaseException | None = None) -> None:
        """Count an item's rows as written (or as failed); the last row of a slot makes it ready."""
        if error is not None:
            with self._lock:
                _, slot, row = item.targets[0]
                if slot.error is None or row < slot.error_row:
                    slot.error, slot.error_row = error, row
        for _, slot, _ in item.targets:
            with self._lock:
                full = slot.missing == 1
                if not full:
                    slot.missing -= 1
            if full:  # this thread alone wrote the last row: nobody else touches the slot now
                self._fill(slot)

    def _fill(self, slot: Slot) -> None:
        failure: BaseException | None = None
        if self._on_full is not None and slot.error is None:
            try:
                self._on_full(slot)
            except BaseException as error:
                failure = error
        with self._done:
            slot.error = slot.error or failure
            slot.missing = 0
            slot.ready = time.monotonic()
            self._done.notify_all()

    def wait(self, timeout: float | None = None) -> Slot | None:
        """The next slot in order once all its rows are there; None when `timeout` seconds passed or after `stop()`."""
        with self._done:
            slot = self.slots[self._delivered % self.size]

            def ready() -> bool:
                if self._stopped or self._abort is not None:
                    return True
                return slot.step == self._delivered and slot.missing == 0

            arrived = self._done.wait_for(ready, timeout)
            if self._abort is not None:
                raise self._abort
            if not arrived or self._stopped:
                return None
            self._delivered += 1
            return slot

    def release(self, slot: Slot) -> None:
        """The consumer is done with the slot's host buffers: they may be filled again."""
        with self._work:
            if slot.step != self._released:
                raise RuntimeError(f"SlotRing.release: expected step {self._released}, got {slot.step}")
            self._released += 1
            self._work.notify_all()

    def abort(self, error: BaseException) -> None:
        """A thread failed outside any sample: `wait` raises its error."""
        with self._lock:
            self._abort = error
            self._done.notify_all()

    def stop(self) -> None:
        """Wake every thread; `take` and `wait` return None from now on."""
        with self._lock:
            self._stopped = True
            self._work.notify_all()
            self._done.notify_all()

    def progress(self) -> str:
        """What is ready and what is missing, for the timeout report."""
        with self._lock:
            opened = [s for s in self.slots if s.step >= self._delivered]
            slots = ", ".join(
                f"step {s.step}: {s.rows - s.missing}/{s.rows} rows" for s in sorted(opened, key=lambda s: s.step)
            )
            return f"waiting for step {self._delivered}; {slots or 'no slot open'}"
