"""torchvision's datasets and transforms in every loader, as people write them; the fast tier has stand-ins for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import write_images
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from with_torchvision import import_torchvision, missing

from dlb_fast import LastBatchLoss
from dlb_fast.data import (
    ClassBatchSampler,
    Compose,
    EvalLoader,
    Flip,
    ImageDecoder,
    IndexedDataset,
    MapDataset,
    OverlapBatchSampler,
    OverlapLoader,
    PadCrop,
    ResidentLoader,
    SampledLoader,
    SampleError,
    TwoViews,
    ViewPairSampler,
    collate_overlap,
    load_into_memory,
    pair_halves,
    train_transform,
)
from dlb_fast.data.transforms.single import takes_rng

NAMES = [f"{label}/{k}.png" for label in ("cat", "dog") for k in range(8)]  # image k of all is grey of value k


class Both:
    """torchvision's `StandardTransform`."""

    __module__ = "torchvision.datasets.vision"

    def __init__(self, transform: Any, target_transform: Any) -> None:
        self.transform, self.target_transform = transform, target_transform


def default_loader(path: str) -> Image.Image:
    """torchvision's way to open a file."""
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


default_loader.__module__ = "torchvision.datasets.folder"


class Folder(Dataset[Any]):
    """torchvision's `ImageFolder`."""

    __module__ = "torchvision.datasets.folder"

    def __init__(self, root: Path, transform: Any = None, target_transform: Any = None) -> None:
        self.classes = sorted(path.name for path in root.iterdir())
        self.samples = [(str(p), k) for k, name in enumerate(self.classes) for p in sorted((root / name).iterdir())]
        self.targets = [label for _, label in self.samples]
        self.transform, self.target_transform = transform, target_transform
        self.transforms = Both(transform, target_transform)
        self.loader = default_loader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, target = self.samples[index]
        image: Any = self.loader(path)
        if self.transform is not None:
            image = self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)


class Normed:
    """torchvision's `Compose([ToTensor(), Normalize(0.5, 0.5)])` with a random crop in front."""

    __module__ = "torchvision.transforms.transforms"

    def __call__(self, img: Any) -> torch.Tensor:
        assert isinstance(img, Image.Image)
        left = int(torch.randint(0, 3, ()))
        pixels = np.array(img.crop((left, 0, left + 4, 4)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def v1(modules: SimpleNamespace) -> Any:
    t = modules.v1
    return t.Compose([t.RandomCrop(4), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize([0.5] * 3, [0.5] * 3)])


def v2(modules: SimpleNamespace) -> Any:
    t = modules.v2
    steps = [t.ToImage(), t.RandomCrop(4), t.ToDtype(torch.float32, scale=True), t.Normalize([0.5] * 3, [0.5] * 3)]
    return t.Compose(steps)


KINDS = ["stand-in", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("v1", "v2"))]


@pytest.fixture(params=KINDS)
def vision(request: pytest.FixtureRequest, tmp_path: Path) -> SimpleNamespace:
    """(folder, transform): an ImageFolder maker, and a transform to normalised float tensors (3, 4, 4)."""
    root = write_images(tmp_path, NAMES)
    if request.param == "stand-in":
        return SimpleNamespace(folder=lambda **options: Folder(root, **options), transform=Normed())
    if reason := missing():
        pytest.skip(reason)
    import_torchvision()
    datasets = import_module("torchvision.datasets")
    modules = SimpleNamespace(v1=import_module("torchvision.transforms"), v2=import_module("torchvision.transforms.v2"))
    transform = {"v1": v1, "v2": v2}[request.param](modules)
    return SimpleNamespace(folder=lambda **options: datasets.ImageFolder(str(root), **options), transform=transform)


def grey(images: torch.Tensor) -> list[int]:
    """The grey value of each image that `Normed` and the like have made."""
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 4, 4) and type(images) is torch.Tensor
    return ((images.amax((1, 2, 3)) * 0.5 + 0.5) * 255).round().int().tolist()


def check(batches: list[Any]) -> None:
    """Every row shows the image of its id, with its label; the old half repeats the new half of the batch before."""
    before = None
    for batch in batches:
        assert grey(batch.images) == batch.ids.tolist() and batch.targets.tolist() == [
            i // 8 for i in grey(batch.images)
        ]
        assert before is None or batch.ids[: batch.num_old].tolist() == before
        before = batch.ids[batch.num_old :].tolist()


MAKERS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "OverlapLoader, transform of the loader": lambda v: OverlapLoader(v.folder(), 8, transform=v.transform),
    "OverlapLoader, transform of the dataset": lambda v: OverlapLoader(v.folder(transform=v.transform), 8),
    "ResidentLoader, transform of the loader": lambda v: ResidentLoader(v.folder(), 8, transform=v.transform),
    "ResidentLoader, transform of the dataset": lambda v: ResidentLoader(v.folder(transform=v.transform), 8),
    "DataLoader, transform of the dataset": lambda v: DataLoader(
        IndexedDataset(v.folder(transform=v.transform)),
        batch_sampler=OverlapBatchSampler(v.folder(), 8),
        collate_fn=collate_overlap,
    ),
    "DataLoader, transform of the wrapper": lambda v: DataLoader(
        IndexedDataset(v.folder(), v.transform),
        batch_sampler=OverlapBatchSampler(v.folder(), 8),
        collate_fn=collate_overlap,
    ),
    "TwoViews": lambda v: pair_halves(DataLoader(TwoViews(v.folder(), v.transform), batch_size=4, shuffle=True)),
    "in a Compose": lambda v: OverlapLoader(v.folder(), 8, transform=Compose([Flip(), v.transform])),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_loader_takes_them(vision: SimpleNamespace, name: str) -> None:
    made = MAKERS[name](vision)
    try:
        check([batch for _ in range(2) for batch in made])
    finally:
        getattr(made, "close", lambda: None)()


def test_each_view_is_transformed_anew(vision: SimpleNamespace) -> None:
    """Also where the dataset has the transform: its crops of an image of stripes differ between the views."""
    data = vision.folder(transform=vision.transform)
    stripes = Image.fromarray(np.tile(np.arange(6, dtype=np.uint8)[None, :, None] * 40, (5, 1, 3)))
    for path, _ in data.samples:
        stripes.save(path)
    for make in (OverlapLoader, ResidentLoader):
        with make(data, 8, shuffle=False, drop_last=False) as loader:
            batches = [batch for _ in range(4) for batch in loader]
        same = [torch.equal(b.new[k], after.old[k]) for b, after in pairwise(batches) for k in range(4)]
        assert same.count(False) > 0 and len(set(same)) == 2, make  # 3 places of a crop
    assert data.transform is vision.transform  # the user's dataset is left alone


def test_in_one_loop_with_the_criterion(vision: SimpleNamespace) -> None:
    data = vision.folder(transform=vision.transform)
    model, criterion = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)), LastBatchLoss(num_classes=2)
    loader = DataLoader(IndexedDataset(data), batch_sampler=OverlapBatchSampler(data, 8))  # torch's own collate
    for images, labels, ids in loader:
        criterion(model(images), labels, ids).backward()
        with torch.no_grad():
            model[1].weight += model[1].weight.grad
    assert criterion.buffer.mismatched == 0 and criterion.parts.lb > 0


def test_parts_of_datasets_and_their_labels(vision: SimpleNamespace) -> None:
    data = vision.folder(transform=vision.transform, target_transform=lambda label: 1 - label)
    part = Subset(data, range(4, 16))
    for make in (OverlapLoader, ResidentLoader):
        with make(part, 8) as loader:
            for batch in loader:
                assert grey(batch.images) == [i + 4 for i in batch.ids.tolist()]
                assert batch.targets.tolist() == [1 - (i + 4) // 8 for i in batch.ids.tolist()]
    both = ConcatDataset([Subset(data, [0, 1]), Subset(data, range(8, 14))])
    with OverlapLoader(both, 8) as loader:
        for batch in loader:
            assert grey(batch.images) == [i if i < 2 else i + 6 for i in batch.ids.tolist()]
    with pytest.raises(ValueError, match="datasets of the ConcatDataset have different transforms; give them none"):
        OverlapLoader(ConcatDataset([data, vision.folder()]), 8)


def test_the_other_loaders(vision: SimpleNamespace) -> None:
    data = vision.folder(transform=vision.transform)
    (batch,) = EvalLoader(data, 16)
    assert grey(batch.images) == list(range(16))
    (batch,) = EvalLoader(vision.folder(), 16, transform=vision.transform)
    assert grey(batch.images) == list(range(16))
    for sampler in (ViewPairSampler(data, 8), ClassBatchSampler(data.targets, 8)):
        for batch in SampledLoader(data, sampler):
            assert grey(batch.images) == batch.ids.tolist()
    loaded = load_into_memory(vision.folder())
    assert loaded.images.shape == (16, 3, 5, 6) and loaded.classes == ["cat", "dog"]
    with pytest.raises(TypeError, match=r"uint8 images are needed, sample 0 is torch.float32 \(3, 4, 4\); leave conv"):
        load_into_memory(data)


def test_our_transforms_on_their_datasets_are_exact(vision: SimpleNamespace) -> None:
    """`transform(image, rng)` gives the same batches from every loader, bit for bit."""
    data, transform = vision.folder(), Compose([PadCrop(1), Flip()])
    with OverlapLoader(data, 8, transform=transform, dtype=torch.uint8) as loader:
        whole = [batch.images.contiguous() for _ in range(2) for batch in loader]
    resident = ResidentLoader(data, 8, transform=transform, dtype=torch.uint8)
    dataset = IndexedDataset(data, transform)
    sampled = DataLoader(dataset, batch_sampler=OverlapBatchSampler(data, 8), collate_fn=collate_overlap)
    for other in (resident, sampled):
        assert all(map(torch.equal, whole, [batch.images for _ in range(2) for batch in other]))


def test_a_file_that_cannot_be_read_is_named(vision: SimpleNamespace) -> None:
    data = vision.folder(transform=vision.transform)
    Path(data.samples[13][0]).write_bytes(b"no image")
    with OverlapLoader(Subset(data, range(8, 16)), 4) as loader, pytest.raises(SampleError, match=r"dog/5\.png"):
        list(loader)


def test_their_files_are_read_by_our_decoder(vision: SimpleNamespace) -> None:
    """torchvision's own opens whatever Pillow knows, and Ghostscript draws an EPS."""
    data = vision.folder(transform=vision.transform)
    with (
        OverlapLoader(data, 8, decoder=ImageDecoder(max_pixels=29)) as loader,
        pytest.raises(SampleError, match="6 x 5 pixels, more than max_pixels=29"),
    ):
        next(iter(loader))
    for path, _ in data.samples[::3]:
        Path(path).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n%%EOF\n")
    for part in (data, Subset(data, range(4, 16)), ConcatDataset([data])):
        with (
            OverlapLoader(part, 8) as loader,
            pytest.raises(SampleError, match="not an image of a format that is read"),
        ):
            list(loader)
        with pytest.raises(ValueError, match="not an image of a format that is read"):
            ResidentLoader(part, 8)


class Mine(Dataset[Any]):
    """A dataset as people write it, with a transform of its own."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.new("RGB", (6, 5), (index,) * 3)), index % 2


def test_a_dataset_that_transforms_itself_is_read_for_each_view() -> None:
    calls = []

    def count(image: Image.Image) -> torch.Tensor:
        calls.append(image.getpixel((0, 0))[0])
        return torch.full((3, 2, 2), calls[-1] + 100.0 * calls.count(calls[-1]))

    with OverlapLoader(Mine(count), 4, shuffle=False, num_threads=1, depth=1) as loader:
        batches = list(loader)
    for batch, after in pairwise(batches):
        assert (after.old != batch.new).all() and torch.equal(after.old % 100, batch.new % 100)


class Mended(Folder):
    """A subclass that expects to have a transform."""

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.samples[index][0]) as image:
            return self.transform(image.convert("RGB")), self.targets[index]


def test_a_subclass_of_theirs_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Mended(write_images(tmp_path, NAMES), transform=Normed(), target_transform=int)
    with OverlapLoader(data, 8, num_threads=1) as loader:
        check(list(loader))
        assert loader.stats().reads <= 16 + 3 * 4  # an item is not read again for its second view


def test_what_cannot_be_is_said(vision: SimpleNamespace) -> None:
    data = vision.folder(transform=vision.transform)
    with (
        OverlapLoader(data, 8, mean=(0.5,) * 3, std=(0.5,) * 3) as loader,
        pytest.raises(ValueError, match="mean and std: "),
    ):
        next(iter(loader))
    resident = ResidentLoader(data, 8, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match="mean and std: expected uint8 views, got torch.float32, which the transform"):
        next(iter(resident))
    plain = DataLoader(
        IndexedDataset(vision.folder()), batch_sampler=OverlapBatchSampler(data, 8), collate_fn=collate_overlap
    )
    with pytest.raises(TypeError, match=r"got PIL images; end the dataset's transform with ToTensor\(\)"):
        next(iter(plain))
    with (
        OverlapLoader(vision.folder(), 8, transform=lambda image: image.float()) as loader,
        pytest.raises(
            RuntimeError, match=r"gets a PIL image \(RGB\) here, .*transform\(image, rng\), which gets a uint8"
        ),
    ):
        next(iter(loader))
    with pytest.raises(TypeError, match=r"seed must fit the transform: transform\(image\) takes no seed, got seed=3"):
        TwoViews(data, vision.transform, seed=3)
    with pytest.raises(TypeError, match=r"transform\(image, rng\) takes a seed, got seed=None"):
        TwoViews(data, train_transform("small", 4))


def test_how_a_transform_is_called_follows_from_its_arguments() -> None:
    one = [lambda image: image, lambda image, size=3: image, torch.nn.Identity(), Normed()]
    two = [lambda image, rng: image, lambda image, rng=None: image, lambda *args: args[0], Flip(), PadCrop(1)]
    two += [train_transform("small", 8), train_transform("imagenet", 8), SimpleNamespace, lambda image, other: image]
    assert [takes_rng(transform) for transform in one] == [False] * 4
    assert [takes_rng(transform) for transform in two] == [True] * len(two)


class Items(Dataset[Any]):
    """A dataset whose transform has a name of its own, and whose items are what `shape(image, label, index)` makes."""

    def __init__(self, shape: Callable[[Any, int, int], Any]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return self.shape(torch.rand(3, 4, 4), index % 2, index)


class Augmented(Items):
    """One whose transform has the usual name."""

    transform = True


def keyed(image: Any, label: int, index: int) -> Any:
    return {"image": image, "label": label}


def picked(dataset: Any, index: int) -> Any:
    item = dataset[index]
    return item["image"], item["label"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: OverlapLoader(Items(lambda *parts: parts[:2]), 8),
        lambda: OverlapLoader(Items(keyed), 8, load=picked),
        lambda: OverlapLoader(MapDataset(Items(keyed), picked), 8),
        lambda: OverlapLoader(Subset(Items(lambda *parts: parts[:2]), range(8)), 8),
        lambda: OverlapLoader(Augmented(keyed), 8, load=picked, transform=torch.nn.Identity()),
        lambda: OverlapLoader(MapDataset(Augmented(keyed), picked), 8, transform=torch.nn.Identity()),
    ],
    ids=["items", "load", "MapDataset", "Subset", "load, two transforms", "MapDataset, two transforms"],
)
def test_a_dataset_of_ones_own_never_gives_one_picture_twice(make: Callable[[], Any]) -> None:
    with make() as loader:
        for before, batch in pairwise(list(loader)):
            assert batch.ids[: batch.num_old].tolist() == before.ids[before.num_old :].tolist()
            assert not torch.equal(batch.old, before.new)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (keyed, "got dict with the keys 'image', 'label'; pass load=.* to OverlapLoader or to MapDataset"),
        (lambda *parts: parts, "got tuple of 3; pass load="),
        (lambda image, label, index: (image, {"boxes": [1] * index}), "the target dict with the keys 'boxes'; one cla"),
        (lambda image, label, index: (image, Image.new("L", (4, 4))), "the target Image; one class of the whole image"),
        (lambda image, label, index: (image, [(0, 0, 1, 1)]), "the target list of 1; one class of the whole image"),
        (lambda image, label, index: (image, "cat"), "the target 'cat'; number the class names"),
    ],
)
def test_items_that_cannot_be_trained_on_say_what_to_change(shape: Any, match: str) -> None:
    data = Items(shape)
    with pytest.raises(TypeError, match=f"IndexedDataset: expected a pair .*{match}"):
        next(iter(DataLoader(IndexedDataset(data), batch_sampler=OverlapBatchSampler(data, 8))))
    with OverlapLoader(data, 8) as loader, pytest.raises(SampleError, match=match):
        next(iter(loader))
    with pytest.raises(TypeError, match=match):
        load_into_memory(data)


def test_a_sampler_belongs_to_its_dataset() -> None:
    data = Items(lambda *parts: parts[:2])
    for other in (Subset(data, range(8)), ConcatDataset([data, data])):
        loader = DataLoader(IndexedDataset(other), batch_sampler=OverlapBatchSampler(data, 8))
        with pytest.raises(ValueError, match=f"sampler was made for 16 samples, this dataset has {len(other)}; make"):
            next(iter(loader))
    with pytest.raises(TypeError, match=r"got a list of them; pass .*batch_sampler=\.\.\.\), not as sampler="):
        next(iter(DataLoader(IndexedDataset(data), batch_size=4, sampler=OverlapBatchSampler(data, 8))))


def drawn(image: Any) -> torch.Tensor:
    """A transform as people write it: its random numbers are torch's, NumPy's and Python's."""
    numbers = [torch.rand(()).item(), float(np.random.rand()), random.random()]
    return torch.tensor(numbers, dtype=torch.float32).reshape(3, 1, 1)


@pytest.mark.parametrize("where", ["dataset", "wrapper", "resident", "workers"])
def test_views_of_global_random_numbers_are_the_same_in_every_run(tmp_path: Path, where: str) -> None:
    """In the DataLoader and in ResidentLoader; what the training itself draws is as if no image had been loaded."""
    data = Folder(write_images(tmp_path, NAMES))

    def loader() -> Any:
        if where == "resident":
            return ResidentLoader(data, 8, transform=drawn)
        own, given = (drawn, None) if where == "dataset" else (None, drawn)
        options: Any = {"num_workers": 2 if where == "workers" else 0, "generator": torch.Generator()}
        dataset = IndexedDataset(Folder(tmp_path, transform=own), given)
        return DataLoader(dataset, batch_sampler=OverlapBatchSampler(data, 8), collate_fn=collate_overlap, **options)

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    undisturbed = [torch.rand(()).item(), np.random.rand(), random.random()]
    seed()
    whole = list(loader())
    assert [torch.rand(()).item(), np.random.rand(), random.random()] == undisturbed
    again = list(loader())
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True))
    views = torch.cat([batch.images.flatten(1) for batch in whole])
    assert all(len(views[:, k].unique()) == len(views) for k in range(3))  # each view draws its own
