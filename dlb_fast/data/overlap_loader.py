"""Batches for training with the last mini-batch: each image is read and decoded once, each view copied once."""

from __future__ import annotations

import numbers
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from dlb_fast.data._cursor import Cursor
from dlb_fast.data._ranks import check_callable, device_of, length_of, make_plan
from dlb_fast.data.batch import Batch
from dlb_fast.data.decode import ImageDecoder
from dlb_fast.data.device_augment import ViewParameters
from dlb_fast.data.erasing import Eraser
from dlb_fast.data.errors import LoaderTimeout
from dlb_fast.data.mixing import Mix, check_mix
from dlb_fast.data.normalise import Normalise
from dlb_fast.data.pipeline import LoaderStats, Pipeline, Settings
from dlb_fast.data.plan import as_int
from dlb_fast.data.source import FailurePolicy, SampleSource
from dlb_fast.data.view_rng import ViewRng

__all__ = ["OverlapLoader"]

Transform = Callable[[torch.Tensor, ViewRng], torch.Tensor]


class OverlapLoader:
    """Overlapping batches from worker threads; iterating gives one epoch of `Batch` and moves on to the next by itself.

    A thread reads and decodes a sample once and makes both its views: the first goes into the batch that introduces the
    sample, the second straight into the batch after it. Views are functions of (seed, epoch, sample, use), so batches
    are the same with any number of threads, after a resume, on any number of ranks (by id), and as those of an
    `OverlapBatchSampler` with the same transform.

    The threads start at the first `next` and run on across epochs; they end at `close()`, when an iteration is left
    early, when an error is raised, and when the loader is garbage. Images belong to whoever receives them: they are
    never written again.

    Args:
        dataset: `read(i)` (bytes or a path) and `targets`, or `images` and `targets`, or anything with `load`.
        batch_size: rows the model sees on this rank: even; half of them are new.
        repeat: False gives plain epochs: `batch_size` new samples per batch, one view of each, no second use.
        transform: `transform(image, rng)`: uint8 (c, h, w) and the view's `ViewRng` to a (c, h', w') tensor of one
            size; it runs in worker threads and must not change its input. None takes images as they are.
        device: where batches are yielded: cpu or cuda. None: cpu.
        num_threads: None: the cores this process may use, at most 8.
        depth: finished batches kept ahead; host (and device) memory is `depth + 2` batches of views, and on a CPU the
            last two that were delivered.
        seed, shuffle, drop_last, rank, world_size: as in `OverlapBatchSampler`.
        mean, std: of images in [0, 1], per channel: `(x / 255 - mean) / std` on the device; both None: `x / 255`.
        dtype: of the images; torch.uint8 leaves pixels as they are. Views that are not uint8 are passed on unchanged.
        channels_last: memory format of the images.
        erase: `RandomErasing` or `Cutout`: a box of every view, drawn from the view's own numbers, after the rest.
        mix: mixup and CutMix on the finished batch, both uses of a sample mixed alike.
        on_error: "raise" (a `SampleError` in the batch it belongs to) or "replace" (a substitute, for both uses).
        max_failures: with "replace", how many different samples may fail: an int, or a float fraction of the dataset.
        timeout: seconds `next` may wait before `LoaderTimeout` reports what each thread is doing; None: for ever.
        decoder: bytes to uint8 (h, w, 3); None: `ImageDecoder()`.
        load: `load(dataset, i)` giving (image, target) for datasets of another kind.
        augment_on: "host" cuts views in the threads; "device" copies each decoded image once and cuts both views there
            (RandomResizedCrop, Flip and Cutout only): for few cores and a GPU with time to spare.
        max_ring_pixels: with augment_on="device", larger images are shrunk to this many pixels before the copy;
            `(depth + 2) * half * 3` times as many bytes are held on host and device.
        check_threads: measure once, on the first image, whether two threads make views faster than one, and log a
            warning if not; it takes about 0.3 s at most, and is skipped for transforms that take longer than 50 ms.

    Raises:
        ValueError, TypeError: an argument out of range. SampleError, LoaderTimeout: from `next`.

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
        repeat: bool = True,
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
        check_threads: bool = True,
        augment_on: str = "host",
        max_ring_pixels: int = 400_000,
    ) -> None:
        name = type(self).__name__
        length = length_of(name, dataset)
        self.plan, self.rank = make_plan(
            name, length, batch_size, repeat=repeat, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        self.half = self.plan.rows
        self.batch_size = 2 * self.half if repeat else self.half
        check_callable(name, transform=transform, decoder=decoder, load=load)
        self.timeout = _seconds(name, timeout)
        self.decoder = decoder if decoder is not None else ImageDecoder()
        source = SampleSource(dataset, self.decoder, load)
        self._policy = FailurePolicy(source, self.plan.seed, on_error, max_failures)
        self._settings = Settings(
            plan=self.plan,
            rank=self.rank,
            source=source,
            policy=self._policy,
            transform=transform,
            num_threads=_threads(name, num_threads),
            depth=as_int(depth, name, "depth", 1),
            device=_device(device),
            normalise=Normalise(mean, std, dtype, channels_last=channels_last, erase=erase),
            stats=LoaderStats(),
            check_threads=check_threads,
            augment_on=augment_on,
            max_ring_pixels=as_int(max_ring_pixels, name, "max_ring_pixels", 1),
            repeat=repeat,
            mix=check_mix(name, mix, dtype),
        )
        if augment_on not in ("host", "device"):
            raise ValueError(f'{name}: augment_on: expected "host" or "device", got {augment_on!r}.')
        if augment_on == "device":
            ViewParameters(transform)  # raises for a transform that has to run on the host
        self._cursor = Cursor(self.plan, name)
        self._lock = threading.RLock()  # the collector may close an iteration at any point
        self._pipeline: Pipeline | None = None
        self._user: object = None  # the iteration the pipeline works for
        self._finaliser: weakref.finalize[..., OverlapLoader] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "OverlapLoader: a loader with threads and buffers cannot be pickled or copied; make another one with the "
            "same arguments where it is needed, and give it this one's position: load_state_dict(loader.state_dict())"
        )

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self.plan.halves_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return _Epoch(self)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch to deliver."""
        return self._cursor.epoch

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
        self._cursor.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches, O(1); what was prefetched is forgotten."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position, also on another number of ranks with the same global half.

        Raises:
            RuntimeError: an iteration is active.
            ValueError: seed, length, shuffle, drop_last, repeat, version or half * world_size differ; both are named.
        """
        self._cursor.load_state_dict(state)

    def stats(self) -> LoaderStats:
        """Counters since the loader was made: batches, decodes, bytes, waiting time, failures."""
        return self._settings.stats.filled(self._settings.source, self._policy, self.decoder)

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

    def _next(self, epoch: int, step: int, user: object) -> Batch:
        """The batch of a position, from the running pipeline when it stands there, else from a new one."""
        position = epoch * self.plan.halves_per_epoch + step
        pipeline = self._pipeline
        try:
            if pipeline is None or not pipeline.stands_at(position):
                self.close()
                pipeline = Pipeline(self._settings, position)
                with self._lock:
                    self._pipeline = pipeline
                    self._finaliser = weakref.finalize(self, pipeline.stop)
                pipeline.start()  # a Ctrl-C in here must not leave a pipeline that nobody works for
            self._user = user
            return pipeline.next(self.timeout)
        except LoaderTimeout:
            raise  # nothing is lost: asking again waits again
        except BaseException:
            self.close()
            raise


class _Epoch:
    """One pass over the rest of an epoch; leaving it early ends the threads."""

    def __init__(self, loader: OverlapLoader) -> None:
        self._loader = loader
        self._iteration = loader._cursor.iterate()
        self._open = False
        self._token = object()

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Batch:
        position = self._iteration.peek()
        if position is None:
            self._open = False  # the whole epoch was taken: the threads go on with the next one
            raise StopIteration
        self._open = True
        with self._iteration.making():
            batch = self._loader._next(*position, self._token)
        self._iteration.advance()
        return batch

    def close(self) -> None:
        """End the threads when this iteration was left early."""
        if self._open and not self._iteration.exhausted and self._loader._user is self._token:
            self._loader.close()
        self._open = False

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
