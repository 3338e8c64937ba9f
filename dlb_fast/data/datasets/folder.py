"""Datasets of image files: class folders, a list of files, and the TinyImageNet layout. Tar shards are in `tar.py`.

They hold targets and names; `read(i)` gives a file's bytes and `path(i)` its name. Decoding is the loader's work;
`dataset[i]` decodes too, so that each is a map-style dataset as well.
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
    """The base of the datasets of files.

    Args:
        paths: of the files, relative to `root`.
        targets: (N,) class indices.
        classes: names.
        root: folder.
        name: of the set, for messages.
    """

    def __init__(self, paths: Iterable[str], targets: Any, classes: Sequence[str], root: str | Path, name: str) -> None:
        # one array of bytes: 1.28 million paths cost little more than their characters, and forked workers copy nothing
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
        """Where sample `index` is, for messages."""
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def read(self, index: int) -> bytes:
        """The file's bytes; OSError names what is wrong with it."""
        return read_file(self.path(index))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(_decoder()(self.read(index))).permute(2, 0, 1)
        return image, int(self.targets[index])

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The same kind of set with only these samples, in this order; ids count anew from 0."""
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
    """`root/CLASS/**/image.jpg`: one folder per class, as torchvision's.

    Args:
        root: folder with the class folders. Names that begin with a dot are left out; links are followed, but not back
            to a folder that they lie in.
        classes: names in the order of their indices; None takes all folders, sorted. Give a training set's classes to
            its validation folder, so that both agree even when one lacks a class.
        extensions: which files count, as in (".jpg", ".png"); the case does not matter.
        allow_empty: keep classes without an image instead of raising.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, a class without images, or a class folder that is not in `classes`.
        TypeError: extensions in one string.
        OSError: a folder that cannot be read.
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
    """A text file with one `path<TAB>label` per line; in a line without a tab the label is the last word.

    Args:
        file: the list, in UTF-8. Empty lines and lines that begin with # are skipped.
        root: folder of relative paths; None is the list's own.
        classes: names in the order of their indices. None: numbers are class indices themselves, and other labels are
            numbered in sorted order.

    Raises:
        FileNotFoundError: no such list.
        ValueError: a line without a label or with an unknown one, naming file and line; numbers that are no class
            indices.
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
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # some editors write a mark in front
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
        split: "train", or "test" for the annotated validation images (the published test images have no labels).
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
        super().__init__(paths, targets, classes, root, "tinyimagenet")


def has_folders(root: Path) -> bool:
    """Whether `root` has folders in it that are not hidden."""
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
        OSError: a folder that cannot be read: its images would be missing without a word.
    """
    found = tree(str(root), folder, _unreadable)
    return sorted(path for path, is_folder in found if not is_folder and is_image(path, endings))


def is_image(path: str, endings: tuple[str, ...]) -> bool:
    """Whether a file's name is that of an image; names that begin with a dot are not."""
    name = os.path.basename(path)
    return name.lower().endswith(endings) and not name.startswith(".")


def tree(
    root: str, folder: str, failed: Callable[[str, OSError], None], *, deep: bool = True
) -> Iterator[tuple[str, bool]]:
    """(path relative to `root`, whether it is a folder) of everything below `root/folder`, each folder sorted.

    Hidden folders are named but not entered. Links are followed, but not back to a folder that they lie in.

    Args:
        root: where the paths begin.
        folder: below `root`, or "".
        failed: called with a folder that cannot be read and the reason; raises, or returns to go on without it.
        deep: False names what is directly in the folder only.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    if folder:
        waiting = [(folder, frozenset([_identity(root)]))]
    while waiting:
        inside, above = waiting.pop()
        place = os.path.join(root, inside) if inside else root
        try:
            here = _identity(place)
            if here in above:
                _LOG.warning("%s leads back to a folder that it lies in, and is not followed", place)
                continue
            with os.scandir(place) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            failed(place, error)
            continue
        for entry in found:
            path = os.path.join(inside, entry.name)
            try:
                is_folder = entry.is_dir()
            except PermissionError as error:  # a link to a place that may not be looked at
                failed(entry.path, error)
                continue
            except OSError:  # a link to itself: like one to nowhere it is a file that `read` will name
                is_folder = False
            yield path, is_folder
            if is_folder and deep and not entry.name.startswith("."):
                waiting.append((path, above | {here}))


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _unreadable(folder: str, error: OSError) -> NoReturn:
    raise type(error)(
        f"ImageFolder: cannot look into {folder} ({error.strerror}): its images would be missing; allow reading and "
        "searching it (chmod u+rx), or take it out of the set"
    ) from error


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
