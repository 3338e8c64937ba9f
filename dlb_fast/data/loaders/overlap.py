"""`OverlapLoader`: each image is read and decoded once, each view copied once."""

from __future__ import annotations

import dataclasses
import numbers
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from dlb_fast._args import as_int
from dlb_fast.data._args import check_callable, device_of, length_of
from dlb_fast.data.batch import Batch
from dlb_fast.data.datasets.source import FailurePolicy, SampleSource
from dlb_fast.data.decode.decode import ImageDecoder
from dlb_fast.data.loaders.pipeline import LoaderStats, LoaderTimeout, Pipeline, Settings
from dlb_fast.data.plan import make_plan
from dlb_fast.data.position import Iteration, StreamPosition
from dlb_fast.data.transforms.crops import Transform
from dlb_fast.data.transforms.erasing import Eraser
from dlb_fast.data.transforms.mixing import Mix, check_mix
from dlb_fast.data.transforms.normalise import Normalise

__all__ = ["OverlapLoader"]


class OverlapLoader:
    """Overlapping batches from worker threads; iterating gives one epoch of `Batch` and moves on to the next by itself.

    A thread reads and decodes a sample once and makes both its views: the first goes into the batch in which the sample
    is new, the second straight into the batch after it. Views are functions of (seed, epoch, sample, view), so batches
    are the same with any number of threads, after a resume, on any number of ranks (by id), and as those of an
    `OverlapBatchSampler` with the same transform.

    The threads start at the first `next` and run on across epochs; they end at `close()`, when an iteration is left
    early, when an error is raised, and when the loader is garbage. Images belong to whoever receives them: they are
    never written again. A transform in Python holds the interpreter lock, and then a second thread hardly helps; those
    of `dlb_fast.data` work in compiled code.

    Args:
        dataset: `read(i)` (bytes or a path) and `targets`, or `images` and `targets`, or anything with `load`.
        batch_size: rows the model sees on this rank: even; half of them are new.
        transform: `transform(image, rng)`: uint8 (c, h, w) and the view's `ViewRng` to a (c, h', w') tensor of one
            size; it runs in worker threads and must not change its input. None takes images as they are.
        device: where batches are yielded: cpu or cuda. None: cpu.
        overlap: False gives plain epochs: `batch_size` new samples per batch, one view of each.
        num_threads: None: the cores this process may use, at most 8.
        depth: finished batches kept ahead; host (and device) memory is `depth + 2` batches of views, and on a CPU the
            last two that were delivered.
        seed: as in `OverlapBatchSampler`, like `shuffle`, `drop_last`, `rank` and `world_size`.
        mean: of images in [0, 1], per channel: `(x / 255 - mean) / std`; without mean and std `x / 255`.
        std: likewise.
        dtype: of the images; torch.uint8 leaves pixels as they are. Views that are not uint8 are passed on unchanged.
        channels_last: memory format of the images.
        erase: `RandomErasing` or `Cutout`: a box of every view is overwritten at the end.
        mix: mixup and CutMix on the finished batch, both views of a sample mixed alike.
        on_error: "raise" (a `SampleError` in the batch it belongs to) or "replace" (a substitute, for both views).
        max_failures: with "replace", how many different samples may fail: an int, or a float fraction of the dataset.
        timeout: seconds `next` may wait before `LoaderTimeout` reports what each thread is doing; None: for ever.
        decoder: bytes to uint8 (h, w, 3); None: `ImageDecoder()`.
        load: `load(dataset, i)` giving (image, target) for datasets of another kind.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of another type.
        SampleError: from `next`, a sample that cannot be loaded.
        LoaderTimeout: from `next`; asking again waits again.

    Example:
        >>> from types import SimpleNamespace
        >>> class Grey:
        ...     images, targets = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), [0, 1, 2, 3, 4, 5]
        ...     def __len__(self): return 6
        >>> with OverlapLoader(Grey(), 4, shuffle=False, num_threads=1) as loader:
        ...     [batch.ids.tolist() for batch in loader]
        [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5]]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
        overlap: bool = True,
        num_threads: int | None = None,
        depth: int = 2,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        erase: Eraser | None = None,
        mix: Mix | None = None,
        on_error: str = "raise",
        max_failures: int | float = 0.01,
        timeout: float | None = None,
        decoder: Callable[[bytes], Any] | None = None,
        load: Callable[[Any, int], tuple[Any, Any]] | None = None,
    ) -> None:
        name = type(self).__name__
        self.plan, self.rank = make_plan(
            name,
            length_of(name, dataset),
            batch_size,
            overlap=overlap,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        self.half = self.plan.rows  # new rows of a batch
        self.batch_size = 2 * self.half if overlap else self.half
        check_callable(name, transform=transform, decoder=decoder, load=load)
        self.timeout = _seconds(name, timeout)
        self.decoder = decoder if decoder is not None else ImageDecoder()
        source = SampleSource(dataset, self.decoder, load, name)
        self._settings = Settings(
            plan=self.plan,
            rank=self.rank,
            source=source,
            policy=FailurePolicy(source, self.plan.seed, on_error, max_failures),
            transform=transform,
            num_threads=_threads(name, num_threads),
            depth=as_int(depth, name, "depth", 1),
            device=_device(device),
            normalise=Normalise(mean, std, dtype, channels_last=channels_last, erase=erase),
            mix=check_mix(name, mix, dtype),
            decoder=self.decoder,
        )
        self._position = StreamPosition(self.plan, name)
        self._lock = threading.RLock()  # the collector may close an iteration at any point
        self._pipeline: Pipeline | None = None
        self._user: weakref.ref[Iteration] | None = None  # the iteration the pipeline works for
        self._finaliser: weakref.finalize[..., OverlapLoader] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "OverlapLoader: a loader with threads and buffers cannot be pickled or copied; make another one with the "
            "same arguments where it is needed, and give it this one's position: load_state_dict(loader.state_dict())"
        )

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return _Epoch(self)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch to deliver."""
        return self._position.epoch

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return self._settings.device

    @property
    def num_threads(self) -> int:
        """Worker threads."""
        return self._settings.num_threads

    @property
    def sampler(self) -> OverlapLoader:
        """Itself, for frameworks that announce the epoch by `loader.sampler.set_epoch` (Lightning, timm)."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; nothing happens when it is the current one."""
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches, O(1); what was prefetched is forgotten."""
        return self._position.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position, also on another number of ranks with the same global half.

        Raises:
            RuntimeError: an iteration is active.
            ValueError: seed, length, shuffle, drop_last, overlap, version or half * world_size differ; both are named.
        """
        self._position.load_state_dict(state)

    def stats(self) -> LoaderStats:
        """Counters since the loader was made: batches, decodes, bytes, waiting time, failures."""
        found, pipeline = self._settings.counters(), self._pipeline
        running = 0.0 if pipeline is None else pipeline.idle_seconds()
        return dataclasses.replace(found, idle_seconds=found.idle_seconds + running)

    def close(self) -> None:
        """End the threads and free the buffers; the loader may be iterated again."""
        with self._lock:
            finaliser, self._finaliser, self._pipeline = self._finaliser, None, None
        if finaliser is not None:
            finaliser()

    def __enter__(self) -> OverlapLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, epoch: int, step: int, user: Iteration) -> Batch:
        """The batch of a position, from the running pipeline when it stands there, else from a new one."""
        position = epoch * self.plan.steps_per_epoch + step
        pipeline = self._pipeline
        try:
            if pipeline is None or not pipeline.stands_at(position):
                self.close()
                pipeline = Pipeline(self._settings, position)
                with self._lock:
                    self._pipeline = pipeline
                    self._finaliser = weakref.finalize(self, pipeline.stop)
                pipeline.start()  # a Ctrl-C in here must not leave a pipeline that nobody works for
            self._user = weakref.ref(user)
            return pipeline.next(self.timeout)
        except LoaderTimeout:
            raise  # nothing is lost: asking again waits again
        except BaseException:
            self.close()
            raise


class _Epoch:
    """One pass over the rest of an epoch; leaving it early ends the threads.

    It is no generator, because an iteration goes on after a `LoaderTimeout`.
    """

    def __init__(self, loader: OverlapLoader) -> None:
        self._loader = loader
        self._iteration = loader._position.iterate()

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Batch:
        position = self._iteration.peek()
        if position is None:
            raise StopIteration  # the threads go on with the next epoch
        batch = self._loader._next(*position, self._iteration)
        self._iteration.advance()
        return batch

    def close(self) -> None:
        """End the threads, unless the epoch was delivered or the pipeline works for a newer iteration."""
        user = self._loader._user
        if self._iteration.left_early and user is not None and user() is self._iteration:
            self._loader.close()

    def __del__(self) -> None:
        self.close()


def _threads(name: str, count: int | None) -> int:
    if count is not None:
        return as_int(count, name, "num_threads", 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _seconds(name: str, timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
        raise TypeError(f"{name}: timeout: expected seconds or None, got {timeout!r} ({type(timeout).__name__}).")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"{name}: timeout: expected seconds above 0 or None (for ever), got {timeout!r}.")
    return timeout


def _device(device: torch.device | str | None) -> torch.device:
    found = device_of("OverlapLoader", device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(
            f"OverlapLoader: device: expected a cpu or cuda device, got {found}; load on the cpu and call batch.to()."
        )
    return found
