"""Ending a run early: a signal only marks the wish, and all ranks end after the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .distributed import Ranks

__all__ = ["StopSignals"]

SECONDS = 0.5  # between two votes
LONGEST = 256  # steps between two votes, however fast the steps before were


class StopSignals:
    """SIGTERM and SIGINT end the run after the running step; a second one ends it at once.

    A process alone looks at its own mark. Several ranks vote: about twice a second a sum of two numbers tells all of
    them whether any got a signal, and, by the slowest rank's pace, after how many steps to vote again.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.number = 0  # of the signal this process got
        self._interval = self._left = 1  # steps
        self._voted = time.perf_counter()

    def wanted(self, *, now: bool = False) -> str | None:
        """Asked once before every step, by all ranks: the name of the signal that ends the run, or None. `now`: vote
        whether or not it is time (the same on all ranks)."""
        number = self.number
        if self.ranks.several:
            self._left -= 1
            if self._left > 0 and not now:
                return None
            clock = time.perf_counter()
            agreed, pace = self.ranks.largest([number, (clock - self._voted) / self._interval])
            number, self._voted = int(agreed), clock
            self._interval = self._left = max(1, min(int(SECONDS / max(pace, 1e-6)), 2 * self._interval, LONGEST))
        return signal.Signals(number).name if number else None

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Signals only mark within this block; the handlers from before are put back."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        before: dict[int, Any] = {}

        def mark(number: int, frame: Any) -> None:
            self.number = number
            signal.signal(number, before[number])

        for wanted in (signal.SIGTERM, signal.SIGINT):
            before[wanted] = signal.signal(wanted, mark)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
