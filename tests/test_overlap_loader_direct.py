"""Views written straight into the batch are those of the transform, bit for bit, whatever the memory layout."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_files import loader, make_files
from torch.utils._python_dispatch import TorchDispatchMode

from dlb_fast.data import Compose, Cutout, Flip, OverlapLoader, RandomResizedCrop, ViewRng
from dlb_fast.data.transforms.crops import CompiledCrop, resized_crops
from dlb_fast.data.transforms.normalise import Normalise

FLIPS: list[Any] = [None, Flip(), Flip(1.0), Flip(0.0), Flip(alternate=True)]


def picture(layout: str, channels: int, height: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(height * width)
    pixels = torch.from_numpy(rng.integers(0, 256, (height + 2, width + 3, channels), dtype=np.uint8))
    pixels = pixels[1 : height + 1, 2 : width + 2]  # neither contiguous nor at the start of its storage
    if layout == "channels first":
        return pixels.permute(2, 0, 1).contiguous()
    return (pixels if layout == "window" else pixels.contiguous()).permute(2, 0, 1)


@pytest.fixture(autouse=True)
def needs_the_op() -> None:
    if resized_crops() is None:
        pytest.skip("the op is not built here")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", ["channels last", "channels first", "window"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", FLIPS, ids=repr)
def test_equal_to_the_transform(layout: str, channels: int, flip: Any, dtype: torch.dtype) -> None:
    crop = RandomResizedCrop(8, scale=(0.05, 1.0))
    transform = Compose([crop] if flip is None else [crop, flip])
    write = CompiledCrop.of(transform)
    assert write is not None and write.size == 8
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.4)[:channels]
    normalise = Normalise(mean, std, dtype)
    table = normalise.table(channels) if dtype == torch.float32 else None
    for height, width in ((8, 8), (13, 29), (40, 7), (1, 5)):
        image = picture(layout, channels, height, width)
        for rows in (torch.zeros(3, 8, 8, channels), torch.zeros(3, channels, 8, 8).permute(0, 2, 3, 1)):
            batch = rows.to(dtype)
            other = torch.zeros_like(batch)
            for sample in range(6):
                views = [transform(image, ViewRng(1, 2, sample, view)) for view in (0, 1)]
                wanted = normalise(torch.stack(views).permute(0, 2, 3, 1))
                places = [(ViewRng(1, 2, sample, 0), batch, 1), (ViewRng(1, 2, sample, 1), other, 2)]
                write(image, places if sample % 3 else places[:1], table)
                assert torch.equal(batch[1].permute(2, 0, 1), wanted[0])
                assert not sample % 3 or torch.equal(other[2].permute(2, 0, 1), wanted[1])
            assert not batch[0].any() and not batch[2].any() and not other[:2].any()


def test_only_a_crop_alone_or_before_a_flip_is_compiled() -> None:
    class Mine(RandomResizedCrop):
        pass

    assert CompiledCrop.of(RandomResizedCrop(8)) is not None
    for other in (None, Flip(), Mine(8), Compose([Flip(), RandomResizedCrop(8)]), lambda image, rng: image):
        assert CompiledCrop.of(other) is None
    assert CompiledCrop.of(Compose([RandomResizedCrop(8), Flip(), Cutout(2)])) is None


class Pictures:
    """Sizes, layouts and dtypes mixed; sample 5 is grey when `odd` says so."""

    def __init__(self, odd: str = "") -> None:
        self.targets, self.odd = list(range(12)), odd

    def __len__(self) -> int:
        return 12

    def get(self, i: int) -> torch.Tensor:
        if i == 5 and self.odd:
            return picture("window", 1, 20, 20) if self.odd == "grey" else picture("window", 3, 20, 20).float()
        return picture(["channels last", "channels first", "window"][i % 3], 3, 10 + 3 * i, 40 - 2 * i)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_loader_batches_do_not_change(
    dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ordinary loader, normalised float32 on a CPU, writes its views by the compiled crop too."""
    written: list[int] = []
    call = CompiledCrop.__call__

    def counted(self: CompiledCrop, image: Any, rows: Any, table: Any) -> None:
        written.append(len(rows))
        call(self, image, rows, table)

    def batches() -> list[torch.Tensor]:
        with OverlapLoader(
            Pictures(),
            4,
            transform=Compose([RandomResizedCrop(8), Flip()]),
            num_threads=2,
            load=lambda d, i: (d.get(i), d.targets[i]),
            dtype=dtype,
            channels_last=channels_last,
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.4),
        ) as loader:
            return [batch.images for _ in range(2) for batch in loader]

    monkeypatch.setattr(CompiledCrop, "__call__", counted)
    compiled = batches()
    assert bool(written) == (dtype != torch.float16)  # each view of which has to be converted
    monkeypatch.setattr(CompiledCrop, "of", classmethod(lambda cls, transform: None))
    for mine, general in zip(compiled, batches(), strict=True):
        assert torch.equal(mine, general) and mine.stride() == general.stride()


@pytest.mark.parametrize("odd", ["grey", "float"])
def test_an_image_that_does_not_fit_is_named(odd: str) -> None:
    with OverlapLoader(
        Pictures(odd), 4, transform=RandomResizedCrop(8), num_threads=2, dtype=torch.uint8,
        shuffle=False, load=lambda d, i: (d.get(i), d.targets[i]),
    ) as loader, pytest.raises(ValueError, match="views of one size are needed: sample 5"):  # fmt: skip
        list(loader)


class Calls(TorchDispatchMode):
    """Which of torch's operators the thread calls that is in here."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_who_takes_a_batch_on_the_cpu_calls_nothing_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every call would give the interpreter lock to a loading thread and wait until that lets go of it again."""
    with loader(make_files(tmp_path), transform=RandomResizedCrop(16), dtype=dtype) as made:
        batches = iter(made)
        next(batches)
        with Calls() as calls:
            batch = next(batches)
        assert calls.names == []
        if dtype.is_floating_point:  # an ordinary tensor all the same
            batch.images.requires_grad_()
            batch.images.square().sum().backward()
            assert torch.equal(batch.images.grad, 2 * batch.images)
            factor = torch.ones((), requires_grad=True)
            next(batches).images.mul_(factor).sum().backward()
            assert factor.grad is not None


def test_batches_die_in_a_loading_thread_and_none_is_kept_for_long(tmp_path: Path) -> None:
    """A loop that rebinds its batch would otherwise give the interpreter lock away and wait for it in the middle."""
    died: list[str] = []
    most = seen = 0
    with loader(make_files(tmp_path), transform=RandomResizedCrop(16)) as made:
        for _ in range(6):
            for batch in made:
                weakref.finalize(batch.images, lambda: died.append(threading.current_thread().name)).atexit = False
                seen += 1
                most = max(most, seen - len(died))
        assert died and all(name.startswith("dlb-loader") for name in died)
        assert most <= 3 + 3  # the consumer's, the one before, one to go; and three that may be ready at once
