"""`augment_on="device"`: the same stream as on the host, one copy per image, and the ring's own rule."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from test_device_stream import Streams
from test_overlap_loader import _after, facts, stream

from dlb_fast.data import pipeline
from dlb_fast.data.augment import Compose, Flip, PadCrop, RandomResizedCrop, train_transform
from dlb_fast.data.device_augment import COLUMNS, ViewParameters, cut_torch, shrink_to
from dlb_fast.data.device_ring import RingStage
from dlb_fast.data.erasing import Cutout, RandomErasing
from dlb_fast.data.normalise import Normalise
from dlb_fast.data.overlap_loader import OverlapLoader
from dlb_fast.data.slots import Slot
from dlb_fast.data.view_rng import ViewRng, ViewRngs

CPU = torch.device("cpu")
VIEWS = [
    RandomResizedCrop(16),
    train_transform("imagenet", 16),
    Compose([RandomResizedCrop(16), Flip(alternate=True), Cutout(6, (9, 99, 199))]),
]


def picture(index: int) -> np.ndarray:
    """A uint8 image whose size depends on its index."""
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (20 + index % 7, 40 - index % 11, 3), dtype=np.uint8)


class Pictures:
    def __len__(self) -> int:
        return 26


def load(_: Any, index: int) -> tuple[np.ndarray, int]:
    return picture(index), index % 4


def make(transform: Any = VIEWS[1], where: str = "device", **options: Any) -> OverlapLoader:
    defaults = {"num_threads": 3, "dtype": torch.uint8, "check_threads": False, "timeout": 20, "max_ring_pixels": 2000}
    return OverlapLoader(
        Pictures(), 6, transform=transform, load=load, augment_on=where, **{**defaults, **options}
    )


@pytest.mark.parametrize("transform", VIEWS, ids=["crop", "flip", "cutout"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("drop_last", [True, False])
def test_same_stream_as_on_the_host(transform: Any, dtype: torch.dtype, drop_last: bool) -> None:
    options = {"dtype": dtype, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "drop_last": drop_last}
    expected = stream(make(transform, "host", **options), 3)
    for threads, depth in ((1, 1), (8, 3)):
        assert stream(make(transform, num_threads=threads, depth=depth, **options), 3) == expected


def test_every_stop_point_resumes() -> None:
    expected = stream(make(drop_last=False), 4)
    for stop in range(2 * len(make(drop_last=False)) + 1):
        with make(drop_last=False) as source:
            state = _after(source, stop)
        with make(drop_last=False) as again:
            again.load_state_dict(state)
            assert facts(next(iter(again))) == expected[stop]


def test_contiguous_format_and_other_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        with make(where="host", dtype=dtype, channels_last=False) as a, make(dtype=dtype, channels_last=False) as b:
            for one, two in zip(a, b, strict=True):
                assert torch.equal(one.images, two.images) and two.images.is_contiguous()


def test_large_images_are_shrunk_and_grey_ones_refused() -> None:
    assert shrink_to(torch.zeros(3, 100, 50, dtype=torch.uint8), 1250).shape == (3, 50, 25)
    assert shrink_to(torch.zeros(3, 1, 5000, dtype=torch.uint8), 10).shape[1] == 1
    with make(max_ring_pixels=300) as source:
        assert len(list(source)) == 8
    grey = OverlapLoader(
        Pictures(), 6, transform=VIEWS[0], load=lambda d, i: (picture(i)[..., 0], 0), augment_on="device",
        check_threads=False,
    )
    with grey, pytest.raises(ValueError, match="uint8 RGB"):
        next(iter(grey))


def test_other_transforms_and_places_are_refused() -> None:
    for transform in (PadCrop(2), Compose([Flip(), RandomResizedCrop(8)]), None, lambda image, rng: image):
        with pytest.raises(ValueError, match="augment_on='host'"):
            make(transform)
    with pytest.raises(ValueError, match='"host" or "device"'):
        make(where="gpu")
    with pytest.raises(ValueError, match="max_ring_pixels"):
        make(max_ring_pixels=0)


def over_late_streams(seed: int, broken: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Any]:
    """300 batches by way of the CUDA order on streams that run late; `broken` names a rule to drop."""
    streams = Streams(seed, broken)

    class Late(RingStage):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, api=streams, **{**options, "copy_stream": "copy"})

        def _read_by(self, slot: Slot) -> list[Any]:
            return super()._read_by(slot)[: 1 if broken == "own only" else 2]

    monkeypatch.setattr(pipeline, "RingStage", Late)
    got = []
    with make(depth=1) as source:
        while len(got) < 300:
            for batch in source:
                got.append(batch)
        stats = source.stats()
    streams.finish()
    return [facts(batch) for batch in got], stats


def test_right_pixels_on_late_streams_and_one_copy_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stream(make(where="host"), 38)[:304]
    for seed in range(2):
        got, stats = over_late_streams(seed, "", monkeypatch)
        assert got == expected
        held = sum(-(-picture(i).size // 16) * 16 for batch in got for i in batch[3][batch[2] :])
        assert stats.bytes_to_device == held + len(got) * 6 * len(COLUMNS) * 8


@pytest.mark.parametrize("rule", ["copy waits", "consumer waits", "host waits", "own only"])
def test_dropping_a_rule_gives_wrong_pixels(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stream(make(where="host"), 38)[:304]
    wrong = 0
    for seed in range(3):
        try:
            got, _ = over_late_streams(seed, rule, monkeypatch)
            wrong += got != expected
        except Exception:  # garbage in a table: offsets that lead nowhere
            wrong += 1
    assert wrong > 0


def compare_kernel(views: Any, dtype: torch.dtype, channels_last: bool, erase: Any = None) -> None:
    """The Triton kernel (through its interpreter) against `cut_torch`, to one grey level."""
    from dlb_fast.data.device_kernel import cut_triton

    parameters = ViewParameters(views)
    normalise = Normalise((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), dtype, channels_last=channels_last, erase=erase)
    buffers, table = [torch.zeros(40_000, dtype=torch.uint8) for _ in range(2)], []
    used = [16, 48]
    for i in range(4):
        image, own = picture(i), i % 2
        flat = torch.from_numpy(image).flatten()
        buffers[own][used[own] : used[own] + len(flat)] = flat
        h, w = image.shape[:2]
        box = (0,) * 5 if erase is None else erase.draw(ViewRngs(0, 1, [i], 0), 16, 16)[:, 0].tolist()
        table.append([own, used[own], h, w, *parameters.draw(h, w, ViewRng(0, 1, i, 0)), *box, 0, i])
        used[own] += len(flat) + 16
    numbers = np.array(table, dtype=np.int64)
    outs = [normalise.empty((4, 16, 16, 3), torch.uint8, CPU) for _ in range(2)]
    cut_torch(*buffers, numbers, parameters, normalise, outs[0])
    cut_triton(*buffers, torch.from_numpy(numbers), parameters, normalise, outs[1])
    level = 1.0 if dtype == torch.uint8 else 1 / 255 / 0.2
    difference = (outs[0].float() - outs[1].float()).abs() / level
    assert difference.max() <= 1.001, difference.max()
    assert difference.mean() < 0.05, difference.mean()


CASES = [(VIEWS[0], torch.uint8, True), (VIEWS[1], torch.float32, False), (VIEWS[2], torch.float32, True)]


@pytest.mark.parametrize("views,dtype,channels_last", CASES, ids=["crop", "flip", "cutout"])
def test_triton_kernel_against_torch(views: Any, dtype: torch.dtype, channels_last: bool) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter (conftest turns it on where there is no GPU)")
    compare_kernel(views, dtype, channels_last)
    if dtype == torch.float32:
        for mode in ("const", "rand", "pixel"):
            compare_kernel(views, dtype, channels_last, RandomErasing(0.8, mode=mode))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_to_one_grey_level() -> None:
    with make(where="host") as host, make(device="cuda") as device:
        for _ in range(20):
            for one, two in zip(host, device, strict=True):
                assert one.ids.tolist() == two.ids.tolist()
                assert (one.images.float() - two.images.cpu().float()).abs().max() <= 1
