"""Worker threads that can say what they are doing, and that are gone when they are told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

__all__ = ["Status", "WorkerPool", "one_torch_thread"]

_LOG = logging.getLogger("dlb_fast.data")


@dataclass(slots=True)
class Status:
    """What one thread is doing, since when; written by that thread, read by the timeout report."""

    doing: str = "starting"
    sample: int | None = None
    since: float = field(default_factory=time.monotonic)

    def set(self, doing: str, sample: int | None = None) -> None:
        self.since = time.monotonic()
        self.doing, self.sample = doing, sample

    def describe(self, path: Callable[[int], str] | None = None) -> str:
        """For example `reading sample 17 (a/b.jpg), for 3.2 s`."""
        sample, text = self.sample, self.doing
        if sample is not None:
            text += f" sample {sample}" + (f" ({path(sample)})" if path else "")
        return f"{text}, for {time.monotonic() - self.since:.1f} s"


def one_torch_thread() -> None:
    """Let the calling thread alone run torch operations on one core.

    Asking back matters: a thread's first operation otherwise takes over the process-wide default once more, whatever
    was set before it.

    Example:
        >>> thread = threading.Thread(target=one_torch_thread)
        >>> thread.start(); thread.join()
    """
    torch.set_num_threads(1)
    torch.get_num_threads()


class WorkerPool:
    """`count` daemon threads running `work(status)` once each; one torch thread inside each.

    `torch.set_num_threads(1)` sets the calling thread's count, but also the default for threads born later,
    so `start` restores that default afterwards.

    Args:
        count: threads. work: runs until told to stop by other means (the ring's `stop`); must not raise.
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
            one_torch_thread()
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

    def alive(self) -> int:
        return sum(t.is_alive() for t in self._threads)
