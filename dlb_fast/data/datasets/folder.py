"""Datasets of image files: class folders, a list of files, and the TinyImageNet layout. Tar shards are in `tar.py`.

`read(i)` returns a file's bytes and `path(i)` its name; the loader decodes. `dataset[i]` decodes as well, so each is a
map-style dataset.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.decode.decode import ImageDecoder

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FileDataset", "ImageFolder", "ListFile", "TinyImageNet"]

_LOG = logging.getLogger("dlb_fast.data")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
_MOST_CLASSES = 1_000_000


def numbered(labels: Sequence[str], operation: str, *, names: bool = False) -> tuple[list[str], list[int]]:
    """(class names, class index of each label): numeric labels are indices, other labels are numbered in sorted order.

    Args:
        labels: one label per sample.
        operation: name for messages.
        names: True treats numeric labels as names too.

    Raises:
        ValueError: numbers too large for class indices, such as dates.
    """
    if names or not all(label.isascii() and label.isdigit() for label in labels):
        classes = sorted(set(labels))
        index = {name: k for k, name in enumerate(classes)}
        return classes, [index[label] for label in labels]
    targets = [int(label) for label in labels]
    if max(targets) >= _MOST_CLASSES:
        raise ValueError(
            f"{operation}: label {max(targets)}: numbers are class indices, expected below {_MOST_CLASSES}; number the "
            "classes from 0, pass a ListFile the labels as classes=[...], or put a letter in front of them"
        )
    return [str(c) for c in range(max(targets) + 1)], targets


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: the file cannot be read or is not regular (reading a pipe or a device may never return).
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # for a folder `open` raises a clear error
        raise OSError(f"{os.fspath(path)}: not a regular file but a pipe, socket or device; remove it from the set")
    with open(path, "rb") as file:
        return file.read()


class FileDataset:
    """Base of the datasets of files.

    Args:
        paths: paths of the files, relative to `root`.
        targets: (N,) class indices.
        classes: class names.
        root: folder of the relative paths.
        name: name of the dataset, for messages.
    """

    def __init__(self, paths: Iterable[str], targets: Any, classes: Sequence[str], root: str | Path, name: str) -> None:
        # One bytes array: 1.28 million paths take little more than their characters, and forked workers share it.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.targets: NDArray[np.int64] = np.asarray(targets, dtype=np.int64)
        self.classes = list(classes)
        self.root = str(root)
        self.name = name

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        """Path of sample `index`."""
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def read(self, index: int) -> bytes:
        """Bytes of the file; OSError if it cannot be read."""
        return read_file(self.path(index))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(_decoder()(self.read(index))).permute(2, 0, 1)
        return image, int(self.targets[index])

    def select(self, indices: NDArray[np.int64]) -> Self:
        """A dataset of only these samples, in this order; ids start again at 0."""
        chosen = copy.copy(self)
        chosen._paths, chosen.targets = self._paths[indices], self.targets[indices]
        return chosen

    def with_targets(self, targets: NDArray[np.int64]) -> Self:
        """The same files with other targets."""
        changed = copy.copy(self)
        changed.targets = np.array(targets, dtype=np.int64)
        return changed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root}: {len(self)} files, {self.num_classes} classes)"


@functools.cache
def _decoder() -> ImageDecoder:
    return ImageDecoder()


class ImageFolder(FileDataset):
    """`root/CLASS/**/image.jpg`: one folder per class, as in torchvision.

    Args:
        root: folder with the class folders. Names that begin with a dot are ignored. Links are followed, except to a
            parent folder of the link.
        classes: class names in the order of their indices; None means all folders, sorted. Pass the classes of the
            training set for its validation folder, so that the indices agree even if one folder lacks a class.
        extensions: file extensions, such as (".jpg", ".png"), in any case.
        allow_empty: keep classes without an image instead of raising.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no class folders, a class without images, or a class folder that is not in `classes`.
        TypeError: `extensions` is one string.
        OSError: a folder cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        classes: Sequence[str] | None = None,
        extensions: Sequence[str] = IMAGE_EXTENSIONS,
        allow_empty: bool = False,
    ) -> None:
        root = Path(root)
        endings = check_extensions("ImageFolder", extensions)
        found = class_folders(root)
        names = found if classes is None else list(classes)
        present = set(found)
        unknown = sorted(present - set(names))
        if unknown:
            raise ValueError(f"ImageFolder: {root} has class folders that the given classes lack: {some(unknown)}")
        paths: list[str] = []
        counts = []
        for name in names:
            before = len(paths)
            paths += image_files(root, name, endings) if name in present else []
            counts.append(len(paths) - before)
        empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
        if not paths or (empty and classes is None and not allow_empty):
            raise ValueError(
                f"ImageFolder: no images in {some(empty)} of {root} (extensions {', '.join(endings)}); "
                "remove the empty folders, or pass allow_empty=True or other extensions"
            )
        super().__init__(paths, np.repeat(np.arange(len(names)), counts), names, root, "imagefolder")


class ListFile(FileDataset):
    """Images listed in a text file, one `path<TAB>label` per line; without a tab the last word is the label.

    Args:
        file: the list, in UTF-8. Empty lines and lines that begin with # are skipped.
        root: folder of the relative paths; None means the folder of the list.
        classes: class names in the order of their indices. None: numeric labels are class indices, other labels are
            numbered in sorted order.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: a line without a label or with an unknown one (the message names file and line), or numbers too
            large for class indices.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        root: str | Path | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"ListFile: no file {file}; expected lines of `path<TAB>label`")
        paths, labels, numbers = [], [], []
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # some editors write a byte order mark
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            fields = line.rsplit("\t", 1) if "\t" in line else line.rsplit(maxsplit=1)
            if len(fields) != 2:
                raise ValueError(f"ListFile: {file} line {number}: expected `path<TAB>label`, got {line!r}")
            paths.append(fields[0].strip())
            labels.append(fields[1].strip())
            numbers.append(number)
        if not paths:
            raise ValueError(f"ListFile: {file} lists no images")
        if classes is None:
            classes, targets = numbered(labels, f"ListFile: {file}")
        else:
            index = {name: k for k, name in enumerate(classes)}
            for label, number in zip(labels, numbers, strict=True):
                if label not in index:
                    raise ValueError(
                        f"ListFile: {file} line {number}: label {label!r} is not one of the given classes"
                    )
            targets = [index[label] for label in labels]
        super().__init__(paths, targets, classes, file.parent if root is None else root, "list")


class TinyImageNet(FileDataset):
    """The published layout of TinyImageNet: `wnids.txt`, `train/WNID/images`, `val/images` with `val_annotations.txt`.

    Args:
        root: the unpacked `tiny-imagenet-200`.
        split: "train", or "test" for the validation images (the published test images have no labels).
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        root = Path(root)
        if split not in ("train", "test"):
            raise ValueError(f'TinyImageNet: split must be "train" or "test", got {split!r}')
        needed = [
            root / "wnids.txt",
            root / "train" if split == "train" else root / "val" / "val_annotations.txt",
        ]
        for path in needed:
            if not path.exists():
                raise FileNotFoundError(f"TinyImageNet: {path} is missing; pass the unpacked tiny-imagenet-200 folder")
        classes = sorted(needed[0].read_text().split())
        index = {name: k for k, name in enumerate(classes)}
        paths, targets = [], []
        if split == "train":
            for name in classes:
                folder = root / "train" / name
                found = image_files(root, os.path.join("train", name), IMAGE_EXTENSIONS) if folder.is_dir() else []
                if not found:
                    raise ValueError(f"TinyImageNet: no images in {folder}")
                paths += found
                targets += [index[name]] * len(found)
        else:
            for number, line in enumerate(needed[1].read_text().splitlines(), start=1):
                fields = line.split("\t")
                if len(fields) < 2 or fields[1] not in index:
                    raise ValueError(f"TinyImageNet: {needed[1]} line {number}: expected `file<TAB>wnid`, got {line!r}")
                paths.append(os.path.join("val", "images", fields[0]))
                targets.append(index[fields[1]])
        super().__init__(paths, targets, classes, root, "tinyimagenet")


def has_folders(root: Path) -> bool:
    """Whether `root` contains folders that are not hidden."""
    return bool(_folders(root))


def class_folders(root: Path) -> list[str]:
    """Names of the class folders in `root`, sorted."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"ImageFolder: {root} {what}; expected a folder with one subfolder per class")
    names = _folders(root)
    if not names:
        raise ValueError(f"ImageFolder: {root} has no class folders; expected {root}/CLASS/image.jpg")
    return names


def _folders(root: Path) -> list[str]:
    found = tree(str(root), "", _unreadable, deep=False)
    return [path for path, is_folder in found if is_folder and not path.startswith(".")]


def image_files(root: Path, folder: str, endings: tuple[str, ...]) -> list[str]:
    """Image files below `root/folder`, relative to `root`, sorted.

    Raises:
        OSError: a folder cannot be read; skipping it would silently drop its images.
    """
    found = tree(str(root), folder, _unreadable)
    return sorted(path for path, is_folder in found if not is_folder and is_image(path, endings))


def is_image(path: str, endings: tuple[str, ...]) -> bool:
    """Whether a file name has an image extension and does not begin with a dot."""
    name = os.path.basename(path)
    return name.lower().endswith(endings) and not name.startswith(".")


def tree(
    root: str, folder: str, failed: Callable[[str, OSError], None], *, deep: bool = True
) -> Iterator[tuple[str, bool]]:
    """Yields (path relative to `root`, whether it is a folder) of everything below `root/folder`, sorted per folder.

    Hidden folders are yielded but not entered. Links are followed, except to a parent folder of the link.

    Args:
        root: base of the paths.
        folder: start, relative to `root`, or "".
        failed: called with a folder that cannot be read and the error; it raises, or returns to skip the folder.
        deep: False does not descend into subfolders.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    if folder:
        waiting = [(folder, frozenset([_identity(root)]))]
    while waiting:
        inside, above = waiting.pop()
        current = os.path.join(root, inside) if inside else root
        try:
            here = _identity(current)
            if here in above:
                _LOG.warning("%s links to one of its parent folders and is not followed", current)
                continue
            with os.scandir(current) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            failed(current, error)
            continue
        for entry in found:
            path = os.path.join(inside, entry.name)
            try:
                is_folder = entry.is_dir()
            except PermissionError as error:  # a link to a folder without permission
                failed(entry.path, error)
                continue
            except OSError:  # a link to itself; like a broken link it counts as a file, and `read` raises
                is_folder = False
            yield path, is_folder
            if is_folder and deep and not entry.name.startswith("."):
                waiting.append((path, above | {here}))


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _unreadable(folder: str, error: OSError) -> NoReturn:
    raise type(error)(
        f"ImageFolder: cannot read the folder {folder} ({error.strerror}), so its images would be missing; allow it "
        "(chmod u+rx), or remove the folder from the dataset"
    ) from error


def check_extensions(operation: str, extensions: Sequence[str]) -> tuple[str, ...]:
    """The extensions in lower case.

    Raises:
        TypeError: one string, because each of its letters would count as an extension.
    """
    if isinstance(extensions, str):
        raise TypeError(
            f"{operation}: extensions: expected a sequence of endings, got the string {extensions!r}; pass "
            f'("{extensions if extensions.startswith(".") else "." + extensions}",)'
        )
    return tuple(extension.lower() for extension in extensions)


def some(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
