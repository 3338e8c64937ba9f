"""How long a training loop waits inside `next`, and how much of that is the machine's own unsteadiness.

The step is as long as a batch takes to make, by one of two paces. *fixed*: the mean time per batch of the same loader
at full speed, over the batches taken immediately before. *following*: what the last batches, as many, took: their time
less the time that the loader's threads waited for room. A *sleeping* step leaves every core to the loader, as a GPU's
step does; a *computing* step keeps one core at work (small matrix products on one thread) and the loader has one thread
fewer than cores.

At exactly 1.0 a queue that holds three batches is at its critical load. With a fixed pace, whatever the machine loses
in speed after the step was measured is waited for at every step: two figures say how long that would be with a loader
that hands over in no time. `ideal` replays the loader's own full-speed times through such a queue, `equal_work` does it
with the times of equal work (one JPEG decoded over and over by as many threads): what is in the latter is not the
loader's but this machine's. The following pace stays at the critical load while the machine's speed moves; what varies
faster than the mean of so many batches still empties the queue.

`others` is the CPU time per second that other processes took. A round they disturb is tried again, up to twice as many
rounds in all; the least disturbed ones count.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loader_contenders import MEAN, SEED, SIZE, STD, Files

from dlb_fast.data import ImageDecoder, OverlapLoader, train_transform

_TICKS = os.sysconf("SC_CLK_TCK")
WARM, ENOUGH = 6, 0.05
PACES = ("fixed", "following")
QUIET = 0.06  # cores; a round in which others take more is disturbed


def machine_busy() -> float:
    """CPU seconds all processes of this machine have used; 0 where /proc does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    return sum(int(fields[i]) for i in (0, 1, 2, 5, 6)) / _TICKS


def at(values: Sequence[float], share: float) -> float:
    """The quantile of a list."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def replay(times: Sequence[float], step: float, depth: int) -> list[float]:
    """Waits of a consumer with a constant `step` when batch k takes `times[k]` to make and hand-over takes nothing.

    Half k may be begun when batch k - depth - 1 has been taken: the ring holds depth + 2 batches, a half touches two.
    """
    ready, taken, waits = 0.0, [], []
    for number, needed in enumerate(times):
        begun = max(ready, taken[number - depth - 1]) if number > depth else ready
        ready = begun + needed
        asked = taken[-1] + step if taken else 0.0
        taken.append(max(ready, asked))
        waits.append(taken[-1] - asked)
    return waits[min(WARM, len(waits) // 2) :]  # it begins empty, as the measured ones do


def predicted(times: Sequence[Sequence[float]], load: float, depth: int) -> float:
    """p99 of `replay` as a share of the step, over all recorded stretches, each against its own mean."""
    shares = []
    for stretch in times:
        step = load * statistics.fmean(stretch)
        shares += [wait / step for wait in replay(stretch, step, depth)]
    return round(at(shares, 0.99), 4)


def variation(times: Sequence[Sequence[float]]) -> float:
    """Coefficient of variation within the stretches, their mean."""
    return round(statistics.fmean(statistics.pstdev(s) / statistics.fmean(s) for s in times), 4)


def timed(batches: Iterator[Any], count: int, pace: Pace | None = None) -> list[float]:
    """Seconds between batches at full speed, after `WARM`: those that lay ready took no time, they were made before."""
    for _ in range(WARM):
        next(batches)
    marks = [time.perf_counter()]
    for _ in range(count):
        next(batches)
        marks.append(time.perf_counter())
        if pace is not None:
            pace.mark()
    return [b - a for a, b in itertools.pairwise(marks)]


class Pace:
    """How long a batch takes to make, over the last `count` batches of a loader: what lies between two deliveries less
    the time its threads waited for room meanwhile.

    Args:
        idle: gives the seconds that `threads` threads have waited, all together.
    """

    def __init__(self, idle: Callable[[], float], threads: int, count: int) -> None:
        self._idle, self._threads = idle, threads
        self._marks: deque[tuple[float, float]] = deque(maxlen=count + 1)

    def mark(self) -> None:
        """A batch was delivered."""
        self._marks.append((time.perf_counter(), self._idle()))

    def seconds(self) -> float:
        """Per batch."""
        (begun, idle), (end, idle_then) = self._marks[0], self._marks[-1]
        return (end - begun - (idle_then - idle) / self._threads) / (len(self._marks) - 1)


def equal_work(data: bytes, threads: int, per_batch: int, count: int) -> list[float]:
    """Seconds per `per_batch` decodes of one JPEG, shared by `threads` threads, `count` times."""
    decode, marks, total = ImageDecoder(), [], per_batch * count + 1

    def run() -> None:
        while len(marks) < total:
            decode(data)
            marks.append(time.perf_counter())

    pool = [threading.Thread(target=run) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    ends = sorted(marks)[:total:per_batch]
    return [b - a for a, b in itertools.pairwise(ends)]


def sleeping(seconds: float) -> None:
    time.sleep(seconds)


def computing(seconds: float) -> None:
    """Products of about 0.2 ms, which release the interpreter lock."""
    end, a = time.perf_counter() + seconds, torch.ones(160, 160)
    while time.perf_counter() < end:
        torch.mm(a, a)


@dataclass
class Round:
    """What one round found: waits as shares of the step, by pace and load; full-speed times; times of equal work."""

    shares: dict[tuple[str, float], list[float]] = field(default_factory=dict)
    times: list[list[float]] = field(default_factory=list)
    equal: list[float] = field(default_factory=list)
    others: float = 0.0


@dataclass
class Kind:
    """One kind of step and its loader.

    Attributes:
        threads, depth: the loader's. step: lasts the seconds it is given. loads: step lengths in times of a batch.
        steps: measured per round and load.
    """

    name: str
    files: Files
    half: int
    threads: int
    step: Callable[[float], None]
    loads: Sequence[float]
    steps: int
    depth: int = 2
    order: random.Random = field(default_factory=lambda: random.Random(0))

    def round(self) -> Round:
        """One round over all paces and loads, in shuffled order."""
        found = Round()
        options: dict[str, Any] = {"num_threads": self.threads, "depth": self.depth, "dtype": torch.uint8, "seed": SEED}
        transform = train_transform("imagenet", SIZE)
        cpu, busy, begun = time.process_time(), machine_busy(), time.perf_counter()
        with OverlapLoader(
            self.files, 2 * self.half, transform=transform, mean=MEAN, std=STD, **options
        ) as loader:
            batches = (batch for _ in range(10**6) for batch in loader)
            for _ in range(WARM):
                next(batches)
            cases = list(itertools.product(PACES, self.loads))
            for name, load in self.order.sample(cases, len(cases)):
                pace = Pace(lambda: loader.stats().idle_seconds, self.threads, self.steps)
                found.times.append(timed(batches, self.steps, pace))
                mean = statistics.fmean(found.times[-1])
                found.shares[name, load] = self._waits(batches, load, pace if name == "following" else None, mean)
        found.equal = equal_work(self.files.read(0), self.threads, 2 * self.half, self.steps)
        others = machine_busy() - busy - (time.process_time() - cpu)
        found.others = others / (time.perf_counter() - begun)
        return found

    def _waits(self, batches: Iterator[Any], load: float, pace: Pace | None, mean: float) -> list[float]:
        waits = []
        for number in range(WARM + self.steps):
            step = load * (mean if pace is None else pace.seconds())
            self.step(step)
            started = time.perf_counter()
            next(batches)
            if number >= WARM:
                waits.append((time.perf_counter() - started) / step)
            if pace is not None:
                pace.mark()
        return waits

    def rows(self, rounds: Sequence[Round]) -> list[dict[str, Any]]:
        """One result per pace and load."""
        times, equal = [stretch for r in rounds for stretch in r.times], [r.equal for r in rounds]
        common = {
            "what": "stall", "step": self.name, "threads": self.threads, "depth": self.depth, "half": self.half,
            "batch_ms": round(1e3 * statistics.median(statistics.fmean(stretch) for stretch in times), 2),
            "batch_time_variation": variation(times), "equal_work_variation": variation(equal),
            "rounds": len(rounds), "others_max": round(max(r.others for r in rounds), 3),
        }  # fmt: skip
        rows = []
        for pace, load in itertools.product(PACES, self.loads):
            shares = [share for r in rounds for share in r.shares[pace, load]]
            per_round = [round(at(r.shares[pace, load], 0.99), 4) for r in rounds]
            quantiles = {f"share_of_step_p{q}": round(at(shares, q / 100), 4) for q in (50, 90, 99)}
            rows.append(common | quantiles | {
                "pace": pace, "step_over_batch_time": load, "n": len(shares),
                "share_of_step_max": round(max(shares), 4),
                "share_of_step_mean": round(statistics.fmean(shares), 4), "p99_by_round": per_round,
                "steps_over_5_percent": round(sum(s > ENOUGH for s in shares) / len(shares), 4),
                "ideal_p99": predicted(times, load, self.depth), "equal_work_p99": predicted(equal, load, self.depth),
            })  # fmt: skip
        return rows


def stalls(files: Files, half: int, rounds: int, steps: int, loads: Sequence[float]) -> list[dict[str, Any]]:
    """Sleeping and computing steps: the `rounds` least disturbed rounds of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, own = min(cores, 8), torch.get_num_threads()
    torch.set_num_threads(1)
    kinds = [
        Kind("sleeping", files, half, threads, sleeping, loads, steps),
        Kind("computing on one core", files, half, max(1, threads - 1), computing, loads, steps),
    ]
    found: list[list[Round]] = [[], []]
    try:
        for _ in range(2 * rounds):
            for kind, done in zip(kinds, found, strict=True):
                if sum(r.others <= QUIET for r in done) < rounds:
                    done.append(kind.round())
    finally:
        torch.set_num_threads(own)
    rows = []
    for kind, done in zip(kinds, found, strict=True):
        rows += kind.rows(sorted(done, key=lambda r: r.others)[:rounds])
    return rows
