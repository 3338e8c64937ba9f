"""Datasets of image files: class folders and the TinyImageNet layout. List files and tar shards lie beside it.

They hold targets and, in one buffer, names or offsets; `read(i)` gives a file's bytes and `path(i)` its name.
Decoding is the loader's work; `dataset[i]` decodes too, so that each is a map-style dataset as well.
"""

from __future__ import annotations

import copy
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.decode import ImageDecoder

if TYPE_CHECKING:
    from typing_extensions import Self

_LOG = logging.getLogger("dlb_fast.data")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")


class StringTable:
    """Many strings in one bytes buffer: 1.28 million paths cost their characters, and forked workers copy nothing.

    Example:
        >>> table = StringTable(["a/b.jpg", "c.jpg"])
        >>> table[1], len(table)
        ('c.jpg', 2)
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._buffer = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(part) for part in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} entries")
        return os.fsdecode(self._buffer[self._ends[index] : self._ends[index + 1]])

    def select(self, indices: NDArray[np.int64]) -> StringTable:
        """A table of these entries."""
        return StringTable(self[int(i)] for i in indices)


_MOST_CLASSES = 1_000_000


def numbered(labels: Sequence[str], operation: str, *, names: bool = False) -> tuple[list[str], list[int]]:
    """(names of the classes, index of each label): labels that are all numbers are the indices, others are sorted.

    Args:
        names: they are names, even where all are numbers.

    Raises:
        ValueError: numbers that are no class indices, such as dates: every number below would be a class.
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
    """The bytes of a regular file; opening a pipe would wait for ever, and a device may never end.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder names the error itself
        raise OSError(f"{os.fspath(path)}: not a regular file but a pipe, socket or device; remove it from the set")
    with open(path, "rb") as file:
        return file.read()


class FileDataset:
    """What all datasets of files share.

    Args:
        paths: of the files, relative to `root`. targets: (N,) class indices. classes: names.
        root: folder. name: what messages call the set.
    """

    def __init__(self, paths: StringTable, targets: Any, classes: Sequence[str], root: str | Path, name: str) -> None:
        self.paths = paths
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
        """Where sample `index` is, for messages."""
        return os.path.join(self.root, self.paths[index])

    def read(self, index: int) -> bytes:
        """The file's bytes; OSError names what is wrong with it."""
        return read_file(self.path(index))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(_decoder()(self.read(index))).permute(2, 0, 1)
        return image, int(self.targets[index])

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The same kind of set with only these samples, in this order; ids count anew from 0."""
        chosen = copy.copy(self)
        chosen.paths, chosen.targets = self.paths.select(indices), self.targets[indices]
        return chosen

    def with_targets(self, targets: NDArray[np.int64]) -> Self:
        """The same files with other targets."""
        changed = copy.copy(self)
        changed.targets = np.array(targets, dtype=np.int64)
        return changed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root}: {len(self)} files, {self.num_classes} classes)"


_DECODER: list[ImageDecoder] = []


def _decoder() -> ImageDecoder:
    if not _DECODER:
        _DECODER.append(ImageDecoder())
    return _DECODER[0]


class ImageFolder(FileDataset):
    """`root/CLASS/**/image.jpg`: one folder per class, as torchvision's.

    Args:
        root: folder with the class folders. Names that begin with a dot are left out; links are followed, but not back
            to a folder that they lie in.
        classes: names in the order of their indices; None takes all folders, sorted. Give a training set's classes to
            its validation folder, so that both agree even when one lacks a class.
        extensions: which files count, as in (".jpg", ".png"); the case does not matter.
        allow_empty: keep classes without an image instead of raising.

    Raises:
        FileNotFoundError: no such folder. ValueError: no class folders, a class without images, or a class folder
        that is not in `classes`. TypeError: extensions in one string. OSError: a folder that cannot be read.
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
        super().__init__(StringTable(paths), np.repeat(np.arange(len(names)), counts), names, root, "imagefolder")


def has_folders(root: Path) -> bool:
    """Whether `root` holds folders that are not hidden."""
    return any(not entry.name.startswith(".") and _is_folder(entry) for entry in _entries(root))


def class_folders(root: Path) -> list[str]:
    """Names of the class folders in `root`, sorted."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"ImageFolder: {root} {what}; expected a folder with one subfolder per class")
    names = sorted(entry.name for entry in _entries(root) if not entry.name.startswith(".") and _is_folder(entry))
    if not names:
        raise ValueError(f"ImageFolder: {root} has no class folders; expected {root}/CLASS/image.jpg")
    return names


def image_files(root: Path, folder: str, endings: tuple[str, ...]) -> list[str]:
    """Image files below `root/folder`, relative to `root`, sorted. Links are followed, but not back to a folder they
    lie in.

    Raises:
        OSError: a folder that cannot be read: its images would be missing without a word.
    """
    found: list[str] = []
    # (folder relative to root, the folders it lies in by device and inode)
    waiting = [(folder, frozenset([_identity(root)]))]
    while waiting:
        inside, above = waiting.pop()
        place = os.path.join(root, inside)
        here = _identity(place)
        if here in above:
            _LOG.warning("%s leads back to a folder that it lies in, and is not followed", place)
            continue
        for entry in _entries(place):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                waiting.append((os.path.join(inside, entry.name), above | {here}))
            elif entry.name.lower().endswith(endings):
                found.append(os.path.join(inside, entry.name))
    return sorted(found)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return found.st_dev, found.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except PermissionError as error:  # a link to a place that may not be looked at
        raise _unreadable(entry.path, error) from error
    except OSError:  # a link to itself: like one to nowhere it is a file that `read` will name
        return False


def _unreadable(folder: str | Path, error: OSError) -> OSError:
    return type(error)(
        f"ImageFolder: cannot look into {folder} ({error.strerror}): its images would be missing; allow reading and "
        "searching it (chmod u+rx), or take it out of the set"
    )


def check_extensions(operation: str, extensions: Sequence[str]) -> tuple[str, ...]:
    """The extensions in lower case.

    Raises:
        TypeError: one string, whose letters would each count as an extension.
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


class TinyImageNet(FileDataset):
    """The published layout of TinyImageNet: `wnids.txt`, `train/WNID/images`, `val/images` with `val_annotations.txt`.

    Args:
        root: the unpacked `tiny-imagenet-200`. split: "train", or "test" for the annotated validation images (the
            published test images have no labels).
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
                place = root / "train" / name
                found = image_files(root, os.path.join("train", name), IMAGE_EXTENSIONS) if place.is_dir() else []
                if not found:
                    raise ValueError(f"TinyImageNet: no images in {place}")
                paths += found
                targets += [index[name]] * len(found)
        else:
            for number, line in enumerate(needed[1].read_text().splitlines(), start=1):
                fields = line.split("\t")
                if len(fields) < 2 or fields[1] not in index:
                    raise ValueError(f"TinyImageNet: {needed[1]} line {number}: expected `file<TAB>wnid`, got {line!r}")
                paths.append(os.path.join("val", "images", fields[0]))
                targets.append(index[fields[1]])
        super().__init__(StringTable(paths), targets, classes, root, "tinyimagenet")
