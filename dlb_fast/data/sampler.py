"""The plan for anyone's `torch.utils.data.DataLoader`: `OverlapBatchSampler`, and the dataset and collate beside it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from dlb_fast.data import _hash
from dlb_fast.data._cursor import Cursor, Iteration
from dlb_fast.data._ranks import check_callable, make_plan
from dlb_fast.data._targets import class_indices
from dlb_fast.data.batch import Batch
from dlb_fast.data.plan import as_int
from dlb_fast.data.view_rng import ViewRng

if TYPE_CHECKING:
    from typing_extensions import Self


class SampleIndex(int):
    """A sample id that says which of its two uses this is: an `int` for any dataset, with `seed`, `epoch`, `use`,
    `step`.

    `epoch` is the one the sample was drawn in, `use` 0 for a new row and 1 for a repeated one, `step` that of its
    batch.
    """

    seed: int
    epoch: int
    use: int
    step: int

    def __new__(cls, sample: int, seed: int = 0, epoch: int = 0, use: int = 0, step: int = 0) -> Self:
        self = super().__new__(cls, sample)
        self.seed, self.epoch, self.use, self.step = seed, epoch, use, step
        return self

    def rng(self) -> ViewRng:
        """The randomness of this view."""
        return ViewRng(self.seed, self.epoch, int(self), self.use)


class OverlapBatchSampler(Sampler[list[int]]):
    """Batches of indices, each `[the new half of the batch before, in order | new samples]`, as one endless stream.

    Iterating once gives one epoch (the carried half included) and moves on to the next epoch by itself. Each sample an
    epoch keeps is seen exactly twice, in two consecutive steps, on one rank; the very first batch of epoch 0 has no old
    half. Every rank takes the same number of steps with the same number of rows. The rules of shuffling, sharding and
    of the epochs' boundaries are `OverlapPlan`'s.

    Works with any `torch.utils.data.DataLoader(dataset, batch_sampler=...)`. **A map-style dataset is then asked
    twice for every sample, so each image is decoded twice**; `OverlapLoader` decodes once, and `TwoViews` is the
    official scheme.

    The indices are `SampleIndex` (ints that know epoch and use). `IndexedDataset` with `collate_overlap` turns them
    into `Batch` with ids and `num_old`; without these, `num_old(epoch, step)` tells the number of repeated rows.

    A DataLoader with workers draws batches ahead of those it delivers, and this sampler sees the drawn ones only. So
    `state_dict()` alone would skip the batches under way, and a loop that is left early starts its epoch again only
    where the workers had not drawn all of it: else the next loop begins the next epoch, and the rest of this one is
    lost. `for batch in sampler.track(loader)` (or `TrackedLoader(loader)`) counts delivered batches, which makes both
    exact; `state_dict(delivered=k)`, k batches received since this iteration began, makes the state exact. torchdata's
    `StatefulDataLoader` keeps snapshots of this sampler by itself.

    Args:
        data_source_or_len: number of samples, or anything that has a length.
        batch_size: rows the model sees on this rank: even, at least 2; half of them are new.
        shuffle: a new order each epoch; False keeps the natural order.
        seed: non-negative integer; all ranks must pass the same.
        rank, world_size: None takes those of torch.distributed where it is initialised, else 0 of 1.
        drop_last: True gives full halves only; False covers every sample (see `OverlapPlan`).

    Raises:
        ValueError: an odd or too small batch size, fewer samples than one half over all ranks, a wrong rank.
        TypeError: a size that is not an integer.

    Example:
        >>> sampler = OverlapBatchSampler(6, 4, shuffle=False)
        >>> [[int(i) for i in batch] for batch in sampler]
        [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5]]
        >>> [int(i) for i in next(iter(sampler))]  # the second epoch carries the last half over
        [4, 5, 0, 1]
    """

    _overlap = True  # whether the new rows of a batch are the old ones of the next

    def __init__(
        self,
        data_source_or_len: int | Sized,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = True,
    ) -> None:
        name = type(self).__name__
        length = len(data_source_or_len) if isinstance(data_source_or_len, Sized) else data_source_or_len
        length = as_int(length, name, "data_source_or_len", 0)
        self.plan, self.rank = make_plan(
            name, length, batch_size, repeat=True, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank,
            world_size=world_size, overlap=self._overlap,
        )  # fmt: skip
        self.batch_size = 2 * self.plan.rows
        self._cursor = Cursor(self.plan, name)
        self._newest: weakref.ref[Iteration] | None = None
        self._tracked: Iteration | None = None  # whose batches `track` counts
        self._delivered = 0  # of these, handed out

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in another process, stands where this one does and has no iteration."""
        cursor = copy.copy(self._cursor)
        if self._counted is not None:
            cursor.place_after(self._counted)
        return {**self.__dict__, "_cursor": cursor, "_newest": None, "_tracked": None}

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self.plan.halves_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        batches = _BatchIterator(self)
        self._newest = weakref.ref(batches._iteration)
        return batches

    @property
    def epoch(self) -> int:
        """Epoch of the next batch to draw."""
        return self._cursor.epoch

    @property
    def sampler(self) -> EpochListener:
        """For frameworks that announce the epoch by `batch_sampler.sampler.set_epoch` (Lightning)."""
        return EpochListener(self._cursor)

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; nothing happens when it is the current one (so a resume stays exact)."""
        if self._counted is not None and self._tracked is not None:
            if as_int(epoch, "OverlapBatchSampler.set_epoch", "epoch", 0) == self.state_dict()["epoch"]:
                return  # that of the next batch to deliver, whatever was drawn ahead
            self._cursor.settle(self._tracked, self._delivered)
        self._cursor.set_epoch(epoch)

    def num_old(self, epoch: int, step: int) -> int:
        """Repeated rows at the front of batch `step` of `epoch`."""
        return self.plan.num_old(epoch, step)

    def indices(self, epoch: int, step: int) -> list[int]:
        """The indices of one batch, a pure function of its place: old rows (use 1), then new rows (use 0)."""
        old, new = self.plan.batch(epoch, step, self.rank)
        before = self.plan.before(epoch, step)
        drawn, seed = (before[0] if before else 0), self.plan.seed
        batch: list[int] = [SampleIndex(i, seed, drawn, 1, step) for i in old.tolist()]
        batch += [SampleIndex(i, seed, epoch, 0, step) for i in new.tolist()]
        return batch

    def track(self, loader: Any) -> Iterator[Any]:
        """Iterate over `loader` (a DataLoader around this sampler) and count what it delivers, for `state_dict`."""
        if self._counted is not None and self._tracked is not None:
            self._cursor.settle(self._tracked, self._delivered)  # somebody still holds the iteration before
        # A DataLoader's iterator takes the seed of its workers from torch's global random numbers. A resumed run makes
        # one iterator more than an uninterrupted one, and its dropout would differ: so the seed is a function of the
        # epoch, and the global numbers are given back.
        self._newest, random = None, torch.get_rng_state()
        torch.default_generator.manual_seed(_hash.key_of(self.plan.seed, _hash.WORKERS, self.epoch, self.rank) >> 1)
        try:
            batches = iter(loader)  # asks this sampler for an iterator, and may draw at once
        finally:
            torch.set_rng_state(random)
        drawing, count = self._latest(), 0
        self._tracked, self._delivered = drawing, 0
        try:
            for count, batch in enumerate(batches, start=1):
                drawing = drawing or self._latest()  # some loaders ask for an iterator with their first batch
                if drawing is not None:
                    self._cursor.check_current(drawing)  # also where its workers have drawn everything
                    self._tracked, self._delivered = drawing, count
                yield batch
        finally:
            if drawing is not None:
                self._cursor.settle(drawing, count)
            if self._tracked is drawing:
                self._tracked = None

    def _latest(self) -> Iteration | None:
        """The iteration that was made last, while somebody holds it."""
        return None if self._newest is None else self._newest()

    @property
    def _counted(self) -> int | None:
        """Batches of the current iteration that were delivered; None where nobody counts."""
        tracked = self._tracked
        return self._delivered if tracked is not None and self._cursor.is_current(tracked) else None

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """The position in the stream, O(1): a flat dict of ints and bools.

        Args:
            delivered: batches received from the DataLoader since its current iteration began. None counts the batches
                `track` delivered, and without `track` all batches drawn from this sampler: exact with `num_workers=0`.
        """
        return self._cursor.state_dict(self._counted if delivered is None else delivered)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position.

        Another world size may continue when `half * world_size` is the same: the global order goes on.

        Raises:
            RuntimeError: an iteration is active.
            ValueError: seed, length, shuffle, drop_last, repeat, version or half * world_size differ; both are named.
        """
        self._cursor.load_state_dict(state)


class EpochListener:
    """Takes the epochs a framework announces, also when a DataLoader has drawn from that epoch already."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`, unless the stream is there or an iteration of it is under way."""
        self._cursor.announce(epoch)


class _BatchIterator:
    """One epoch of a sampler; nothing is drawn, and no position taken, before the first `next`."""

    def __init__(self, sampler: OverlapBatchSampler) -> None:
        self._sampler = sampler
        self._iteration: Iteration = sampler._cursor.iterate()

    def __iter__(self) -> _BatchIterator:
        return self

    def __next__(self) -> list[int]:
        position = self._iteration.advance()
        if position is None:
            raise StopIteration
        return self._sampler.indices(*position)


class IndexedDataset(Dataset[tuple[Any, Any, int]]):
    """A map-style dataset whose items are `(image, target, index)`.

    Args:
        dataset: any map-style dataset of `(image, target)`.
        transform: called as `transform(image, rng)` with the view's `ViewRng`, so that every view is reproducible; None
            leaves the dataset's own transforms at work. It needs the indices of an `OverlapBatchSampler`.

    Example:
        >>> IndexedDataset([("image", 1)])[0]
        ('image', 1, 0)
    """

    def __init__(self, dataset: Any, transform: Callable[[Any, ViewRng], Any] | None = None) -> None:
        check_callable("IndexedDataset", transform=transform)
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        image, target = self.dataset[index][:2]
        if self.transform is not None:
            if not isinstance(index, SampleIndex):
                raise TypeError(
                    f"IndexedDataset: a transform needs the indices of an OverlapBatchSampler to know which view it "
                    f"makes, got a plain {type(index).__name__}; pass DataLoader(..., batch_sampler=...)"
                )
            image = self.transform(image, index.rng())
        return image, target, index


def collate_overlap(items: Sequence[tuple[Any, Any, int]]) -> Batch:
    """`collate_fn` for an `IndexedDataset` under an `OverlapBatchSampler`: one `Batch` with ids and `num_old`.

    Raises:
        TypeError: items without the indices of an `OverlapBatchSampler`, targets that are not integers.
    """
    images, targets, indices = collated("collate_overlap", "an OverlapBatchSampler", items)
    num_old = sum(index.use for index in indices)
    return Batch(images, targets, torch.tensor(indices, device="cpu"), num_old, indices[-1].epoch, indices[-1].step)


def collated(
    operation: str, sampler: str, items: Sequence[tuple[Any, Any, int]]
) -> tuple[torch.Tensor, torch.Tensor, list[SampleIndex]]:
    """(images, targets, indices) of `IndexedDataset` items; TypeError where they are anything else."""
    tagged = [
        item[2]
        for item in items
        if isinstance(item, (tuple, list)) and len(item) == 3 and isinstance(item[2], SampleIndex)
    ]
    if not tagged or len(tagged) != len(items):
        raise TypeError(
            f"{operation}: expected items (image, target, SampleIndex), got {_described(items)}; wrap the dataset in "
            f"IndexedDataset and pass {sampler} as batch_sampler"
        )
    images = default_collate([item[0] for item in items])
    return images, torch.from_numpy(class_indices(operation, [item[1] for item in items])), tagged


def _described(items: Sequence[Any]) -> str:
    """What the items are, in words."""
    if not len(items):
        return "none"
    first = items[0]
    kinds = [type(part).__name__ for part in first] if isinstance(first, (tuple, list)) else None
    return type(first).__name__ if kinds is None else f"({', '.join(kinds)})"
