"""`SampledLoader`: the batches of any row sampler, from a resident set or from files, without a `DataLoader`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from dlb_fast.data._ranks import check_callable, device_of
from dlb_fast.data.augment import Transform
from dlb_fast.data.batch import Batch, stack_views
from dlb_fast.data.class_batches import ViewPairSampler
from dlb_fast.data.decode import ImageDecoder
from dlb_fast.data.erasing import Eraser
from dlb_fast.data.errors import SampleError
from dlb_fast.data.mixing import Mix, check_mix
from dlb_fast.data.normalise import Normalise
from dlb_fast.data.plan import as_int
from dlb_fast.data.resident import resident_tensors
from dlb_fast.data.resident_views import ResidentViews
from dlb_fast.data.source import SampleSource
from dlb_fast.data.view_rng import ViewRng, ViewRngs

__all__ = ["SampledLoader"]


class SampledLoader:
    """Batches of a `ClassBatchSampler` or `ViewPairSampler`; one iteration is one epoch and moves on by itself.

    A set with `images` is kept on the device and gathered there, as in `ResidentLoader`; any other is read, decoded and
    augmented by threads, one step ahead. Every row is its own read: rows that share a sample decode it once each.

    Args:
        dataset: has `targets`, and `images` (N, c, h, w) uint8 or `read(i)`.
        sampler: with `rows(epoch, step)`; its position is this loader's.
        transform, device, mean, std, dtype, channels_last: as in `ResidentLoader`.
        num_threads: that load, for sets not in memory.
        erase: `RandomErasing` or `Cutout`: a box of every view, drawn from the view's own numbers, after the rest.
        mix: mixup and CutMix, both views of a sample mixed alike; with a `ViewPairSampler` only.

    Raises:
        SampleError: a file that cannot be read, naming path and index; other errors as `ResidentLoader`.
        ValueError: `mix` with rows that belong together by their class.

    Example:
        >>> from types import SimpleNamespace
        >>> from dlb_fast.data.class_batches import ViewPairSampler
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
    ) -> None:
        self.sampler = sampler
        self.batch_size = sampler.batch_size
        self.device = device_of("SampledLoader", device)
        check_callable("SampledLoader", transform=transform)
        self._normalise = Normalise(mean, std, dtype, channels_last=channels_last, erase=erase)
        self.mix = check_mix("SampledLoader", mix, dtype)
        if mix is not None and not isinstance(sampler, ViewPairSampler):
            raise ValueError(
                f"SampledLoader: mix fits two views of the same samples (ViewPairSampler); the rows of a "
                f"{type(sampler).__name__} belong together by their one class, which mixed images do not have"
            )
        self._threads = as_int(num_threads, "SampledLoader", "num_threads", 1)
        self._transform = transform
        self._views: ResidentViews | None = None
        if hasattr(dataset, "images"):
            images, targets = resident_tensors(dataset, "SampledLoader")
            self._views = ResidentViews(images.to(self.device), transform, self._normalise, "SampledLoader")
            self._targets = targets.to(self.device)
        else:
            self._source = SampleSource(dataset, ImageDecoder(), operation="SampledLoader")

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        iteration = self.sampler._cursor.iterate()
        if self._views is not None:
            while (position := iteration.peek()) is not None:
                with iteration.making():
                    batch = self._gathered(*position)
                iteration.advance()
                yield batch
            return
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="dlb-rows")
        ahead: deque[list[Future[tuple[torch.Tensor, int]]]] = deque()
        try:
            while (position := iteration.peek()) is not None:
                upcoming = position
                for _ in range(len(ahead)):
                    upcoming = self.sampler.plan.after(*upcoming)
                while len(ahead) < 2 and upcoming[0] == position[0]:
                    ahead.append(self._submit(pool, *upcoming))
                    upcoming = self.sampler.plan.after(*upcoming)
                with iteration.making():
                    batch = self._stacked([future.result() for future in ahead.popleft()], *position)
                iteration.advance()
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _gathered(self, epoch: int, step: int) -> Batch:
        assert self._views is not None
        rows, uses = self.sampler.rows(epoch, step)
        images, ids = self._views(ViewRngs(self.sampler.plan.seed, epoch, rows, uses))
        return self._mixed(Batch(images, self._targets[ids], ids, 0, epoch, step))

    def _submit(self, pool: ThreadPoolExecutor, epoch: int, step: int) -> list[Future[tuple[torch.Tensor, int]]]:
        rows, uses = self.sampler.rows(epoch, step)
        return [pool.submit(self._one, epoch, i, use) for i, use in zip(rows.tolist(), uses.tolist(), strict=True)]

    def _one(self, epoch: int, index: int, use: int) -> tuple[torch.Tensor, int]:
        try:
            image, target = self._source.get(index)
        except Exception as error:
            raise SampleError(self._source.path(index), index, epoch, f"{type(error).__name__}: {error}") from error
        rng = ViewRng(self.sampler.plan.seed, epoch, index, use)
        return (image if self._transform is None else self._transform(image, rng)), target

    def _stacked(self, views: list[tuple[torch.Tensor, int]], epoch: int, step: int) -> Batch:
        rows, uses = self.sampler.rows(epoch, step)
        stacked = stack_views("SampledLoader", [view for view, _ in views], rows.tolist())
        images = stacked.to(self.device).permute(0, 2, 3, 1).contiguous()
        targets = torch.tensor([target for _, target in views], dtype=torch.int64, device=self.device)
        ids = torch.from_numpy(rows).to(self.device)
        rngs = ViewRngs(self.sampler.plan.seed, epoch, rows, uses)
        return self._mixed(Batch(self._normalise(images, rngs), targets, ids, 0, epoch, step))

    def _mixed(self, batch: Batch) -> Batch:
        if self.mix is None:
            return batch
        view = (len(batch) // 2, batch.epoch, batch.step)  # the same draws for both views of the samples
        return self.mix.in_place(batch, [view, view], self.sampler.plan.seed, self.sampler.rank)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch to deliver."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; nothing happens when it is the current one."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches, O(1)."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; RuntimeError while an iteration is active, ValueError on any mismatch."""
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Threads live no longer than an iteration, so there is nothing to stop; here for the loaders' common face."""

    def __enter__(self) -> SampledLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
