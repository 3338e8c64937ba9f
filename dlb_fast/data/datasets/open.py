"""`open_dataset` opens the dataset of `--data KIND[:PATH]`; `MapDataset` and `load_into_memory` take any dataset."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from dlb_fast._args import as_int
from dlb_fast.data._args import class_index, class_indices, length_of
from dlb_fast.data.datasets.arrays import ArrayDataset, check_split, cifar, digits, stratified_split, synthetic
from dlb_fast.data.datasets.folder import (
    ImageFolder,
    ListFile,
    TinyImageNet,
    class_folders,
    is_hidden,
    say,
    some,
    split_of,
    tree,
    unreadable,
)
from dlb_fast.data.datasets.source import as_image, as_pair
from dlb_fast.data.datasets.tar import TarShards
from dlb_fast.data.rng import ViewRng
from dlb_fast.data.transforms.crops import Transform
from dlb_fast.data.transforms.single import as_transform

__all__ = ["MapDataset", "load_into_memory", "open_dataset"]

_KINDS = {
    "digits": "", "cifar10": ":PATH", "cifar100": ":PATH", "imagefolder": ":PATH", "tinyimagenet": ":PATH",
    "list": ":FILE", "tar": ":PATH", "synthetic": "[:N,C,SIZE]",
}  # fmt: skip
_HELD_OUT = 0.1  # fraction of each class that becomes the test set of a dataset without one
_VALIDATION = ("val", "valid", "validation", "test")
_SYNTHETIC_DEFAULT = (2000, 10, 32)


def open_dataset(kind: str, split: str = "train", *, seed: int = 0) -> Any:
    """Open the dataset of `--data KIND[:PATH]`.

    Args:
        kind: digits | cifar10:PATH | cifar100:PATH | imagefolder:PATH | tinyimagenet:PATH | list:FILE | tar:PATH |
            synthetic[:N,C,SIZE] (N training images of C classes, SIZE pixels square).
        split: "train" or "test". An imagefolder may contain `train` and one of val, valid, validation, test (`train`
            alone is a split if it contains class folders, else a class; another usual spelling, such as Val, is taken
            with a log line). For any other imagefolder, list or tar a tenth of every class, chosen by `seed`, is held
            out as the test set, with a log line.
        seed: seed of the random splits and of synthetic images.

    Returns:
        A dataset with `__len__`, `classes`, `num_classes`, `targets` and either `images` (N, c, h, w) uint8 or
        `read(i)`.

    Raises:
        ValueError: an unknown kind, a path that is missing or superfluous, or folders whose meaning is not certain.
        FileNotFoundError: the path does not exist.

    Example:
        >>> dataset = open_dataset("synthetic:20,2,8", "test")
        >>> len(dataset), dataset.num_classes, tuple(dataset.images.shape)
        (5, 2, (5, 3, 8, 8))
    """
    if not isinstance(kind, str):
        raise TypeError(f"open_dataset: expected a string KIND[:PATH], got {kind!r}")
    check_kind(kind)
    name, _, path = kind.partition(":")
    check_split("open_dataset", split)
    if name == "digits":
        if path:
            raise ValueError(f"open_dataset: digits takes no path (scikit-learn ships the images), got {kind!r}")
        return digits(split, seed=seed)
    if name == "synthetic":
        return synthetic(split, **_synthetic_sizes(kind, path), seed=seed)
    openers: dict[str, Callable[[], Any]] = {
        "cifar10": lambda: cifar(path, 10, split),
        "cifar100": lambda: cifar(path, 100, split),
        "imagefolder": lambda: _folder(Path(path), split, seed),
        "tinyimagenet": lambda: TinyImageNet(path, split),
        "list": lambda: _held_out(ListFile(path), split, seed),
        "tar": lambda: _held_out(TarShards(path), split, seed),
    }
    if not path:
        raise ValueError(f"open_dataset: {name} needs a path, as in {name}:/data/{name}; got {kind!r}")
    return openers[name]()


def check_kind(kind: str) -> None:
    """ValueError for a KIND[:PATH] whose kind is unknown."""
    name, _, path = kind.partition(":")
    if name not in _KINDS:
        found = next((one for one in (kind, path) if os.path.exists(one)), "")
        meant = "imagefolder" if os.path.isdir(found) else "tar" if found.endswith(".tar") else "list"
        raise ValueError(
            f"open_dataset: unknown kind {name!r} in {kind!r}; expected one of "
            + ", ".join(one + rest for one, rest in _KINDS.items())
            + (f" (is {meant}:{found} meant?)" if found else "")
        )


def _synthetic_sizes(kind: str, path: str) -> dict[str, int]:
    sizes = list(_SYNTHETIC_DEFAULT)
    given = path.split(",") if path else []
    try:
        numbers = [int(part) for part in given]
    except ValueError:
        numbers = []
    if len(given) > 3 or len(numbers) != len(given):
        raise ValueError(f"open_dataset: expected synthetic[:N[,C[,SIZE]]] with integers, got {kind!r}")
    sizes[: len(numbers)] = numbers
    return dict(zip(("length", "num_classes", "size"), sizes, strict=True))


def _folder(root: Path, split: str, seed: int) -> Any:
    """The split of a folder of images: of its `train` and validation folders, or a tenth of each class is held out."""
    train, validation, said = find_splits(root)
    if train is None:
        return _held_out(ImageFolder(root), split, seed)
    if said:
        say(f"{root}: {said}")
    found = ImageFolder(train)
    if validation is None:
        return _held_out(found, split, seed)
    if split == "train":
        return found
    test = ImageFolder(validation, classes=found.classes)
    for name in found.classes:
        here, there = train / name, validation / name
        if there.exists() and here.exists() and os.path.samefile(here, there):
            raise ValueError(
                f"open_dataset: {there} is {here}, so its test images would be those of the training; remove the link"
            )
    counts = np.bincount(test.targets, minlength=len(found.classes))
    lacking = [found.classes[label] for label in np.flatnonzero(counts == 0)]
    if lacking:
        say(f"{validation} lacks {len(lacking)} of the {len(found.classes)} classes of {train}: {some(lacking)}")
    return test


def find_splits(root: Path) -> tuple[Path | None, Path | None, str]:
    """(training folder, validation folder, what to say) of a folder of images; (None, None, "") if it has no splits.

    `train` is a split if it has class folders, or a validation folder lies beside it; else it may be a class, beside
    `bus` and `car`. Split names are known in any case and in the usual spellings.

    Raises:
        ValueError: it is not certain which folders are the splits.
    """
    folders = class_folders(root)
    if (root / "wnids.txt").is_file():
        raise ValueError(f"open_dataset: {root} is TinyImageNet as published; use tinyimagenet:{root}")
    named: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    for name in folders:
        named[split_of(name)].append(name)
    trains = [name for name in named["train"] if class_names(root / name)]
    if not trains and not (named["train"] and (named["val"] or named["test"] or not named[""])):
        return None, None, ""
    for names in (named["train"], named["val"], named["test"]):
        if len(names) > 1:
            raise ValueError(
                f"open_dataset: {root} has several folders for one split: {some(names)}; rename or remove all but one"
            )
    (train,) = named["train"]
    classes = set(class_names(root / train))
    labelled = [name for name in named["val"] + named["test"] if class_names(root / name)]
    validation = (named["val"] + labelled)[:1]
    unused = [name for name in folders if name not in (train, *validation)]
    for name in named[""]:
        twins = sorted(classes & set(class_names(root / name)))
        if twins or not (validation or class_names(root / name)):
            has = f"has folders like the classes of {train!r} ({some(twins)})" if twins else "holds images or nothing"
            raise ValueError(
                f"open_dataset: {root}: {name!r} beside {train!r} {has}: is it a split or a class? Name a validation "
                f"folder val, valid, validation or test, and move anything else out of {root}"
            )
    if validation and os.path.samefile(root / train, root / validation[0]):
        raise ValueError(
            f"open_dataset: {root}/{validation[0]} is {root}/{train}, so the test images would be those of the "
            "training; remove it, and a tenth of each class is held out"
        )
    said = f"trains on {train}" + (f", tests on {validation[0]}" if validation else "")
    said += f"; not used: {some(unused)}" if unused else ""
    usual = train == "train" and (not validation or validation[0] in _VALIDATION)
    return root / train, root / validation[0] if validation else None, "" if usual and not unused else said


def class_names(folder: Path) -> list[str]:
    """Names of the class folders in `folder`; [] if it has none."""
    found = tree(str(folder), "", unreadable, deep=False)
    return [name for name, is_folder, _ in found if is_folder and not is_hidden(name)]


def held_out(dataset: Any, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training indices, test indices) of a dataset without a test set of its own."""
    return stratified_split(dataset.targets, _HELD_OUT, seed)


def _held_out(dataset: Any, split: str, seed: int) -> Any:
    train, test = held_out(dataset, seed)
    if len(test) == 0:
        raise ValueError(f"open_dataset: {dataset!r} has no class with two images, so there is nothing to hold out")
    lone = int((np.bincount(dataset.targets) == 1).sum())
    without = f", without the {lone} classes of a single image" if lone else ""
    say(f"{dataset.root} has no test set: a stratified tenth ({len(test)} of {len(dataset)}) is held out{without}")
    return dataset.select(train if split == "train" else test)


class MapDataset:
    """Adds `targets` and `classes` to any map-style dataset and converts its images to (c, h, w) tensors.

    For `OverlapLoader` pass the dataset itself: `OverlapLoader(dataset, batch_size, load=load)`.

    Args:
        dataset: has `__len__` and whatever `load` uses.
        load: `load(dataset, i)` returns (image, target); None means `dataset[i]`. Images are uint8 tensors (c, h, w),
            arrays (h, w[, c]) or PIL images (grey images have one channel, all others become RGB).
        targets: (N,) class indices; None means `dataset.targets`, or the targets of all samples, loaded at first use.
        classes: class names; None means `dataset.classes`, or numbers.
    """

    def __init__(
        self,
        dataset: Any,
        load: Callable[[Any, int], tuple[Any, Any]] | None = None,
        *,
        targets: Any = None,
        classes: list[str] | None = None,
    ) -> None:
        length_of("MapDataset", dataset)
        self.dataset = dataset
        self.load = load if load is not None else lambda data, index: data[index]
        self._targets = targets if targets is not None else getattr(dataset, "targets", None)
        self._classes = classes if classes is not None else _classes_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, target = as_pair(self.load(self.dataset, index))
        return as_image(image), class_index("MapDataset", target)

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) class indices."""
        if self._targets is None:
            pairs = (as_pair(self.load(self.dataset, index)) for index in range(len(self)))
            self._targets = [class_index("MapDataset", target) for _, target in pairs]
        self._targets = class_indices("MapDataset", self._targets)
        return self._targets

    @property
    def classes(self) -> list[str]:
        """Names, or numbers where the dataset has no names."""
        if self._classes is None:
            self._classes = [str(c) for c in range(int(self.targets.max()) + 1)]
        return list(self._classes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def _classes_of(dataset: Any) -> list[str] | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "classes", None)


def load_into_memory(dataset: Any, transform: Transform | None = None, *, num_threads: int = 2) -> ArrayDataset:
    """Load a dataset into memory as uint8, for `ResidentLoader`.

    Args:
        dataset: `dataset[i]` returns (image, target); the image is a uint8 tensor (c, h, w), an array or a PIL image.
        transform: a deterministic transform that gives all images one size, such as `eval_transform(64)`.
        num_threads: number of loading threads.

    Raises:
        ValueError: no samples, or images of different sizes.
    """
    length_of("load_into_memory", dataset)
    name = getattr(dataset, "name", "array")
    if hasattr(dataset, "images") and hasattr(dataset, "targets") and transform is None:
        return ArrayDataset(dataset.images, dataset.targets, MapDataset(dataset).classes, name)
    if len(dataset) == 0:
        raise ValueError(f"load_into_memory: {dataset!r} has no samples")
    view = as_transform("load_into_memory", transform)
    targets = np.empty(len(dataset), dtype=np.int64)

    def one(index: int) -> torch.Tensor:
        item, target = as_pair(dataset[index])
        targets[index] = class_index("load_into_memory", target)
        image = as_image(item)
        return image if view is None else view(image, ViewRng(0, 0, index, 0))

    first = one(0)
    if first.dtype != torch.uint8:
        raise TypeError(
            f"load_into_memory: uint8 images are needed, sample 0 is {first.dtype} {tuple(first.shape)}; leave "
            "conversions such as ToTensor to the loader, and pass a dataset without a transform of its own"
        )
    images = torch.empty((len(dataset), *first.shape), dtype=first.dtype, device="cpu")

    def fill(index: int) -> None:
        image = one(index)
        if image.shape != first.shape:
            raise ValueError(
                f"load_into_memory: sample {index} has shape {tuple(image.shape)}, sample 0 has {tuple(first.shape)}; "
                "pass a transform that brings all to one size, such as eval_transform(64)"
            )
        images[index] = image

    with ThreadPoolExecutor(as_int(num_threads, "load_into_memory", "num_threads", 1)) as pool:
        for _ in pool.map(fill, range(len(dataset))):
            pass
    known = hasattr(dataset, "targets") and getattr(dataset, "target_transform", None) is None
    labels = dataset.targets if known else targets
    return ArrayDataset(images, labels, MapDataset(dataset, targets=labels).classes, name)
