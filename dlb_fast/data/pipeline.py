"""One run of the worker threads over the ring: made where an iteration starts, stopped where it is left."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dlb_fast.data.batch import Batch
from dlb_fast.data.device_ring import RingStage
from dlb_fast.data.device_stream import CpuStage, CudaStage, Normalise, make_stage
from dlb_fast.data.direct import Place, direct_writer
from dlb_fast.data.errors import LoaderTimeout, SampleError
from dlb_fast.data.mixing import Mix
from dlb_fast.data.plan import OverlapPlan
from dlb_fast.data.probe import check_threads
from dlb_fast.data.slots import Item, Slot, SlotRing
from dlb_fast.data.source import FailurePolicy, SampleSource
from dlb_fast.data.view_rng import ViewRng, ViewRngs
from dlb_fast.data.workers import Status, WorkerPool

__all__ = ["LoaderStats", "Pipeline", "Settings"]

_JOIN = 5.0  # seconds; a thread stuck in a system call cannot be ended, only reported


@dataclass
class LoaderStats:
    """Counters of one loader.

    Attributes:
        batches, views: delivered. reads, bytes_read: samples (each is decoded once per read) and file bytes.
        bytes_to_device: copied host to device (0 on a CPU). wait_seconds: spent waiting inside `next`.
        idle_seconds: of all threads together, spent waiting for a free batch: the loader was the faster one.
        failed: distinct samples that could not be loaded. replaced: times a substitute was used.
        failures: the first of the errors. fallbacks: why the default decoder handed files to Pillow, and how often.
    """

    batches: int = 0
    views: int = 0
    reads: int = 0
    bytes_read: int = 0
    bytes_to_device: int = 0
    wait_seconds: float = 0.0
    idle_seconds: float = 0.0
    failed: int = 0
    replaced: int = 0
    failures: list[SampleError] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)

    def filled(self, source: SampleSource, policy: FailurePolicy, decoder: Any) -> LoaderStats:
        """A copy with the counters that live elsewhere."""
        return replace(
            self,
            reads=source.reads,
            bytes_read=source.bytes_read,
            failed=policy.failed,
            replaced=policy.replaced,
            failures=list(policy.errors.values()),
            fallbacks=dict(getattr(decoder, "fallbacks", {})),
        )


@dataclass
class Settings:
    """What a loader hands to each of its pipelines; it must not refer to the loader (see `OverlapLoader.close`)."""

    plan: OverlapPlan
    rank: int
    source: SampleSource
    policy: FailurePolicy
    transform: Callable[[torch.Tensor, ViewRng], torch.Tensor] | None
    num_threads: int
    depth: int
    device: torch.device
    normalise: Normalise
    stats: LoaderStats
    check_threads: bool
    augment_on: str = "host"
    max_ring_pixels: int = 0
    repeat: bool = True
    mix: Mix | None = None
    copy_stream: Any = None  # one for the loader's life, however often iterations are left early


def _device_ring(s: Settings) -> RingStage | None:
    if s.augment_on == "host":
        return None
    return RingStage(
        s.device, s.normalise, s.transform, s.plan.seed, s.max_ring_pixels, copy_stream=s.copy_stream
    )


class Pipeline:
    """Threads, ring and device stage from one position of the stream onwards.

    Args:
        settings: the loader's. position: the step (epoch * steps + step) to deliver first.
    """

    def __init__(self, settings: Settings, position: int) -> None:
        self._s = settings
        self._pid = os.getpid()
        self._position = position
        self._idle = 0.0  # of the ring's idle seconds, those already in the counters
        self._stopped = False
        self._device_ring = _device_ring(settings)
        self._stage: CpuStage | CudaStage | RingStage
        self._host_stage: CpuStage | CudaStage | None = None
        if self._device_ring is not None:
            self._stage = self._device_ring
        else:
            self._stage = self._host_stage = make_stage(settings.device, settings.normalise, settings.copy_stream)
        settings.copy_stream = self._stage.copy_stream
        self._ring = SlotRing(
            settings.plan, settings.rank, start=position, depth=settings.depth, repeat=settings.repeat,
            on_full=self._full,
        )  # fmt: skip
        if self._device_ring is not None:
            self._device_ring.prepare(self._ring.slots, settings.plan.rows)
        self._pool = WorkerPool(settings.num_threads, self._work)
        self._writer = direct_writer(settings.transform)
        # Views that are written directly never hold the interpreter lock, and None makes none.
        made = settings.transform is not None and self._writer is None and self._device_ring is None
        self._unmeasured = settings.check_threads and settings.num_threads > 1 and made
        self._measuring = threading.Lock()
        self._buffers = threading.Lock()
        self._form: tuple[tuple[int, int, int], torch.dtype] | None = None

    def start(self) -> None:
        """Start the threads."""
        self._pool.start()

    def stands_at(self, position: int) -> bool:
        """Whether the next batch of this pipeline is that of `position` (never in a forked child)."""
        return not self._stopped and self._position == position and not self.forked

    @property
    def forked(self) -> bool:
        """Whether this process is a child that has the object but not its threads."""
        return self._pid != os.getpid()

    def next(self, timeout: float | None) -> Batch:
        """The next batch; SampleError, LoaderTimeout or what a thread raised."""
        started = time.monotonic()
        slot = self._ring.wait(timeout)
        waited = time.monotonic() - started
        if slot is None:
            if self._stopped:
                raise RuntimeError("OverlapLoader: closed while a batch was awaited.")
            raise LoaderTimeout(f"OverlapLoader: no batch within {timeout} s; {self.report()}")
        if slot.error is not None:
            error, slot.error = slot.error, None  # its traceback leads back to the slot
            try:
                raise error
            finally:
                del error
        epoch, step = divmod(slot.step, self._s.plan.halves_per_epoch)
        batch = Batch(*self._stage.deliver(slot), slot.num_old, epoch, step)
        if self._s.mix is not None:
            batch = self._s.mix.of_plan(batch, self._s.plan, self._s.rank)
        stats = self._s.stats
        stats.batches += 1
        stats.views += slot.rows
        stats.wait_seconds += waited
        idle = self._ring.idle_seconds()
        stats.idle_seconds, self._idle = stats.idle_seconds + idle - self._idle, idle
        stats.bytes_to_device += self._stage.bytes_of(slot)
        self._ring.release(slot)
        self._position += 1
        return batch

    def report(self) -> str:
        """What is awaited and what each thread is doing."""
        return f"{self._ring.progress()}; threads:\n{self._pool.report(self._s.source.path)}"

    def stop(self) -> None:
        """End the threads and free the buffers."""
        self._stopped = True
        if self.forked:
            return  # the threads are the parent's, and its locks may have been copied while held
        self._ring.stop()
        if not self._pool.join(_JOIN):
            self._stage.close()

    def _full(self, slot: Slot) -> None:
        """All rows of a slot are written: draw what is erased in them and hand it to the device side."""
        plan, normalise = self._s.plan, self._s.normalise
        if normalise.erase is not None:
            uses = (np.arange(slot.rows) < slot.num_old).astype(np.int64)
            epochs = (slot.step - uses) // plan.halves_per_epoch
            rngs = ViewRngs(plan.seed, epochs, self._stage.ids(slot), uses)
            slot.boxes = normalise.boxes(rngs, *self._stage.size)
        self._stage.submit(slot)

    def _work(self, status: Status) -> None:
        try:
            while (item := self._ring.take()) is not None:
                error: BaseException | None = None
                try:
                    self._make(item, status)
                except BaseException as caught:
                    error = caught
                self._ring.finish(item, error)
                status.set("waiting for a free batch")
        except BaseException as error:  # not of one sample: the plan or this code
            self._ring.abort(error)

    def _make(self, item: Item, status: Status) -> None:
        s = self._s
        sample, image, target = s.policy.get(item.epoch, item.sample, status.set)
        if self._device_ring is not None:
            status.set("keeping", sample)
            self._device_ring.add(item, image, sample, target)
            return
        if self._unmeasured:
            self._measure(image, item.epoch, sample, status)
        places = self._places(image, item, sample)
        if places is not None and self._writer is not None:
            status.set("making the views of", sample)
            self._writer(image, places)
        for use, slot, row in item.targets:
            if places is None:
                status.set(f"making view {use} of", sample)
                self._write(slot, row, self._view(image, item.epoch, sample, use), sample)
            assert slot.numbers is not None
            slot.numbers[0, row] = target
            slot.numbers[1, row] = sample

    def _places(self, image: torch.Tensor, item: Item, sample: int) -> list[Place] | None:
        """Where the views can be made in their rows; None for the general way, as for the first of a run."""
        if self._writer is None or self._form is None or image.dtype != torch.uint8:
            return None
        (_, _, c), dtype = self._form
        if dtype != torch.uint8 or image.shape[0] != c:
            return None
        assert self._host_stage is not None
        places = []
        for use, slot, row in item.targets:
            images = self._host_stage.rows(slot)
            if images is None:
                return None
            places.append((ViewRng(self._s.plan.seed, item.epoch, sample, use), images, row))
        return places

    def _view(self, image: torch.Tensor, epoch: int, sample: int, use: int) -> torch.Tensor:
        transform = self._s.transform
        if transform is None:
            return image
        try:
            view = transform(image, ViewRng(self._s.plan.seed, epoch, sample, use))
        except Exception as error:
            raise RuntimeError(
                f"OverlapLoader: transform failed on view {use} of sample {sample} of epoch {epoch} "
                f"({self._s.source.path(sample)}): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(view, torch.Tensor) or view.ndim != 3:
            got = f"shape {tuple(view.shape)}" if isinstance(view, torch.Tensor) else type(view).__name__
            raise TypeError(f"OverlapLoader: transform: expected a (c, h, w) tensor, got {got}.")
        return view

    def _write(self, slot: Slot, row: int, view: torch.Tensor, sample: int) -> None:
        assert self._host_stage is not None
        c, h, w = view.shape
        form = (h, w, c), view.dtype
        if self._form is None:
            with self._buffers:
                if self._form is None:  # the first view of the run tells what all look like
                    self._host_stage.prepare(self._ring.slots, 2 * self._s.plan.rows, *form)
                    self._form = form
        if form != self._form:
            (h, w, c), dtype = self._form
            raise ValueError(
                f"OverlapLoader: views of one size are needed: sample {sample} ({self._s.source.path(sample)}) gave "
                f"{tuple(view.shape)} {view.dtype}, others {(c, h, w)} {dtype}; pass a transform that crops or resizes "
                "to one size"
            )
        self._host_stage.write(slot, row, view)

    def _measure(self, image: torch.Tensor, epoch: int, sample: int, status: Status) -> None:
        """Probe the transform on the first image of the run, once in a loader's life.

        It runs in a worker, so that `next` keeps to its timeout; the other workers wait, or they would disturb it.
        """
        status.set("waiting for the measurement of the transform, to go on with", sample)
        with self._measuring:
            if not self._unmeasured:
                return
            self._s.check_threads = False
            status.set("measuring the transform on", sample)
            own = image.clone()

            def views() -> None:
                for use in (0, 1):
                    self._view(own, epoch, sample, use)

            # A thread of its own has torch's default number of threads, which the probe puts back.
            probe = threading.Thread(target=check_threads, args=(views,), name="dlb-probe", daemon=True)
            probe.start()
            probe.join()
            self._unmeasured = False
