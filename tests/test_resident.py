"""ResidentLoader and EvalLoader; all tiers give the same batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dlb_fast.data import (
    ArrayDataset,
    Compose,
    Cutout,
    EvalLoader,
    Flip,
    HalfBatchSampler,
    IndexedDataset,
    OverlapBatchSampler,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    SampleError,
    TwoViews,
    ViewRng,
    collate_overlap,
    pair_halves,
    synthetic,
)

FULL = Compose([PadCrop(2), Flip(), Cutout(3)])
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def dataset(length=23):
    return synthetic(length=length, num_classes=3, size=8)


def content(batch):
    return batch.images, batch.targets, batch.ids, batch.num_old, batch.epoch, batch.step


def equal(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    assert all(equal(content(a), content(b)) for a, b in zip(first, second, strict=True))


def epochs(loader, count=2):
    return [batch for _ in range(count) for batch in loader]


def test_a_batch_is_what_it_says():
    data = dataset()
    loader = ResidentLoader(data, 8, dtype=torch.uint8, seed=2)
    before = None
    for batch in epochs(loader, 3):
        assert torch.equal(batch.targets, data.targets[batch.ids]) and batch.ids.dtype == torch.int64
        assert torch.equal(batch.images, data.images[batch.ids])
        assert batch.old._base is batch.new._base is not None  # views of one buffer
        assert torch.equal(torch.cat([batch.old, batch.new]), batch.images) and len(batch.old) == batch.num_old
        if before is None:
            assert batch.num_old == 0 and not batch.has_old
        else:
            assert torch.equal(batch.ids[: batch.num_old], before.ids[before.num_old :]) and batch.has_old
        before = batch
    assert [(b.epoch, b.step) for b in epochs(ResidentLoader(data, 8), 2)] == list(
        itertools.product(range(2), range(5))
    )
    assert len(loader) == 5 and loader.half == 4 and loader.batch_size == 8 and loader.epoch == 3


@pytest.mark.parametrize(
    "transform",
    [None, PadCrop(2), FULL, Compose([Flip(alternate=True)]), Compose([PadCrop(2), RandomResizedCrop(6), Flip()])],
    ids=repr,
)
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_sampler_in_a_dataloader_gives_the_same_batches(transform, drop_last):
    """Bit for bit, with one transform: images one at a time there, all at once here."""
    data = dataset()
    for rank in range(2):
        options = {"seed": 3, "rank": rank, "world_size": 2, "drop_last": drop_last}
        resident = ResidentLoader(data, 6, transform=transform, dtype=torch.uint8, **options)
        viewed = IndexedDataset(data, transform or (lambda image, rng: image))
        sampler = OverlapBatchSampler(data, 6, **options)
        loader = DataLoader(viewed, batch_sampler=sampler, collate_fn=collate_overlap)
        same(epochs(resident, 3), epochs(loader, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_set_on_the_gpu_gives_the_batches_of_the_cpu_without_a_synchronisation():
    data = dataset(64)
    options = {"transform": FULL, "seed": 3, "dtype": torch.uint8}
    loader = ResidentLoader(data, 16, device="cuda", **options)
    loader.make(0, 1)  # first use of the allocators
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = epochs(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same([batch.to("cpu") for batch in batches], epochs(ResidentLoader(data, 16, **options)))


def test_two_views_of_one_sample_differ_and_views_change_with_the_epoch():
    data = dataset(4)
    data.images[:] = torch.arange(64, dtype=torch.uint8).view(8, 8)
    batches = epochs(ResidentLoader(data, 4, transform=PadCrop(4), dtype=torch.uint8), 12)
    shown = {}
    for batch in batches:
        for row, sample in enumerate(batch.ids.tolist()):
            key = (
                sample,
                batch.epoch if row >= batch.num_old else (batch.epoch - (batch.step == 0)),
                row < batch.num_old,
            )
            shown[key] = batch.images[row].numpy().tobytes()
    assert len(set(shown.values())) > 0.5 * len(shown)  # 81 places for about 90 views


def test_normalisation_is_exact_to_one_rounding():
    data = dataset()
    plain = epochs(ResidentLoader(data, 8, transform=FULL, dtype=torch.uint8))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float64, 1e-6)):
        loader = ResidentLoader(data, 8, transform=FULL, mean=MEAN, std=STD, dtype=dtype)
        for raw, batch in zip(plain, epochs(loader), strict=True):
            mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
            expected = (raw.images.double() / 255 - mean) / std
            assert batch.images.dtype == dtype
            torch.testing.assert_close(batch.images.double(), expected, atol=tolerance, rtol=tolerance)
    scaled = next(iter(ResidentLoader(data, 8)))
    torch.testing.assert_close(scaled.images, data.images[scaled.ids].float() / 255)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last):
    batch = next(iter(ResidentLoader(dataset(), 8, transform=FULL, channels_last=channels_last)))
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.is_contiguous(memory_format=wanted)


def test_resume_at_every_point_of_three_epochs_twice_in_a_row():
    def make():
        return ResidentLoader(dataset(), 8, transform=FULL, seed=1, drop_last=False)

    whole = epochs(make(), 4)
    for stop in range(3 * len(make())):
        first, second, third = make(), make(), make()
        got = take(first, stop)
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == first.state_dict()
        got += take(second, 1)
        third.load_state_dict(second.state_dict())
        same(got + take(third, len(whole) - stop - 1), whole)


def take(loader, count):
    return list(itertools.islice(itertools.chain.from_iterable(iter(loader) for _ in itertools.count()), count))


def test_state_is_the_samplers_too():
    data = dataset()
    sampler = OverlapBatchSampler(data, 8, seed=4)
    next(iter(sampler))
    loader = ResidentLoader(data, 8, seed=4)
    loader.load_state_dict(sampler.state_dict())
    assert next(iter(loader)).step == 1


def test_loading_while_iterating_and_mismatches_raise():
    loader = ResidentLoader(dataset(), 8)
    state = loader.state_dict()
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(RuntimeError, match="an iteration is active at epoch 0, step 1"):
        loader.load_state_dict(state)
    iterator.close()
    with pytest.raises(ValueError, match="seed was 7 when the state was saved and is 0 here"):
        loader.load_state_dict({**state, "seed": 7})
    loader.load_state_dict(state)
    loader.set_epoch(2)
    assert next(iter(loader)).epoch == 2


def test_the_set_of_all_ranks_is_that_of_one_rank_with_the_same_views():
    data = dataset(48)
    one = epochs(ResidentLoader(data, 16, transform=FULL, rank=0, world_size=1))
    parts = [epochs(ResidentLoader(data, 4, transform=FULL, rank=rank, world_size=4)) for rank in range(4)]
    for whole, *shares in zip(one, *parts, strict=True):
        assert torch.equal(whole.new, torch.cat([share.new for share in shares]))
        assert torch.equal(whole.old, torch.cat([share.old for share in shares]))
        assert torch.equal(whole.ids[whole.num_old :], torch.cat([share.ids[share.num_old :] for share in shares]))


def test_a_yielded_batch_belongs_to_the_receiver():
    loader = ResidentLoader(dataset(), 8, transform=FULL)
    first = next(iter(loader))
    copy = first.images.clone()
    first.images.zero_()
    again = next(iter(loader))
    assert torch.equal(again.images, copy)


def test_any_callable_is_a_transform():
    class Marks:
        def __call__(self, image, rng):
            return torch.full_like(image, rng.integer(256))

    batch = next(iter(ResidentLoader(dataset(), 8, transform=Compose([PadCrop(1), Marks()]), dtype=torch.uint8)))
    for row, sample in enumerate(batch.ids.tolist()):
        rng = ViewRng(0, 0, sample, 0)
        rng.skip(2)  # PadCrop's
        assert int(batch.images[row].unique()) == rng.integer(256)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ResidentLoader([1, 2], 2), TypeError, "list has not both; use OverlapLoader for files"),
        (lambda: ResidentLoader(dataset(), 5), ValueError, "ResidentLoader: batch_size must be even"),
        (lambda: ResidentLoader(dataset(), 60), ValueError, r"30 \* 1 = 30 samples, got 23"),
        (lambda: ResidentLoader(dataset(), 4, world_size=2), ValueError, "needs rank as well"),
        (lambda: ResidentLoader(dataset(), 4, mean=(0.5,), std=None), ValueError, "both or neither"),
        (lambda: ResidentLoader(dataset(), 4, mean=(0.5,), std=(1.0,)), ValueError, "1 channels, the images have 3"),
    ],
)
def test_bad_arguments(make, error, match):
    with pytest.raises(error, match=match):
        next(iter(make()))


def test_images_that_are_not_uint8_or_do_not_match():
    data = dataset()
    data.images = data.images.float()
    with pytest.raises(TypeError, match=r"must be uint8 .* got torch.float32"):
        ResidentLoader(data, 4)
    data = dataset()
    data.targets = data.targets[:5]
    with pytest.raises(ValueError, match=r"must have shape \(23,\) like the images, got \(5,\)"):
        ResidentLoader(data, 4)
    data = dataset()
    data.targets = data.targets + 0.5
    with pytest.raises(TypeError, match=r"targets must be integer class labels, got float32"):
        ResidentLoader(data, 4)


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_sample_exactly_once(world_size):
    data = dataset(22)
    shares = [list(EvalLoader(data, 4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    ids = torch.cat([batch.ids for share in shares for batch in share])
    assert ids.tolist() == list(range(22))
    for rank, share in enumerate(shares):
        assert len(share) == len(EvalLoader(data, 4, rank=rank, world_size=world_size))
        assert all(not batch.has_old for batch in share)
        assert [batch.step for batch in share] == list(range(len(share)))
    images = torch.cat([batch.images for share in shares for batch in share])
    torch.testing.assert_close(images, data.images.float() / 255)


def test_evaluation_of_any_map_style_dataset_equals_that_of_a_resident_one():
    data = dataset(22)
    items = [(data.images[i], int(data.targets[i])) for i in range(22)]
    loader = EvalLoader(items, 4, mean=MEAN, std=STD, num_threads=2)
    same(loader, EvalLoader(data, 4, mean=MEAN, std=STD))
    same(loader, loader)
    same(EvalLoader(data, 4, transform=lambda image, rng: image, mean=MEAN, std=STD), loader)


def test_evaluation_names_what_it_cannot_read_and_leaves_no_thread_behind():
    import threading

    class Broken:
        targets = [0] * 6

        def __len__(self):
            return 6

        def read(self, index):
            raise OSError("no such disk")

        def path(self, index):
            return f"pictures/{index}.jpg"

    before = threading.active_count()
    with pytest.raises(SampleError, match=r"sample 0 .*pictures/0\.jpg: OSError: no such disk"):
        list(EvalLoader(Broken(), 4))
    items = [(torch.zeros(1, 4 + (i == 2), 4, dtype=torch.uint8), 0) for i in range(4)]
    with pytest.raises(ValueError, match=r"sample 2 has shape \(1, 5, 4\) .*, sample 0 of its batch has \(1, 4, 4\)"):
        list(EvalLoader(items, 4))
    iterator = iter(EvalLoader([(torch.zeros(1, 4, 4, dtype=torch.uint8), 0)] * 40, 4))
    next(iterator)
    iterator.close()
    assert threading.active_count() == before


# The official scheme


@pytest.mark.parametrize("workers", [0, 2])
def test_pair_halves_is_the_official_scheme(workers):
    data = dataset(22)
    viewed = TwoViews(data, Compose([PadCrop(2), Flip()]), seed=5)
    loader = DataLoader(viewed, batch_size=4, drop_last=False, num_workers=workers)
    paired = pair_halves(loader)
    before: list[int] = []
    for epoch in range(2):
        viewed.set_epoch(epoch)
        for step, batch in enumerate(paired):
            assert (batch.epoch, batch.step) == (epoch, step)
            ids = batch.ids.tolist()
            assert ids[: batch.num_old] == before and batch.images.dtype == torch.uint8
            before = ids[batch.num_old :]
            for row, sample in enumerate(ids):
                old = row < batch.num_old
                rng = ViewRng(5, epoch - (old and step == 0), sample, int(old))
                assert torch.equal(batch.images[row], viewed.transform(data.images[sample], rng))
                assert int(batch.targets[row]) == int(data.targets[sample])
    assert len(paired) == 6 and before == [20, 21]
    paired.reset()
    assert next(iter(paired)).num_old == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop_last", [True, False])
def test_pair_halves_over_the_same_plan_gives_the_sampler_s_batches(dtype, drop_last):
    """New halves in the plan's order, as SampleIndex: then the held views are those of every other tier."""
    data, options = dataset(23), {"seed": 6, "drop_last": drop_last}
    viewed = TwoViews(data, FULL, seed=6)
    halves = HalfBatchSampler(data, 8, **options)
    paired = pair_halves(DataLoader(viewed, batch_sampler=halves), dtype=dtype)
    expected = epochs(ResidentLoader(data, 8, transform=FULL, dtype=dtype, **options), 3)
    for got, batch in zip(epochs(paired, 3), expected, strict=True):
        assert torch.equal(got.images, batch.images) and torch.equal(got.ids, batch.ids)
        assert torch.equal(got.targets, batch.targets) and got.images.dtype == dtype
        assert (got.num_old, got.epoch, got.step) == (batch.num_old, batch.epoch, batch.step)
    assert halves.num_old(1, 0) == 0 and len(halves) == len(expected) // 3
    with pytest.raises(ValueError, match="HalfBatchSampler: batch_size must be even"):
        HalfBatchSampler(data, 5)


def test_two_views_take_any_transform_without_a_seed_and_scale_on_request():
    viewed = TwoViews(dataset(8), lambda image: image)
    batch = next(iter(pair_halves(DataLoader(viewed, batch_size=4), dtype=torch.float32)))
    torch.testing.assert_close(batch.images, dataset(8).images[:4].float() / 255)
    rows = dataset().images[:2, 0, 0]
    flat = [(rows, rows, torch.zeros(2), torch.arange(2))]
    with pytest.raises(ValueError, match=r"pair_halves: views must be \(h, c, H, W\) to be scaled, got \(2, 8\)"):
        next(iter(pair_halves(flat, dtype=torch.float32)))
    with pytest.raises(TypeError, match="dtype: expected a torch.dtype"):
        pair_halves(flat, dtype=float)


def test_array_dataset_checks_itself():
    images = np.zeros((3, 1, 2, 2), np.uint8)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 2\), got 0 to 2"):
        ArrayDataset(images, [0, 1, 2], ["a", "b"])
    with pytest.raises(ValueError, match="3 images need as many targets"):
        ArrayDataset(images, [0, 1], ["a", "b"])
    with pytest.raises(TypeError, match="images must be uint8"):
        ArrayDataset(images.astype(np.float32), [0, 1, 1], ["a", "b"])
