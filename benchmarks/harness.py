"""Timing that can be trusted: variants in turn, in shuffled order, medians with their 20 and 80 % quantiles.

A GPU call is timed three ways: device time (events around a stretch of calls), wall time (host clock around call and
synchronisation) and, where it can be captured, graph replay. Cold means that more than the second-level cache was
written between two calls.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Work = Callable[[], object]

ROOT = Path(__file__).parent.parent
GPU = "cuda"
SLEEP = 1_500_000  # clock cycles, 0.8 ms: what eager code takes to launch forward and backward
IN_A_GRAPH = 20  # steps in one captured graph: the launch of the graph is then a small share of a step
FLUSH = 256 << 20  # bytes written to make the second-level cache cold: five times the largest in use
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes of the copy that gives the bandwidth: larger than any cache
SEE_THE_LOG = "left out or not possible: see gpu-check.log"
UNCAPTURED = ("compile-ro", "liger")  # replays graphs of its own; waits for the device, which spoils a capture


def command() -> str:
    """The command line that runs this again, without this machine's paths."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [Path(sys.argv[0]).name]
    return shlex.join(["python", *start, *sys.argv[1:]])


def environment(device: str) -> dict[str, Any]:
    """What a published number has to carry besides itself."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = os.environ.get("DLB_FAST_COMMIT", "")  # for a copy of the tree without its history
    if not commit and shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "command": command(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def spread(samples: list[float]) -> dict[str, float]:
    """Median, 20 and 80 % quantile, and n, of times in microseconds."""
    ordered = sorted(samples)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return {"median_us": statistics.median(ordered), "p20_us": at(0.2), "p80_us": at(0.8), "n": len(ordered)}


def synchronize(device: str) -> None:
    """Wait for the device; a CPU is always done."""
    if device == "cuda":
        torch.cuda.synchronize()


class Times(NamedTuple):
    """Microseconds of every round. ``cpu`` is what this process used: time that others took from it is not in there."""

    wall: list[float]
    cpu: list[float]


def in_rounds(variants: dict[Any, Work], device: str, *, seconds: float, least: int = 10) -> dict[Any, Times]:
    """Times of every variant, round by round in shuffled order, for about ``seconds`` in all."""
    order = random.Random(0)
    names = list(variants)
    for name in names:
        for _ in range(3):
            variants[name]()
    synchronize(device)
    samples = {name: Times([], []) for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[names[0]].wall) < least:
        order.shuffle(names)
        for name in names:
            synchronize(device)
            start, used = time.perf_counter(), time.process_time()
            variants[name]()
            synchronize(device)
            samples[name].wall.append((time.perf_counter() - start) * 1e6)
            samples[name].cpu.append((time.process_time() - used) * 1e6)
    return samples


def interleaved(variants: dict[Any, Work], device: str, *, seconds: float) -> dict[str, Any]:
    """Median, quantiles and n of ``in_rounds``, by variant; nothing for no variants."""
    if not variants:
        return {}
    return {name: spread(times.wall) for name, times in in_rounds(variants, device, seconds=seconds).items()}


def paired(samples: list[float], base: list[float], resamples: int = 4000) -> dict[str, float]:
    """Median over the rounds of ``sample / base`` of the same round, with its 95 % interval by bootstrap over rounds.

    What slows a whole round down (another process, a clock that sinks) falls out of the ratio, which is why it can tell
    one percent where two medians cannot.
    """
    ratios = np.asarray(samples) / np.asarray(base)
    picks = np.random.default_rng(0).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return {"ratio": float(np.median(ratios)), "ratio_low": float(low), "ratio_high": float(high)}


def device_times(variants: dict[Any, Work], *, seconds: float, cold: bool) -> dict[str, Any]:
    """Device time of one call of each variant by events; ``cold`` overwrites 256 MiB before each call."""
    order = random.Random(0)
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=GPU) if cold else None
    names = list(variants)
    for name in names:
        for _ in range(3):
            variants[name]()
    samples: dict[Any, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[names[0]]) < 10:
        order.shuffle(names)
        for name in names:
            if flush is not None:
                flush.zero_()
            else:
                variants[name]()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The events must not wait for the host: a kernel long enough to hide its launches goes first.
            torch.cuda._sleep(SLEEP)
            start.record()
            variants[name]()
            stop.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(stop) * 1e3)
    return {name: spread(times) for name, times in samples.items()}


def all_times(
    variants: dict[Any, Work], device: str, *, seconds: float, small: bool = True
) -> dict[str, dict[Any, Any]]:
    """Kind of timing -> variant -> spread: wall, and on a GPU device time (cold; warm and in graphs where ``small``).

    ``graph`` is the wall time of one replayed step, ``graph_each`` the device time of a step inside a graph of many.
    """
    times = {"wall": interleaved(variants, device, seconds=seconds)}
    if device == "cuda":
        times["device_cold"] = device_times(variants, seconds=seconds, cold=True)
        if small:  # a graph keeps the memory of its steps: several of them do not fit beside large shapes
            times["device_warm"] = device_times(variants, seconds=seconds, cold=False)
            # After a capture that failed its stream may stay the current one, and its memory pool the allocator's.
            able = {key: step for key, step in variants.items() if not any(name in str(key) for name in UNCAPTURED)}
            graphs = {name: graph for name, step in able.items() if (graph := captured(step)) is not None}
            times["graph"] = interleaved(graphs, device, seconds=seconds / 2)
            many = {name: graph for name in graphs if (graph := captured(variants[name], IN_A_GRAPH)) is not None}
            found = device_times(many, seconds=seconds / 2, cold=False) if many else {}
            times["graph_each"] = {
                name: {k: v if k == "n" else v / IN_A_GRAPH for k, v in time.items()} for name, time in found.items()
            }
    return times


def captured(work: Work, steps: int = 1) -> Work | None:
    """``steps`` calls of ``work`` as one CUDA graph, or None where it cannot be captured (it waits for the device)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(steps):
                work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def copy_bandwidth(device: str, seconds: float = 1.0) -> float:
    """Bytes per second, read plus written, of a copy larger than any cache: the roof for all that runs beside it."""
    source = torch.ones(COPIED[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    if device == "cuda":
        times: dict[str, Any] = device_times(copy, seconds=seconds, cold=False)
    else:
        times = interleaved(copy, device, seconds=seconds)
    return 2 * source.numel() * 4 / (times["copy"]["median_us"] * 1e-6)


def launches(works: dict[Any, Work]) -> dict[Any, int]:
    """Kernels one call of each starts on the device. One profile for all of them: each costs a tenth of a second."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        for work in works.values():
            torch.cuda._sleep(1)  # the mark before each
            work()
        torch.cuda.synchronize()
    found = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    counts = kernels_between_marks([(e.time_range.start, e.name) for e in found])
    if len(counts) != len(works):  # no device tracing here (it needs CUPTI): the times are worth having without it
        print(f"launches are not known: the profiler saw {len(counts)} marks of {len(works)}")
        return {}
    return dict(zip(works, counts, strict=True))


def kernels_between_marks(events: list[tuple[float, str]]) -> list[int]:
    """Events after each mark of ``launches``, without copies between host and device and annotations."""
    counts: list[int] = []
    for _, name in sorted(events):
        if "spin_kernel" in name:
            counts.append(0)
        elif counts and not name.lower().startswith(("memcpy htod", "memcpy dtoh", "## ", "torch-compiled")):
            counts[-1] += 1
    return counts


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON lines file; OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write(path: Path | None, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON lines file. Where it cannot be written (a full disk) they are printed, not lost."""
    if path is not None:
        try:
            append(path, records)
        except OSError as error:
            print(f"{path}: {error}; its records:", *map(json.dumps, records), sep="\n")


class Bar(NamedTuple):
    """One line of the table: ``verdict`` is "met", "MISSED" or "not measured: reason"."""

    what: str
    value: str
    bar: str
    verdict: str
    about_right: bool = False  # a result is wrong where it is missed, and not only slow


def judged(what: str, value: str, bar: str, met: bool | None, why: str = "", right: bool = False) -> Bar:
    """A bar with its verdict; ``met`` is None where nothing was measured."""
    told = "met" if met else "MISSED" if met is not None else f"not measured: {why or SEE_THE_LOG}"
    return Bar(what, value, bar, told, right)


def as_markdown(title: str, found: list[Bar]) -> str:
    """The table of the bars."""
    rows = [f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in bar[:4])} |" for bar in found]
    count = {word: sum(bar.verdict.startswith(word) for bar in found) for word in ("met", "MISSED", "not measured")}
    said = ", ".join(f"{number} {word}" for word, number in count.items())
    return "\n".join([title, "", "| what | here | bar | |", "| --- | --- | --- | --- |", *rows, "", said, ""])
