"""Batches for evaluation: every sample exactly once, in order, no padding, no duplicates, on any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from dlb_fast.data._ranks import check_callable, device_of, length_of, resolve_ranks
from dlb_fast.data._targets import class_indices
from dlb_fast.data.augment import Transform
from dlb_fast.data.batch import Batch, stack_views
from dlb_fast.data.decode import ImageDecoder
from dlb_fast.data.device_stream import Normalise
from dlb_fast.data.errors import SampleError
from dlb_fast.data.memory import tensor_of
from dlb_fast.data.plan import as_int
from dlb_fast.data.source import SampleSource
from dlb_fast.data.view_rng import ViewRng


def _item(data: Any, index: int) -> Any:
    return data[index]


class EvalLoader:
    """One pass over a rank's share of a dataset; iterate it as often as wanted.

    Rank r has samples `[r * N // W, (r + 1) * N // W)`: the shares are disjoint, cover the set, and differ by one
    sample at most, so ranks may take different numbers of steps. Call no collective operation inside the loop; add
    the sums up after it. The last batch is short where the batch size does not divide the share.

    Args:
        dataset: `images` and `targets`, or `read(i)` and `targets`, or `dataset[i]` giving (image, target).
        batch_size: rows per batch.
        transform: a fixed one, such as `eval_transform(224)`; it must bring all images of a batch to one size.
        device: where batches are yielded, None is the CPU. num_threads: that load and decode, for sets not in memory.
        mean, std, dtype, channels_last: as in `ResidentLoader`. rank, world_size: as in `OverlapBatchSampler`.

    Yields:
        `Batch` with num_old 0, epoch 0 and its step.

    Raises:
        SampleError: a file that cannot be read or decoded, naming path and index. ValueError: images of different
            sizes.

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
    ) -> None:
        name = "EvalLoader"
        self.batch_size = as_int(batch_size, name, "batch_size", 1)
        self._threads = as_int(num_threads, name, "num_threads", 1)
        rank, world_size = resolve_ranks(name, rank, world_size)
        self.device = device_of(name, device)
        self._normalise = Normalise(mean, std, dtype, channels_last=channels_last)
        check_callable(name, transform=transform)
        self._transform = transform
        own = hasattr(dataset, "targets") and (hasattr(dataset, "images") or hasattr(dataset, "read"))
        self._source = SampleSource(dataset, ImageDecoder(), None if own else _item, name)
        size = length_of(name, dataset)
        self._ids = np.arange(rank * size // world_size, (rank + 1) * size // world_size)
        # A set in memory is sliced; it is brought to the device batch by batch.
        self._images = tensor_of(dataset.images) if own and hasattr(dataset, "images") else None
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
        """Threads load a batch ahead of the one that is used."""
        steps = [self._ids[k * self.batch_size : (k + 1) * self.batch_size] for k in range(len(self))]
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="dlb-eval")
        ahead: deque[list[Future[tuple[torch.Tensor, int]]]] = deque()
        try:
            for step, ids in enumerate(steps):
                for upcoming in steps[step + len(ahead) : step + 2]:
                    ahead.append([pool.submit(self._one, int(i)) for i in upcoming])
                views = [future.result() for future in ahead.popleft()]
                images = stack_views("EvalLoader", [view for view, _ in views], ids.tolist())
                targets = torch.tensor([target for _, target in views], dtype=torch.int64, device="cpu")
                yield self._batch(images, targets, torch.from_numpy(ids), step)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            image, target = self._source.get(index)
        except Exception as error:
            raise SampleError(self._source.path(index), index, 0, f"{type(error).__name__}: {error}") from error
        return (image if self._transform is None else self._transform(image, ViewRng(0, 0, index, 0))), target

    def _batch(self, images: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, step: int) -> Batch:
        images = images.to(self.device).permute(0, 2, 3, 1).contiguous()
        return Batch(self._normalise(images), targets.to(self.device), ids.to(self.device), 0, 0, step)
