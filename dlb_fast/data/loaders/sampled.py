"""`SampledLoader` yields the batches of a class or view-pair sampler, `EvalLoader` every sample once, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dlb_fast._args import as_int
from dlb_fast.data._args import check_callable, class_indices, device_of, length_of
from dlb_fast.data.batch import Batch, stack_views, tensor_of
from dlb_fast.data.datasets.source import FailurePolicy, SampleError, SampleSource
from dlb_fast.data.decode.decode import ImageDecoder
from dlb_fast.data.loaders.resident import ResidentViews, resident_tensors
from dlb_fast.data.plan import resolve_ranks
from dlb_fast.data.position import Iteration
from dlb_fast.data.rng import ViewRng, ViewRngs
from dlb_fast.data.sampler import PlanSampler, ViewPairSampler
from dlb_fast.data.transforms.crops import Transform
from dlb_fast.data.transforms.erasing import Eraser
from dlb_fast.data.transforms.mixing import Mix, check_mix
from dlb_fast.data.transforms.normalise import Normalise
from dlb_fast.data.transforms.single import source_transform

__all__ = ["EvalLoader", "SampledLoader"]

Rows = list[tuple[torch.Tensor, int, int]]  # image, target, id


def loaded_ahead(
    batches: Iterable[Iterable[tuple[Any, ...]]], load: Callable[..., tuple[torch.Tensor, int, int]], num_threads: int
) -> Iterator[Rows]:
    """Yields `[load(*row) for row in batch]` for every batch; threads load one batch ahead."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dlb-rows")
    ahead: deque[list[Future[tuple[torch.Tensor, int, int]]]] = deque()
    try:
        for batch in batches:
            ahead.append([pool.submit(load, *row) for row in batch])
            if len(ahead) == 2:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class SampledLoader:
    """Batches of a `ClassBatchSampler` or `ViewPairSampler`; one iteration is one epoch, the next iteration the next.

    A dataset with `images` stays on the device, as in `ResidentLoader`. Any other is read, decoded and augmented by
    threads, one step ahead. Two rows of the same sample read and decode it twice.

    Args:
        dataset: as in `OverlapLoader`.
        sampler: decides the rows of every batch and keeps the position.
        transform: as in `ResidentLoader`.
        device: as in `ResidentLoader`.
        mean: as in `ResidentLoader`.
        std: as in `ResidentLoader`.
        dtype: as in `ResidentLoader`.
        channels_last: as in `ResidentLoader`.
        num_threads: number of loading threads, for datasets not in memory.
        erase: as in `ResidentLoader`.
        mix: mixup and CutMix, both views of a sample mixed alike; only with a `ViewPairSampler`.
        decoder: maps bytes to uint8 (h, w, 3); None means `ImageDecoder()`.
        on_error: as in `OverlapLoader`; of a `ClassBatchSampler` the substitute has the same class.

    Raises:
        SampleError: a file cannot be read; the message names path and index. Other errors as in `ResidentLoader`.
        ValueError: `mix` with a `ClassBatchSampler`.

    Example:
        >>> from types import SimpleNamespace
        >>> from dlb_fast.data import PlanSampler, ViewPairSampler
        >>> digits = SimpleNamespace(images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8), targets=torch.arange(4))
        >>> [batch.ids.tolist() for batch in SampledLoader(digits, ViewPairSampler(4, 4, shuffle=False))]
        [[0, 1, 0, 1], [2, 3, 2, 3]]
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Any,
        *,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        num_threads: int = 2,
        erase: Eraser | None = None,
        mix: Mix | None = None,
        decoder: Callable[[bytes], Any] | None = None,
        on_error: str = "raise",
    ) -> None:
        if not isinstance(sampler, PlanSampler):
            raise TypeError(
                f"SampledLoader: sampler must be a ClassBatchSampler or a ViewPairSampler, got a "
                f"{type(sampler).__name__}; torch's samplers belong into a DataLoader"
            )
        self.sampler = sampler
        self.batch_size = sampler.batch_size
        self.device = device_of("SampledLoader", device)
        check_callable("SampledLoader", decoder=decoder)
        self._normalise = Normalise(mean, std, dtype, channels_last=channels_last, erase=erase)
        self.mix = check_mix("SampledLoader", mix, dtype)
        if mix is not None and not isinstance(sampler, ViewPairSampler):
            raise ValueError(
                f"SampledLoader: mix needs a ViewPairSampler, got a {type(sampler).__name__}, which groups rows by "
                "class; mixed images have no single class, so turn mix off"
            )
        self._threads = as_int(num_threads, "SampledLoader", "num_threads", 1)
        self._views: ResidentViews | None = None
        if hasattr(dataset, "images"):
            images, targets, _ = resident_tensors(dataset, "SampledLoader")
            self._views = ResidentViews(images.to(self.device), [transform], self._normalise, "SampledLoader")
            self._targets = targets.to(self.device)
        else:
            self._source = SampleSource(dataset, decoder or ImageDecoder(), operation="SampledLoader")
            alike = None if isinstance(sampler, ViewPairSampler) else np.asarray(dataset.targets)
            seed = sampler.plan.seed
            self._policy = FailurePolicy(self._source, seed, on_error, operation="SampledLoader", targets=alike)
            self._transform = source_transform("SampledLoader", self._source, transform)

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(self.sampler._position.iterate())

    def _batches(self, iteration: Iteration) -> Iterator[Batch]:
        loaded: Iterator[Rows] | None = None
        while (position := iteration.peek()) is not None:
            if self._views is not None:
                batch = self._gathered(*position)
            else:
                loaded = loaded or loaded_ahead(self._rest_of(*position), self._one, self._threads)
                batch = self._stacked(next(loaded), *position)
            iteration.advance()
            yield batch

    def _gathered(self, epoch: int, step: int) -> Batch:
        assert self._views is not None
        ids, epochs, views = self.sampler.views(epoch, step)
        images, rows = self._views(ViewRngs(self.sampler.plan.seed, epochs, ids, views))
        return self._mixed(Batch(images, self._targets[rows], rows, 0, epoch, step))

    def _rest_of(self, epoch: int, step: int) -> Iterator[Iterator[tuple[int, int, int]]]:
        """The rows of this and all later batches of the epoch, for `_one`."""
        for later in range(step, len(self)):
            yield zip(*(column.tolist() for column in self.sampler.views(epoch, later)), strict=True)

    def _one(self, sample: int, epoch: int, view: int) -> tuple[torch.Tensor, int, int]:
        sample, image, target = self._policy.get(epoch, sample)
        if self._transform is not None:
            image = self._transform(image, ViewRng(self.sampler.plan.seed, epoch, sample, view))
        return image, target, sample

    def _stacked(self, rows: Rows, epoch: int, step: int) -> Batch:
        _, epochs, views = self.sampler.views(epoch, step)
        ids = np.array([sample for _, _, sample in rows])
        stacked = stack_views("SampledLoader", [image for image, _, _ in rows], ids.tolist())
        pixels = stacked.to(self.device).permute(0, 2, 3, 1).contiguous()
        images = self._normalise(pixels, ViewRngs(self.sampler.plan.seed, epochs, ids, views))
        targets = torch.tensor([target for _, target, _ in rows], dtype=torch.int64, device=self.device)
        return self._mixed(Batch(images, targets, torch.from_numpy(ids).to(self.device), 0, epoch, step))

    def _mixed(self, batch: Batch) -> Batch:
        if self.mix is None:
            return batch
        view = (len(batch) // 2, batch.epoch, batch.step)  # the same draws for both views of the samples
        return self.mix.in_place(batch, [view, view], self.sampler.plan.seed, self.sampler.rank)

    @property
    def epoch(self) -> int:
        """Epoch of the position, as in `state_dict()`."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; the current epoch is not restarted, so a resume stays exact."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; RuntimeError while an iteration is active, ValueError on any mismatch."""
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Does nothing, because the threads end with an iteration; all loaders have this method."""

    def __enter__(self) -> SampledLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EvalLoader:
    """Every sample of this rank's share of a dataset once, in order; may be iterated repeatedly.

    Rank r has samples `[r * N // W, (r + 1) * N // W)`. The shares are disjoint, cover the dataset and differ by at
    most one sample, so ranks may take different numbers of steps: use no collective inside the loop, reduce after it.
    The last batch may be short.

    Args:
        dataset: as in `OverlapLoader`.
        batch_size: rows per batch.
        transform: a deterministic transform that gives all images one size, such as `eval_transform(224)`.
        device: device of the batches; None means the CPU.
        num_threads: number of loading threads, for datasets not in memory.
        rank: as in `OverlapBatchSampler`.
        world_size: as in `OverlapBatchSampler`.
        mean: as in `ResidentLoader`.
        std: as in `ResidentLoader`.
        dtype: as in `ResidentLoader`.
        channels_last: as in `ResidentLoader`.
        decoder: maps bytes to uint8 (h, w, 3); None means `ImageDecoder()`.
        on_error: "raise", or "replace": an image that cannot be read becomes a row of zeros with target -1, which
            `dlb_fast.train.evaluate` leaves out. Nothing else would keep "every sample once".

    Yields:
        `Batch` with num_old 0, epoch 0 and its step.

    Raises:
        SampleError: a file cannot be read or decoded; the message names path and index.
        ValueError: images of different sizes.

    Example:
        >>> digits = [(torch.zeros(1, 8, 8, dtype=torch.uint8), 0)] * 5
        >>> [len(batch) for batch in EvalLoader(digits, 2)]
        [2, 2, 1]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
        num_threads: int = 2,
        rank: int | None = None,
        world_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        decoder: Callable[[bytes], Any] | None = None,
        on_error: str = "raise",
    ) -> None:
        name = "EvalLoader"
        self.batch_size = as_int(batch_size, name, "batch_size", 1)
        self._threads = as_int(num_threads, name, "num_threads", 1)
        rank, world_size = resolve_ranks(name, rank, world_size)
        self.device = device_of(name, device)
        self._normalise = Normalise(mean, std, dtype, channels_last=channels_last)
        check_callable(name, decoder=decoder)
        self._source = SampleSource(dataset, decoder or ImageDecoder(), operation=name)
        self._policy = FailurePolicy(self._source, 0, on_error, operation=name)
        self._transform = source_transform(name, self._source, transform)
        size = length_of(name, dataset)
        self._ids = np.arange(rank * size // world_size, (rank + 1) * size // world_size)
        # A dataset in memory is sliced and moved to the device batch by batch.
        in_memory = not self._source.items and hasattr(dataset, "images")
        self._images = tensor_of(dataset.images) if in_memory else None
        self._targets = torch.from_numpy(class_indices(name, dataset.targets)) if self._images is not None else None

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._ids) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._images is not None and self._transform is None:
            yield from self._sliced()
        else:
            yield from self._loaded()

    def _sliced(self) -> Iterator[Batch]:
        assert self._images is not None and self._targets is not None
        for step in range(len(self)):
            ids = torch.from_numpy(self._ids[step * self.batch_size : (step + 1) * self.batch_size])
            part = slice(int(ids[0]), int(ids[-1]) + 1)
            yield self._batch(self._images[part], self._targets[part], ids, step)

    def _loaded(self) -> Iterator[Batch]:
        steps = [self._ids[k * self.batch_size : (k + 1) * self.batch_size] for k in range(len(self))]
        loaded = loaded_ahead((((int(i),) for i in ids) for ids in steps), self._one, self._threads)
        for step, (ids, rows) in enumerate(zip(steps, loaded, strict=True)):
            images = stack_views("EvalLoader", [image for image, _, _ in rows], ids.tolist())
            targets = torch.tensor([target for _, target, _ in rows], dtype=torch.int64, device="cpu")
            yield self._batch(images, targets, torch.from_numpy(ids), step)

    def _one(self, sample: int) -> tuple[torch.Tensor, int, int]:
        try:
            image, target = self._source.load(sample, 0)
        except SampleError as error:
            self._policy.record(error, "left out")
            image, target = torch.zeros(3, 8, 8, dtype=torch.uint8), -1
        return (image if self._transform is None else self._transform(image, ViewRng(0, 0, sample, 0))), target, sample

    def _batch(self, images: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, step: int) -> Batch:
        images = images.to(self.device).permute(0, 2, 3, 1).contiguous()
        return Batch(self._normalise(images), targets.to(self.device), ids.to(self.device), 0, 0, step)
