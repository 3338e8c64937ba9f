"""Batches whose rows belong together: companions of one class (BAKE, CS-KD), or two views of each sample (DDGSD).

The anchors follow an `OverlapPlan(overlap=False)`: ranks, epochs and resuming are those of `OverlapBatchSampler`, every
epoch is shuffled anew, and there is no row that repeats the batch before (`num_old` is 0).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dlb_fast.data import _hash
from dlb_fast.data.batch import Batch
from dlb_fast.data.plan import as_bool, as_int
from dlb_fast.data.sampler import OverlapBatchSampler, SampleIndex, collated

__all__ = ["ClassBatchSampler", "ViewPairSampler", "collate_rows"]

_COMPANION = 0x636F6D70616E
Ids = NDArray[np.int64]


class _RowSampler(OverlapBatchSampler, abc.ABC):
    """What the samplers of this file share: a batch is `rows(epoch, step)`, ids and views, a pure function."""

    _overlap = False

    @abc.abstractmethod
    def rows(self, epoch: int, step: int) -> tuple[Ids, Ids]:
        """(ids (n,), uses (n,)) of one batch on this rank; `use` names the view, see `view_key`."""

    def indices(self, epoch: int, step: int) -> list[int]:
        """The indices of one batch: `SampleIndex`, so that every view is reproducible."""
        ids, uses = self.rows(epoch, step)
        seed = self.plan.seed
        return [SampleIndex(i, seed, epoch, use, step) for i, use in zip(ids.tolist(), uses.tolist(), strict=True)]


class ClassBatchSampler(_RowSampler):
    """Batches `[anchors | companions]`: for every anchor `companions` samples of its class, anchor by anchor.

    An epoch visits every sample once as an anchor; with M companions it shows M + 1 times the images (count that when
    you compare). Companions are drawn without replacement and without the anchor, with replacement where the class is
    too small for that, and are the anchor itself where it is alone in its class. Which ones is a pure function of
    (seed, epoch, anchor), whatever the rank, the thread or the number of resumes; their views differ from all other
    views of the same sample in that epoch.

    Source: `IdentityBatchSampler` of the official BAKE code; with `companions=1, include_anchor=True` the
    `PairBatchSampler` of the official CS-KD code. (Both keep a short last batch: `drop_last=False`.)

    Args:
        targets: (N,) class of every sample.
        batch_size: rows the model sees on this rank, a multiple of `companions + 1`.
        companions: M, per anchor.
        include_anchor: whether the anchor may be its own companion.
        shuffle, seed, rank, world_size, drop_last: as in `OverlapBatchSampler`.

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
        classes = np.asarray(targets)
        if classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(f"{name}: targets must be (N,) integers, got {classes.dtype} {classes.shape}")
        anchors = batch_size // (self.companions + 1)
        super().__init__(
            len(classes), 2 * anchors, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last
        )
        self.batch_size = batch_size
        order = np.argsort(classes, kind="stable")
        self._members = np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)
        self._home = np.empty(len(classes), np.int64)  # class of a sample, counted 0, 1, ...
        self._place = np.empty(len(classes), np.int64)  # its place among them
        for number, members in enumerate(self._members):
            self._home[members], self._place[members] = number, np.arange(len(members))

    def rows(self, epoch: int, step: int) -> tuple[Ids, Ids]:
        """Anchors (use 0), then the companions of the first anchor, of the second, ..."""
        anchors = self.plan.half(epoch, step, self.rank)
        friends = np.array([self._companions_of(epoch, anchor) for anchor in anchors.tolist()], np.int64).reshape(-1)
        # A view that no other row of the epoch has: 2 * sample + use is then one number per (anchor, place, sample).
        number = (anchors[:, None] * self.companions + np.arange(self.companions)).reshape(-1)
        uses = 2 * self.plan.length * (1 + number)
        return np.concatenate([anchors, friends]), np.concatenate([np.zeros_like(anchors), uses])

    def _companions_of(self, epoch: int, anchor: int) -> list[int]:
        members = self._members[self._home[anchor]]
        place, wanted = int(self._place[anchor]), self.companions
        pool = len(members) - (not self.include_anchor)
        if pool == 0:
            return [anchor] * wanted
        key = _hash.key_of(self.plan.seed, _COMPANION, epoch, anchor)
        chosen: list[int] = []
        for draw in range(wanted):
            high = pool if pool < wanted else pool - wanted + 1 + draw
            pick = ((_hash.mix((key + (draw + 1) * _hash.GOLDEN) & _hash.MASK) >> 32) * high) >> 32
            # Floyd's sample: where it is taken already, the newest place is free.
            chosen.append(high - 1 if pool >= wanted and pick in chosen else pick)
        step_over = not self.include_anchor
        return [int(members[pick + (step_over and pick >= place)]) for pick in chosen]

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """As `OverlapBatchSampler.state_dict`, with what belongs to the companions."""
        own = {"companions": self.companions, "include_anchor": self.include_anchor}
        return {**super().state_dict(delivered), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; ValueError when anything that decides the batches differs."""
        for name in ("companions", "include_anchor"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"ClassBatchSampler.load_state_dict: {name} was {state.get(name)!r} when the state was saved and "
                    f"is {getattr(self, name)!r} here; continue with the same options, or start a new run"
                )
        super().load_state_dict(state)


class ViewPairSampler(_RowSampler):
    """Batches `[n samples, first views | the same n samples, second views]`: both views in one step.

    Args:
        data_source_or_len, batch_size, shuffle, seed, rank, world_size, drop_last: as in `OverlapBatchSampler`; half of
            the rows are samples.

    Example:
        >>> sampler = ViewPairSampler(4, 4, shuffle=False)
        >>> [[(int(i), i.use) for i in batch] for batch in sampler]
        [[(0, 0), (1, 0), (0, 1), (1, 1)], [(2, 0), (3, 0), (2, 1), (3, 1)]]
    """

    def rows(self, epoch: int, step: int) -> tuple[Ids, Ids]:
        """The step's samples twice, use 0 and use 1."""
        ids = self.plan.half(epoch, step, self.rank)
        return np.concatenate([ids, ids]), np.repeat(np.array([0, 1]), len(ids))


def collate_rows(items: Sequence[tuple[Any, Any, int]]) -> Batch:
    """`collate_fn` for an `IndexedDataset` under a sampler of this file: one `Batch` with num_old 0.

    Raises:
        TypeError: items without the indices of such a sampler, targets that are not integers.
    """
    images, targets, indices = collated("collate_rows", "a ClassBatchSampler or ViewPairSampler", items)
    ids = torch.tensor([int(i) for i in indices], device="cpu")
    return Batch(images, targets, ids, 0, indices[-1].epoch, indices[-1].step)
