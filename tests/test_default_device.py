"""`torch.set_default_device` moves no part of a loader that was told to work on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_files import make_files

from dlb_fast.data import (
    Compose,
    Cutout,
    EvalLoader,
    Flip,
    MapDataset,
    Mix,
    OverlapLoader,
    PadCrop,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    ResidentLoader,
    eval_transform,
    load_into_memory,
)

OVERLAP: list[dict[str, Any]] = [
    {}, {"dtype": torch.uint8}, {"erase": RandomErasing()}, {"erase": Cutout(4, fill=(9,))},
    {"erase": RandomErasing(mode="pixel")}, {"mix": Mix(mixup_alpha=0.2)},
]  # fmt: skip
RESIDENT: list[dict[str, Any]] = [
    {"transform": Compose([PadCrop(2), Flip()])}, {"transform": Cutout(3)}, {"transform": RandAugment()},
    {"erase": RandomErasing(), "mix": Mix(cutmix_alpha=1.0)},
]  # fmt: skip


def pictures() -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    return load_into_memory(MapDataset([(picture, i % 3) for i, picture in enumerate(pixels)]))


def compare(make: Any) -> None:
    """The batches under a default device that holds no values are those without one."""
    with torch.device("meta"):
        found = make()
    for one, other in zip(found, make(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", OVERLAP, ids=str)
def test_the_overlap_loader(tmp_path: Path, options: dict[str, Any]) -> None:
    files = make_files(tmp_path)

    def make() -> list[Any]:
        transform = RandomResizedCrop(16)
        with OverlapLoader(files, 8, transform=transform, device="cpu", num_threads=2, **options) as loader:
            return [(batch.images, batch.targets, batch.ids) for batch in loader]

    compare(make)


@pytest.mark.parametrize("options", RESIDENT, ids=str)
def test_the_resident_loader(options: dict[str, Any]) -> None:
    compare(lambda: [(b.images, b.targets, b.ids) for b in ResidentLoader(pictures(), 4, device="cpu", **options)])


def test_the_evaluation_loader(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    make = lambda: list(EvalLoader(files, 8, transform=eval_transform(16), device="cpu"))  # noqa: E731
    compare(lambda: [(b.images, b.targets, b.ids) for b in make()])
