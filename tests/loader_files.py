"""A small folder of JPEGs, a dataset of it, and a loader for it: shared by the loader's tests."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import torch
from builders import jpeg, wait_for

from dlb_fast.data.loaders.overlap import OverlapLoader
from dlb_fast.data.rng import ViewRng


class Files:
    """A list of files, read when asked; id i has target i % 3."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.targets = [i % 3 for i in range(len(paths))]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> str:
        return str(self.paths[index])


def make_files(folder: Path) -> Files:
    paths = []
    for i in range(24):
        paths.append(folder / f"{i:02}.jpg")
        paths[-1].write_bytes(jpeg(i))
    return Files(paths)


def corner(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
    top = rng.integer(20)
    return image[:, top : top + 32, top : top + 32]


def loader(data: Any, batch_size: int = 8, **options: Any) -> OverlapLoader:
    defaults = {"transform": corner, "num_threads": 2, "dtype": torch.uint8, "timeout": 20}
    return OverlapLoader(data, batch_size, **{**defaults, **options})


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dlb-")]


def assert_no_threads() -> None:
    """All threads of loaders ended (a moment is allowed to those that were just told to)."""
    gc.collect()
    wait_for(lambda: not threads(), f"the end of {threads()}")
