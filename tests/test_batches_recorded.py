"""Batches of every loader against recorded ones: randomness and pixels must not change from release to release.

`python tests/test_batches_recorded.py` prints the table of hashes. Floating images are rounded to 1/64 of a grey level
before they are hashed, because processors differ in how they round a multiply-add.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dlb_fast.data import (
    Batch,
    ClassBatchSampler,
    Compose,
    Cutout,
    Flip,
    HalfBatchSampler,
    IndexedDataset,
    Mix,
    OverlapBatchSampler,
    OverlapLoader,
    PadCrop,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    ResidentLoader,
    SampledLoader,
    TwoViews,
    ViewPairSampler,
    collate_overlap,
    collate_rows,
    pair_halves,
    stratified_split,
    subset,
    synthetic,
    train_transform,
    with_label_noise,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOAT = {"mean": MEAN, "std": STD}
SMALL = synthetic(length=29, num_classes=3, size=16, seed=5)
LARGE = synthetic(length=23, num_classes=3, size=48, seed=6)
PATHS = SimpleNamespace(load=lambda data, index: (data.images[index], data.targets[index]))
CROP = train_transform("imagenet", 24)


def digest(batches: Iterable[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        images = batch.images
        if images.dtype != torch.uint8:
            images = (images.double() * 255 * 0.25 * 64).round().to(torch.int32)
        found.update(repr((batch.num_old, batch.epoch, batch.step, tuple(images.shape))).encode())
        extra = [] if batch.lam is None else [batch.target_b, (batch.lam * 2**20).round().int()]
        for tensor in (images, batch.targets, batch.ids, *extra):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def epochs(loader: Any, count: int = 2) -> list[Batch]:
    batches = [batch for _ in range(count) for batch in loader]
    if hasattr(loader, "close"):
        loader.close()
    return batches


def threaded(**options: Any) -> list[Batch]:
    given = {"transform": CROP, "num_threads": 2, "seed": 3, "timeout": 60, **options}
    return epochs(OverlapLoader(LARGE, 6, load=PATHS.load, **given))


def resident(**options: Any) -> list[Batch]:
    given = {"transform": Compose([PadCrop(2), Flip()]), "seed": 3, **options}
    return epochs(ResidentLoader(SMALL, 6, **given))


def torch_loader(transform: Any, sampler: Any, collate: Any = collate_overlap) -> list[Batch]:
    loader = DataLoader(IndexedDataset(LARGE, transform), batch_sampler=sampler, collate_fn=collate)
    return epochs(loader)


def held(transform: Any) -> list[Batch]:
    sampler = HalfBatchSampler(LARGE, 6, seed=3)
    loader = DataLoader(TwoViews(LARGE, transform, seed=3), batch_sampler=sampler)
    return epochs(pair_halves(loader, dtype=torch.float32))


def indices() -> str:
    found = []
    for options in ({}, {"shuffle": False}, {"drop_last": False}, {"rank": 1, "world_size": 2, "drop_last": False}):
        sampler = OverlapBatchSampler(23, 6, seed=4, **options)
        found += [[(int(i), i.seed, i.epoch, i.view, i.step) for i in batch] for _ in range(3) for batch in sampler]
    found += [[(int(i), i.view) for i in batch] for batch in ClassBatchSampler(LARGE.targets, 6, companions=2, seed=1)]
    found += [[(int(i), i.view) for i in batch] for batch in ViewPairSampler(23, 6, seed=1)]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def sets() -> str:
    fewer, noisy = subset(SMALL, 4, seed=2), with_label_noise(SMALL, 0.3, seed=2)
    split = [part.tolist() for part in stratified_split(SMALL.targets.numpy(), 0.2, 9)]
    found = [fewer.targets.tolist(), noisy.targets.tolist(), split, int(fewer.images.long().sum())]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


AUGMENT = Compose([RandomResizedCrop(24), Flip(), RandAugment(2, 9)])
CASES: dict[str, Callable[[], Any]] = {
    "indices": indices,
    "sets": sets,
    "DataLoader": lambda: torch_loader(CROP, OverlapBatchSampler(LARGE, 6, seed=3)),
    "DataLoader, RandAugment": lambda: torch_loader(AUGMENT, OverlapBatchSampler(LARGE, 6, seed=3)),
    "DataLoader, classes": lambda: torch_loader(
        CROP, ClassBatchSampler(LARGE.targets, 6, companions=2, seed=1), collate_rows
    ),
    "OverlapLoader, uint8": lambda: threaded(dtype=torch.uint8),
    "OverlapLoader, float32": lambda: threaded(**FLOAT),
    "OverlapLoader, float32, planes": lambda: threaded(**FLOAT, channels_last=False, drop_last=False),
    "OverlapLoader, bfloat16": lambda: threaded(**FLOAT, dtype=torch.bfloat16),
    "OverlapLoader, RandAugment": lambda: threaded(**FLOAT, transform=AUGMENT),
    "OverlapLoader, crop alone": lambda: threaded(**FLOAT, transform=RandomResizedCrop(20)),
    "OverlapLoader, erase": lambda: threaded(**FLOAT, erase=RandomErasing(0.6, mode="pixel")),
    "OverlapLoader, mix": lambda: threaded(**FLOAT, mix=Mix(mixup_alpha=0.8, cutmix_alpha=1.0)),
    "OverlapLoader, rank": lambda: threaded(**FLOAT, rank=1, world_size=2),
    "OverlapLoader, plain epochs": lambda: threaded(**FLOAT, overlap=False),
    "ResidentLoader, uint8": lambda: resident(dtype=torch.uint8),
    "ResidentLoader, float32": lambda: resident(**FLOAT),
    "ResidentLoader, float32, planes": lambda: resident(**FLOAT, channels_last=False, drop_last=False),
    "ResidentLoader, bfloat16": lambda: resident(**FLOAT, dtype=torch.bfloat16),
    "ResidentLoader, no transform": lambda: resident(**FLOAT, transform=None),
    "ResidentLoader, alternate, Cutout": lambda: resident(
        **FLOAT, transform=Compose([Flip(alternate=True), PadCrop(1, 12), Cutout(5, fill=(7, 8, 9))])
    ),
    "ResidentLoader, RandAugment": lambda: resident(
        **FLOAT, transform=Compose([PadCrop(2), Flip(), RandAugment(3, 20)])
    ),
    "ResidentLoader, erase": lambda: resident(**FLOAT, erase=RandomErasing(0.6, mode="rand")),
    "ResidentLoader, Cutout as erase": lambda: resident(**FLOAT, erase=Cutout(6)),
    "ResidentLoader, mix": lambda: resident(**FLOAT, mix=Mix(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem")),
    "ResidentLoader, plain epochs": lambda: resident(**FLOAT, overlap=False),
    "TwoViews": lambda: held(CROP),
    "TwoViews, RandAugment": lambda: held(AUGMENT),
    "SampledLoader, classes": lambda: epochs(
        SampledLoader(SMALL, ClassBatchSampler(SMALL.targets, 6, companions=2, seed=1), transform=PadCrop(2), **FLOAT)
    ),
    "SampledLoader, pairs": lambda: epochs(
        SampledLoader(SMALL, ViewPairSampler(SMALL, 6, seed=1), transform=PadCrop(2), mix=Mix(0.5), **FLOAT)
    ),
}
RECORDED: dict[str, str] = {
    "indices": "1abcb02e7a27d1b0",
    "sets": "73418623e7c6d689",
    "DataLoader": "38cafff78afbde91",
    "DataLoader, RandAugment": "f4e98b44f567bb20",
    "DataLoader, classes": "39f1cc245a55baa4",
    "OverlapLoader, uint8": "38cafff78afbde91",
    "OverlapLoader, float32": "1f9390e133a185b6",
    "OverlapLoader, float32, planes": "e958fbefbb1d50d4",
    "OverlapLoader, bfloat16": "7b366648d28d791f",
    "OverlapLoader, RandAugment": "a4c15249f81688a9",
    "OverlapLoader, crop alone": "975ec0d5632cd8fc",
    "OverlapLoader, erase": "d5fd757ac5aef74d",
    "OverlapLoader, mix": "25df90426f4c1aef",
    "OverlapLoader, rank": "0329340273788d92",
    "OverlapLoader, plain epochs": "f9d52c635f01ecd6",
    "ResidentLoader, uint8": "d93a771c37fbeba1",
    "ResidentLoader, float32": "dc1469c6fe73a3e2",
    "ResidentLoader, float32, planes": "9b7075aa01c6bf97",
    "ResidentLoader, bfloat16": "54e3059cc9b4844b",
    "ResidentLoader, no transform": "5f1bc20ecbdd4bbc",
    "ResidentLoader, alternate, Cutout": "e02dfc7bb1dd01e5",
    "ResidentLoader, RandAugment": "e03cfcd24817d888",
    "ResidentLoader, erase": "08baee1a7d4954b0",
    "ResidentLoader, Cutout as erase": "756e4e363b65c0a9",
    "ResidentLoader, mix": "a6c5a12e7bf8b46a",
    "ResidentLoader, plain epochs": "9934fd02473c2a82",
    "TwoViews": "270bddf963da0dce",
    "TwoViews, RandAugment": "6bcf383e4905176a",
    "SampledLoader, classes": "eb71f7c7f2af1e5f",
    "SampledLoader, pairs": "95155ddd0b3ce223",
}


def hashed(name: str) -> str:
    found = CASES[name]()
    return found if isinstance(found, str) else digest(found)


@pytest.mark.parametrize("name", list(CASES))
def test_batches_are_the_recorded_ones(name: str, one_thread: None) -> None:
    assert hashed(name) == RECORDED[name]


if __name__ == "__main__":
    for case in CASES:
        print(f'    "{case}": "{hashed(case)}",')
