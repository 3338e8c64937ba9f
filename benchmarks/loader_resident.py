"""`ResidentLoader` against the customary pipeline for small images: Pillow per sample in a DataLoader with 2 workers.

Both make the batches of one `OverlapBatchSampler` with the same pixels: padding of 4, crop, flip, normalise, float32.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from loader_stalls import machine_busy
from torch.utils.data import DataLoader, Dataset

from dlb_fast.data import NORMALISATION, Compose, Flip, OverlapBatchSampler, PadCrop, ResidentLoader, SampleIndex

SIDE, PADDING = 32, 4
MEAN, STD = NORMALISATION["cifar10"]


class PilItems(Dataset[Any]):
    """torchvision's padded RandomCrop, flip, ToTensor and Normalize on Pillow images, with the loader's places."""

    def __init__(self, images: np.ndarray[Any, Any], targets: list[int]) -> None:
        self.images, self.targets = images, targets
        self.mean, self.std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def __getitem__(self, index: SampleIndex) -> Any:
        from PIL import Image, ImageOps

        rng = index.rng()
        top, left = rng.integer(2 * PADDING + 1), rng.integer(2 * PADDING + 1)
        padded = ImageOps.expand(Image.fromarray(self.images[index]), PADDING)
        view = padded.crop((left, top, left + SIDE, top + SIDE))
        if rng.uniform() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float().div_(255)
        return tensor.sub_(self.mean).div_(self.std), self.targets[index]


def pictures(count: int) -> SimpleNamespace:
    """Random pixels: their values cost nothing either way."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return SimpleNamespace(pixels=pixels, images=images, targets=[i % 10 for i in range(count)])


def resident(data: SimpleNamespace, batch_size: int) -> Iterator[torch.Tensor]:
    transform = Compose([PadCrop(PADDING), Flip()])
    loader = ResidentLoader(data, batch_size, transform=transform, mean=MEAN, std=STD)
    while True:
        yield from (batch.images for batch in loader)


def per_sample(data: SimpleNamespace, batch_size: int, workers: int) -> Iterator[torch.Tensor]:
    sampler = OverlapBatchSampler(len(data.pixels), batch_size)
    items = PilItems(data.pixels, data.targets)
    loader = DataLoader(items, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from (images for images, _ in loader)


Make = Callable[[], Iterator[torch.Tensor]]


def _speed(make: Make, views: int, cpu_seconds: Callable[[], float]) -> dict[str, float]:
    gc.collect()
    source = make()
    for _ in range(4):
        next(source)
    done, cpu, busy, started = 0, cpu_seconds(), machine_busy(), time.perf_counter()
    while done < views:
        done += len(next(source))
    taken = time.perf_counter() - started
    others = machine_busy() - busy - (cpu_seconds() - cpu)
    source.close()  # type: ignore[attr-defined]
    return {"views_per_s": done / taken, "others": others / taken}


def compare(rounds: int, cpu_seconds: Callable[[], float], batch_size: int = 256) -> list[dict[str, Any]]:
    """Interleaved rounds; the ratio is taken round by round."""
    data = pictures(10_000)
    mine, theirs = next(resident(data, batch_size)), next(per_sample(data, batch_size, 0))
    kinds: dict[str, tuple[Make, int]] = {
        "ResidentLoader, CPU": (lambda: resident(data, batch_size), 100 * batch_size),
        "Pillow per sample, DataLoader 2 workers": (lambda: per_sample(data, batch_size, 2), 30 * batch_size),
    }
    found = [{name: _speed(make, n, cpu_seconds) for name, (make, n) in kinds.items()} for _ in range(rounds)]
    common: dict[str, Any] = {"what": "resident", "rounds": rounds, "batch_size": batch_size}
    rows = [common | {"name": name, "views_per_s": [r[name]["views_per_s"] for r in found]} for name in kinds]
    ours, pil = kinds
    rows.append(common | {
        "name": "ratio", "largest_difference": (mine - theirs).abs().max().item(),
        "over_per_sample": [r[ours]["views_per_s"] / r[pil]["views_per_s"] for r in found],
        "others_max": round(max(v["others"] for r in found for v in r.values()), 3),
    })  # fmt: skip
    for row in rows:
        for key in ("views_per_s", "over_per_sample"):
            if key in row:
                low, middle, high = statistics.quantiles(row[key], n=4) if rounds > 1 else 3 * row[key]
                row[key] = {"median": round(middle, 3), "q25": round(low, 3), "q75": round(high, 3)}
    return rows
