"""`overlap=False`: plain epochs, every sample once, shuffled anew, in the views of an overlap loader's new rows."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch

from dlb_fast.data import Compose, Cutout, Flip, OverlapLoader, PadCrop, ResidentLoader, synthetic
from dlb_fast.data.loaders.ring import SlotRing
from dlb_fast.data.plan import OverlapPlan

VIEWS = Compose([PadCrop(2), Flip(), Cutout(3)])


def content(batch: Any) -> tuple[Any, ...]:
    tensors = batch.images.contiguous().numpy().tobytes(), batch.targets.tolist(), batch.ids.tolist()
    return *tensors, batch.epoch, batch.step


def data(length: int = 23) -> Any:
    return synthetic(length=length, num_classes=3, size=8)


def make(kind: Any, batch_size: int, **options: Any) -> Any:
    extra = {"num_threads": 3, "timeout": 20} if kind is OverlapLoader else {}
    return kind(data(), batch_size, **{"transform": VIEWS, **options, **extra})


def stream(loader: Any, count: int = 3) -> list[Any]:
    with loader:
        return [content(b) for _ in range(count) for b in loader]


@pytest.mark.parametrize("kind", [ResidentLoader, OverlapLoader])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 5, 11, 12, 23])
def test_the_views_of_the_new_rows_of_twice_the_batch(kind: Any, drop_last: bool, rows: int) -> None:
    options: dict[str, Any] = {"seed": 3, "drop_last": drop_last}
    views = {}
    with make(ResidentLoader, 2 * rows, **options) as overlapping:
        for batch in (batch for _ in range(3) for batch in overlapping):
            for image, sample in zip(batch.new, batch.ids[batch.num_old :].tolist(), strict=True):
                views[batch.epoch, sample] = image
    plan, shared = OverlapPlan(23, rows, overlap=False, **options), 0
    with make(kind, rows, overlap=False, **options) as plain:
        assert plain.batch_size == plain.half == rows and len(plain) == plan.steps_per_epoch
        for batch in (batch for _ in range(3) for batch in plain):
            assert batch.ids.tolist() == plan.half(batch.epoch, batch.step).tolist() and not batch.has_old
            for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
                if (batch.epoch, sample) in views:  # drop_last may leave out others there
                    assert torch.equal(image, views[batch.epoch, sample])
                    shared += 1
    assert shared > 0.9 * len(views)


@pytest.mark.parametrize("kind", [ResidentLoader, OverlapLoader])
def test_two_steps_per_epoch_are_shuffled_between_the_steps(kind: Any) -> None:
    """Only a repeated half forces the sets of the two halves."""
    with make(kind, 11, overlap=False) as plain:
        epochs = [list(plain) for _ in range(5)]
    assert len({frozenset(batches[0].ids.tolist()) for batches in epochs}) == 5


def test_a_state_knows_whether_halves_are_repeated() -> None:
    both = {"shuffle": False, "drop_last": True}
    plain, repeated = make(ResidentLoader, 4, overlap=False, **both), make(OverlapLoader, 8, **both)
    with repeated, pytest.raises(ValueError, match="overlap was False when the state was saved and is True here"):
        repeated.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="overlap was True when the state was saved and is False here"):
        plain.load_state_dict(repeated.state_dict())


def test_ranks_share_the_epoch() -> None:
    ranks = [stream(make(OverlapLoader, 4, overlap=False, rank=rank, world_size=2), 1) for rank in range(2)]
    ids = [i for batches in ranks for batch in batches for i in batch[2]]
    assert len(ids) == 16 and len(set(ids)) == 16


def test_every_stop_point_resumes() -> None:
    options = {"overlap": False, "drop_last": False}
    whole = stream(make(OverlapLoader, 5, **options))
    for stop in range(len(whole)):
        with make(OverlapLoader, 5, **options) as first:
            batches = (batch for _ in range(3) for batch in first)
            for _ in range(stop):
                next(batches)
            state = first.state_dict()
        for kind in (OverlapLoader, ResidentLoader):
            with make(kind, 5, **options) as second:
                second.load_state_dict(state)
                assert content(next(chain(second, second))) == whole[stop]  # the rest of an ended epoch is empty


def test_one_view_and_one_read_per_sample_and_epoch() -> None:
    """Nothing is made to be thrown away: that is what this mode is for."""
    seen, guard, length = Counter[tuple[int, int, int]](), threading.Lock(), 24

    def view(image: torch.Tensor, rng: Any) -> torch.Tensor:
        with guard:
            seen[rng.epoch, rng.sample, rng.view] += 1
        return image

    with OverlapLoader(data(length), 6, overlap=False, transform=view, num_threads=2) as loader:
        for _ in range(2):
            assert [len(batch) for batch in loader] == [6] * 4
        stats = loader.stats()
    assert stats.views == 48 and stats.reads <= 48 + 6 * (2 + 1)
    for epoch in range(2):
        assert all(seen[epoch, sample, 0] == 1 for sample in range(length))
    assert not any(use for _, _, use in seen)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_ring_runs_ahead_by_the_depth(depth: int) -> None:
    ring = SlotRing(OverlapPlan(20, 4, overlap=False), 0, start=3, depth=depth)
    items = []
    while ring._may_take():
        items.append(ring.take())
    assert len(items) == 4 * (depth + 1) and len(ring.slots) == depth + 1
    assert {len(item.views) for item in items if item} == {1}
    for item in items[4:]:
        assert item is not None
        ring.finish(item)
    assert ring.wait(0) is None  # its own rows are missing, whatever came after
    for item in items[:4]:
        assert item is not None
        ring.finish(item)
    slot = ring.wait(0)
    assert slot is not None and (slot.step, slot.num_old, slot.rows) == (3, 0, 4)


def test_overlap_is_a_bool_and_sizes_are_checked() -> None:
    with pytest.raises(TypeError, match="overlap must be True or False, got 'no'"):
        make(ResidentLoader, 4, overlap="no")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make(OverlapLoader, 0, overlap=False)
    with pytest.raises(ValueError, match="batch_size must be even"):
        make(ResidentLoader, 5)
