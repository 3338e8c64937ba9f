"""`OverlapLoader` reads and decodes each image once and copies each view once."""

from __future__ import annotations

import dataclasses
import numbers
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from dlb_fast._args import as_int, cores
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
from dlb_fast.data.transforms.single import source_transform

__all__ = ["OverlapLoader"]


class OverlapLoader:
    """Overlapping batches from worker threads; one iteration yields one epoch of `Batch`, the next iteration the next.

    A thread reads and decodes a sample once and makes both its views: the first for the batch in which the sample is
    new, the second for the batch after it. A view depends on (seed, epoch, sample, view) only. So the batches do not
    depend on the number of threads, on resumes or (by id) on the number of ranks, and equal those of an
    `OverlapBatchSampler` with the same transform.

    The threads start at the first `next` and keep running across epochs. They end at `close()`, when an iteration is
    left early, when an error is raised, and when the loader is garbage-collected. The loader never writes to a batch
    that it has yielded. A transform written in Python holds the interpreter lock, so a second thread hardly helps; the
    transforms of `dlb_fast.data` run in compiled code.

    Args:
        dataset: has `targets` and either `read(i)` (bytes or a path) or `images`; or `dataset[i]` is (image, target),
            as in torchvision. A torchvision dataset's own `transform` is applied to each view. An item of any other
            dataset is read again for the second view if the dataset has a `transform`, or the loader has none.
        batch_size: rows of a batch on this rank, an even number; half of them are new.
        transform: called as `transform(image, rng)` with a uint8 (c, h, w) image and the view's `ViewRng`; returns a
            (c, h', w') tensor, the same size for every image. It runs in worker threads and must not modify its input.
            None leaves the images unchanged. A transform of one argument, such as torchvision's, is called as
            `transform(image)`, with a PIL image or what `dataset[i]` gives; its views are not reproducible.
        device: device of the batches, cpu or cuda; None means cpu.
        overlap: False turns repetition off: `batch_size` new samples per batch, one view of each.
        num_threads: number of worker threads; None means the cores of this process, at most 8.
        depth: batches finished ahead. Host (and device) memory holds `depth + 2` batches of views; on a CPU also the
            last two yielded ones.
        seed: non-negative integer, the same on all ranks.
        shuffle: a new order each epoch; False keeps the order of the dataset.
        drop_last: True yields full halves only; False covers every sample (see `OverlapPlan`).
        rank: as in `OverlapBatchSampler`.
        world_size: as in `OverlapBatchSampler`.
        mean: per channel, of pixels in [0, 1]: images are `(x / 255 - mean) / std`, or `x / 255` without mean and std.
        std: per channel, of pixels in [0, 1].
        dtype: dtype of the images; torch.uint8 keeps the pixels. Views that are not uint8 keep their dtype and values.
        channels_last: memory format of the images.
        erase: `RandomErasing` or `Cutout`, applied to normalised views.
        mix: mixup and CutMix; both views of a sample are mixed alike.
        on_error: "raise" raises a `SampleError` with the batch of the sample; "replace" substitutes another sample in
            both views.
        max_failures: with "replace", the number of distinct samples that may fail: an int, or a float fraction of the
            dataset.
        timeout: seconds that `next` may wait before it raises `LoaderTimeout`; None waits for ever.
        decoder: maps bytes to uint8 (h, w, 3); None means `ImageDecoder()`.
        load: `load(dataset, i)` returns (image, target), for datasets whose items are anything else.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of another type.
        SampleError: from `next`, for a sample that cannot be loaded.
        LoaderTimeout: from `next`; another call waits again.

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
        check_callable(name, decoder=decoder, load=load)
        self.timeout = _seconds(name, timeout)
        self.decoder = decoder if decoder is not None else ImageDecoder()
        source = SampleSource(dataset, self.decoder, load, name)
        self._settings = Settings(
            plan=self.plan,
            rank=self.rank,
            source=source,
            policy=FailurePolicy(source, self.plan.seed, on_error, max_failures),
            transform=source_transform(name, source, transform),
            num_threads=_threads(name, num_threads),
            depth=as_int(depth, name, "depth", 1),
            device=_device(device),
            normalise=Normalise(mean, std, dtype, channels_last=channels_last, erase=erase),
            mix=check_mix(name, mix, dtype),
            decoder=self.decoder,
        )
        self._position = StreamPosition(self.plan, name)
        self._lock = threading.RLock()  # reentrant: the garbage collector may close an iteration while it is held
        self._pipeline: Pipeline | None = None
        self._user: weakref.ref[Iteration] | None = None  # the iteration that uses the pipeline
        self._finaliser: weakref.finalize[..., OverlapLoader] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "OverlapLoader: a loader with threads and buffers cannot be pickled or copied; make a second one with the "
            "same arguments and pass on the position: load_state_dict(loader.state_dict())"
        )

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return _Epoch(self)

    @property
    def epoch(self) -> int:
        """Epoch of the position, as in `state_dict()`."""
        return self._position.epoch

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return self._settings.device

    @property
    def num_threads(self) -> int:
        """Worker threads."""
        return self._settings.num_threads

    @property
    def sampler(self) -> OverlapLoader:
        """The loader itself, for frameworks that call `loader.sampler.set_epoch` (Lightning, timm)."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; the current epoch is not restarted, so a resume stays exact."""
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches; prefetched batches do not count."""
        return self._position.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; the number of ranks may differ if half * world_size is the same.

        Raises:
            RuntimeError: an iteration is active.
            ValueError: seed, length, shuffle, drop_last, overlap, version or half * world_size differ; both are named.
        """
        self._position.load_state_dict(state)

    def stats(self) -> LoaderStats:
        """Counters since the loader was made: batches, decodes, bytes, waiting time, failures."""
        counters, pipeline = self._settings.counters(), self._pipeline
        running = 0.0 if pipeline is None else pipeline.idle_seconds()
        return dataclasses.replace(counters, idle_seconds=counters.idle_seconds + running)

    def close(self) -> None:
        """End the threads and free the buffers; the loader may be iterated again."""
        self._stop(None)

    def _stop(self, user: Iteration | None) -> None:
        """End the threads; with `user` only if that iteration is the one that uses them."""
        with self._lock:
            if user is not None and (self._user is None or self._user() is not user):
                return
            finaliser, self._finaliser, self._pipeline, self._user = self._finaliser, None, None, None
        if finaliser is not None:
            finaliser()

    def __enter__(self) -> OverlapLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, epoch: int, step: int, user: Iteration) -> Batch:
        """The batch of a position, from the running pipeline if it is there, else from a new one."""
        position = epoch * self.plan.steps_per_epoch + step
        pipeline = self._pipeline
        try:
            if pipeline is None or not pipeline.is_at(position):
                self.close()
                pipeline = Pipeline(self._settings, position)
                with self._lock:  # the user too: an older iteration freed from now on must not end these threads
                    self._pipeline, self._user = pipeline, weakref.ref(user)
                    self._finaliser = weakref.finalize(self, pipeline.stop)
                pipeline.start()  # inside the `try`, so that Ctrl-C during the start closes the pipeline
            elif self._user is None or self._user() is not user:
                with self._lock:
                    self._user = weakref.ref(user)  # the next epoch of a running pipeline
            return pipeline.next(self.timeout)
        except LoaderTimeout:
            raise  # the pipeline keeps running; another call waits again
        except BaseException:
            self.close()
            raise


class _Epoch:
    """One pass over the rest of an epoch; leaving it early ends the threads.

    Not a generator, because an iteration continues after a `LoaderTimeout` and a generator would be finished.
    """

    def __init__(self, loader: OverlapLoader) -> None:
        self._loader = loader
        self._iteration = loader._position.iterate()

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Batch:
        position = self._iteration.peek()
        if position is None:
            raise StopIteration  # the threads continue with the next epoch
        batch = self._loader._next(*position, self._iteration)
        self._iteration.advance()
        return batch

    def close(self) -> None:
        """End the threads, unless the epoch is complete or a newer iteration uses the pipeline."""
        if self._iteration.left_early:
            self._loader._stop(self._iteration)

    def __del__(self) -> None:
        self.close()


def _threads(name: str, count: int | None) -> int:
    if count is not None:
        return as_int(count, name, "num_threads", 1)
    return min(cores(), 8)


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
