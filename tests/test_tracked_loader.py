"""TrackedLoader, and what loaders do when frameworks announce epochs, rewind them, or start them on the wrong rank."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dlb_fast.data import (
    Batch,
    IndexedDataset,
    OverlapBatchSampler,
    ResidentLoader,
    TrackedLoader,
    collate_overlap,
    synthetic,
)

N, ROWS = 40, 8  # 10 steps an epoch
DATA = TensorDataset(torch.arange(N))


def as_is(image, rng):
    return image


def loader(workers=0, collate=None, **options):
    data = IndexedDataset(synthetic("train", length=N, num_classes=4, size=8), as_is) if collate else DATA
    sampler = OverlapBatchSampler(N, ROWS, seed=3)
    return DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=collate, **options)


def ids(batches):
    return [batch[0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_resumes_exactly_whatever_was_prefetched(workers):
    whole = TrackedLoader(loader(workers))
    want = [ids(whole) for _ in range(3)]
    for stop in (1, 4, 9, 10):
        first = TrackedLoader(loader(workers))
        for _, _batch in zip(range(stop), first, strict=False):
            pass
        state = first.state_dict()
        assert (state["epoch"], state["step"]) == divmod(stop, 10)
        second = TrackedLoader(loader(workers))
        second.load_state_dict(state)
        got = [ids(second) for _ in range(2)]
        assert (got[0] == want[0][stop:]) if stop < 10 else (got == want[1:])
        assert second.epoch == (2 if stop < 10 else 3)


AHEAD = [(0, {}), (2, {}), (2, {"prefetch_factor": 8}), (2, {"prefetch_factor": 8, "persistent_workers": True})]


@pytest.mark.parametrize("workers,options", AHEAD, ids=str)
def test_an_older_iteration_is_stale_whatever_its_workers_had_drawn(workers, options):
    tracked = TrackedLoader(loader(workers, **options))
    older = iter(tracked)
    next(older)
    tracked.set_epoch(1)
    with pytest.raises(RuntimeError, match="this iterator is stale"):
        next(older)
    assert tracked.epoch == 1


@pytest.mark.parametrize("workers,options", AHEAD, ids=str)
def test_a_loop_left_early_starts_again_whatever_was_drawn_ahead(workers, options):
    whole = TrackedLoader(loader())
    want = [ids(whole) for _ in range(2)]
    tracked = TrackedLoader(loader(workers, **options))
    for _ in range(2):
        for step, _batch in enumerate(tracked):
            assert tracked.epoch == tracked.state_dict()["epoch"] == 0
            tracked.set_epoch(0)  # the current one, whatever was drawn
            if step == 2:
                break
        assert tracked.state_dict()["step"] == 3  # what was delivered
    assert [ids(tracked) for _ in range(2)] == want
    for _batch in tracked:
        tracked.set_epoch(5)
        assert tracked.epoch == 5
        break
    held = iter(tracked)
    assert tracked.epoch == 5 and next(held)[0].tolist() == whole._sampler.indices(5, 0)
    assert next(iter(tracked))[0].tolist() == whole._sampler.indices(5, 0)  # also while the one before is held


@pytest.mark.parametrize("workers,options", AHEAD, ids=str)
def test_a_state_is_loaded_after_a_break(workers, options):
    want = ids(TrackedLoader(loader()))
    tracked = TrackedLoader(loader(workers, **options))
    for step, _batch in enumerate(tracked):
        if step == 2:
            break
    tracked.load_state_dict(tracked.state_dict())
    assert ids(tracked) == want[3:]
    held = iter(tracked)
    next(held)
    tracked.sampler.set_epoch(7)
    assert (tracked.epoch, tracked.state_dict()["step"]) == (7, 0)
    del held  # what is stale does not move the position when it ends
    assert (tracked.epoch, tracked.state_dict()["step"]) == (7, 0)


def test_a_state_is_loaded_where_a_workers_error_is_caught():
    def broken(rows):
        raise ArithmeticError("no batch")

    tracked = TrackedLoader(loader(2, collate=broken))
    with pytest.raises(ArithmeticError, match="no batch") as caught:
        next(iter(tracked))
    tracked.load_state_dict(tracked.state_dict())
    assert tracked.state_dict()["step"] == 0 and caught


def test_its_face_is_that_of_the_loaders():
    tracked = TrackedLoader(loader(collate=collate_overlap), device="cpu")
    assert (len(tracked), tracked.batch_size, tracked.plan.length, tracked.rank) == (10, ROWS, N, 0)
    assert all(isinstance(batch, Batch) for batch in tracked)
    tracked.set_epoch(5)
    assert tracked.epoch == 5 and next(iter(tracked)).epoch == 5
    tracked.close()


def test_batches_of_every_shape_are_moved():
    made = {"a": [torch.ones(2)], "b": (torch.ones(1), "x"), "c": 3}
    batch = next(iter(TrackedLoader(loader(collate=lambda rows: made), "meta")))
    assert batch["a"][0].device.type == batch["b"][0].device.type == "meta"
    assert (batch["b"][1], batch["c"]) == ("x", 3)


@pytest.mark.parametrize("wrong", [DataLoader(DATA, batch_size=4), [1, 2]], ids=["plain DataLoader", "list"])
def test_other_loaders_are_refused(wrong):
    with pytest.raises(TypeError, match=r"expected a DataLoader with batch_sampler=OverlapBatchSampler"):
        TrackedLoader(wrong)


def test_making_an_iterator_leaves_the_random_numbers_alone():
    """A resumed run makes one iterator more: dropout must not notice."""
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    tracked = TrackedLoader(loader())
    next(iter(tracked))
    assert torch.equal(torch.rand(3), want)


def test_the_seeds_of_the_workers_differ_between_epochs_and_not_between_runs():
    drawn = []
    sampler = OverlapBatchSampler(N, ROWS, seed=3)

    class Probe:
        def __iter__(self):
            drawn.append(torch.empty((), dtype=torch.int64).random_().item())
            return iter(sampler)

    for _ in range(3):
        list(sampler.track(Probe()))
    assert len(set(drawn)) == 3
    again, drawn[:] = list(drawn), []
    sampler = OverlapBatchSampler(N, ROWS, seed=3)
    for _ in range(3):
        list(sampler.track(Probe()))
    assert drawn == again


@pytest.mark.parametrize("make", [lambda: ResidentLoader(synthetic("train", length=N, num_classes=4, size=8), ROWS),
                                  lambda: TrackedLoader(loader())], ids=["resident", "tracked"])  # fmt: skip
def test_a_resume_is_not_undone_silently(make):
    first = make()
    for _ in range(2):
        list(first)
    second = make()
    second.load_state_dict(first.state_dict())
    second.set_epoch(2)
    with pytest.raises(ValueError, match=r"epoch 0 would undo the state that was just loaded \(epoch 2, step 0\)"):
        second.set_epoch(0)
    next(iter(second))
    second.set_epoch(0)  # once batches are taken it is a choice like any other
    assert second.epoch == 0


def test_an_announced_epoch_does_not_rewind_what_was_drawn_ahead():
    """Lightning makes the iterator, workers draw a short epoch to its end, then the same epoch is announced."""
    source = loader(workers=2, prefetch_factor=8)
    batches = iter(source)
    assert source.batch_sampler.epoch == 1  # all drawn, nothing delivered
    source.batch_sampler.sampler.set_epoch(0)
    assert source.batch_sampler.epoch == 1 and len(list(batches)) == 10
    source.batch_sampler.sampler.set_epoch(1)
    assert next(iter(source))[0].tolist() == source.batch_sampler.indices(1, 0)
    resident = ResidentLoader(synthetic("train", length=N, num_classes=4, size=8), ROWS)
    resident.sampler.set_epoch(4)
    assert resident.epoch == 4


def test_a_loader_made_before_the_process_group_says_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"WORLD_SIZE=2, but torch.distributed is not initialised yet"):
        OverlapBatchSampler(N, ROWS)
    OverlapBatchSampler(N, ROWS, rank=1, world_size=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    OverlapBatchSampler(N, ROWS)
