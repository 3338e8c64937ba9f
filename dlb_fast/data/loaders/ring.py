"""The ring of batches being built, the order in which worker threads fill it, and these threads.

Steps are numbered through the whole run: step g is batch g % K of epoch g // K, K = steps per epoch. A work item is one
sample of half g. It is decoded once and gives two views: the first goes into the new rows of slot g, the second into
the old rows of slot g + 1. A slot is ready when all its rows are written; that is a counter, there is no barrier, so
threads run ahead into later batches. The rules, each with a test:

1. An item of half g is handed out only when slots g and g + 1 are both free, i.e. g + 1 < released + depth + 2.
2. A slot is delivered only when its counter of missing rows is 0, and slots are delivered in order.
3. A slot is used again (opened for step g + depth + 2) only after the consumer released it.
4. A failed item still counts its rows; its error belongs to the first batch that holds the sample and is raised there.

In plain epochs (a plan without overlap) an item gives its first view only, needs slot g alone, in a ring of depth + 1.
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
    """One batch being built: host buffers, which step they hold and how many rows are missing.

    Attributes:
        step: the step being built.
        num_old: repeated rows of it.
        rows: all rows of it.
        images: (max rows, height, width, channels): a staging buffer that stays, or on a CPU the batch being made.
        fresh: no view of this step was written yet.
        meta: (2, max rows) int64: targets and sample ids.
        numbers: the memory of `meta` as a NumPy array.
        missing: rows not yet written.
        error: the failure of the lowest row, if any.
        error_row: that row.
        boxes: (5, rows) to erase, or None.
        stage: what the device side keeps with a slot (events, device buffers).
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
        """Begin a step."""
        self.step, self.num_old, self.rows, self.fresh = step, num_old, num_old + num_new, True
        self.missing, self.error, self.error_row = self.rows, None, self.rows


@dataclass(slots=True)
class Item:
    """One sample of one half and where its views go.

    Attributes:
        epoch: epoch the half belongs to.
        sample: its id in the plan (a substitute may take its place).
        views: up to two of (view, slot, row); a half carried into a resumed run has its second view only, and in plain
            epochs there is no second view.
    """

    epoch: int
    sample: int
    views: tuple[tuple[int, Slot, int], ...]


class SlotRing:
    """Hands out items, counts written rows and hands over finished batches, in order.

    Args:
        plan: which samples.
        rank: this process.
        start: the first step to deliver.
        depth: finished batches kept ahead, at least 1.
        on_full: called by the thread that wrote the last row of a slot, before the slot counts as ready
            (the device side launches its copy there).

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
        self._later = int(plan.overlap)  # batches after its own in which a half is shown
        self.size = depth + 1 + self._later
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
        self._half = max(0, start - self._later)  # half whose samples are being handed out
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
        slot = self.slots[half % self.size]
        first = (0, slot, slot.num_old + row)
        if not self._later:
            return Item(epoch, sample, (first,))
        second = (1, self.slots[(half + 1) % self.size], row)
        if half < self._first:  # carried into this run: its first view was delivered before
            return Item(epoch, sample, (second,))
        return Item(epoch, sample, (first, second))

    def finish(self, item: Item, error: BaseException | None = None) -> None:
        """Count an item's rows as written (or as failed); the last row of a slot makes it ready."""
        if error is not None:
            with self._lock:
                _, slot, row = item.views[0]  # the first batch that would show the sample
                if slot.error is None or row < slot.error_row:
                    slot.error, slot.error_row = error, row
        for _, slot, _ in item.views:
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


@dataclass(slots=True)
class Status:
    """What one thread is doing, since when; written by that thread, read by the timeout report."""

    doing: str = "starting"
    sample: int | None = None
    since: float = field(default_factory=time.monotonic)

    def set(self, doing: str, sample: int | None = None) -> None:
        """Note what the thread does from now on."""
        self.since = time.monotonic()
        self.doing, self.sample = doing, sample

    def describe(self, path: Callable[[int], str] | None = None) -> str:
        """For example `reading sample 17 (a/b.jpg), for 3.2 s`."""
        sample, text = self.sample, self.doing
        if sample is not None:
            text += f" sample {sample}" + (f" ({path(sample)})" if path else "")
        return f"{text}, for {time.monotonic() - self.since:.1f} s"


class WorkerPool:
    """`count` daemon threads running `work(status)` once each; one torch thread inside each.

    `torch.set_num_threads(1)` sets the calling thread's count, but also the default for threads born later,
    so `start` restores that default afterwards.

    Args:
        count: number of threads.
        work: runs until told to stop by other means (the ring's `stop`); it must not raise.
        name: prefix of the threads' names.

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
            self._go.set()  # only now, so that threads which the work makes find the default of the others

    def _run(self, status: Status) -> None:
        try:
            torch.set_num_threads(1)  # for this thread alone
            torch.get_num_threads()  # else the thread's first operation takes over the process-wide default again
            torch.set_grad_enabled(False)
        finally:
            self._started.release()
        self._go.wait()
        self._work(status)
        status.set("ended")

    def join(self, timeout: float) -> list[str]:
        """Wait up to `timeout` seconds in all; returns what the threads that did not end are doing."""
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
        """One line per thread: its name and what it is doing."""
        pairs = zip(self._threads, self._statuses, strict=True)
        return "\n".join(f"  {t.name}: {s.describe(path)}" for t, s in pairs)
