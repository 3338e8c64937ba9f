"""Class companions and view pairs: who is in a batch, on which rank, with which view, after which resume."""

from __future__ import annotations

import doctest
import io
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dlb_fast.data import (
    ClassBatchSampler,
    Compose,
    Flip,
    IndexedDataset,
    OverlapBatchSampler,
    PadCrop,
    SampledLoader,
    SampleError,
    ViewPairSampler,
    collate_rows,
)
from dlb_fast.data import sampler as samplers
from dlb_fast.data.loaders import sampled

torch.set_num_threads(1)


def classes_of(length=60, classes=5, seed=0):
    return np.random.default_rng(seed).integers(0, classes, length)


def image_set(length=40, classes=4):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (length, 3, 10, 10), generator=g, dtype=torch.uint8)
    return SimpleNamespace(images=images, targets=torch.arange(length) % classes)


def crops():
    return Compose([PadCrop(2), Flip()])


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(8, 60), classes=st.integers(1, 9), companions=st.integers(1, 4), anchors=st.integers(1, 4),
    include=st.booleans(), shuffle=st.booleans(), world=st.integers(1, 2), drop=st.booleans(), seed=st.integers(0, 5),
)  # fmt: skip
def test_every_batch_keeps_the_rules(length, classes, companions, anchors, include, shuffle, world, drop, seed):
    targets = classes_of(length, classes, seed)
    size = Counter(targets.tolist())
    visited, steps = Counter(), set()
    for rank in range(world):
        sampler = ClassBatchSampler(
            targets, anchors * (companions + 1), companions=companions, include_anchor=include, shuffle=shuffle,
            seed=seed, rank=rank, world_size=world, drop_last=drop,
        )  # fmt: skip
        batches = list(sampler)
        steps.add(len(batches))
        assert len(batches) == len(sampler)
        for batch in batches:
            n = len(batch) // (companions + 1)
            own, friends = batch[:n], batch[n:]
            visited.update(int(i) for i in own)
            assert len(friends) == n * companions
            for k, anchor in enumerate(own):
                mine = [int(i) for i in friends[k * companions : (k + 1) * companions]]
                assert all(targets[i] == targets[anchor] for i in mine)
                pool = size[targets[anchor]] - (not include)
                if pool >= companions:
                    assert len(set(mine)) == companions
                if not include and pool:
                    assert int(anchor) not in mine
            views = [(int(i), i.view) for i in batch]
            assert len(set(views)) == len(views)
    assert len(steps) == 1  # every rank takes the same number of steps
    full = length // (anchors * world) * anchors * world
    if drop:
        assert sum(visited.values()) == full and set(visited.values()) <= {1}
    else:
        assert set(visited) == set(range(length))


def test_companions_are_spread_evenly_and_change_with_the_epoch():
    targets = np.zeros(10, int)
    drawn, by_epoch = Counter(), []
    for epoch in range(300):
        sampler = ClassBatchSampler(targets, 4, companions=3, seed=1)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        friends = [int(i) for batch in batches for i in batch[1:]]
        drawn.update(friends)
        by_epoch.append({int(b[0]): tuple(map(int, b[1:])) for b in batches})
    assert sum(drawn.values()) == 300 * 30
    assert max(drawn.values()) < 1.1 * 900 and min(drawn.values()) > 0.9 * 900
    assert by_epoch[0] != by_epoch[1]


def test_companions_do_not_depend_on_the_ranks():
    """Another world size draws the same anchors over all ranks, each with the same companions."""
    targets = classes_of(48, 4)

    def pairs(world):
        found = {}
        for rank in range(world):
            sampler = ClassBatchSampler(targets, 16 // world, companions=1, seed=3, rank=rank, world_size=world)
            for batch in sampler:
                n = len(batch) // 2
                found.update({int(a): int(b) for a, b in zip(batch[:n], batch[n:], strict=True)})
        return found

    assert pairs(1) == pairs(2) == pairs(4)


def test_cs_kd_pairs_may_be_the_sample_itself():
    same = sum(
        int(a) == int(b)
        for epoch in range(40)
        for batch in _epoch(ClassBatchSampler(np.zeros(4, int), 4, companions=1, include_anchor=True), epoch)
        for a, b in zip(batch[:2], batch[2:], strict=True)
    )
    assert 0.15 < same / 160 < 0.35  # a fourth of them


def _epoch(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


SAMPLERS = {
    "class": lambda **o: ClassBatchSampler(image_set().targets, 12, companions=2, seed=5, **o),
    "views": lambda **o: ViewPairSampler(40, 8, seed=5, **o),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("stop", [0, 1, 4, 10, 13])
def test_resume_is_exact(name, stop):
    def stream(loader, count):
        found = []
        while len(found) < count:
            for batch in loader:
                found.append((batch.ids.tolist(), batch.images, batch.epoch, batch.step))
                if len(found) == count:
                    break
        return found

    make = lambda: SampledLoader(image_set(), SAMPLERS[name](), transform=crops())  # noqa: E731
    whole = stream(make(), stop + 9)
    first = make()
    stream(first, stop)
    second = make()
    second.load_state_dict(first.state_dict())
    rest = stream(second, 9)
    for a, b in zip(whole[stop:], rest, strict=True):
        assert a[0] == b[0] and a[2:] == b[2:] and torch.equal(a[1], b[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_files_resident_and_dataloader_give_the_same_batches(name):
    data = image_set()
    resident = SampledLoader(data, SAMPLERS[name](), transform=crops())
    threaded = SampledLoader(Files(data), SAMPLERS[name](), transform=crops(), num_threads=2)
    torch_loader = DataLoader(
        IndexedDataset(list(zip(data.images, data.targets.tolist(), strict=True)), crops()),
        batch_sampler=SAMPLERS[name](), collate_fn=collate_rows,
    )  # fmt: skip
    count = 0
    for a, b, c in zip(resident, threaded, torch_loader, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)
        assert torch.equal(a.ids, c.ids) and torch.equal(a.targets, c.targets) and (c.num_old, c.step) == (0, a.step)
        assert torch.equal((a.images * 255).round().to(torch.uint8), c.images)
        count += 1
    assert count == len(resident) == 10


class Files:
    """The same set as PNG bytes."""

    def __init__(self, data):
        self.images_of, self.targets = data.images, data.targets.numpy()

    def __len__(self):
        return len(self.targets)

    def read(self, index):
        stream = io.BytesIO()
        Image.fromarray(self.images_of[index].permute(1, 2, 0).numpy()).save(stream, "PNG")
        return stream.getvalue()


def test_the_two_views_of_a_sample_differ():
    batch = next(iter(SampledLoader(image_set(), ViewPairSampler(40, 20, seed=2), transform=crops())))
    assert torch.equal(batch.ids[:10], batch.ids[10:]) and batch.num_old == 0
    same = sum(torch.equal(a, b) for a, b in zip(batch.images[:10], batch.images[10:], strict=True))
    assert same <= 2


def test_a_broken_file_is_named():
    class Broken:
        targets = np.arange(4)

        def __len__(self):
            return 4

        def read(self, index):
            return b"no image"

        def path(self, index):
            return f"/data/{index}.jpg"

    loader = SampledLoader(Broken(), ViewPairSampler(4, 4, shuffle=False))
    with pytest.raises(SampleError, match=r"/data/0\.jpg"):
        next(iter(loader))


def test_misuse_is_named():
    with pytest.raises(ValueError, match="a multiple of companions \\+ 1 = 4"):
        ClassBatchSampler([0] * 20, 10, companions=3)
    with pytest.raises(ValueError, match="targets must be"):
        ClassBatchSampler([0.5] * 20, 10)
    sampler = ClassBatchSampler([0] * 20, 4, companions=1)
    with pytest.raises(ValueError, match="companions was 1"):
        ClassBatchSampler([0] * 20, 6, companions=2).load_state_dict(sampler.state_dict())
    with pytest.raises(TypeError, match="SampleIndex"):
        collate_rows([(torch.zeros(1), 0, 3)])


@pytest.mark.parametrize("module", [samplers, sampled])
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0


@pytest.mark.parametrize("make", [lambda: ViewPairSampler(16, 16), lambda: ClassBatchSampler([0] * 16, 16)])
def test_two_steps_per_epoch_are_shuffled_between_the_steps(make):
    sampler = make()
    epochs = [list(sampler) for _ in range(5)]
    first = [frozenset(int(i) for i in batches[0] if i.view == 0) for batches in epochs]
    assert len(set(first)) == 5 and {len(ids) for ids in first} == {8}


def test_states_of_overlapping_batches_are_refused():
    with pytest.raises(ValueError, match="overlap was True when the state was saved and is False here"):
        ViewPairSampler(16, 8).load_state_dict(OverlapBatchSampler(16, 8).state_dict())
