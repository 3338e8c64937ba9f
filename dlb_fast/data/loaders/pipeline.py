"""The pipeline of `OverlapLoader`: worker threads, ring and device stage, from one position of the stream onwards."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dlb_fast.data.batch import Batch
from dlb_fast.data.datasets.source import FailurePolicy, SampleError, SampleSource
from dlb_fast.data.loaders.ring import Item, Slot, SlotRing, Status, WorkerPool
from dlb_fast.data.loaders.transfer import make_stage
from dlb_fast.data.plan import OverlapPlan
from dlb_fast.data.rng import ViewRng, ViewRngs
from dlb_fast.data.transforms.crops import CompiledCrop, Transform
from dlb_fast.data.transforms.mixing import Mix
from dlb_fast.data.transforms.normalise import Normalise

__all__ = ["LoaderStats", "LoaderTimeout", "Pipeline", "Settings"]

_JOIN = 5.0  # seconds; a thread that hangs in a system call cannot be ended, only reported


class LoaderTimeout(TimeoutError):
    """``next()`` waited longer than ``timeout``; the message names the activity of every thread.

    Example:
        >>> isinstance(LoaderTimeout("waited 5 s"), TimeoutError)
        True
    """


@dataclass
class LoaderStats:
    """Counters of one loader.

    Attributes:
        batches: delivered batches.
        views: views in these batches.
        reads: loaded samples, each decoded once.
        bytes_read: bytes read from files.
        bytes_to_device: bytes copied to the device (0 on a CPU).
        wait_seconds: seconds that `next` waited for a batch.
        idle_seconds: seconds that all threads together waited for a free slot because the consumer was slower.
        failed: distinct samples that could not be loaded.
        replaced: number of times a substitute was used.
        failures: the first errors.
        fallbacks: reason -> number of files that Pillow decoded instead of the JPEG decoder.
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


@dataclass
class Settings:
    """Arguments that a loader passes to its pipelines. They must not refer to the loader, or it is never collected."""

    plan: OverlapPlan
    rank: int
    source: SampleSource
    policy: FailurePolicy
    transform: Transform | None
    num_threads: int
    depth: int
    device: torch.device
    normalise: Normalise
    mix: Mix | None
    decoder: Any
    stats: LoaderStats = field(default_factory=LoaderStats)
    copy_stream: Any = None  # one per loader, shared by its pipelines

    def counters(self) -> LoaderStats:
        """A copy of the counters, including those of the source, the failure policy and the decoder."""
        return replace(
            self.stats,
            reads=self.source.reads,
            bytes_read=self.source.bytes_read,
            failed=self.policy.failed,
            replaced=self.policy.replaced,
            failures=list(self.policy.errors.values()),
            fallbacks=dict(getattr(self.decoder, "fallbacks", {})),
        )


class Pipeline:
    """Threads, ring and device stage from one position of the stream onwards.

    Args:
        settings: settings of the loader.
        position: first step to deliver, epoch * steps_per_epoch + step.
    """

    def __init__(self, settings: Settings, position: int) -> None:
        self._s = settings
        self._pid = os.getpid()
        self._position = position
        self._stopped = False
        self._stage = make_stage(settings.device, settings.normalise, settings.copy_stream)
        settings.copy_stream = self._stage.copy_stream
        self._ring = SlotRing(
            settings.plan, settings.rank, start=position, depth=settings.depth, on_full=self._finish_batch
        )
        self._pool = WorkerPool(settings.num_threads, self._work)
        writable = self._stage.row_dtype in (torch.uint8, torch.float32)  # dtypes that the compiled crop writes
        self._crop = CompiledCrop.of(settings.transform) if writable else None
        self._table: torch.Tensor | None = None
        self._view_type: tuple[tuple[int, int, int], torch.dtype] | None = None  # (h, w, c) and dtype of all views
        self._view_type_lock = threading.Lock()

    def start(self) -> None:
        """Start the threads."""
        self._pool.start()

    # Called by the worker threads.

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
        except BaseException as error:  # raised by the plan or by this code, not by a sample
            self._ring.abort(error)

    def _make(self, item: Item, status: Status) -> None:
        """Read and decode one sample and write its views into their rows."""
        s, epoch = self._s, item.epoch
        sample, image, target = s.policy.get(epoch, item.sample, status.set)
        status.set("making the views of", sample)
        rngs = [ViewRng(s.plan.seed, epoch, sample, view) for view, _, _ in item.views]
        if self._crop is not None and image.dtype == torch.uint8:
            side = self._crop.size
            self._expect(sample, (side, side, image.shape[0]), image.dtype)
            rows = [(rng, self._stage.rows(slot), row) for rng, (_, slot, row) in zip(rngs, item.views, strict=True)]
            self._crop(image, rows, self._table)
        else:
            for rng, (_, slot, row) in zip(rngs, item.views, strict=True):
                view = image if s.transform is None else self._transformed(image, rng)
                c, h, w = view.shape
                self._expect(sample, (h, w, c), view.dtype)
                self._stage.write(slot, row, view)
        for _, slot, row in item.views:
            assert slot.numbers is not None
            slot.numbers[0, row] = target
            slot.numbers[1, row] = sample

    def _transformed(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        assert self._s.transform is not None
        try:
            view = self._s.transform(image, rng)
        except Exception as error:
            raise RuntimeError(
                f"OverlapLoader: transform failed on view {rng.view} of sample {rng.sample} of epoch {rng.epoch} "
                f"({self._s.source.path(rng.sample)}): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(view, torch.Tensor) or view.ndim != 3:
            got = f"shape {tuple(view.shape)}" if isinstance(view, torch.Tensor) else type(view).__name__
            raise TypeError(f"OverlapLoader: transform: expected a (c, h, w) tensor, got {got}.")
        return view

    def _expect(self, sample: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Allocate the buffers for the first view; ValueError for a later view of another shape or dtype."""
        view_type = shape, dtype
        if self._view_type is None:
            with self._view_type_lock:
                if self._view_type is None:
                    if self._crop is not None and self._stage.row_dtype == torch.float32:
                        self._table = self._s.normalise.table(shape[2])
                    self._stage.prepare(self._ring.slots, 2 * self._s.plan.rows, shape, dtype)
                    self._view_type = view_type
        if view_type != self._view_type:
            (h, w, c), known = self._view_type
            raise ValueError(
                f"OverlapLoader: views of one size are needed: sample {sample} ({self._s.source.path(sample)}) gave "
                f"{(shape[2], *shape[:2])} {dtype}, others {(c, h, w)} {known}; pass a transform that crops or resizes "
                "to one size"
            )

    def _finish_batch(self, slot: Slot) -> None:
        """Choose the boxes to erase in a full slot and pass it to the device stage."""
        plan, normalise = self._s.plan, self._s.normalise
        if normalise.erase is not None:
            views = (np.arange(slot.rows) < slot.num_old).astype(np.int64)
            epochs = (slot.step - views) // plan.steps_per_epoch
            rngs = ViewRngs(plan.seed, epochs, self._stage.ids(slot), views)
            slot.boxes = normalise.erase.draw(rngs, *self._stage.size)
        self._stage.submit(slot)

    # Called by the consumer.

    def is_at(self, position: int) -> bool:
        """Whether `position` is the next batch of this pipeline (never in a forked child, which has no threads)."""
        return not self._stopped and self._position == position and self._pid == os.getpid()

    def next(self, timeout: float | None) -> Batch:
        """The next batch; raises SampleError, LoaderTimeout or the error of a thread."""
        started = time.monotonic()
        slot = self._ring.wait(timeout)
        waited = time.monotonic() - started
        if slot is None:
            if self._stopped:
                raise RuntimeError("OverlapLoader: closed while a batch was awaited.")
            raise LoaderTimeout(
                f"OverlapLoader: no batch within {timeout} s; {self._ring.progress()}; threads:\n"
                f"{self._pool.report(self._s.source.path)}"
            )
        if slot.error is not None:
            error, slot.error = slot.error, None  # break the cycle: the traceback refers to the slot
            try:
                raise error
            finally:
                del error
        epoch, step = divmod(slot.step, self._s.plan.steps_per_epoch)
        batch = Batch(*self._stage.deliver(slot), slot.num_old, epoch, step)
        if self._s.mix is not None:
            batch = self._s.mix.of_plan(batch, self._s.plan, self._s.rank)
        stats = self._s.stats
        stats.batches += 1
        stats.views += slot.rows
        stats.wait_seconds += waited
        stats.bytes_to_device += self._stage.bytes_of(slot)
        self._ring.release(slot)
        self._position += 1
        return batch

    def idle_seconds(self) -> float:
        """Seconds that all threads of this pipeline together have waited for a free slot."""
        return 0.0 if self._stopped else self._ring.idle_seconds()

    def stop(self) -> None:
        """End the threads and free the buffers."""
        if self._pid != os.getpid():
            self._stopped = True
            return  # in a forked child the threads do not exist, and a lock may have been held during the fork
        self._s.stats.idle_seconds += self.idle_seconds()
        self._stopped = True
        self._ring.stop()
        if not self._pool.join(_JOIN):
            self._stage.close()
