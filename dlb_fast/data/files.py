"""Datasets of image files: class folders, a list file, the TinyImageNet layout, tar shards read by index.

They hold targets and, in one buffer, names or offsets; `read(i)` gives a file's bytes and `path(i)` its name.
Decoding is the loader's work; `dataset[i]` decodes too, so that each is a map-style dataset as well.
"""

from __future__ import annotations

import copy
import os
import tarfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.decode import ImageDecoder

if TYPE_CHECKING:
    from typing_extensions import Self

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
        with open(self.path(index), "rb") as file:
            return file.read()

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
        root: folder with the class folders. Names that begin with a dot are left out.
        classes: names in the order of their indices; None takes all folders, sorted. Give a training set's classes to
            its validation folder, so that both agree even when one lacks a class.
        extensions: which files count (lower case; the case of a file's name does not matter).
        allow_empty: keep classes without an image instead of raising.

    Raises:
        FileNotFoundError: no such folder. ValueError: no class folders, a class without images, or a class folder
        that is not in `classes`.
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
        endings = tuple(extension.lower() for extension in extensions)
        found = class_folders(root)
        names = found if classes is None else list(classes)
        unknown = sorted(set(found) - set(names))
        if unknown:
            raise ValueError(f"ImageFolder: {root} has class folders that the given classes lack: {_some(unknown)}")
        paths: list[str] = []
        counts = []
        for name in names:
            before = len(paths)
            paths += image_files(root, name, endings) if name in set(found) else []
            counts.append(len(paths) - before)
        empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
        if not paths or (empty and classes is None and not allow_empty):
            raise ValueError(
                f"ImageFolder: no images in {_some(empty)} of {root} (extensions {', '.join(endings)}); "
                "remove the empty folders, or pass allow_empty=True or other extensions"
            )
        super().__init__(StringTable(paths), np.repeat(np.arange(len(names)), counts), names, root, "imagefolder")


def class_folders(root: Path) -> list[str]:
    """Names of the class folders in `root`, sorted."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"ImageFolder: {root} {what}; expected a folder with one subfolder per class")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"ImageFolder: {root} has no class folders; expected {root}/CLASS/image.jpg")
    return names


def image_files(root: Path, folder: str, endings: tuple[str, ...]) -> list[str]:
    """Image files below `root/folder`, relative to `root`, sorted."""
    found = []
    for top, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inside = os.path.relpath(top, root)
        found += [os.path.join(inside, f) for f in files if f.lower().endswith(endings) and not f.startswith(".")]
    return sorted(found)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class ListFile(FileDataset):
    """A text file with one `path label` per line, separated by a tab, a comma or spaces; the label is the last word.

    Args:
        file: the list. Empty lines and lines that begin with # are skipped.
        root: folder of relative paths; None is the list's own.
        classes: names in the order of their indices. None: numbers are class indices themselves, and other labels are
            numbered in sorted order.

    Raises:
        FileNotFoundError: no such list. ValueError: a line without a label or with an unknown one, naming file and
            line.
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
            raise FileNotFoundError(f"ListFile: no file {file}; expected lines of `path label`")
        paths, labels, numbers = [], [], []
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            separator = next((s for s in ("\t", ",") if s in line), None)
            parts = [part.strip() for part in line.rsplit(separator, 1)]
            if len(parts) != 2 or not all(parts):
                raise ValueError(f"ListFile: {file} line {number}: expected `path label`, got {line!r}")
            paths.append(parts[0])
            labels.append(parts[1])
            numbers.append(number)
        if not paths:
            raise ValueError(f"ListFile: {file} lists no images")
        if classes is None:
            numeric = all(label.isascii() and label.isdigit() for label in labels)
            classes = [str(c) for c in range(max(map(int, labels)) + 1)] if numeric else sorted(set(labels))
            labels = [str(int(label)) for label in labels] if numeric else labels
        index = {name: k for k, name in enumerate(classes)}
        for label, number in zip(labels, numbers, strict=True):
            if label not in index:
                raise ValueError(f"ListFile: {file} line {number}: label {label!r} is not one of the given classes")
        targets = [index[label] for label in labels]
        super().__init__(StringTable(paths), targets, classes, file.parent if root is None else root, "list")


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
                found = image_files(root, os.path.join("train", name), IMAGE_EXTENSIONS)
                if not found:
                    raise ValueError(f"TinyImageNet: no images in {root / 'train' / name}")
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


class TarShards(FileDataset):
    """Uncompressed tar files read by index: the headers are walked once, each `read` is then one positioned read.

    A member's label is the number in the member of the same key that ends in `.cls` (WebDataset's convention), else the
    name of the folder it lies in.

    Args:
        shards: a tar file, a folder of them, or a list of files; taken in sorted order.

    Raises:
        FileNotFoundError: no shards. ValueError: a compressed or damaged tar, an image without a label.
    """

    def __init__(self, shards: str | Path | Sequence[str | Path]) -> None:
        self.shards = _shard_files(shards)
        self._open: dict[int, int] = {}  # shard -> descriptor
        self._lock = threading.Lock()
        names: list[str] = []
        labels: list[str] = []
        places: list[tuple[int, int, int]] = []
        numeric = True
        for number, shard in enumerate(self.shards):
            images, classes = _walk(shard)
            for name, place in images:
                key = name.split("/")[-1].split(".")[0]
                key = name[: len(name) - len(name.split("/")[-1])] + key
                folder = os.path.basename(os.path.dirname(name))
                if key in classes:
                    labels.append(classes[key])
                elif folder:
                    labels.append(folder)
                    numeric = False
                else:
                    raise ValueError(f"TarShards: {shard}: {name} has neither a {key}.cls beside it nor a class folder")
                names.append(name)
                places.append((number, *place))
        if not names:
            raise ValueError(f"TarShards: no images in {_some(self.shards)}")
        numeric = numeric and all(label.isdigit() for label in labels)
        all_classes = [str(c) for c in range(max(map(int, labels)) + 1)] if numeric else sorted(set(labels))
        index = {name: k for k, name in enumerate(all_classes)}
        self._places = np.array(places, dtype=np.int64)  # (N, 3): shard, offset, size
        targets = [index[str(int(label)) if numeric else label] for label in labels]
        super().__init__(StringTable(names), targets, all_classes, os.path.dirname(self.shards[0]), "tar")

    def path(self, index: int) -> str:
        return f"{self.shards[self._places[index, 0]]}!{self.paths[index]}"

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self._places[index])
        data = os.pread(self._descriptor(shard), size, offset)  # no file position: threads and forks share it safely
        if len(data) != size:
            raise OSError(f"{self.path(index)}: expected {size} bytes, got {len(data)}: the tar file is cut off")
        return data

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
            return self._open[shard]

    def close(self) -> None:
        """Close the tar files; the next `read` opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def select(self, indices: NDArray[np.int64]) -> Self:
        chosen = super().select(indices)
        chosen._places = self._places[indices]
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = {}, threading.Lock()


def _shard_files(shards: str | Path | Sequence[str | Path]) -> list[str]:
    if isinstance(shards, (str, Path)):
        place = Path(shards)
        files = sorted(place.glob("*.tar")) if place.is_dir() else [place]
    else:
        files = sorted(Path(shard) for shard in shards)
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"TarShards: no tar files at {_some(missing) if missing else shards}")
    return [str(file) for file in files]


def _walk(shard: str) -> tuple[list[tuple[str, tuple[int, int]]], dict[str, str]]:
    """(images with their (offset, size), key -> label) of one shard."""
    images, classes = [], {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.name.lower().endswith(IMAGE_EXTENSIONS):
                    images.append((member.name, (member.offset_data, member.size)))
                elif member.name.endswith(".cls"):
                    content = tar.extractfile(member)
                    classes[member.name[: -len(".cls")]] = content.read().decode().strip() if content else ""
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"TarShards: {shard}: {error}; expected an uncompressed tar (a compressed one cannot be read by index)"
        ) from error
    return images, classes
