"""The input pipelines that `bench_loader.py` compares: all make the same crops of the same files, halves of 2 views.

A   naive: an overlapping batch sampler in a DataLoader, so every image is decoded twice; Pillow, float32.
B   the published scheme: two views per item, stacked, in a DataLoader; Pillow, float32 (Meta-knowledge-Lab/DLB). It is
    given the two halves as views of the stacks: no time is charged for joining them.
ours: `OverlapLoader`. Others are built when their library imports.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dlb_fast.data import OverlapBatchSampler, OverlapLoader, OverlapPlan, RandomResizedCrop, ViewRng, train_transform
from dlb_fast.data.decode.decode import ImageDecoder
from dlb_fast.data.sampler import SampleIndex

SIZE, SEED = 224, 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BOX = RandomResizedCrop(SIZE)
_OPERATORS: Any = None  # a torch library lives as long as its object
Halves = Sequence[torch.Tensor]  # the images of one batch, in one tensor or two


class Files:
    """JPEG files with targets, in one list: the set every contender reads."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [str(path) for path in paths]
        self.targets = [i % 10 for i in range(len(paths))]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        with open(self.paths[index], "rb") as file:
            return file.read()


def make_files(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Files:
    """JPEGs (quality 90, 4:2:0) from random crops of scikit-learn's two photographs; nothing is downloaded."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        photo = photos[i % 2]
        w = int(rng.integers(size[0] * 3 // 5, photo.width + 1))
        h = min(photo.height, w * size[1] // size[0])
        left, top = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
        paths.append(folder / f"{i:05}.jpg")
        crop = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        crop.save(paths[-1], "JPEG", quality=90, subsampling=2)
    return Files(paths)


def pil_view(image: Any, rng: ViewRng, floats: bool = True) -> Any:
    """torchvision's RandomResizedCrop, flip, ToTensor and Normalize on a Pillow image, with the loader's own crop."""
    from PIL import Image

    top, left, h, w = _BOX.box(image.height, image.width, rng)
    view = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if rng.uniform() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()
    if not floats:
        return tensor
    return tensor.float().div_(255).sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def pil_open(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


class NaiveItems(Dataset[Any]):
    """Anchor A: one view per request, so a decode per view."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __getitem__(self, index: SampleIndex) -> Any:
        return pil_view(pil_open(self.files.read(index)), index.rng()), self.files.targets[index]


class TwoViewItems(Dataset[Any]):
    """Anchor B: one decode, two stacked views per item."""

    def __init__(self, files: Files, floats: bool = True) -> None:
        self.files, self.floats = files, floats

    def __getitem__(self, index: SampleIndex) -> Any:
        image = pil_open(self.files.read(index))
        views = [pil_view(image, ViewRng(SEED, index.epoch, int(index), u), self.floats) for u in (0, 1)]
        return torch.stack(views), self.files.targets[index]


class HalfSampler:
    """New halves only, for anchor B."""

    def __init__(self, length: int, half: int) -> None:
        self.plan, self.epoch = OverlapPlan(length, half, seed=SEED), 0

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for step in range(len(self)):
            yield [SampleIndex(i, SEED, epoch, 0, step) for i in self.plan.half(epoch, step).tolist()]


def _epochs(source: Any) -> Iterator[Any]:
    while True:
        yield from source


def naive(files: Files, half: int, workers: int) -> Iterator[Halves]:
    sampler = OverlapBatchSampler(files, 2 * half, seed=SEED)
    loader = DataLoader(NaiveItems(files), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    for images, _ in _epochs(loader):
        yield [images]


def published(files: Files, half: int, workers: int, floats: bool = True) -> Iterator[Halves]:
    items = TwoViewItems(files, floats)
    sampler = HalfSampler(len(files), half)
    loader = DataLoader(items, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)  # type: ignore[arg-type]
    yield from _paired(stack for stack, _ in _epochs(loader))


def ours(files: Files, half: int, threads: int, dtype: torch.dtype, transform: Any = None) -> Iterator[Halves]:
    transform = transform or train_transform("imagenet", SIZE)
    loader = OverlapLoader(
        files, 2 * half, transform=transform, num_threads=threads, seed=SEED, dtype=dtype, mean=MEAN, std=STD,
    )
    with loader:
        for batch in _epochs(loader):
            yield [batch.images]


def opencv_view(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
    """The same crops resized by OpenCV without antialiasing: a transform of the user's own."""
    import cv2

    top, left, h, w = _BOX.box(image.shape[1], image.shape[2], rng)
    window = np.ascontiguousarray(image[:, top : top + h, left : left + w].permute(1, 2, 0).numpy())
    view = cv2.resize(window, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(view[:, ::-1].copy() if rng.uniform() < 0.5 else view).permute(2, 0, 1)


def torchdata_nodes(files: Files, half: int, workers: int) -> Iterator[Halves]:
    """torchdata's thread mapper around our decoder and transform, two views per item (the published pairing)."""
    from torchdata.nodes import Batcher, IterableWrapper, Loader, ParallelMapper, Prefetcher

    items = _FastItems(files)
    sampler = HalfSampler(len(files), half)
    node = IterableWrapper(i for batch in _epochs(sampler) for i in batch)
    node = ParallelMapper(node, items, num_workers=workers, method="thread")
    node = Prefetcher(Batcher(node, half), 2)
    yield from _paired(torch.stack(list(batch)) for batch in Loader(node))


def spdl(files: Files, half: int, workers: int) -> Iterator[Halves]:
    """SPDL's thread pipeline around our decoder and transform, two views per item (the published pairing)."""
    from spdl.pipeline import PipelineBuilder

    items, sampler = _FastItems(files), HalfSampler(len(files), half)
    pipeline = (
        PipelineBuilder()
        .add_source(i for batch in _epochs(sampler) for i in batch)
        .pipe(items, concurrency=workers, output_order="input")
        .aggregate(half)
        .pipe(torch.stack)
        .add_sink(2)
        .build(num_threads=workers)
    )
    with pipeline.auto_stop():
        yield from _paired(pipeline.get_iterator())


def import_timm() -> Any:
    """timm's loader module.

    Beside a CPU build of torch, the torchvision of PyPI lacks its compiled operators and fails where it describes two
    of them; timm's loader uses none, so naming them is enough to import it.
    """
    global _OPERATORS
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        if _OPERATORS is not None:
            raise  # they are named, and it lacks something else
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _OPERATORS = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm.data.loader

    return timm.data.loader


def timm_prefetcher(files: Files, half: int, workers: int) -> Iterator[Halves]:
    """timm's PrefetchLoader (uint8 transport, normalisation on the device) over the published two-view items."""
    loader_module = import_timm()

    def flat(items: list[Any]) -> Any:
        return torch.cat([views for views, _ in items]), torch.tensor([t for _, t in items])

    loader = DataLoader(
        TwoViewItems(files, floats=False), batch_sampler=HalfSampler(len(files), half),  # type: ignore[arg-type]
        num_workers=workers, persistent_workers=workers > 0, collate_fn=flat,
    )
    fetched = loader_module.PrefetchLoader(
        loader, mean=MEAN, std=STD, device=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    yield from _paired(images.unflatten(0, (-1, 2)) for images, _ in _epochs(fetched))


class _FastItems:
    def __init__(self, files: Files) -> None:
        self.files, self.decode, self.transform = files, ImageDecoder(), train_transform("imagenet", SIZE)

    def __call__(self, index: SampleIndex) -> torch.Tensor:
        image = torch.from_numpy(self.decode(self.files.read(index))).permute(2, 0, 1)
        return torch.stack([self.transform(image, ViewRng(SEED, index.epoch, int(index), u)) for u in (0, 1)])


def _paired(stacks: Iterator[torch.Tensor]) -> Iterator[Halves]:
    before = None
    for stack in stacks:
        if before is not None:
            yield before[:, 1], stack[:, 0]
        before = stack


@dataclass(frozen=True)
class Contender:
    """A pipeline under a name; `make(files, half)` iterates over the images of its batches."""

    name: str
    make: Callable[[Files, int], Iterator[Halves]]
    library: str = ""

    def missing(self) -> str:
        """Why it cannot run here, or ""."""
        if not self.library:
            return ""
        try:
            import_timm() if self.library == "timm" else importlib.import_module(self.library)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def contenders() -> list[Contender]:
    """All of them; the first two are the anchors."""
    found = [
        Contender("A naive overlap, DataLoader 2 workers, PIL, float32", lambda f, h: naive(f, h, 2)),
        Contender("B published two views, DataLoader 2 workers, PIL, float32", lambda f, h: published(f, h, 2)),
        Contender("B8 as B but uint8 out of the worker", lambda f, h: published(f, h, 2, floats=False)),
        Contender("ours 1 thread, uint8", lambda f, h: ours(f, h, 1, torch.uint8)),
        Contender("ours 2 threads, uint8", lambda f, h: ours(f, h, 2, torch.uint8)),
        Contender("ours 4 threads, uint8", lambda f, h: ours(f, h, 4, torch.uint8)),
        Contender("ours 2 threads, float32 normalised on the CPU", lambda f, h: ours(f, h, 2, torch.float32)),
        Contender(
            "ours 2 threads, uint8, OpenCV (aliased)", lambda f, h: ours(f, h, 2, torch.uint8, opencv_view), "cv2"
        ),
        Contender("torchdata nodes 2 threads, our decode, uint8", lambda f, h: torchdata_nodes(f, h, 2), "torchdata"),
        Contender("SPDL 2 threads, our decode, uint8", lambda f, h: spdl(f, h, 2), "spdl.pipeline"),
        Contender("timm PrefetchLoader 2 workers, PIL, float32", lambda f, h: timm_prefetcher(f, h, 2), "timm"),
    ]
    return found


@contextlib.contextmanager
def running(contender: Contender, files: Files, half: int) -> Iterator[Iterator[Halves]]:
    """Its iterator, closed (with its threads and processes) on the way out."""
    iterator = contender.make(files, half)
    try:
        yield iterator
    finally:
        iterator.close()  # type: ignore[attr-defined]
