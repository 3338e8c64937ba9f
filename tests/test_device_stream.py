"""The stream rules against a model of CUDA streams: work runs late, in any order that streams and events allow.

Every rule of `dlb_fast/data/loaders/transfer.py` is dropped in turn, and the pixels must then come out wrong; with all
rules they are right in every order tried. This proves the order of the calls, not torch's CUDA streams themselves.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlb_fast.data.loaders.overlap import OverlapLoader
from dlb_fast.data.loaders.ring import Slot
from dlb_fast.data.loaders.transfer import CpuStage, CudaStage
from dlb_fast.data.transforms.normalise import Normalise

CPU = torch.device("cpu")


class Event:
    """Recorded n times, reached m times; waiting refers to the record that was newest then, as in CUDA."""

    def __init__(self) -> None:
        self.recorded = self.reached = 0


class Streams:
    """A `StreamApi` whose queues run only when somebody synchronises, or by chance; `broken` names a rule to drop."""

    def __init__(self, seed: int, broken: str = "") -> None:
        self.random = random.Random(seed)
        self.broken = broken
        self.queues: dict[str, deque[tuple[str, Any]]] = {"copy": deque(), "consumer": deque()}
        self.lock = threading.RLock()

    def new_event(self) -> Event:
        return Event()

    def current(self) -> str:
        return "consumer"

    def device(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def record(self, event: Event, stream: str) -> None:
        with self.lock:
            event.recorded += 1
            self.queues[stream].append(("record", (event, event.recorded)))

    def wait(self, stream: str, event: Event) -> None:
        if self.broken == f"{stream} waits":
            return
        with self.lock:
            self.queues[stream].append(("wait", (event, event.recorded)))
            self._some()

    def copy(self, stream: str, target: torch.Tensor, source: torch.Tensor) -> None:
        self.launch(stream, lambda: target.copy_(source))

    def launch(self, stream: str, work: Callable[[], Any]) -> None:
        with self.lock:
            self.queues[stream].append(("work", work))
            self._some()

    def synchronize(self, what: Event | str) -> None:
        if self.broken == "host waits":
            return
        with self.lock:
            if isinstance(what, Event):
                goal = what.recorded
                while what.reached < goal:
                    self._step()
            else:
                while self.queues[what]:
                    self._step()

    def finish(self) -> None:
        with self.lock:
            while any(self.queues.values()):
                self._step()

    def _some(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 4))):
            self._step(may_idle=True)

    def _step(self, may_idle: bool = False) -> None:
        """Run the head of a random stream that is not waiting for an event."""
        ready = []
        for queue in self.queues.values():
            while queue and queue[0][0] == "wait" and queue[0][1][0].reached >= queue[0][1][1]:
                queue.popleft()
            if queue and queue[0][0] != "wait":
                ready.append(queue)
        if not ready:
            assert may_idle or not any(self.queues.values()), "the streams wait for each other"
            return
        kind, payload = self.random.choice(ready).popleft()
        if kind == "work":
            payload()
        else:
            event, number = payload
            event.reached = max(event.reached, number)


STEPS, ROWS = 60, 4


def run(seed: int, broken: str = "") -> list[bool]:
    """Push 60 batches through two slots the way the loader does; which of them came out right."""
    streams = Streams(seed, broken)
    stage = CudaStage(CPU, Normalise(None, None, torch.uint8), api=streams, copy_stream="copy")
    slots = [Slot(), Slot()]
    stage.prepare(slots, ROWS, (2, 2, 1), torch.uint8)
    results = []

    def fill(step: int) -> None:
        slot = slots[step % 2]
        slot.open(step, 0, ROWS)
        for row in range(ROWS):
            stage.write(slot, row, torch.full((1, 2, 2), step, dtype=torch.uint8))
        assert slot.meta is not None
        slot.meta.fill_(step)
        stage.submit(slot)

    fill(0)
    for step in range(STEPS):
        results.append((step, *stage.deliver(slots[step % 2])))  # the consumer's work may run much later
        if step + 1 < STEPS:
            fill(step + 1)
    streams.finish()
    return [all(bool((tensor == step).all()) for tensor in delivered) for step, *delivered in results]


@pytest.mark.parametrize("seed", range(40))
def test_all_rules_give_the_right_pixels_in_any_order(seed: int) -> None:
    assert all(run(seed))


@pytest.mark.parametrize("rule", ["copy waits", "consumer waits", "host waits"])
def test_dropping_a_rule_gives_wrong_pixels(rule: str) -> None:
    """Rule 2: the copy stream waits for `consumed`; 3: the consumer for `copied`; 4: the host before it writes."""
    wrong = sum(not all(run(seed, rule)) for seed in range(20))
    assert wrong >= 15, f"{wrong} of 20 orders show the missing rule"


def test_close_waits_for_everything_under_way() -> None:
    """Rule 6: after `close` nothing touches the device buffers."""
    for seed in range(20):
        streams = Streams(seed)
        stage = CudaStage(CPU, Normalise(None, None, torch.uint8), api=streams, copy_stream="copy")
        slot = Slot()
        stage.prepare([slot], 2, (1, 1, 1), torch.uint8)
        slot.open(0, 0, 2)
        for row in range(2):
            stage.write(slot, row, torch.full((1, 1, 1), 9, dtype=torch.uint8))
        stage.submit(slot)
        images, *_ = stage.deliver(slot)
        stage.close()
        assert not any(streams.queues.values()) and (images == 9).all()


def test_fresh_device_memory_waits_for_the_stream_it_came_from() -> None:
    """Rule 1: the allocator may hand out memory that work of the allocating stream still uses."""
    streams = Streams(0)
    stage = CudaStage(CPU, Normalise(None, None, torch.uint8), api=streams, copy_stream="copy")
    slot = Slot()
    order: list[str] = []
    streams.queues["consumer"].append(("work", lambda: order.append("old use of the memory")))
    stage.prepare([slot], 2, (1, 1, 1), torch.uint8)
    streams.launch("copy", lambda: order.append("first copy"))
    streams.finish()
    assert order == ["old use of the memory", "first copy"]


class Images:
    targets = tuple(range(37))
    images = torch.arange(37, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 5, 5)

    def __len__(self) -> int:
        return 37


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_whole_loader_over_late_streams(depth: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 batches by way of the CUDA order, several threads, streams that run late: every sample is right."""
    from dlb_fast.data.loaders import pipeline

    streams = Streams(seed)

    def make_stage(device: torch.device, normalise: Normalise, copy_stream: Any = None) -> CudaStage:
        assert copy_stream in (None, "copy")
        return CudaStage(CPU, normalise, api=streams, copy_stream="copy")

    monkeypatch.setattr(pipeline, "make_stage", make_stage)
    data, held = Images(), []
    with OverlapLoader(data, 6, num_threads=3, depth=depth, dtype=torch.uint8) as loader:
        while len(held) < 1000:
            for batch in loader:
                held.append(batch)
                if len(held) % 97 == 0:
                    break  # left early, with copies under way
        stats = loader.stats()
    streams.finish()
    for batch in held:
        assert torch.equal(batch.targets, batch.ids)
        assert torch.equal(batch.images, data.images[batch.ids])
    assert stats.bytes_to_device == sum(b.images.nbytes + b.targets.nbytes + b.ids.nbytes for b in held)


def test_cpu_and_cuda_order_agree() -> None:
    """The same slot through both stages gives the same floats."""
    normalise = Normalise((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    views = torch.randint(0, 256, (3, 3, 6, 5), dtype=torch.uint8)
    streams, results = Streams(1), []
    for stage in (CpuStage(normalise), CudaStage(CPU, normalise, api=streams, copy_stream="copy")):
        slot = Slot()
        stage.prepare([slot], 4, (6, 5, 3), torch.uint8)
        slot.open(0, 1, 2)
        assert slot.meta is not None
        slot.meta.copy_(torch.arange(8).view(2, 4))
        for row in (2, 0, 1):
            stage.write(slot, row, views[row])
        stage.submit(slot)
        results.append(stage.deliver(slot))
    streams.finish()
    (expected, *numbers), (got, *meta) = results
    assert got.shape == (3, 3, 6, 5) and got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, expected)
    assert [m.tolist() for m in meta] == [n.tolist() for n in numbers] == [[0, 1, 2], [4, 5, 6]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_late_consumer_gets_the_right_pixels() -> None:
    """1000 batches whose consumer is delayed by long kernels on its stream: checksums of every sample."""
    data = Images()
    busy = torch.randn(2048, 2048, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    expected = data.images.float().mean((1, 2, 3)).cuda()
    with OverlapLoader(data, 6, device="cuda", num_threads=4, dtype=torch.uint8) as loader:
        seen = 0
        while seen < 1000:
            for batch in loader:
                for _ in range(3):
                    busy = (busy @ busy).clamp(-1, 1)
                wrong += (batch.images.float().mean((1, 2, 3)) != expected[batch.ids]).sum()
                wrong += (batch.targets != batch.ids).sum()
                seen += 1
                if seen % 97 == 0:
                    break
    assert wrong.item() == 0
