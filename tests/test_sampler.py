"""OverlapBatchSampler: the stream, its state, its ranks, and its life inside DataLoaders."""

from __future__ import annotations

import gc
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dlb_fast.data import (
    Batch,
    ClassBatchSampler,
    EvalLoader,
    HalfBatchSampler,
    IndexedDataset,
    MapDataset,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    SampledLoader,
    TwoViews,
    ViewPairSampler,
    collate_overlap,
    collate_rows,
    load_into_memory,
    synthetic,
)
from dlb_fast.data.position import StreamPosition

EPOCHS = 3


def configurations():
    for half, world, drop_last in itertools.product((1, 2, 3), (1, 2, 3), (True, False)):
        rows = half * world
        for length in sorted({rows, rows + 1, 2 * rows, 2 * rows + 1, 3 * rows - 1, 3 * rows, 4 * rows + 1}):
            yield {"length": length, "half": half, "world_size": world, "drop_last": drop_last}


def make(config, rank=0, **changes):
    options = {"seed": 5, **config, **changes}
    length, half = options.pop("length"), options.pop("half")
    return OverlapBatchSampler(length, 2 * half, rank=rank, **options)


def plain(batches):
    return [[int(i) for i in batch] for batch in batches]


def tagged(batch):
    return [(int(i), i.epoch, i.view, i.step, i.seed) for i in batch]


def stream(sampler, epochs=EPOCHS):
    return [tagged(batch) for _ in range(epochs) for batch in sampler]


def test_every_batch_is_the_old_half_in_order_and_a_new_half():
    for config in configurations():
        for rank in range(config["world_size"]):
            sampler = make(config, rank)
            before: list[int] = []
            for epoch in range(EPOCHS):
                batches = list(sampler)
                assert len(batches) == len(sampler)
                for step, batch in enumerate(batches):
                    num_old = sampler.num_old(epoch, step)
                    assert num_old == len(before)
                    assert plain([batch])[0][:num_old] == before
                    assert [i.view for i in batch] == [1] * num_old + [0] * (len(batch) - num_old)
                    assert {i.epoch for i in batch[num_old:]} == {epoch}
                    before = plain([batch])[0][num_old:]
                    assert before


def test_each_sample_is_used_exactly_twice_in_two_consecutive_steps_on_one_rank():
    for config in configurations():
        steps = len(make(config))
        uses = defaultdict(list)  # (epoch drawn, sample) -> [(rank, step of the stream, use)]
        for rank in range(config["world_size"]):
            for at, batch in enumerate(stream(make(config, rank))):
                for sample, epoch, use, _, _ in batch:
                    uses[epoch, sample].append((rank, at, use))
        for (epoch, sample), seen in uses.items():
            for rank, first in {(r, s) for r, s, use in seen if use == 0}:
                again = [(r, s) for r, s, use in seen if use == 1 and r == rank]
                if first == EPOCHS * steps - 1:
                    assert again == [], (config, sample)  # the stream was cut here
                else:
                    assert again == [(rank, first + 1)], (config, epoch, sample)
        for epoch in range(EPOCHS):
            drawn = {sample for e, sample in uses if e == epoch}
            rows = config["half"] * config["world_size"]
            assert len(drawn) == (config["length"] // rows * rows if config["drop_last"] else config["length"])


def test_all_ranks_take_the_same_steps_and_rows():
    for config in configurations():
        shapes = {
            tuple(len(batch) for _ in range(EPOCHS) for batch in sampler)
            for sampler in (make(config, rank) for rank in range(config["world_size"]))
        }
        assert len(shapes) == 1


def take(sampler, count):
    """The next `count` batches of the endless stream; the last epoch is left early."""
    endless = itertools.chain.from_iterable(iter(sampler) for _ in itertools.count())
    return [tagged(batch) for batch in itertools.islice(endless, count)]


def test_resume_at_every_point_of_three_epochs_twice_in_a_row():
    for config in configurations():
        steps = len(make(config))
        whole = stream(make(config), EPOCHS + 1)
        for stop in range(EPOCHS * steps):
            first, second, third = make(config), make(config), make(config)
            got = take(first, stop)
            state = json.loads(json.dumps(first.state_dict()))
            second.load_state_dict(state)
            assert second.state_dict() == state  # saving without a step is the identity
            got += take(second, 1)
            third.load_state_dict(second.state_dict())
            got += take(third, len(whole) - stop - 1)
            assert got == whole, (config, stop)


def test_a_state_after_an_epochs_last_batch_has_nothing_left_of_that_epoch():
    sampler = OverlapBatchSampler(10, 4)
    iterator = iter(sampler)
    for _ in range(5):
        last = next(iterator)
    state = sampler.state_dict()  # the iterator has not raised StopIteration yet
    assert (state["epoch"], state["step"], sampler.epoch) == (0, 5, 0)
    assert list(iterator) == []
    ended = sampler.state_dict()
    assert (ended["epoch"], ended["step"], sampler.epoch) == (1, 0, 1)
    for called in ([], [0]):  # a loop may call set_epoch with the epoch of the state
        resumed = OverlapBatchSampler(10, 4)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state and resumed.epoch == 0
        for epoch in called:
            resumed.set_epoch(epoch)
        assert list(resumed) == [] and resumed.state_dict() == ended
        batches = list(resumed)
        assert len(batches) == 5 and plain(batches)[0][:2] == plain([last])[0][2:]
    for first in (ended, state):
        resumed = OverlapBatchSampler(10, 4)
        resumed.load_state_dict(first)
        resumed.set_epoch(1)
        assert plain(resumed) == plain(batches)


def test_state_is_constant_size_and_flat():
    sampler = OverlapBatchSampler(100_000, 64, seed=9, rank=1, world_size=2, drop_last=False)
    next(iter(sampler))
    assert sampler.state_dict() == {
        "version": 1,
        "seed": 9,
        "epoch": 0,
        "step": 1,
        "length": 100_000,
        "half": 32,
        "world_size": 2,
        "shuffle": True,
        "drop_last": False,
        "overlap": True,
    }


def test_another_world_size_continues_the_same_global_order():
    def global_order(world, half, state, count):
        samplers = [OverlapBatchSampler(50, 2 * half, seed=1, rank=r, world_size=world) for r in range(world)]
        for sampler in samplers:
            if state:
                sampler.load_state_dict(state)
        steps = zip(*(itertools.islice(itertools.chain(s, s), count) for s in samplers), strict=True)
        new = [[int(i) for batch in batches for i in batch if i.view == 0] for batches in steps]
        return new, samplers[0].state_dict()

    whole, _ = global_order(1, 8, None, 11)
    head, state = global_order(4, 2, None, 5)
    middle, state = global_order(2, 4, state, 3)
    tail, _ = global_order(8, 1, state, 3)
    assert head + middle + tail == whole


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 6}, "seed was 5 when the state was saved and is 6"),
        ({"length": 21}, "length was 20 .* is 21"),
        ({"shuffle": False}, "shuffle was True .* is False"),
        ({"drop_last": False}, "drop_last was True .* is False"),
        ({"half": 3}, r"half \* world_size was 2 \* 1 = 2 .* is 3 \* 1 = 3"),
        ({"world_size": 2}, r"half \* world_size was 2 \* 1 = 2 .* is 2 \* 2 = 4"),
    ],
)
def test_a_mismatch_names_both_values_and_changes_nothing(changes, match):
    config = {"length": 20, "half": 2}
    state = make(config).state_dict()
    other = make(config, **changes)
    next(iter(other))
    before = other.state_dict()
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(state)
    assert other.state_dict() == before


def test_damaged_states():
    sampler = OverlapBatchSampler(20, 4)
    good = sampler.state_dict()
    with pytest.raises(TypeError, match="expected the dict"):
        sampler.load_state_dict([1])
    with pytest.raises(ValueError, match=r"lacks \['seed', 'step'\]"):
        sampler.load_state_dict({k: v for k, v in good.items() if k not in ("seed", "step")})
    with pytest.raises(ValueError, match="version 99 was saved, this release reads version 1"):
        sampler.load_state_dict({**good, "version": 99})
    with pytest.raises(ValueError, match="step 11 is beyond the 10 steps"):
        sampler.load_state_dict({**good, "step": 11})
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        sampler.load_state_dict({**good, "epoch": -1})
    with pytest.raises(TypeError, match=r"step must be an integer, got 1\.5"):
        sampler.load_state_dict({**good, "step": 1.5})


def test_loading_raises_while_an_iteration_is_active_only():
    sampler = OverlapBatchSampler(20, 4)
    state = sampler.state_dict()
    iterator = iter(sampler)
    sampler.load_state_dict(state)  # nothing drawn yet
    next(iterator)
    with pytest.raises(RuntimeError, match="an iteration is active at epoch 0, step 1"):
        sampler.load_state_dict(state)
    list(iterator)
    sampler.load_state_dict(state)  # exhausted
    for _ in sampler:
        break
    gc.collect()
    sampler.load_state_dict(state)  # left and gone
    assert sampler.state_dict() == state


def test_an_iteration_left_early_starts_again_where_it_began():
    sampler, fresh = OverlapBatchSampler(20, 4), OverlapBatchSampler(20, 4)
    next(iter(sampler))
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["step"]) == (
        0,
        1,
    )  # what was delivered
    assert stream(sampler) == stream(fresh)
    state = {**fresh.state_dict(), "epoch": 1, "step": 4}
    sampler.load_state_dict(state)
    first = plain([next(iter(sampler))])
    assert plain(sampler)[:1] == first and sampler.epoch == 2


@pytest.mark.parametrize("kind", ["sampler", "resident", "overlap", "sampled", "dataloader"])
def test_the_second_time_that_an_epoch_starts_over_is_warned_of(kind):
    data = synthetic(length=40, num_classes=2, size=4)
    made = {
        "sampler": lambda: OverlapBatchSampler(40, 8),
        "resident": lambda: ResidentLoader(data, 8),
        "overlap": lambda: OverlapLoader(data, 8, num_threads=1),
        "sampled": lambda: SampledLoader(data, ViewPairSampler(40, 8)),
        "dataloader": lambda: DataLoader(list(range(40)), batch_sampler=OverlapBatchSampler(40, 8)),
    }[kind]()
    for _ in range(3):
        list(made)  # whole epochs

    def part(epoch=None):
        if epoch is not None:
            made.set_epoch(epoch)
        for number, _ in enumerate(made):
            if number == 2:
                break
        gc.collect()

    part()
    part()
    with pytest.warns(
        UserWarning, match="epoch 3 starts over at step 0 for the second time, .* left after step 3 of 10"
    ):
        part()
    part()  # once is enough
    list(made)
    if kind != "dataloader":
        for epoch in (5, 6, 7, 8):  # what the warning asks for
            part(epoch)


WORKERS = [{"num_workers": 1}, {"num_workers": 2, "snapshot_every_n_steps": 4}]


@pytest.mark.parametrize("options", [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in WORKERS)])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_dataloader_continues_as_with_torchs_own_samplers(options):
    """Batches left of the epoch and in the next one, for a state saved after `stop` batches, or after the loop."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader(ours):
        how = {"batch_sampler": OverlapBatchSampler(20, 8)} if ours else {"batch_size": 4, "shuffle": True}
        return torchdata.StatefulDataLoader(TensorDataset(torch.arange(20)), **how, **options)

    def left(ours, stop):
        first = loader(ours)
        iterator = iter(first)
        for _ in range(min(stop, 5)):
            next(iterator)
        if stop > 5:
            assert list(iterator) == []
        second = loader(ours)
        second.load_state_dict(first.state_dict())
        return len(list(second)), len(list(second))

    for stop in (4, 5, 6):
        assert left(True, stop) == left(False, stop) == {4: (1, 5), 5: (0, 5), 6: (5, 5)}[stop]


def test_looking_at_the_next_place_does_not_deliver_it():
    position = StreamPosition(OverlapBatchSampler(20, 4).plan, "test")
    iteration = position.iterate()
    assert iteration.peek() == iteration.peek() == (0, 0) and position.step == 0
    iteration.advance()
    assert position.step == 1
    again = position.iterate()
    assert again.peek() == (0, 0) and position.step == 0  # the one before was left early


def test_a_stale_iterator_raises():
    sampler = OverlapBatchSampler(20, 4)
    old = iter(sampler)
    next(old)
    newer = iter(sampler)
    next(newer)
    with pytest.raises(RuntimeError, match="stale"):
        next(old)
    sampler.set_epoch(3)
    with pytest.raises(RuntimeError, match="stale"):
        next(newer)


def test_set_epoch():
    sampler, walked = OverlapBatchSampler(20, 4), OverlapBatchSampler(20, 4)
    whole = [plain(walked) for _ in range(4)]
    sampler.set_epoch(2)
    assert plain(sampler) == whole[2] and sampler.epoch == 3
    sampler.set_epoch(3)
    assert plain(sampler) == whole[3]
    sampler.set_epoch(0)
    assert plain(sampler) == whole[0]
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 2, "step": 6})
    sampler.set_epoch(2)  # what a training loop calls after a resume
    assert plain(sampler) == whole[2][6:]
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(TypeError, match="epoch must be an integer"):
        sampler.set_epoch("1")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((10, 3), {}, ValueError, "batch_size must be even .* got 3; use 2 or 4"),
        ((10, 0), {}, ValueError, "batch_size must be at least 2, got 0"),
        ((10, -4), {}, ValueError, "batch_size must be at least 2, got -4"),
        ((10, 4.0), {}, TypeError, "batch_size must be an integer, got 4.0"),
        ((10, True), {}, TypeError, "batch_size must be an integer, got True"),
        ((10, "4"), {}, TypeError, "batch_size must be an integer, got '4'"),
        ((3, 8), {}, ValueError, r"4 \* 1 = 4 samples, got 3"),
        (([], 4), {}, ValueError, "samples, got 0"),
        ((2.5, 4), {}, TypeError, "data_source_or_len must be an integer, got 2.5"),
        ((10, 4), {"world_size": 2}, ValueError, "world_size=2 needs rank as well"),
        (
            (10, 4),
            {"world_size": 2, "rank": 2},
            ValueError,
            "rank must be below world_size = 2, got 2",
        ),
        ((10, 4), {"rank": 1}, ValueError, "rank must be below world_size = 1, got 1"),
        ((10, 4), {"rank": -1}, ValueError, "rank must be at least 0"),
        ((10, 4), {"seed": 1.5}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_arguments(arguments, options, error, match):
    with pytest.raises(error, match=match):
        OverlapBatchSampler(*arguments, **options)


def test_ranks_come_from_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    assert plain(OverlapBatchSampler(18, 4)) == plain(OverlapBatchSampler(18, 4, rank=2, world_size=3))
    assert plain(OverlapBatchSampler(18, 4, rank=0, world_size=1)) != plain(OverlapBatchSampler(18, 4))


def dataset(length=22):
    return IndexedDataset(TensorDataset(torch.arange(length) * 10, torch.arange(length) % 3))


def seen(batch):
    assert isinstance(batch, Batch) and torch.equal(batch.images, batch.ids * 10)
    assert torch.equal(batch.targets, batch.ids % 3)
    return batch.ids.tolist(), batch.num_old, batch.epoch, batch.step


def expected(batch):
    new = [b for b in batch if b[2] == 0]
    return [b[0] for b in batch], len(batch) - len(new), new[0][1], new[0][3]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_dataloader_with_the_state_after_what_was_delivered(workers):
    whole = [expected(b) for b in stream(OverlapBatchSampler(22, 4, drop_last=False, seed=1))]

    def loader(sampler):
        return DataLoader(dataset(), batch_sampler=sampler, num_workers=workers, collate_fn=collate_overlap)

    for stop in (0, 1, 10, 11):
        sampler = OverlapBatchSampler(22, 4, drop_last=False, seed=1)
        got = [seen(b) for b in itertools.islice(loader(sampler), stop)]
        resumed = OverlapBatchSampler(22, 4, drop_last=False, seed=1)
        resumed.load_state_dict(sampler.state_dict(delivered=stop))
        batches = loader(resumed)
        while len(got) < 2 * 11:
            got += [seen(b) for b in batches]
        assert got == whole[:22], stop


def test_delivered_beyond_what_was_drawn():
    sampler = OverlapBatchSampler(20, 4)
    next(iter(sampler))
    with pytest.raises(ValueError, match="delivered must be at most 1, .* got 2"):
        sampler.state_dict(delivered=2)
    with pytest.raises(ValueError, match="delivered must be at least 0, got -1"):
        sampler.state_dict(delivered=-1)
    list(sampler)
    states = [sampler.state_dict(delivered=k) for k in (0, 1, 9, 10)]
    assert [(state["epoch"], state["step"]) for state in states] == [(0, 0), (0, 1), (0, 9), (1, 0)]
    iterator = iter(sampler)
    for _ in range(10):
        next(iterator)
    assert sampler.state_dict(delivered=10)["step"] == 10  # the iteration has not ended


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own, with new torch
def test_torchdatas_stateful_dataloader_resumes_exactly_at_every_stop(workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    whole = [expected(b) for b in stream(OverlapBatchSampler(10, 4, drop_last=False, seed=1), 6)]
    assert len(whole) == 6 * 5

    def loader():
        return torchdata.StatefulDataLoader(
            dataset(10),
            batch_sampler=OverlapBatchSampler(10, 4, drop_last=False, seed=1),
            num_workers=workers,
            collate_fn=collate_overlap,
        )

    # Epochs end at 5 and 10. Two processes for each loader cost a second.
    for stop in range(1, 12) if workers == 0 else (1, 4, 5, 6, 10):
        first = loader()
        got = [seen(b) for b in itertools.islice(itertools.chain(first, first, first), stop)]
        state = json.loads(json.dumps(first.state_dict(), default=repr)) if workers == 0 else first.state_dict()
        second = loader()
        second.load_state_dict(state)
        for _ in range(3):
            got += [seen(b) for b in second]
        assert got == whole[: len(got)] and len(got) > 10, stop


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdatas_stateful_dataloader_with_companions():
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    targets = [i % 3 for i in range(12)]

    def loader():
        sampler = ClassBatchSampler(targets, 6, companions=2, seed=2)
        return torchdata.StatefulDataLoader(dataset(12), batch_sampler=sampler, collate_fn=collate_rows)

    whole = [b.ids.tolist() for b in loader()]
    first = loader()
    head = [b.ids.tolist() for b in itertools.islice(first, 2)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert head + [b.ids.tolist() for b in second] == whole and len(whole) == 6


class Stream(IterableDataset):
    """A stream with a length, as many have."""

    def __len__(self):
        return 100

    def __iter__(self):
        return iter(range(100))


INDICES = range(500, 600)
NO_DATASET = {
    "random": (SubsetRandomSampler(INDICES), "got a SubsetRandomSampler, .*Subset"),
    "sequential": (SequentialSampler(INDICES), "got a SequentialSampler, .*Subset"),
    "weighted": (WeightedRandomSampler([1.0] * 9, 100), "got a WeightedRandomSampler, .*Subset"),
    "batch": (BatchSampler(SequentialSampler(INDICES), 4, False), "got a BatchSampler, .*Subset"),
    "overlap": (OverlapBatchSampler(100, 4), "got a OverlapBatchSampler, .*Subset"),
    "dataloader": (DataLoader(list(range(100))), "got a DataLoader, .*Subset"),
    "resident": (ResidentLoader(synthetic(length=40, size=4), 8), "got a ResidentLoader, .*Subset"),
    "set": (set(INDICES), "got a set, .*Subset"),
    "generator": ((i for i in INDICES), "got a generator, .*Subset"),
    "stream": (Stream(), "Stream is an IterableDataset"),
    "splits": (
        {"train": [0] * 50, "test": [0] * 9},
        "got a dict with the keys 'train', 'test'; pass one of its values",
    ),
    "path": ("/data/train", "got the str '/data/train'; open it first"),
    "folder": (Path("/data/train"), "got the PosixPath .*; open it first"),
}
TAKERS = {
    "OverlapBatchSampler": lambda data: OverlapBatchSampler(data, 8),
    "HalfBatchSampler": lambda data: HalfBatchSampler(data, 8),
    "ViewPairSampler": lambda data: ViewPairSampler(data, 8),
    "OverlapLoader": lambda data: OverlapLoader(data, 8, load=lambda d, i: d[i]),
    "ResidentLoader": lambda data: ResidentLoader(data, 8),
    "SampledLoader": lambda data: SampledLoader(data, ViewPairSampler(100, 8)),
    "EvalLoader": lambda data: EvalLoader(data, 8),
    "TwoViews": lambda data: TwoViews(data, lambda image: image),
    "IndexedDataset": IndexedDataset,
    "MapDataset": MapDataset,
    "load_into_memory": load_into_memory,
}


@pytest.mark.parametrize("wrong", NO_DATASET)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_has_a_length_but_is_no_dataset_is_refused(taker, wrong):
    data, match = NO_DATASET[wrong]
    with pytest.raises(TypeError, match=f"^{taker}: .*{match}"):
        TAKERS[taker](data)


@pytest.mark.parametrize("kind", [list, tuple, range, np.array, torch.tensor])
def test_indices_into_a_larger_dataset_are_no_dataset(kind):
    indices = INDICES if kind is range else kind(list(INDICES))
    with pytest.raises(TypeError, match=r"of 100 sample indices; pass the dataset, or torch.utils.data.Subset\("):
        OverlapBatchSampler(indices, 8)
    with pytest.raises(
        TypeError, match="ClassBatchSampler: targets must be .* got a SubsetRandomSampler; pass dataset"
    ):
        ClassBatchSampler(SubsetRandomSampler(INDICES), 8)
    with pytest.raises(TypeError, match="SampledLoader: sampler must be a ClassBatchSampler or .* SequentialSampler"):
        SampledLoader(synthetic(length=40, size=4), SequentialSampler(INDICES))
    for whole in (Subset(list(range(900)), INDICES), list(range(100)), [i % 3 for i in INDICES], ["a.jpg"] * 100):
        assert OverlapBatchSampler(whole, 8).plan.length == 100
    for length in (np.int64(100), torch.tensor(100)):
        assert OverlapBatchSampler(length, 8).plan.length == 100


def test_without_drop_last_a_set_may_be_smaller_than_half_a_batch():
    assert stream(OverlapBatchSampler(3, 8, drop_last=False, shuffle=False), 2) == [
        [(i, 0, 0, 0, 0) for i in range(3)],
        [(i, 0, 1, 0, 0) for i in range(3)] + [(i, 1, 0, 0, 0) for i in range(3)],
    ]


def test_a_set_smaller_than_half_a_batch_is_one_short_batch_in_every_loader():
    data = synthetic(length=3, num_classes=2, size=4)
    for make in (ResidentLoader, OverlapLoader):
        with make(data, 8, drop_last=False) as loader:
            batches = [batch for _ in range(2) for batch in loader]
        assert [(len(batch), batch.num_old) for batch in batches] == [(3, 0), (6, 3)]
        assert sorted(batches[0].ids.tolist()) == [0, 1, 2]
        with pytest.raises(ValueError, match="4 samples, got 3; use a smaller .* or drop_last=False"):
            make(data, 8)


def test_transform_and_collate_refuse_plain_indices():
    items = TensorDataset(torch.arange(4), torch.arange(4))
    with pytest.raises(TypeError, match="needs the indices of an OverlapBatchSampler"):
        IndexedDataset(items, transform=lambda image, rng: image)[0]
    with pytest.raises(TypeError, match="expected items"):
        collate_overlap([IndexedDataset(items)[0]])
