"""Does a second thread help? A transform that holds the interpreter lock makes worker threads useless.

The measurement delays the first batch, so it is bounded: it gives up on work that is slow by itself, and stops after
`_BUDGET` seconds (and the round it is in).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

import torch

from dlb_fast.data.workers import one_torch_thread

__all__ = ["check_threads", "speed_up"]

_LOG = logging.getLogger("dlb_fast.data")
_ROUNDS, _SECONDS = 3, 0.02
_LONGEST, _BUDGET = 0.05, 0.3
_ENOUGH = 1.25


def _timed(work: Callable[[], None], count: int, threads: int) -> float:
    barrier = threading.Barrier(threads + 1)

    def run() -> None:
        one_torch_thread()
        barrier.wait()
        with contextlib.suppress(Exception):  # the run raises it with the sample's name
            for _ in range(count):
                work()

    pool = [threading.Thread(target=run, name="dlb-probe", daemon=True) for _ in range(threads)]
    for thread in pool:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in pool:
        thread.join()
    return time.perf_counter() - started


def speed_up(work: Callable[[], None]) -> float:
    """How much faster two threads do twice the work than one: 2 is perfect, 1 is no gain (least disturbed of 3).

    Example:
        >>> speed_up(lambda: time.sleep(0.002)) > 1.25
        True
    """
    own, deadline = torch.get_num_threads(), time.perf_counter() + _BUDGET
    try:
        once = min(_timed(work, 1, 1) for _ in range(2))
        count = max(1, int(_SECONDS / max(once, 1e-6)))
        pairs: list[tuple[float, float]] = []
        while len(pairs) < _ROUNDS and not (pairs and time.perf_counter() > deadline):
            pairs.append((_timed(work, count, 1), _timed(work, count, 2)))
        return 2 * min(one for one, _ in pairs) / min(two for _, two in pairs)
    finally:
        torch.set_num_threads(own)  # see WorkerPool


def check_threads(work: Callable[[], None]) -> bool:
    """Log a warning when two threads are hardly faster than one; True otherwise. Work that fails, or takes longer than
    `_LONGEST` by itself, counts as fine."""
    try:
        once = _seconds(work)
        if _LONGEST < once < _BUDGET / 2:
            once = _seconds(work)  # the first call may have had something to set up
    except Exception:
        return True  # the run raises it with the sample's name
    if once > _LONGEST:
        return True
    gain = speed_up(work)
    if gain < _ENOUGH:
        _LOG.warning(
            "two loader threads do only %.2f times the work of one: the transform holds the interpreter lock. Use "
            "OverlapBatchSampler with a torch DataLoader and worker processes, or num_threads=1. "
            "(Also seen on a machine with one free core; check_threads=False skips this test.)",
            gain,
        )
    return gain >= _ENOUGH


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
