"""A ring of batches that worker threads fill, and the threads.

Steps are numbered through the whole run: step g is batch g % K of epoch g // K, K = steps per epoch. A work item is one
sample of half g. A thread decodes it once and makes two views: the first goes into the new rows of slot g, the second
into the repeated rows of slot g + 1. Each slot counts its missing rows. There is no barrier, so threads run ahead into
later batches. The rules, each with a test:

1. The ring hands out an item of half g only when slots g and g + 1 are both free: g + 1 < released + depth + 2.
2. It delivers a slot only when no row is missing, and delivers slots in order.
3. It reuses a slot (for step g + depth + 2) only after the consumer released it.
4. A failed item still counts its rows. Its error is raised with the first batch that holds the sample.

Without overlap an item has one view and needs slot g alone; the ring then has depth + 1 slots.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.plan import OverlapPlan

__all__ = ["Item", "Slot", "SlotRing", "Status", "WorkerPool"]

_LOG = logging.getLogger("dlb_fast.data")


class Slot:
    """One batch that is being built.

    Attributes:
        step: step number.
        num_old: number of repeated rows.
        rows: number of rows.
        images: (max rows, height, width, channels): a permanent staging buffer, or on a CPU the batch itself.
        fresh: whether no view of this step has been written.
        meta: (2, max rows) int64: targets and sample ids.
        numbers: NumPy array that shares the memory of `meta`.
        missing: number of rows not yet written.
        error: error of the lowest failed row, or None.
        error_row: that row.
        boxes: (5, rows) boxes to erase, or None.
        stage: events and buffers of the device stage.
    """

    __slots__ = (
        "boxes",
        "error",
        "error_row",
        "fresh",
        "images",
        "meta",
        "missing",
        "num_old",
        "numbers",
        "rows",
        "stage",
        "step",
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
        self.boxes: NDArray[np.int64] | None = None
        self.stage: object = None

    def open(self, step: int, num_old: int, num_new: int) -> None:
        """Start building a step."""
        self.step, self.num_old, self.rows, self.fresh = step, num_old, num_old + num_new, True
        self.missing, self.error, self.error_row = self.rows, None, self.rows


@dataclass(slots=True)
class Item:
    """One sample of one half, with the destinations of its views.

    Attributes:
        epoch: epoch of the half.
        sample: sample id in the plan (a substitute may replace it).
        views: one or two of (view, slot, row). The half before a resumed step has only its second view; without
            overlap there is only the first.
    """

    epoch: int
    sample: int
    views: tuple[tuple[int, Slot, int], ...]


class SlotRing:
    """Hands out items, counts written rows and delivers finished batches in order.

    Args:
        plan: index plan.
        rank: rank of this process.
        start: first step to deliver.
        depth: number of batches finished ahead, at least 1.
        on_full: called by the thread that wrote the last row of a slot, before the slot is ready. The device stage
            starts its copy there.

    Example:
        >>> ring = SlotRing(OverlapPlan(4, 2, shuffle=False), 0, start=0, depth=1)
        >>> item = ring.take()
        >>> item.sample, [(view, slot.step, row) for view, slot, row in item.views]
        (0, [(0, 0, 0), (1, 1, 0)])
    """

    def __init__(
        self,
        plan: OverlapPlan,
        rank: int,
        *,
        start: int,
        depth: int,
        on_full: Callable[[Slot], None] | None = None,
    ) -> None:
        self._plan, self._rank = plan, rank
        self._per_epoch = plan.steps_per_epoch
        self._later = int(plan.overlap)  # 1: a half is repeated in the next batch
        self.size = depth + 1 + self._later
        self.slots = [Slot() for _ in range(self.size)]
        self._on_full = on_full
        self._lock = threading.RLock()  # reentrant: the garbage collector may call `stop` while the lock is held
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._stopped = False
        self._abort: BaseException | None = None
        self._idle, self._waiting, self._since = 0.0, 0, time.monotonic()
        self._released = start  # the consumer released all steps below
        self._delivered = start  # next step to deliver
        self._opened = start  # all steps below have a slot
        self._half = max(0, start - self._later)  # half that is being handed out
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
        old = self._rows(step - 1) if self._later else 0
        self.slots[step % self.size].open(step, old, self._rows(step))
        self._opened += 1

    def _may_take(self) -> bool:
        return self._half + self._later < self._released + self.size

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
            if half + self._later >= self._opened:
                self._open_next()
            item = self._item(half, row)
            self._row += 1
            half_done = self._row == len(self._ids)
            if half_done:
                self._half, self._row = half + 1, 0
                self._ids = self._half_ids(self._half)
        if half_done and (half + 2) % self._per_epoch == 0:
            self._plan.order((half + 2) // self._per_epoch)  # cache the next epoch's order while the lock is free
        return item

    def _count_waiting(self, more: int) -> None:
        now = time.monotonic()
        self._idle += self._waiting * (now - self._since)
        self._waiting, self._since = self._waiting + more, now

    def idle_seconds(self) -> float:
        """Seconds that all threads together have waited for a free slot because the consumer was slower."""
        with self._lock:
            self._count_waiting(0)
            return self._idle

    def _item(self, half: int, row: int) -> Item:
        sample, epoch = int(self._ids[row]), half // self._per_epoch
        slot = self.slots[half % self.size]
        first = (0, slot, slot.num_old + row)
        if not self._later:
            return Item(epoch, sample, (first,))
        second = (1, self.slots[(half + 1) % self.size], row)
        if half < self._first:  # its first view was delivered before the resume
            return Item(epoch, sample, (second,))
        return Item(epoch, sample, (first, second))

    def finish(self, item: Item, error: BaseException | None = None) -> None:
        """Count an item's rows as written or failed; the last row makes its slot ready."""
        if error is not None:
            with self._lock:
                _, slot, row = item.views[0]  # the first batch that holds the sample
                if slot.error is None or row < slot.error_row:
                    slot.error, slot.error_row = error, row
        for _, slot, _ in item.views:
            with self._lock:
                full = slot.missing == 1
                if not full:
                    slot.missing -= 1
            if full:  # this thread wrote the last row, so no other thread touches the slot now
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
            self._done.notify_all()

    def wait(self, timeout: float | None = None) -> Slot | None:
        """The next slot once all its rows are written; None after `timeout` seconds or after `stop()`."""
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
        """Allow the threads to fill the slot's host buffers again."""
        with self._work:
            if slot.step != self._released:
                raise RuntimeError(f"SlotRing.release: expected step {self._released}, got {slot.step}")
            self._released += 1
            self._work.notify_all()

    def abort(self, error: BaseException) -> None:
        """Make `wait` raise `error`, which a thread raised outside any sample."""
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
        """Number of rows written in every open slot, for the timeout report."""
        with self._lock:
            opened = [s for s in self.slots if s.step >= self._delivered]
            slots = ", ".join(
                f"step {s.step}: {s.rows - s.missing}/{s.rows} rows" for s in sorted(opened, key=lambda s: s.step)
            )
            return f"waiting for step {self._delivered}; {slots or 'no slot open'}"


@dataclass(slots=True)
class Status:
    """Current activity of one thread and its start time. The thread writes it, the timeout report reads it."""

    doing: str = "starting"
    sample: int | None = None
    since: float = field(default_factory=time.monotonic)

    def set(self, doing: str, sample: int | None = None) -> None:
        """Start another activity."""
        self.since = time.monotonic()
        self.doing, self.sample = doing, sample

    def describe(self, path: Callable[[int], str] | None = None) -> str:
        """For example `reading sample 17 (a/b.jpg), for 3.2 s`."""
        sample, text = self.sample, self.doing
        if sample is not None:
            text += f" sample {sample}" + (f" ({path(sample)})" if path else "")
        return f"{text}, for {time.monotonic() - self.since:.1f} s"


class WorkerPool:
    """`count` daemon threads that each call `work(status)` once and use one torch thread.

    `torch.set_num_threads(1)` also changes the default of threads started later, so `start` restores that default.

    Args:
        count: number of threads.
        work: runs until the ring's `stop` ends it; it must not raise.
        name: prefix of the thread names.

    Example:
        >>> pool = WorkerPool(2, lambda status: status.set("done"))
        >>> pool.start()
        >>> pool.join(5.0)
        []
    """

    def __init__(self, count: int, work: Callable[[Status], None], name: str = "dlb-loader") -> None:
        self._work = work
        self._statuses = [Status() for _ in range(count)]
        self._started = threading.Semaphore(0)
        self._go = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(s,), name=f"{name}-{i}", daemon=True)
            for i, s in enumerate(self._statuses)
        ]

    def start(self) -> None:
        """Start the threads."""
        own = torch.get_num_threads()
        try:
            for thread in self._threads:
                thread.start()
            for _ in self._threads:
                self._started.acquire()
        finally:
            torch.set_num_threads(own)
            self._go.set()  # only now, so that threads started by `work` get the restored default

    def _run(self, status: Status) -> None:
        try:
            torch.set_num_threads(1)
            torch.get_num_threads()  # without this call the first operation resets the thread to the default
            torch.set_grad_enabled(False)
        finally:
            self._started.release()
        self._go.wait()
        self._work(status)
        status.set("ended")

    def join(self, timeout: float) -> list[str]:
        """Wait up to `timeout` seconds in all; returns the activities of the threads that did not end."""
        deadline = time.monotonic() + timeout
        current = threading.current_thread()
        for thread in self._threads:
            if thread is not current and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        pairs = zip(self._threads, self._statuses, strict=True)
        left = [s.describe() for t, s in pairs if t.is_alive() and t is not current]
        if left:
            _LOG.warning("%d loader threads did not end within %.0f s: %s", len(left), timeout, "; ".join(left))
        return left

    def report(self, path: Callable[[int], str]) -> str:
        """One line per thread: its name and its activity."""
        pairs = zip(self._threads, self._statuses, strict=True)
        return "\n".join(f"  {t.name}: {s.describe(path)}" for t, s in pairs)
