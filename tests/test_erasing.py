"""Random erasing: the boxes, the noise, and the same bits from every loader and on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import assert_same_batches, batches
from test_device_stream import Streams

from dlb_fast.data import (
    Compose,
    Cutout,
    Flip,
    Mix,
    OverlapLoader,
    PadCrop,
    RandomErasing,
    ResidentLoader,
    SampledLoader,
    ViewPairSampler,
    synthetic,
)
from dlb_fast.data import rng as _hash
from dlb_fast.data.loaders import pipeline
from dlb_fast.data.loaders.transfer import CudaStage
from dlb_fast.data.rng import ViewRng, ViewRngs
from dlb_fast.data.transforms.erasing import NOISE_UNIT, erase_, erase_by_mask, erase_keys, noise
from dlb_fast.data.transforms.normalise import Normalise

torch.set_num_threads(1)

VIEWS = Compose([PadCrop(2), Flip()])
NORM: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
ERASERS = [
    RandomErasing(0.7, mode="const"),
    RandomErasing(0.7, mode="rand"),
    RandomErasing(0.7, mode="pixel", area=(0.1, 0.5), aspect=(0.5, 2.0)),
    Cutout(5, (9, 99, 199)),
]
NAMES = ["const", "rand", "pixel", "cutout"]


def data(length: int = 23) -> Any:
    return synthetic(length=length, num_classes=3, size=12)


@pytest.mark.parametrize("erase", ERASERS, ids=NAMES)
def test_each_view_is_erased_by_its_own_numbers(erase: Any) -> None:
    """Row by row against the definition: the box of (seed, epoch drawn in, id, use), its content, nothing beside it."""
    options: dict[str, Any] = {"transform": VIEWS, "seed": 5, "drop_last": False, **NORM}
    plain, erased = (batches(ResidentLoader(data(), 8, erase=e, **options)) for e in (None, erase))
    grey = torch.tensor([9.0, 99, 199]) / 255
    filled = ((grey - torch.tensor(NORM["mean"])) / torch.tensor(NORM["std"]))[:, None, None]
    whole = 0
    for bare, batch in zip(plain, erased, strict=True):
        for row, sample in enumerate(batch.ids.tolist()):
            use = int(row < batch.num_old)
            drawn = batch.epoch - (use and batch.step == 0)
            top, left, h, w, key = erase.draw(ViewRngs(5, drawn, [sample], use), 12, 12)[:, 0].tolist()
            box = slice(top, top + h), slice(left, left + w)
            got, expected = batch.images[row], bare.images[row].clone()
            if h * w:
                inside = got[:, box[0], box[1]]
                if isinstance(erase, Cutout):
                    torch.testing.assert_close(inside, filled.expand_as(inside), rtol=1e-5, atol=1e-6)
                elif erase.mode == "const":
                    assert (inside == 0).all()
                elif erase.mode == "rand":
                    values = torch.from_numpy(noise(key, np.arange(3)))
                    assert torch.equal(inside, values[:, None, None].expand_as(inside)) and len(values.unique()) == 3
                else:
                    places = np.arange(12 * 12 * 3).reshape(12, 12, 3)[box]
                    assert torch.equal(inside, torch.from_numpy(noise(key, places)).permute(2, 0, 1))
                expected[:, box[0], box[1]] = inside
            else:
                whole += 1
            assert torch.equal(got, expected)
    total = sum(map(len, erased))
    assert whole == 0 if isinstance(erase, Cutout) else 0.2 * total < whole < 0.4 * total


@pytest.mark.parametrize("erase", ERASERS, ids=NAMES)
def test_all_tiers_erase_alike(erase: Any) -> None:
    options: dict[str, Any] = {"transform": VIEWS, "seed": 4, "drop_last": False, "erase": erase, **NORM}
    for layout in ({}, {"channels_last": False, "dtype": torch.bfloat16}, {"mix": Mix(mixup_alpha=1.0)}):
        expected = batches(ResidentLoader(data(), 8, **options, **layout))
        for threads in (1, 3):
            got = OverlapLoader(data(), 8, num_threads=threads, **options, **layout)
            assert_same_batches(batches(got), expected)
    plain = batches(ResidentLoader(data(), 4, overlap=False, **options))
    assert_same_batches(batches(OverlapLoader(data(), 4, overlap=False, num_threads=2, **options)), plain)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_cuda_erases_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes travel with the targets, so streams that run late erase the right views."""
    streams = Streams(seed)

    def make_stage(device: torch.device, normalise: Normalise, copy_stream: Any = None) -> CudaStage:
        return CudaStage(torch.device("cpu"), normalise, api=streams, copy_stream="copy")

    monkeypatch.setattr(pipeline, "make_stage", make_stage)
    options: dict[str, Any] = {"transform": VIEWS, "seed": 4, "drop_last": False, "erase": ERASERS[2], **NORM}
    got = batches(OverlapLoader(data(), 8, num_threads=3, depth=1, **options), 20)
    streams.finish()
    assert_same_batches(got, batches(ResidentLoader(data(), 8, **options), 20))


def test_row_samplers_erase_too() -> None:
    """From memory and from files, each view by its own numbers."""

    class Files:
        targets = data().targets

        def __len__(self) -> int:
            return 23

        def read(self, index: int) -> bytes:
            import io

            from PIL import Image

            file = io.BytesIO()
            Image.fromarray(data().images[index].permute(1, 2, 0).numpy()).save(file, "PNG")
            return file.getvalue()

    made = [batches(SampledLoader(d, ViewPairSampler(23, 8), erase=ERASERS[2])) for d in (data(), Files())]
    assert_same_batches(*made)
    plain = batches(SampledLoader(data(), ViewPairSampler(23, 8)))
    changed = [(a.images != b.images).flatten(1).any(1) for a, b in zip(plain, made[0], strict=True)]
    assert any((c[:4] != c[4:]).any() for c in changed)  # the two views of a sample are erased differently


def test_resuming_and_ranks_keep_the_boxes() -> None:
    options: dict[str, Any] = {"erase": ERASERS[2], "seed": 1}
    whole = batches(ResidentLoader(data(40), 16, **options))
    two = [batches(ResidentLoader(data(40), 8, rank=rank, world_size=2, **options)) for rank in range(2)]
    for batch, first, second in zip(whole, *two, strict=True):
        old = [part.images[: part.num_old] for part in (first, second)]
        new = [part.images[part.num_old :] for part in (first, second)]
        assert torch.equal(torch.cat([*old, *new]), batch.images)
    source = OverlapLoader(data(40), 16, num_threads=2, **options)
    with source:
        stream = iter(source)
        for _ in range(3):
            next(stream)
        state = source.state_dict()
    again = ResidentLoader(data(40), 16, **options)
    again.load_state_dict(state)
    assert_same_batches([next(iter(again))], [whole[3]])


def test_boxes_follow_the_numbers_given() -> None:
    erase = RandomErasing(0.4, area=(0.1, 0.3), aspect=(0.5, 2.0))
    top, left, h, w, _ = erase.draw(ViewRngs(0, 0, np.arange(20000), 0), 64, 48)
    chosen = h > 0
    assert chosen.mean() == pytest.approx(0.4, abs=0.02) and ((w > 0) == chosen).all()
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 64).all() and (left + w <= 48).all()
    area, aspect = (h * w)[chosen] / (64 * 48), (h / np.maximum(w, 1))[chosen]
    assert area.min() > 0.09 and area.max() < 0.31 and area.mean() == pytest.approx(0.2, abs=0.01)
    assert aspect.min() > 0.45 and aspect.max() < 2.2 and abs(np.log(aspect).mean()) < 0.05
    assert top[chosen].min() == 0 and (top + h)[chosen].max() == 64  # up to the borders
    assert not RandomErasing(0.0).draw(ViewRngs(0, 0, np.arange(50), 0), 8, 8)[2:4].any()
    whole = RandomErasing(1.0, area=(0.9, 0.95), aspect=(9.0, 10.0)).draw(ViewRngs(0, 0, np.arange(50), 0), 8, 8)
    assert not whole[2:4].any()  # none of the attempts fits


def test_noise_has_mean_0_and_variance_1_and_no_memory() -> None:
    keys = erase_keys(ViewRngs(0, 0, np.arange(40), 0)).view(np.int64)
    values = np.stack([noise(int(key), np.arange(3000)) for key in keys])
    assert values.dtype == np.float32 and abs(values.mean()) < 0.01 and abs(values.var() - 1) < 0.01
    assert np.abs(values).max() < 4 * 65536 / 2 * NOISE_UNIT
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01
    key = int(keys[0])
    bits = _hash.mix((key + ((1 << 20) + 7) * _hash.GOLDEN) & _hash.MASK)
    total = sum((bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)) - 131070
    assert noise(key, np.array([7]))[0] == np.float32(total) * np.float32(NOISE_UNIT)


def test_drawing_boxes_leaves_the_views_alone() -> None:
    """The erasing has a stream of its own: a transform draws the same numbers with it and without."""
    rngs = ViewRngs(0, 0, np.arange(3), 0)
    RandomErasing(1.0).draw(rngs, 8, 8)
    assert rngs.counter == 0
    assert erase_keys(rngs)[1] == _hash.fold(ViewRng(0, 0, 1, 0).key, _hash.ERASE)


def finished(erase: Any, way: Any, dtype: torch.dtype, channels_last: bool, channels: int = 3) -> torch.Tensor:
    """A batch by one way; every way gets the same pixels and boxes, one view of which stays whole."""
    norm = {name: values[:channels] for name, values in NORM.items()}
    normalise = Normalise(**norm, dtype=dtype, channels_last=channels_last, erase=erase)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 17, 13, channels), dtype=torch.uint8, generator=generator)
    boxes = torch.zeros(7, 9, dtype=torch.int64)[2:, :6]  # rows of a larger table, as they arrive on a device
    boxes.copy_(torch.from_numpy(erase.draw(ViewRngs(0, 1, np.arange(6), 0), 17, 13)))
    boxes[2:4, 2] = 0
    out = normalise.empty(x.shape, x.dtype, torch.device("cpu"))
    way(normalise, out, x, boxes)
    return out


def by_slices(normalise: Normalise, out: torch.Tensor, x: torch.Tensor, boxes: torch.Tensor) -> None:
    normalise.into(out, x)
    normalise.blank(out, boxes)


def by_mask(normalise: Normalise, out: torch.Tensor, x: torch.Tensor, boxes: torch.Tensor) -> None:
    """What runs on a device, here on the CPU."""
    normalise.into(out, x)
    assert normalise.erase is not None
    erase_by_mask(out, boxes, normalise.erase.mode, normalise._fill(out.device, out.shape[3]))


@pytest.mark.parametrize("erase", [*ERASERS, RandomErasing(1.0, mode="pixel", area=(0.3, 0.5))], ids=[*NAMES, "all"])
@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float32, True), (torch.float32, False), (torch.float16, True)]
)
def test_slices_and_mask_agree(erase: Any, dtype: torch.dtype, channels_last: bool) -> None:
    expected = finished(erase, by_slices, dtype, channels_last)
    assert torch.equal(finished(erase, by_mask, dtype, channels_last), expected)
    boxes = erase.draw(ViewRngs(0, 1, np.arange(6), 0), 17, 13)
    assert (boxes[2] * boxes[3] > 0).sum() >= 3


def test_grey_images() -> None:
    for erase in (ERASERS[2], Cutout(5, 7)):
        same = [finished(erase, way, torch.float32, True, channels=1) for way in (by_slices, by_mask)]
        assert torch.equal(*same)


def test_float_views_are_erased_as_they_are() -> None:
    def normalised(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        return image.float() / 255

    erase = RandomErasing(1.0)
    with OverlapLoader(data(), 8, transform=normalised, erase=erase) as loader:
        batch = next(iter(loader))
    assert all((image == 0).flatten(1).all(0).any() for image in batch.images)


def test_bad_arguments_are_named() -> None:
    for values, message in [
        ({"prob": 1.2}, r"prob must be in \[0, 1\], got 1.2"),
        ({"area": (0.5, 0.2)}, "area must be 0 < low <= high < 1"),
        ({"area": (0.5, 1.0)}, "area must be"),
        ({"aspect": (0.0, 1.0)}, "aspect must be 0 < low <= high"),
        ({"mode": "noise"}, "mode must be one of const, rand, pixel, got 'noise'"),
    ]:
        with pytest.raises(ValueError, match=message):
            RandomErasing(**values)  # type: ignore[arg-type]
    for kind in (ResidentLoader, OverlapLoader):
        with pytest.raises(ValueError, match="use Cutout as a transform"):
            kind(data(), 8, erase=ERASERS[0], dtype=torch.uint8)
        with pytest.raises(TypeError, match="expected RandomErasing, Cutout or None, got float"):
            kind(data(), 8, erase=0.25)
    with pytest.raises(ValueError, match="2 grey values for 3 channels"):
        next(iter(ResidentLoader(data(), 8, erase=Cutout(3, (1, 2)))))


def test_erase_writes_nothing_where_there_is_no_box() -> None:
    out = torch.ones(2, 4, 4, 1)
    boxes = torch.tensor([[1, 0], [1, 0], [2, 0], [2, 3], [5, 6]])
    erase_(out, boxes, "const", torch.zeros(1))
    assert out[0].sum() == 12 and out[1].sum() == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("erase", ERASERS, ids=NAMES)
def test_a_gpu_erases_as_the_cpu(erase: Any) -> None:
    for kind in (ResidentLoader, OverlapLoader):
        made = [
            batches(kind(data(), 8, transform=VIEWS, erase=erase, device=where, **NORM)) for where in ("cuda", "cpu")
        ]
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a.images.cpu(), b.images, rtol=1e-6, atol=1e-6)
