"""Batch samplers for any `torch.utils.data.DataLoader`, with a dataset wrapper and collate functions for them.

`OverlapBatchSampler` repeats half of the batch before. `ClassBatchSampler` (BAKE, CS-KD) groups samples of a class and
`ViewPairSampler` (DDGSD) the two views of a sample; both repeat no rows.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset, Sampler, default_collate

from dlb_fast._args import as_int
from dlb_fast.data._args import PART, are_indices, as_bool, class_indices, length_of
from dlb_fast.data.batch import Batch
from dlb_fast.data.datasets.source import as_image, pair_of
from dlb_fast.data.decode.decode import is_pillow
from dlb_fast.data.plan import Ids, OverlapPlan, half_of, make_plan
from dlb_fast.data.position import Iteration, StreamPosition
from dlb_fast.data.rng import COMPANION, GOLDEN, MASK, ViewRng, key_of, mix
from dlb_fast.data.transforms.single import Single, as_transform

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ClassBatchSampler",
    "HalfBatchSampler",
    "IndexedDataset",
    "OverlapBatchSampler",
    "PlanSampler",
    "SampleIndex",
    "ViewPairSampler",
    "collate_overlap",
    "collate_rows",
]


class SampleIndex(int):
    """A sample id that also identifies a view: an `int` with `seed`, `epoch`, `view`, `step` and `length`.

    `epoch` is the epoch in which the sample was new, `view` is 0 for a new row and 1 for a repeated one, `step` is the
    step of its batch, `length` the number of samples that the sampler knows (0: not said).
    """

    seed: int
    epoch: int
    view: int
    step: int
    length: int

    def __new__(cls, sample: int, seed: int = 0, epoch: int = 0, view: int = 0, step: int = 0, length: int = 0) -> Self:
        self = super().__new__(cls, sample)
        self.seed, self.epoch, self.view, self.step, self.length = seed, epoch, view, step, length
        return self

    def rng(self) -> ViewRng:
        """The random numbers of this view."""
        return ViewRng(self.seed, self.epoch, int(self), self.view)


class PlanSampler(Sampler[list[int]], abc.ABC):
    """Base of the samplers: an endless stream of batches that follow an `OverlapPlan`.

    One iteration yields one epoch, the next iteration the next. `views(epoch, step)` computes a batch. `state_dict` and
    `load_state_dict` save and restore the position; torchdata's `StatefulDataLoader` calls them, so it resumes exactly
    with any number of workers.
    """

    def __init__(self, plan: OverlapPlan, rank: int, batch_size: int) -> None:
        self.plan, self.rank, self.batch_size = plan, rank, batch_size
        self._position = StreamPosition(plan, type(self).__name__)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_position": copy.copy(self._position)}  # a copy has its own position

    @abc.abstractmethod
    def views(self, epoch: int, step: int) -> tuple[Ids, Ids, Ids]:
        """The rows of one batch on this rank: (sample ids, epochs in which they were new, views), each (n,)."""

    def indices(self, epoch: int, step: int) -> list[int]:
        """The indices of one batch as `SampleIndex`, so that every view is reproducible."""
        rows, seed, length = [column.tolist() for column in self.views(epoch, step)], self.plan.seed, self.plan.length
        return [SampleIndex(i, seed, new_in, view, step, length) for i, new_in, view in zip(*rows, strict=True)]

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self._position.iterate())  # not a generator, so that the order of the iterations counts

    def _batches(self, iteration: Iteration) -> Iterator[list[int]]:
        while (position := iteration.peek()) is not None:
            batch = self.indices(*position)
            iteration.advance()
            yield batch

    @property
    def epoch(self) -> int:
        """Epoch of the position, as in `state_dict()`."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; the current epoch is not restarted, so a resume stays exact."""
        self._position.set_epoch(epoch)

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """The position in the stream: a flat dict of ints and bools.

        Args:
            delivered: batches received from the DataLoader since its current iteration began. None counts all batches
                taken from this sampler: exact with `num_workers=0` and under a `StatefulDataLoader`.
        """
        return self._position.state_dict(delivered)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position.

        The number of ranks may differ if `half * world_size` is the same: the global order continues.

        Raises:
            RuntimeError: an iteration is active.
            ValueError: seed, length, shuffle, drop_last, overlap, version or half * world_size differ; both are named.
        """
        self._position.load_state_dict(state)


class OverlapBatchSampler(PlanSampler):
    """Batches of indices, each `[the new half of the batch before, in order | new samples]`, as one endless stream.

    One iteration yields one epoch, the next iteration the next. Each sample of an epoch is in exactly two consecutive
    steps, on one rank; the first batch of epoch 0 has no repeated rows. All ranks take the same number of steps with
    the same number of rows. `OverlapPlan` defines shuffling, sharding and the boundary between epochs.

    Use it with any `torch.utils.data.DataLoader(dataset, batch_sampler=...)`. **The DataLoader then loads every sample
    twice, so each image is decoded twice**; `OverlapLoader` decodes once, and so does `TwoViews`, the official scheme.

    The indices are `SampleIndex` (ints with epoch and view). `IndexedDataset` with `collate_overlap` turns them into
    `Batch` with ids and `num_old`; otherwise `num_old(epoch, step)` returns the number of repeated rows.

    A DataLoader with workers takes batches from the sampler before it delivers them, so the sampler's position is ahead
    of the training. Save `state_dict(delivered=k)` with the k batches received since the iteration began, or use
    torchdata's `StatefulDataLoader`, whose state is exact.

    Args:
        data_source_or_len: number of samples, or a dataset with a length.
        batch_size: rows of a batch on this rank: even, at least 2; half of them are new.
        shuffle: a new order each epoch; False keeps the order of the dataset.
        seed: non-negative integer; all ranks must pass the same.
        rank: rank of this process; None means that of torch.distributed, or 0 without a process group.
        world_size: number of ranks; None means that of torch.distributed, or 1 without a process group.
        drop_last: True yields full halves only; False covers every sample (see `OverlapPlan`).

    Raises:
        ValueError: an odd or too small batch size, fewer samples than one half over all ranks, a wrong rank.
        TypeError: a size that is not an integer, a sampler or a loader in place of a dataset.

    Example:
        >>> sampler = OverlapBatchSampler(6, 4, shuffle=False)
        >>> [[int(i) for i in batch] for batch in sampler]
        [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5]]
        >>> [int(i) for i in next(iter(sampler))]  # the second epoch carries the last half over
        [4, 5, 0, 1]
    """

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
        plan, rank = make_plan(
            name,
            _length(name, data_source_or_len),
            batch_size,
            overlap=True,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(plan, rank, 2 * plan.rows)

    def views(self, epoch: int, step: int) -> tuple[Ids, Ids, Ids]:
        """Repeated rows (view 1), then new rows (view 0)."""
        return self.plan.views(epoch, step, self.rank)

    def num_old(self, epoch: int, step: int) -> int:
        """Number of repeated rows of batch `step` of `epoch`."""
        return self.plan.num_old(epoch, step)


class HalfBatchSampler(OverlapBatchSampler):
    """The new half of every batch of an `OverlapBatchSampler`, for a DataLoader of `TwoViews`.

    `pair_halves(DataLoader(TwoViews(data, transform, seed=s), batch_sampler=HalfBatchSampler(data, rows, seed=s)))`
    yields the same batches as the other loaders with that seed, bit for bit, and decodes each image once.

    The arguments are those of `OverlapBatchSampler`; a batch of this sampler has `batch_size / 2` indices.

    Example:
        >>> [[int(i) for i in batch] for batch in HalfBatchSampler(6, 4, shuffle=False)]
        [[0, 1], [2, 3], [4, 5]]
    """

    def views(self, epoch: int, step: int) -> tuple[Ids, Ids, Ids]:
        """The new rows of one batch."""
        ids = self.plan.half(epoch, step, self.rank)
        return ids, np.full(len(ids), epoch), np.zeros(len(ids), np.int64)

    def num_old(self, epoch: int, step: int) -> int:
        """No row is repeated: `pair_halves` keeps the second views."""
        return 0


class ClassBatchSampler(PlanSampler):
    """Batches `[anchors | companions]`: for every anchor `companions` samples of its class, anchor by anchor.

    An epoch has every sample once as an anchor, so with M companions it trains on M + 1 times the images (count that in
    a comparison). Companions are sampled without replacement and without the anchor; with replacement if the class is
    too small; an anchor alone in its class is its own companion. They depend on (seed, epoch, anchor) only. Their views
    differ from all other views of the same sample in that epoch.

    Source: `IdentityBatchSampler` of the official BAKE code; with `companions=1, include_anchor=True` the
    `PairBatchSampler` of the official CS-KD code. (Both keep a short last batch: `drop_last=False`.)

    Args:
        targets: (N,) class of every sample.
        batch_size: rows of a batch on this rank, a multiple of `companions + 1`.
        companions: number of companions per anchor, M.
        include_anchor: whether the anchor may be its own companion.
        shuffle: as in `OverlapBatchSampler`.
        seed: as in `OverlapBatchSampler`.
        rank: as in `OverlapBatchSampler`.
        world_size: as in `OverlapBatchSampler`.
        drop_last: as in `OverlapBatchSampler`.

    Raises:
        ValueError: a batch size that does not divide, fewer samples than the anchors of one step over all ranks.

    Example:
        >>> sampler = ClassBatchSampler([0, 0, 1, 1], 4, companions=1, shuffle=False)
        >>> [[int(i) for i in batch] for batch in sampler]
        [[0, 1, 1, 0], [2, 3, 3, 2]]
    """

    def __init__(
        self,
        targets: ArrayLike | torch.Tensor,
        batch_size: int,
        *,
        companions: int = 1,
        include_anchor: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = True,
    ) -> None:
        name = "ClassBatchSampler"
        self.companions = as_int(companions, name, "companions", 1)
        self.include_anchor = as_bool(include_anchor, name, "include_anchor")
        batch_size = as_int(batch_size, name, "batch_size", 1)
        if batch_size % (self.companions + 1):
            raise ValueError(
                f"{name}: batch_size must be a multiple of companions + 1 = {self.companions + 1} "
                f"(anchors and their companions), got {batch_size}"
            )
        if not (hasattr(targets, "__array__") or isinstance(targets, Sequence)) or isinstance(targets, str):
            raise TypeError(
                f"{name}: targets must be (N,) class indices, got a {type(targets).__name__}; pass dataset.targets, or "
                "those of the indices of a torch.utils.data.Subset"
            )
        classes = np.asarray(targets)
        if classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(f"{name}: targets must be (N,) integers, got {classes.dtype} {classes.shape}")
        plan, rank = make_plan(
            name,
            len(classes),
            batch_size // (self.companions + 1),
            overlap=False,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(plan, rank, batch_size)
        order = np.argsort(classes, kind="stable")
        self._members = np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)
        self._class = np.empty(len(classes), np.int64)  # index of a sample's class in `_members`
        self._index = np.empty(len(classes), np.int64)  # index of the sample within its class
        for number, members in enumerate(self._members):
            self._class[members], self._index[members] = number, np.arange(len(members))

    def views(self, epoch: int, step: int) -> tuple[Ids, Ids, Ids]:
        """Anchors (view 0), then the companions of the first anchor, of the second, ..."""
        anchors = self.plan.half(epoch, step, self.rank)
        others = np.array([self._companions_of(epoch, anchor) for anchor in anchors.tolist()], np.int64).reshape(-1)
        # View numbers that are unique in the epoch: 2 * sample + view differs for every (anchor, companion, sample).
        number = (anchors[:, None] * self.companions + np.arange(self.companions)).reshape(-1)
        views = np.concatenate([np.zeros_like(anchors), 2 * self.plan.length * (1 + number)])
        return np.concatenate([anchors, others]), np.full(len(views), epoch), views

    def _companions_of(self, epoch: int, anchor: int) -> list[int]:
        members = self._members[self._class[anchor]]
        own, wanted = int(self._index[anchor]), self.companions
        pool = len(members) - (not self.include_anchor)
        if pool == 0:
            return [anchor] * wanted
        key = key_of(self.plan.seed, COMPANION, epoch, anchor)
        chosen: list[int] = []
        for draw in range(wanted):
            high = pool if pool < wanted else pool - wanted + 1 + draw
            pick = ((mix((key + (draw + 1) * GOLDEN) & MASK) >> 32) * high) >> 32
            # Floyd's sampling without replacement: a pick that was chosen before is replaced by the newest index.
            chosen.append(high - 1 if pool >= wanted and pick in chosen else pick)
        skip_anchor = not self.include_anchor
        return [int(members[pick + (skip_anchor and pick >= own)]) for pick in chosen]

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """As `OverlapBatchSampler.state_dict`, with `companions` and `include_anchor`."""
        own = {"companions": self.companions, "include_anchor": self.include_anchor}
        return {**super().state_dict(delivered), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; ValueError if an argument that affects the batches differs."""
        for name in ("companions", "include_anchor"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"ClassBatchSampler.load_state_dict: {name} was {state.get(name)!r} when the state was saved and "
                    f"is {getattr(self, name)!r} here; continue with the same options, or start a new run"
                )
        super().load_state_dict(state)


class ViewPairSampler(PlanSampler):
    """Batches `[n samples, first views | the same n samples, second views]`: both views in one step.

    The arguments are those of `OverlapBatchSampler`; a batch has `batch_size / 2` samples.

    Example:
        >>> sampler = ViewPairSampler(4, 4, shuffle=False)
        >>> [[(int(i), i.view) for i in batch] for batch in sampler]
        [[(0, 0), (1, 0), (0, 1), (1, 1)], [(2, 0), (3, 0), (2, 1), (3, 1)]]
    """

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
        plan, rank = make_plan(
            name,
            _length(name, data_source_or_len),
            half_of(name, batch_size),
            overlap=False,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(plan, rank, 2 * plan.rows)

    def views(self, epoch: int, step: int) -> tuple[Ids, Ids, Ids]:
        """The step's samples twice, view 0 and view 1."""
        ids = self.plan.half(epoch, step, self.rank)
        return np.tile(ids, 2), np.full(2 * len(ids), epoch), np.repeat([0, 1], len(ids))


def _length(operation: str, source: int | Sized) -> int:
    """The number of samples of a dataset, or that number itself."""
    if isinstance(source, float) or (hasattr(source, "__index__") and not getattr(source, "ndim", 0)):
        return as_int(source, operation, "data_source_or_len", 0)
    length = length_of(operation, source)
    if are_indices(source, length):
        raise TypeError(
            f"{operation}: expected a dataset or its length, got a {type(source).__name__} of {length} sample indices; "
            f"{PART}"
        )
    return length


class IndexedDataset(Dataset[tuple[Any, Any, int]]):
    """A map-style dataset whose items are `(image, target, index)`, so that every batch has the ids of its samples.

    With the indices of a sampler of this package every view is reproducible, also that of a transform which draws from
    torch's, NumPy's or Python's global random numbers, as torchvision's do: they are seeded for each item.

    Args:
        dataset: any map-style dataset of `(image, target)`, such as torchvision's; a transform of its own is applied.
        transform: a transform of one argument, such as torchvision's, gets what the dataset gives. One of two is called
            as `transform(image, rng)` with the view's `ViewRng`; it needs the indices of a sampler of this package, and
            gets PIL images as uint8 tensors (c, h, w). None leaves the images as they are.

    Raises:
        TypeError: from `dataset[i]`, for items that are no pair of an image and a class.
        ValueError: from `dataset[i]`, for an index of a sampler that was made for another number of samples.

    Example:
        >>> IndexedDataset([("image", 1)])[0]
        ('image', 1, 0)
    """

    def __init__(self, dataset: Any, transform: Callable[..., Any] | None = None) -> None:
        self.dataset = dataset
        self.transform = as_transform("IndexedDataset", transform, pillow=False)
        length_of("IndexedDataset", dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        if not isinstance(index, SampleIndex):
            if isinstance(index, (list, tuple)):
                raise TypeError(
                    "IndexedDataset: expected one index, got a list of them; pass the sampler of whole batches as "
                    "DataLoader(..., batch_sampler=...), not as sampler="
                )
            return self._item(index)
        if index.length not in (0, len(self.dataset)):
            raise ValueError(
                f"IndexedDataset: the sampler was made for {index.length} samples, this dataset has "
                f"{len(self.dataset)}; make the sampler of the same dataset, a Subset included"
            )
        with index.rng().seeded():
            return self._item(index)

    def _item(self, index: int) -> tuple[Any, Any, int]:
        image, target = pair_of("IndexedDataset", self.dataset[index])
        if isinstance(self.transform, Single):
            image = self.transform(image)
        elif self.transform is not None:
            if not isinstance(index, SampleIndex):
                raise TypeError(
                    "IndexedDataset: a transform(image, rng) needs the indices of an OverlapBatchSampler to know which "
                    f"view it makes, got a plain {type(index).__name__}; pass DataLoader(..., batch_sampler=...)"
                )
            image = self.transform(as_image(image) if is_pillow(image) else image, index.rng())
        return image, target, index


def collate_overlap(items: Sequence[tuple[Any, Any, int]]) -> Batch:
    """`collate_fn` for an `IndexedDataset` under an `OverlapBatchSampler`: one `Batch` with ids and `num_old`.

    Raises:
        TypeError: items without the indices of an `OverlapBatchSampler`, targets that are not integers.
    """
    images, targets, indices = _collated("collate_overlap", "an OverlapBatchSampler", items)
    num_old = sum(index.view for index in indices)
    return Batch(images, targets, torch.tensor(indices, device="cpu"), num_old, indices[-1].epoch, indices[-1].step)


def collate_rows(items: Sequence[tuple[Any, Any, int]]) -> Batch:
    """`collate_fn` for an `IndexedDataset` under a sampler without repeated rows: one `Batch` with num_old 0.

    Raises:
        TypeError: items without the indices of such a sampler, targets that are not integers.
    """
    images, targets, indices = _collated("collate_rows", "a ClassBatchSampler or ViewPairSampler", items)
    ids = torch.tensor([int(i) for i in indices], device="cpu")
    return Batch(images, targets, ids, 0, indices[-1].epoch, indices[-1].step)


def _collated(
    operation: str, sampler: str, items: Sequence[tuple[Any, Any, int]]
) -> tuple[torch.Tensor, torch.Tensor, list[SampleIndex]]:
    """(images, targets, indices) of `IndexedDataset` items; TypeError for other items."""
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
    if is_pillow(items[0][0]):
        raise TypeError(
            f"{operation}: expected tensors as images, got PIL images; end the dataset's transform with ToTensor(), or "
            "pass IndexedDataset a transform"
        )
    images = default_collate([item[0] for item in items])
    return images, torch.from_numpy(class_indices(operation, [item[1] for item in items])), tagged


def _described(items: Sequence[Any]) -> str:
    """The types of the first item, for messages."""
    if not len(items):
        return "none"
    first = items[0]
    kinds = [type(part).__name__ for part in first] if isinstance(first, (tuple, list)) else None
    return type(first).__name__ if kinds is None else f"({', '.join(kinds)})"
