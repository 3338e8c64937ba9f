"""Mixup and CutMix: both uses of a sample are mixed alike, so that its teacher saw the same picture.

The brute force: a set whose image i shows nothing but i, without augmentation. Then the old rows of a batch have to be
the new rows of the batch before, bit for bit, and any other partner, share or box shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from builders import assert_same_batches
from builders import batches as epochs
from torch.utils.data import DataLoader

from dlb_fast import LastBatchLoss
from dlb_fast.data import (
    ArrayDataset,
    Batch,
    Compose,
    Flip,
    IndexedDataset,
    Mix,
    OverlapBatchSampler,
    OverlapLoader,
    PadCrop,
    ResidentLoader,
    SampledLoader,
    ViewPairSampler,
    collate_overlap,
    pair_halves,
)
from dlb_fast.data.sampler import ClassBatchSampler
from dlb_fast.data.transforms import mixing
from dlb_fast.data.transforms.normalise import Normalise

torch.set_num_threads(1)

SIZE = 12
MIXES = [
    Mix(mixup_alpha=0.8),
    Mix(cutmix_alpha=1.0),
    Mix(mixup_alpha=0.4, cutmix_alpha=1.0, prob=0.8, mode="elem"),
    Mix(mixup_alpha=0.4, cutmix_alpha=1.0, prob=0.8),
]
NAMES = ["mixup", "cutmix", "elem", "batch"]
VIEWS = Compose([PadCrop(2), Flip()])


def numbered(length: int = 23, channels: int = 3) -> ArrayDataset:
    """Image i is grey value 10 i, its class is i: a picture and a label that tell which sample it is."""
    grey = torch.arange(length, dtype=torch.uint8) * 10
    images = grey[:, None, None, None].expand(length, channels, SIZE, SIZE).contiguous()
    return ArrayDataset(images, torch.arange(length), [str(i) for i in range(length)], "numbered")


def random_images(length: int = 23) -> ArrayDataset:
    images = torch.randint(
        0, 256, (length, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return ArrayDataset(images, torch.arange(length), [str(i) for i in range(length)], "random")


def content(batch: Batch) -> tuple[torch.Tensor, ...]:
    assert batch.target_b is not None and batch.lam is not None
    place = torch.tensor([batch.num_old, batch.epoch, batch.step])
    return batch.images, batch.targets, batch.ids, batch.target_b, batch.lam, place


def old_rows_are_the_new_rows_before(batches: list[Batch]) -> int:
    """How many rows are repeated; raises where a repeated row is not the picture that its teacher saw."""
    repeated = 0
    for before, batch in itertools.pairwise(batches):
        old = batch.num_old
        assert torch.equal(batch.old, before.new)
        for name in ("targets", "ids", "target_b", "lam"):
            assert torch.equal(getattr(batch, name)[:old], getattr(before, name)[before.num_old :])
        repeated += old
    return repeated


@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [8, 6])
def test_every_teacher_saw_the_same_mix(mix, drop_last, batch_size):
    """Over three epochs, their boundaries and short or odd halves included."""
    loader = ResidentLoader(numbered(), batch_size, mix=mix, drop_last=drop_last, seed=3)
    batches = epochs(loader)
    assert old_rows_are_the_new_rows_before(batches) == sum(len(b) - b.num_old for b in batches[:-1])
    mixed = 0
    for batch in batches:
        for rows in (slice(0, batch.num_old), slice(batch.num_old, len(batch))):
            assert set(batch.target_b[rows].tolist()) <= set(batch.targets[rows].tolist())  # within its own half
        mixed += int((batch.lam < 1).sum())
    assert mixed > 0.5 * sum(map(len, batches))


def test_a_fresh_mix_of_the_old_half_is_noticed(monkeypatch):
    """What one gets from mixing whole batches, as other libraries do: every batch draws anew."""

    def by_batch(batch, steps_per_epoch):
        new = (len(batch) - batch.num_old, batch.epoch, batch.step)
        return [(batch.num_old, batch.epoch, batch.step + 1000), new] if batch.has_old else [new]

    monkeypatch.setattr(mixing, "halves_of", by_batch)
    for mix in MIXES:
        with pytest.raises(AssertionError):
            old_rows_are_the_new_rows_before(epochs(ResidentLoader(numbered(), 8, mix=mix)))


@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
def test_the_teachers_term_vanishes_for_a_frozen_model_and_one_view(mix):
    """Without a step and without augmentation a sample's teacher is its own logits, if it saw the same mix."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 23))
    criterion = LastBatchLoss(23)
    for batch in epochs(ResidentLoader(random_images(), 8, mix=mix)):
        loss = criterion(
            model(batch.images), batch.targets, batch.ids, num_old=batch.num_old, target_b=batch.target_b, lam=batch.lam
        )
        assert torch.isfinite(loss) and abs(criterion.parts.lb.item()) < 1e-6
    assert criterion.buffer.mismatched == 0


@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
def test_pixels_and_shares_against_the_definition(mix):
    """With real crops: each view is mixed with its partner's view of the same use, in the box that the numbered set
    shows, and lam is the share of a row's own pixels."""
    options = {"seed": 5, "drop_last": False}
    plain = epochs(ResidentLoader(random_images(), 8, transform=VIEWS, **options))
    mixed = epochs(ResidentLoader(random_images(), 8, transform=VIEWS, mix=mix, **options))
    shown = epochs(ResidentLoader(numbered(), 8, mix=mix, **options))
    boxes = shares = 0
    for bare, batch, map_ in zip(plain, mixed, shown, strict=True):
        row_of_class = {}
        for row in range(len(batch)):
            row_of_class[row >= batch.num_old, int(batch.targets[row])] = row
        for row in range(len(batch)):
            other = row_of_class[row >= batch.num_old, int(batch.target_b[row])]
            lam, own, partner = batch.lam[row], bare.images[row], bare.images[other]
            own_grey, seen = bare.targets[row] * 10 / 255, map_.images[row, 0]
            boxed = bool(((seen - own_grey).abs() < 1e-6).any()) and lam < 1 and other != row
            if boxed:  # somewhere it shows itself alone
                inside = (seen - own_grey).abs() > 1e-6
                rows, columns = inside.any(1), inside.any(0)
                assert torch.equal(inside, rows[:, None] & columns[None])  # a rectangle
                assert 1 - inside.sum() / SIZE**2 == pytest.approx(lam.item(), abs=1e-6)
                expected = torch.where(inside, partner, own)
                boxes += 1
            else:
                expected = lam * own + (1 - lam) * partner
                shares += int(lam < 1)
            assert torch.equal(batch.images[row], expected)
    assert (boxes > 20 or not mix.cutmix_alpha) and (shares > 20 or not mix.mixup_alpha)


def load(data, index):
    return data.images[index], int(data.targets[index])


@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
def test_all_tiers_mix_alike(mix):
    data, norm = random_images(), {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    options = {"transform": VIEWS, "seed": 4, "drop_last": False}
    expected = epochs(ResidentLoader(data, 8, mix=mix, **norm, **options))
    for threads in (1, 3):
        with OverlapLoader(data, 8, mix=mix, num_threads=threads, **norm, **options) as loader:
            assert_same_batches(epochs(loader), expected)
    sampler = OverlapBatchSampler(data, 8, seed=4, drop_last=False)
    dataset = IndexedDataset([load(data, i) for i in range(len(data))], VIEWS)
    normalise = Normalise(**norm)
    own = []
    for _ in range(3):
        for batch in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_overlap):
            batch.images = normalise(batch.images.permute(0, 2, 3, 1).contiguous())
            own.append(mix(batch, seed=4, steps_per_epoch=len(sampler)))
    assert_same_batches(own, expected)


@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
def test_any_stop_point_resumes_with_the_same_mixes(mix):
    options = {"mix": mix, "seed": 2, "drop_last": False}
    whole = epochs(ResidentLoader(numbered(), 8, **options))
    for stop in range(len(whole)):
        first = ResidentLoader(numbered(), 8, **options)
        stream = (batch for _ in range(3) for batch in first)
        for _ in range(stop):
            next(stream)
        second = ResidentLoader(numbered(), 8, **options)
        second.load_state_dict(first.state_dict())
        resumed = next(itertools.chain(second, second))  # the rest of an ended epoch is empty
        assert_same_batches([resumed], [whole[stop]])


@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
@pytest.mark.parametrize("kind", [ResidentLoader, OverlapLoader])
def test_two_ranks_mix_by_id_as_one(mix, kind):
    """Neighbours stay together when the rows of a global half are split."""
    options = {"mix": mix, "seed": 6, "transform": VIEWS}
    data = random_images(40)
    one = epochs(kind(data, 16, **options))
    two = [epochs(kind(data, 8, rank=rank, world_size=2, **options)) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        joined = {}
        for part in parts:
            for row in range(len(part)):
                joined[row < part.num_old, int(part.ids[row])] = (part, row)
        assert len(joined) == len(whole)
        for row in range(len(whole)):
            part, at = joined[row < whole.num_old, int(whole.ids[row])]
            assert torch.equal(part.images[at], whole.images[row])
            assert part.lam[at] == whole.lam[row] and part.target_b[at] == whole.target_b[row]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_pair_form_has_the_gradient_of_the_dense_target(impl, smoothing):
    """On every implementation, with teachers in the buffer."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(8, 23, generator=generator, device="cpu").to(torch.get_default_device()) for _ in range(12)]
    batches = [b.to(logits[0].device) for b in epochs(ResidentLoader(numbered(), 8, mix=MIXES[2]))]
    pair, dense = (LastBatchLoss(23, impl=impl, label_smoothing=smoothing) for _ in range(2))
    for values, batch in zip(logits, batches, strict=False):
        both = [values[: len(batch)].clone().requires_grad_() for _ in range(2)]
        pair(
            both[0], batch.targets, batch.ids, num_old=batch.num_old, target_b=batch.target_b, lam=batch.lam
        ).backward()
        share = batch.lam[:, None]
        target = share * F.one_hot(batch.targets, 23) + (1 - share) * F.one_hot(batch.target_b, 23)
        dense(both[1], target, batch.ids, num_old=batch.num_old).backward()
        torch.testing.assert_close(both[0].grad, both[1].grad, rtol=1e-5, atol=1e-7)


def test_two_views_of_one_step_are_mixed_alike():
    for data in (numbered(), FilesOf(numbered())):
        loader = SampledLoader(data, ViewPairSampler(23, 8), mix=MIXES[2])
        for batch in epochs(loader, 2):
            half = len(batch) // 2
            for part in content(batch)[:-1]:
                assert torch.equal(part[:half], part[half:])
    with pytest.raises(ValueError, match="ClassBatchSampler, which groups rows by class"):
        SampledLoader(numbered(), ClassBatchSampler([0, 0, 1, 1], 4), mix=MIXES[0])


class FilesOf:
    """The same images as PNG bytes, for the loaders of files."""

    def __init__(self, data: ArrayDataset) -> None:
        self.images_, self.targets = data.images, data.targets

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> bytes:
        import io

        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(self.images_[index].permute(1, 2, 0).numpy()).save(file, "PNG")
        return file.getvalue()


def test_the_official_scheme_and_any_batch_in_a_loop_of_ones_own():
    """`pair_halves` knows no plan; the stage needs the number of steps only, and leaves its input alone."""
    halves = [torch.arange(k, k + 4) for k in range(0, 12, 4)]
    images = {k: torch.rand(4, 3, 8, 8) for k in range(0, 12, 4)}
    items = [(images[int(ids[0])], images[int(ids[0])], ids, ids) for ids in halves]
    pairs, mix = pair_halves(items), MIXES[3]
    batches = []
    for _ in range(3):
        for batch in pairs:
            before = batch.images.clone()
            batches.append(mix(batch, seed=1, steps_per_epoch=len(pairs)))
            assert torch.equal(batch.images, before) and batch.lam is None
    assert old_rows_are_the_new_rows_before(batches) == 4 * 8


def test_halves_of_one_row_stay_as_they_are():
    for batch in epochs(ResidentLoader(numbered(3), 2, mix=Mix(mixup_alpha=1.0))):
        assert (batch.lam == 1).all() and torch.equal(batch.target_b, batch.targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_dtypes_and_formats(dtype, channels_last):
    """Half types are mixed in float32 and rounded once."""
    options = {"seed": 1, "transform": VIEWS, "channels_last": channels_last}
    exact = epochs(ResidentLoader(random_images(), 8, mix=MIXES[2], **options))
    got = epochs(ResidentLoader(random_images(), 8, mix=MIXES[2], dtype=dtype, **options))
    for a, b in zip(exact, got, strict=True):
        assert b.images.dtype == dtype and torch.equal(a.lam, b.lam)
        assert b.images.is_contiguous(memory_format=[torch.contiguous_format, torch.channels_last][channels_last])
        error = (a.images.double() - b.images.double()).abs().max()
        assert error < (1e-6 if dtype.itemsize >= 4 else 4 * torch.finfo(dtype).eps)


def test_plain_epochs_are_mixed_within_the_batch():
    batches = epochs(ResidentLoader(numbered(), 8, overlap=False, mix=MIXES[0], shuffle=False))
    again = epochs(ResidentLoader(numbered(), 16, mix=MIXES[0], shuffle=False))
    for batch, overlap in zip(batches, again, strict=True):  # unshuffled: the halves of twice the batch size
        assert batch.num_old == 0 and (batch.lam < 1).all()
        assert torch.equal(batch.images, overlap.new) and torch.equal(batch.lam, overlap.lam[overlap.num_old :])


def test_a_mixed_batch_moves_and_prints_as_a_whole():
    batch = next(iter(ResidentLoader(numbered(), 8, mix=MIXES[0])))
    moved = batch.to("meta")
    assert moved.lam.is_meta and moved.target_b.is_meta and "lam=(4,)" in repr(batch)
    assert "lam" not in repr(next(iter(ResidentLoader(numbered(), 8))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
def test_a_gpu_mixes_as_the_cpu_without_a_synchronisation(mix):
    batches = [b.to("cuda") for b in epochs(ResidentLoader(random_images(), 8))]
    expected = [mix(b.to("cpu"), steps_per_epoch=5) for b in batches]
    mix(batches[0], steps_per_epoch=5)  # first use of the allocators
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [mix(b, steps_per_epoch=5) for b in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_batches([b.to("cpu") for b in got], expected)
