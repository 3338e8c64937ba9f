"""Datasets in memory, with all images in one uint8 tensor: digits, CIFAR and synthetic images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast._args import as_int
from dlb_fast.data._args import class_indices
from dlb_fast.data.batch import tensor_of
from dlb_fast.data.rng import SPLIT, SYNTHETIC, fold_array, key_of, permutation

if TYPE_CHECKING:
    from typing_extensions import Self

_LOG = logging.getLogger("dlb_fast.data")

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR_PIXELS = 3 * 32 * 32


class ArrayDataset:
    """A map-style dataset in memory: `dataset[i]` is `(image (c, h, w) uint8, target)`.

    Args:
        images: (N, c, h, w) uint8.
        targets: (N,) class indices below `len(classes)`.
        classes: class names.
        name: name of the dataset, for messages and logs.

    Attributes:
        rows: (N,) positions of the samples in the data set as it was before `select`.

    Raises:
        TypeError: another dtype or number of dimensions.
        ValueError: lengths that differ, or a target out of range.
    """

    def __init__(self, images: Any, targets: Any, classes: Sequence[str], name: str = "array") -> None:
        self.images = tensor_of(images)
        self.targets = torch.from_numpy(class_indices(name, targets))
        self.classes = list(classes)
        self.name = name
        self.rows: NDArray[np.int64] = np.arange(len(self.targets))
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise TypeError(
                f"{name}: images must be uint8 (N, channels, height, width), got {self.images.dtype} "
                f"{tuple(self.images.shape)}"
            )
        if self.targets.shape != (len(self.images),):
            raise ValueError(f"{name}: {len(self.images)} images need as many targets, got {tuple(self.targets.shape)}")
        if len(self.targets) and not (self.targets.min() >= 0 and self.targets.max() < self.num_classes):
            raise ValueError(
                f"{name}: targets must be in [0, {self.num_classes}), got {int(self.targets.min())} to "
                f"{int(self.targets.max())}"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.targets[index])

    def select(self, indices: NDArray[np.int64]) -> Self:
        """A dataset of only these samples, in this order; ids start again at 0."""
        chosen = copy.copy(self)
        rows = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        chosen.images, chosen.targets = self.images[rows], self.targets[rows]
        chosen.rows = self.rows[indices]
        return chosen

    def with_targets(self, targets: NDArray[np.int64]) -> Self:
        """The same images with other targets."""
        changed = copy.copy(self)
        changed.targets = torch.from_numpy(class_indices(self.name, targets))
        return changed

    def __repr__(self) -> str:
        shape = "x".join(str(s) for s in self.images.shape[1:])
        return f"{type(self).__name__}({self.name}: {len(self)} images {shape}, {self.num_classes} classes)"


def check_split(operation: str, split: str) -> str:
    """`split`; ValueError unless it is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f'{operation}: split must be "train" or "test", got {split!r}')
    return split


def stratified_split(targets: NDArray[np.int64], test_share: float, seed: int) -> tuple[Any, Any]:
    """(train indices, test indices), sorted: `test_share` of every class, chosen by the seed, is the test set.

    A class with two or more samples has at least one on each side; a single sample is for training.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"stratified_split: test_share must be between 0 and 1, got {test_share}")
    test = np.zeros(len(targets), dtype=bool)
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        if len(members) > 1:
            count = min(max(1, round(test_share * len(members))), len(members) - 1)
            order = permutation(key_of(seed, SPLIT, int(label)), len(members))
            test[members[order[:count]]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def digits(split: str = "train", *, seed: int = 0, test_share: float = 0.5) -> ArrayDataset:
    """1797 real handwritten digits, (N, 1, 8, 8), which scikit-learn ships; no download.

    Args:
        split: "train" or "test".
        seed: seed of the stratified split.
        test_share: fraction of each class in the test set. Half by default, because a smaller test set could not
            separate the methods: with 900 images the standard error is 0.6 % at 96 %.

    Source: scikit-learn `load_digits`: Optical Recognition of Handwritten Digits (UCI); grey values 0 to 16 are scaled
    to 0 to 255.
    """
    check_split("digits", split)
    try:
        from sklearn.datasets import load_digits
    except Exception as error:
        raise RuntimeError(
            f"digits: scikit-learn ships these images and cannot be imported ({error}); pip install scikit-learn, or "
            "use --data synthetic"
        ) from error
    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[:, None]
    targets = found.target.astype(np.int64)
    train, test = stratified_split(targets, test_share, seed)
    chosen = train if split == "train" else test
    return ArrayDataset(images, targets, [str(d) for d in range(10)], name="digits").select(chosen)


def synthetic(
    split: str = "train",
    *,
    length: int = 2000,
    num_classes: int = 10,
    size: int = 32,
    seed: int = 0,
) -> ArrayDataset:
    """Synthetic images, the same on every machine: a smooth pattern per class plus strong noise.

    Args:
        split: "train" has `length` samples, "test" a quarter of it (at least one per class), with the same patterns.
        length: number of training samples.
        num_classes: number of classes.
        size: height and width of the 3-channel images.
        seed: seed of patterns, targets and noise.
    """
    name = "synthetic"
    check_split(name, split)
    num_classes, size = as_int(num_classes, name, "C", 2), as_int(size, name, "SIZE", 4)
    length = as_int(length, name, "N", num_classes)
    count = length if split == "train" else max(num_classes, length // 4)
    corners = _bytes(key_of(seed, SYNTHETIC, 0), num_classes * 3 * 4 * 4).reshape(num_classes, 3, 4, 4)
    at = np.linspace(0, 3, size)
    low = np.minimum(at.astype(int), 2)
    part = at - low
    rows = corners[:, :, low] * (1 - part)[:, None] + corners[:, :, low + 1] * part[:, None]
    patterns = rows[..., low] * (1 - part) + rows[..., low + 1] * part
    which = 1 if split == "train" else 2
    targets = np.arange(count) % num_classes
    targets = targets[permutation(key_of(seed, SYNTHETIC, which, 0), count)].astype(np.int64)
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    for start in range(0, count, 1024):  # in chunks, because the float64 sums take eight times the memory
        labels = targets[start : start + 1024]
        key = key_of(seed, SYNTHETIC, which, 1, start)
        noise = _bytes(key, len(labels) * 3 * size * size).reshape(-1, 3, size, size)
        images[start : start + 1024] = np.round(0.4 * patterns[labels] + 0.6 * noise)
    return ArrayDataset(images, targets, [f"class_{c}" for c in range(num_classes)], name=name)


def _bytes(key: int, count: int) -> NDArray[np.uint8]:
    words = fold_array(key, np.arange(-(-count // 8), dtype=np.int64))
    return words.astype("<u8").view(np.uint8)[:count]


def cifar(path: str | Path, classes: int, split: str = "train") -> ArrayDataset:
    """CIFAR-10 or CIFAR-100 from the published *binary* version; the Python version is not read, because it is pickled.

    CIFAR-100 has `superclasses` (100,), the coarse label of each class.

    Args:
        path: the unpacked folder (`cifar-10-batches-bin`, `cifar-100-binary`) or its parent.
        classes: 10 or 100 (fine labels).
        split: "train" or "test".

    Raises:
        FileNotFoundError: a folder or file is missing; the message names it.
        ValueError: a file has the wrong size or a label out of range; the message names file, offset and value.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images"; format:
        https://www.cs.toronto.edu/~kriz/cifar.html
    """
    if classes not in (10, 100):
        raise ValueError(f"cifar: classes must be 10 or 100, got {classes!r}")
    name = f"cifar{classes}"
    check_split(name, split)
    if classes == 10:
        files = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
        labels, published, inner, names_file = 1, 10_000, "cifar-10-batches-bin", "batches.meta.txt"
    else:
        files = ["train.bin" if split == "train" else "test.bin"]
        labels, published = 2, 50_000 if split == "train" else 10_000
        inner, names_file = "cifar-100-binary", "fine_label_names.txt"
    folder = _cifar_folder(Path(path), inner, files, name)
    parts = [_read_cifar(folder / file, labels, classes, published) for file in files]
    names = [f"class_{c}" for c in range(classes)] if classes == 100 else list(CIFAR10_CLASSES)
    if (folder / names_file).is_file():
        listed = [line.strip() for line in (folder / names_file).read_text().splitlines() if line.strip()]
        names = listed if len(listed) == classes else names
    images, targets, coarse = (np.concatenate(part) for part in zip(*parts, strict=True))
    dataset: Any = ArrayDataset(images, targets, names, name=name)
    if classes == 100:
        dataset.superclasses = _superclasses(folder / files[0], targets, coarse)
    return dataset


def _superclasses(file: Path, targets: NDArray[np.int64], coarse: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(100,) coarse label of each fine one; -1 for a class without an image."""
    found = np.full(100, -1)
    found[targets] = coarse
    wrong = np.flatnonzero(found[targets] != coarse)
    if len(wrong):
        raise ValueError(
            f"{file}: record {wrong[0]} has the coarse label {coarse[wrong[0]]}, others of its class "
            f"{targets[wrong[0]]} have {found[targets[wrong[0]]]}: damaged, or another set's file"
        )
    return found


def _cifar_folder(path: Path, inner: str, files: list[str], name: str) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"{name}: no folder {path}; unpack the binary version of the set ({_CIFAR_PAGE}) and pass its folder"
        )
    folder = path / inner if (path / inner).is_dir() else path
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        pickled = any(folder.glob("data_batch_[0-9]")) or (folder / "meta").is_file() or any(path.glob("cifar-*-py*"))
        hint = (
            "; this looks like the Python (pickled) version, which is not read, because unpickling runs code" * pickled
        )
        raise FileNotFoundError(
            f"{name}: {folder} lacks {', '.join(missing)}{hint}; get the binary version from {_CIFAR_PAGE}"
        )
    return folder


def _read_cifar(file: Path, labels: int, classes: int, published: int) -> tuple[Any, Any, Any]:
    """(images, labels, first label of each record) of a file."""
    record, size = labels + _CIFAR_PIXELS, file.stat().st_size
    if size == 0 or size % record:
        raise ValueError(
            f"{file}: expected records of {record} bytes ({published * record} bytes in all), got {size} bytes: the "
            f"download is cut off or not the binary version ({_CIFAR_PAGE})"
        )
    data = np.fromfile(file, dtype=np.uint8).reshape(-1, record)
    targets = data[:, labels - 1].astype(np.int64)
    wrong = np.flatnonzero(targets >= classes)
    if len(wrong):
        raise ValueError(
            f"{file}: record {wrong[0]} (byte {wrong[0] * record}) has label {targets[wrong[0]]}, expected below "
            f"{classes}: damaged, or another set's file"
        )
    if len(data) != published:
        _LOG.warning("%s has %d images; the published file has %d", file, len(data), published)
    return np.ascontiguousarray(data[:, labels:]).reshape(-1, 3, 32, 32), targets, data[:, 0]
