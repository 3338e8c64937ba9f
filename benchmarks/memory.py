"""Peak memory in bytes, counted where torch allocates: the CPU by its profiler, a GPU by the caching allocator.

`resident_peak` is what Linux counts for the whole process, with what libraries allocate behind torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]

PROCESS = Path("/proc/self")
FORGOTTEN = 1 << 20  # bytes by which the system's two counts may differ


def peak_bytes(work: Work, device: str) -> int:
    """Largest extra memory during one call of ``work``, after one call to warm up."""
    work()
    return _peak(work, device)


def peak_of(build: Callable[[], Work], device: str, calls: int) -> int:
    """Largest memory from before ``build()`` until its work was called so often: parameters, state and activations."""

    def life() -> None:
        work = build()
        for _ in range(calls):
            work()

    return _peak(life, device)


def resident_peak(work: Work) -> int:
    """Largest resident memory of this process during one call of ``work``, beyond what it had before.

    For a process that has done nothing of this size yet: memory that was freed but is still the process's own would be
    taken without being counted. OSError where the system does not count it or cannot forget an earlier peak.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc returns what it keeps
    (PROCESS / "clear_refs").write_text("5")  # the peak is the present size
    before = _resident("VmRSS")
    if _resident("VmHWM") > before + FORGOTTEN:
        raise OSError("clear_refs did not reset the peak")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.M)
    if found is None:
        raise OSError(f"{PROCESS}/status has no {name}")
    return int(found[1]) * 1024


def _peak(work: Work, device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    return highest(changes(record))


def changes(record: torch.profiler.profile) -> Iterator[int]:
    """What was allocated (> 0) and freed (< 0) while the profiler ran, in order of time."""
    allocation = torch._C._profiler._EventType.Allocation
    found: list[tuple[int, int]] = []
    waiting: list[Any] = list(record.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    # Events of one nanosecond: what was freed there may have been allocated there, so allocations go first.
    return (size for _, size in sorted(found, key=lambda pair: (pair[0], -pair[1])))


def highest(sizes: Iterator[int]) -> int:
    """Largest running sum."""
    total = most = 0
    for size in sizes:
        total += size
        most = max(most, total)
    return most
