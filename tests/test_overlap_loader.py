"""The threaded loader: the same batches whatever the threads, tier, rank count, interruption; pixels that stay."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from builders import wait_for
from torch.utils.data import DataLoader

from dlb_fast.data.batch import Batch
from dlb_fast.data.loaders.overlap import OverlapLoader
from dlb_fast.data.rng import ViewRng
from dlb_fast.data.sampler import IndexedDataset, OverlapBatchSampler, collate_overlap


class Images:
    """N random uint8 images with targets, as `images`/`targets` and as a map-style dataset; counts its reads."""

    def __init__(self, length: int = 23, size: int = 12, channels: int = 3) -> None:
        generator = torch.Generator().manual_seed(length)
        self.images = torch.randint(
            0, 256, (length, channels, size, size), dtype=torch.uint8, generator=generator
        )
        self.targets = [i % 5 for i in range(length)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.targets[index]


def crop(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
    """A random 8 x 8 crop and flip."""
    top, left = rng.integer(image.shape[1] - 7), rng.integer(image.shape[2] - 7)
    view = image[:, top : top + 8, left : left + 8]
    return view.flip(2) if rng.integer(2) else view


def jittered(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
    """`crop` after a random nap, so that threads finish in any order."""
    time.sleep(random.random() * 0.002)
    return crop(image, rng)


def loader(data: Any = None, batch_size: int = 8, **options: Any) -> OverlapLoader:
    defaults = {"transform": crop, "num_threads": 2, "dtype": torch.uint8, "timeout": 20}
    return OverlapLoader(data if data is not None else Images(), batch_size, **{**defaults, **options})


def facts(batch: Batch) -> tuple[Any, ...]:
    return (
        batch.epoch, batch.step, batch.num_old, batch.ids.tolist(), batch.targets.tolist(),
        batch.images.contiguous().numpy().tobytes(),
    )


def stream(source: OverlapLoader, epochs: int) -> list[tuple[Any, ...]]:
    with source:
        return [facts(batch) for _ in range(epochs) for batch in source]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_same_batches_with_any_number_of_threads(drop_last: bool, depth: int) -> None:
    options: dict[str, Any] = {"drop_last": drop_last, "seed": 3}
    expected = stream(loader(num_threads=1, **options), 3)
    assert len(expected) == 3 * (5 if drop_last else 6)
    for threads in (2, 8):
        got = stream(loader(num_threads=threads, transform=jittered, depth=depth, **options), 3)
        assert got == expected


def test_equals_the_sampler_in_a_dataloader() -> None:
    data = Images()
    sampler = OverlapBatchSampler(data, 8, seed=5, drop_last=False)
    tier = DataLoader(IndexedDataset(data, crop), batch_sampler=sampler, collate_fn=collate_overlap)
    expected = [facts(batch) for _ in range(3) for batch in tier]
    assert stream(loader(data, seed=5, drop_last=False), 3) == expected


def test_old_rows_repeat_the_new_ones_as_other_views() -> None:
    data = Images(40)
    before: Batch | None = None
    with loader(data) as source:
        for batch in [b for _ in range(2) for b in source]:
            assert batch.targets.tolist() == [data.targets[i] for i in batch.ids.tolist()]
            if before is None:
                assert not batch.has_old and len(batch) == 4
            else:
                assert batch.ids[: batch.num_old].tolist() == before.ids[before.num_old :].tolist()
                assert not torch.equal(batch.old, before.new)
            for row, sample in enumerate(batch.ids.tolist()):
                use = int(row < batch.num_old)
                drawn = batch.epoch - (use == 1 and batch.step == 0)
                expected = crop(data.images[sample], ViewRng(0, drawn, sample, use))
                assert torch.equal(batch.images[row], expected)
            before = batch


def test_one_read_per_sample_per_epoch() -> None:
    """Also over the epochs' boundaries: the half that is carried over is not read again."""
    data, seen = Images(24), Counter[int]()

    def load(dataset: Images, index: int) -> tuple[torch.Tensor, int]:
        seen[index] += 1
        return dataset[index]

    with loader(data, load=load, batch_size=8, depth=1) as source:
        for epoch in range(4):
            assert len(list(source)) == 6
            ahead = 4 * (source._settings.depth + 1)
            assert 24 * (epoch + 1) <= seen.total() <= 24 * (epoch + 1) + ahead
        assert source.stats().reads == seen.total() and source.stats().batches == 24
        assert source.stats().views == 4 * 48 - 4


@pytest.mark.parametrize("length,batch_size", [(1, 2), (2, 2), (4, 8), (5, 4), (7, 4), (9, 6)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_small_sets(length: int, batch_size: int, drop_last: bool) -> None:
    data = Images(length)
    sampler = OverlapBatchSampler(data, batch_size, drop_last=drop_last)
    expected = [sampler.indices(e, s) for e in range(5) for s in range(len(sampler))]
    got = stream(loader(data, batch_size, drop_last=drop_last), 5)
    assert [g[3] for g in got] == expected


def test_every_stop_point_resumes_to_the_same_stream_twice() -> None:
    def make() -> OverlapLoader:
        return loader(Images(19), 6, seed=2, drop_last=False)

    expected = stream(make(), 5)
    steps = len(make())
    for stop in range(3 * steps + 1):
        with make() as source:
            state = _after(source, stop)
        with make() as again:
            again.load_state_dict(state)
            assert again.state_dict() == state
            got = [facts(b) for b in _take(again, 2)]
            assert got == expected[stop : stop + 2]
            second = again.state_dict()
        with make() as third:
            third.load_state_dict(second)
            assert [facts(b) for b in _take(third, 4)] == expected[stop + 2 : stop + 6]


def _take(source: OverlapLoader, count: int) -> Iterator[Batch]:
    """`count` batches, over the epochs' boundaries."""
    while count > 0:
        for batch in source:
            yield batch
            count -= 1
            if count == 0:
                return


def _after(source: OverlapLoader, count: int) -> dict[str, Any]:
    for _ in _take(source, count):
        pass
    return source.state_dict()


def test_state_is_small_and_counts_delivered_batches_only() -> None:
    with loader(depth=3) as source:
        iterator = iter(source)
        for _ in range(2):
            next(iterator)
        wait_for(lambda: source.stats().reads > 12, "threads that read ahead")
        state = source.state_dict()
        assert (state["epoch"], state["step"]) == (0, 2)
        assert all(isinstance(v, (int, bool)) for v in state.values())


def test_four_ranks_continue_the_order_of_one() -> None:
    data = Images(50)
    one = stream(loader(data, 16), 2)
    many = [stream(loader(data, 4, rank=r, world_size=4), 2) for r in range(4)]
    for step, whole in enumerate(one):
        new = [i for rank in many for i in rank[step][3][rank[step][2] :]]
        assert new == whole[3][whole[2] :]
    images = {i: whole[5] for whole in one for i in whole[3]}
    assert set(images) == {i for rank in many for row in rank for i in row[3]}
    with loader(data, 16) as source:
        state = _after(source, 3)
    with loader(data, 4, rank=1, world_size=4) as part:
        part.load_state_dict(state)
        assert facts(next(iter(part))) == many[1][3]


def test_load_after_iter_raises_and_mismatches_name_both_values() -> None:
    with loader(seed=1) as source:
        state = source.state_dict()
        iterator = iter(source)
        next(iterator)
        with pytest.raises(RuntimeError, match="an iteration is active"):
            source.load_state_dict(state)
        del iterator
        source.load_state_dict(state)
    for options, words in [
        ({"seed": 2}, "seed was 1 .* is 2"),
        ({"seed": 1, "batch_size": 4}, "1 = 4 .* is 2"),
        ({"seed": 1, "data": Images(24)}, "length was 23 .* is 24"),
        ({"seed": 1, "drop_last": False}, "drop_last was True .* is False"),
    ]:
        with loader(**options) as other, pytest.raises(ValueError, match=words):  # type: ignore[arg-type]
            other.load_state_dict(state)


def test_batches_belong_to_the_consumer() -> None:
    """Kept batches, and batches the consumer writes into, change nothing later."""
    data = Images(30)
    with loader(data, depth=1) as source:
        kept = [b for _ in range(2) for b in source]
        copies = [facts(b) for b in kept]
        for _ in range(3):
            for batch in source:
                batch.images.fill_(7)
                batch.ids.fill_(-1)
        assert [facts(b) for b in kept] == copies
        assert not any((b.ids == -1).any() or (b.images == 7).all() for b in kept)


def test_normalised_floats_are_those_of_the_formula() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    with loader(dtype=torch.uint8) as raw:
        pixels = next(iter(raw)).images
    for dtype, channels_last in [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]:
        with loader(dtype=dtype, mean=mean, std=std, channels_last=channels_last) as source:
            images = next(iter(source)).images
        m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        expected = (pixels.float() / 255 - m) / s
        assert images.dtype == dtype
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert images.is_contiguous(memory_format=wanted)
        near = 2e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(images.float(), expected, rtol=near, atol=near)


def test_float_views_pass_through() -> None:
    def scaled(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        return crop(image, rng).float() / 10

    with loader(transform=scaled, dtype=torch.float32) as source, loader() as raw:
        torch.testing.assert_close(next(iter(source)).images, next(iter(raw)).images / 10.0)


def test_set_epoch_moves_only_when_it_differs() -> None:
    expected = stream(loader(), 3)
    with loader() as source:
        for epoch in range(3):
            source.set_epoch(epoch)
            pipeline = source._pipeline
            got = [facts(b) for b in source]
            assert got == expected[5 * epoch : 5 * epoch + 5]
            assert pipeline is None or source._pipeline is pipeline
        source.set_epoch(1)
        assert [facts(b) for b in source] == expected[5:10]


def test_an_iteration_left_early_starts_again() -> None:
    expected = stream(loader(), 1)
    with loader() as source:
        for _ in source:
            break
        assert [facts(b) for b in source] == expected
        assert source.epoch == 1


def test_a_stale_iterator_raises_and_leaves_the_newer_one_alone() -> None:
    expected = stream(loader(), 1)
    with loader() as source:
        old = iter(source)
        next(old)
        new = iter(source)
        assert facts(next(new)) == expected[0]
        with pytest.raises(RuntimeError, match="stale"):
            next(old)
        del old
        assert [facts(b) for b in new] == expected[1:]


def test_random_set_of_options_against_the_plan() -> None:
    """Property: whatever the sizes, ids follow the plan and pixels follow ids."""
    rng = random.Random(0)
    for _ in range(12):
        length, half = rng.randrange(6, 40), rng.randrange(1, 5)
        data = Images(length)
        source = loader(
            data, 2 * half, seed=rng.randrange(9), num_threads=rng.randrange(1, 6), depth=rng.randrange(1, 5),
            drop_last=rng.random() < 0.5, transform=None,
        )
        with source:
            for batch in [b for _ in range(3) for b in source]:
                old, new = source.plan.batch(batch.epoch, batch.step)
                assert batch.ids.tolist() == [*old, *new] and batch.num_old == len(old)
                assert torch.equal(batch.images, data.images[batch.ids])


@pytest.mark.parametrize(
    "options,words",
    [
        ({"batch_size": 7}, "even"),
        ({"batch_size": 64}, "samples"),
        ({"num_threads": 0}, "num_threads"),
        ({"depth": 0}, "depth"),
        ({"timeout": 0}, "timeout"),
        ({"on_error": "skip"}, "on_error"),
        ({"max_failures": -1}, "max_failures"),
        ({"mean": (0.5,)}, "mean and std"),
        ({"mean": (0.5,), "std": (0.0,)}, "positive std"),
        ({"dtype": torch.int32}, "dtype"),
        ({"device": "meta"}, "device"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loader(**options)


def test_a_dataset_without_a_face_is_refused() -> None:
    class Bare:
        def __len__(self) -> int:
            return 9

    with pytest.raises(TypeError, match="pass load="):
        loader(Bare(), 2)


def test_numpy_and_pil_images_from_load() -> None:
    from PIL import Image

    array = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    forms = [array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)]

    def load(dataset: Images, index: int) -> tuple[Any, int]:
        return forms[index % 3], index

    with loader(load=load, transform=None) as source:
        for batch in source:
            assert all(torch.equal(i, forms[2]) for i in batch.images)  # type: ignore[arg-type]
            assert batch.targets.tolist() == batch.ids.tolist()


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    """A view, or a NumPy alias, keeps a batch as it is; dropped batches give their memory back."""
    data = Images(64)
    with loader(data, depth=1, batch_size=8) as source:
        held, expected, addresses = [], [], set()
        for number, batch in enumerate(b for _ in range(4) for b in source):
            addresses.add(batch.images.data_ptr())
            part: Any = batch.new[1:2, 0]
            if number % 3 == 0:
                part = part.numpy()
            if number % 4 == 0:
                held.append(part)
                expected.append(part.copy() if isinstance(part, np.ndarray) else part.clone())
            del batch, part
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(held, expected, strict=True))
    assert len(addresses) < 40  # 64 batches, 16 of them held


def test_equals_the_other_tiers_with_the_library_transforms(tmp_path: Any) -> None:
    """Resident set, batch sampler, two views and the threaded loader: one stream."""
    from PIL import Image

    from dlb_fast.data import ImageFolder, ResidentLoader, train_transform

    small, data = train_transform("small", 12), Images(30)
    expected = stream(loader(data, transform=small), 3)
    resident = ResidentLoader(data, 8, transform=small, dtype=torch.uint8)
    assert [facts(b) for _ in range(3) for b in resident] == expected

    for i in range(18):
        (tmp_path / f"class{i % 3}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"class{i % 3}" / f"{i}.jpg")
    folder, large = ImageFolder(tmp_path), train_transform("imagenet", 32)
    sampler = OverlapBatchSampler(folder, 6)
    tier = DataLoader(IndexedDataset(folder, large), batch_sampler=sampler, collate_fn=collate_overlap)
    expected = [facts(b) for _ in range(2) for b in tier]
    assert stream(loader(folder, 6, transform=large), 2) == expected
    assert stream(loader(folder, 6, transform=large, num_threads=8), 2) == expected
