"""`TarShards`: a dataset of images in uncompressed tar files."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dlb_fast.data.datasets.folder import (
    IMAGE_EXTENSIONS,
    NO_CLASSES,
    SMALL,
    FileDataset,
    LeftOut,
    check_names,
    is_hidden,
    numbered,
    say,
    say_masks,
    some,
    split_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TarShards"]

_LONGEST_LABEL = 1000  # bytes
_MAYBE_LABELS = (".json", ".txt", ".label", ".class", ".target", ".index", ".id", ".csv", ".pyd", ".pickle", ".npy")


class TarShards(FileDataset):
    """Images in uncompressed tar files, read by index: the constructor indexes the headers, `read` is one `pread`.

    The label of an image is the text of its `.cls` member: the one with the longest name that agrees with the image's
    up to a dot (for `img.01.jpg` `img.01.cls` before `img.cls`; WebDataset's key is the name up to the first dot).
    Without any `.cls` it is the name of the image's folder. Every `.cls` labels one image. Names that begin with a dot
    are ignored, as in `ImageFolder`. Links to members of the same tar are followed. What is left out is logged in one
    line.

    Args:
        shards: a tar file, a folder of tar files, or a list of files; read in sorted order.

    Raises:
        FileNotFoundError: no shards.
        ValueError: a compressed, damaged or cut off tar, shards of several splits in one folder, an image without a
            label, a `.cls` without an image or for several, several images of one key, a member that is there twice,
            class folders in different folders, class folders whose images have a file beside them that may be a label
            (`.json`, `.txt`, ...), a link out of the tar or into another class, and labels as in `ListFile`.
    """

    def __init__(self, shards: str | Path | Sequence[str | Path]) -> None:
        self.shards = shard_files(shards)
        self._open: dict[int, int] = {}  # shard -> descriptor
        self._lock = threading.Lock()
        names: list[str] = []
        labels: list[str | None] = []
        extents: list[tuple[int, int, int]] = []
        others: set[str] = set()  # files beside images, which may be labels
        left_out, empty = LeftOut(), []
        for number, shard in enumerate(self.shards):
            members = _walk(shard, left_out)
            others.update(members.others)
            empty += [] if members.images else [shard]
            labels += _labels(shard, members)
            names += [name for name, _ in members.images]
            extents += [(number, *extent) for _, extent in members.images]
        if not names:
            raise ValueError(f"TarShards: no images in {some(self.shards)}")
        self._extents = np.array(extents, dtype=np.int64)  # (N, 3): shard, offset, size
        if empty:
            say(f"TarShards: {len(empty)} of {len(self.shards)} files have no images: {some(empty)}")
        left_out.say(f"TarShards: {some(self.shards)}")
        found, by_folder = self._certain(names, labels)
        if by_folder and others:
            raise ValueError(
                f"TarShards: {some(sorted(others))} may be the label of the image of its name, which has no .cls: is "
                "that the label, or is it the class folder? Make the tar with .cls, or without this file"
            )
        self._check_links(names, found)
        operation = f"TarShards: {some(self.shards)}"
        classes, targets = numbered(found, operation, lambda k: f"{self._shard(k)}: {names[k]}", names=by_folder)
        super().__init__(names, targets, classes, os.path.dirname(self.shards[0]), "tar")

    def _shard(self, index: int) -> str:
        return self.shards[self._extents[index, 0]]

    def _check_links(self, names: list[str], labels: list[str]) -> None:
        """ValueError for a link from one class to an image of another."""
        order = np.lexsort(self._extents.T)
        same = np.flatnonzero((self._extents[order[1:]] == self._extents[order[:-1]]).all(1))
        for one, other in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            if labels[one] != labels[other]:
                raise ValueError(
                    f"TarShards: {self._shard(one)}: {names[one]} and {names[other]} are the same file, by a link, in "
                    f"two classes ({labels[one]!r} and {labels[other]!r}); leave the link out"
                )

    def _certain(self, names: list[str], labels: list[str | None]) -> tuple[list[str], bool]:
        """(label of every image, whether these are the names of folders)."""
        given = [label for label in labels if label is not None]
        if len(given) == len(names):
            return given, False
        if given:
            lost = labels.index(None)
            raise ValueError(
                f"TarShards: {self._shard(lost)}: {names[lost]} has no .cls, {len(given)} of {len(names)} images have "
                "one; add it, or remove the image"
            )
        folders = [posixpath.dirname(posixpath.normpath(name)) for name in names]
        first = posixpath.dirname(folders[0])
        for k, folder in enumerate(folders):
            if not folder:
                stem = posixpath.splitext(names[k])[0]
                raise ValueError(
                    f"TarShards: {self._shard(k)}: {names[k]} has neither a {stem}.cls beside it nor a class folder"
                )
            if posixpath.dirname(folder) != first:
                raise ValueError(
                    f"TarShards: {self._shard(k)}: {names[k]} and {names[0]} lie in class folders of different folders "
                    f"({posixpath.dirname(folder) or '.'!r} and {first or '.'!r}), so it is not certain what the "
                    "classes are (or they are two splits); make tar files of CLASS/image.jpg, one split in each"
                )
        found = [posixpath.basename(folder) for folder in folders]
        where = f"TarShards: {some(self.shards)}"
        check_names(where, sorted(set(found)), "give every image its .cls", NO_CLASSES | SMALL)
        say_masks(where, names)
        return found, True

    def path(self, index: int) -> str:
        return f"{self._shard(index)}!{os.fsdecode(self._paths[index])}"

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self._extents[index])
        descriptor = self._descriptor(shard)
        data = os.pread(descriptor, size, offset)  # pread is safe to share between threads and forks
        while len(data) < size:  # one call reads at most 2 GiB
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self.path(index)}: expected {size} bytes, got {len(data)}: the tar file is cut off")
            data += more
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
        chosen._extents = self._extents[indices]
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = {}, threading.Lock()


def shard_files(shards: str | Path | Sequence[str | Path]) -> list[str]:
    if isinstance(shards, (str, Path)):
        path = Path(shards)
        files = _folder_of_shards(path) if path.is_dir() else [path]
    else:
        files = sorted(Path(shard) for shard in shards)
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        inner = [] if missing else sorted({str(file.parent) for file in Path(str(shards)).glob("*/*.tar")})
        hint = f"; pass one of {some(inner)}" if inner else ""
        raise FileNotFoundError(f"TarShards: no tar files at {some(missing) if missing else shards}{hint}")
    known: dict[tuple[int, int], Path] = {}
    twice = [str(file) for file in files if known.setdefault(_inode(file), file) is not file]
    if twice:
        raise ValueError(f"TarShards: {some(twice)} is listed twice, so its images would be trained on twice")
    return [str(file) for file in files]


def _inode(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _folder_of_shards(folder: Path) -> list[Path]:
    """The tar files of a folder, sorted; ValueError if some are compressed, or belong to another split."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    compressed = [name for name in names if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", name.lower())]
    files = [name for name in names if name.lower().endswith(".tar")]
    if compressed and files:
        raise ValueError(
            f"TarShards: {folder} also holds compressed tar files ({some(compressed)}), which cannot be read by index; "
            "unpack or remove them"
        )
    splits: dict[str, str] = {}
    for name in files:
        for word in re.split(r"[^A-Za-z]+", name[: -len(".tar")]):
            if split_of(word):
                splits.setdefault(split_of(word), name)
    if len(splits) > 1:
        raise ValueError(
            f"TarShards: {folder} holds shards of several splits ({some(sorted(splits.values()))}), which would be one "
            "training set; put each split into a folder of its own, or pass the list of files"
        )
    return [folder / name for name in files]


@dataclass
class _Members:
    """What one shard contains: images with (offset, size), the text of each `.cls` by its stem, all stems, and the
    names of files that may be labels of images."""

    images: list[tuple[str, tuple[int, int]]]
    texts: dict[str, str]
    stems: set[str]
    others: Iterable[str] = ()


def _walk(shard: str, left_out: LeftOut) -> _Members:
    images: list[tuple[str, tuple[int, int] | None]] = []  # None: a link
    found = _Members([], {}, set())
    files: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    others: dict[str, str] = {}  # name up to the first dot -> a file that may be a label
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                is_file = member.isfile()
                if is_file:
                    extent = (member.offset_data, member.size)
                elif member.islnk():
                    links[name] = posixpath.normpath(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                else:
                    continue
                hidden = next((part for part in name.split("/") if part != ".." and is_hidden(part)), "")
                if not hidden:
                    stem, ending = posixpath.splitext(name)
                    if name in files:
                        raise ValueError(
                            f"TarShards: {shard}: {member.name} is there twice (added again by `tar -r`?); make the "
                            "tar anew, with one of them"
                        )
                    if ending.lower() in IMAGE_EXTENSIONS:
                        if member.issparse():
                            raise ValueError(
                                f"TarShards: {shard}: {member.name} is stored as a sparse file, whose bytes are not in "
                                "one place; make the tar without --sparse"
                            )
                        images.append((member.name, extent if is_file else None))
                    elif is_file and ending.lower() == ".cls":
                        found.texts[stem] = _text_of(shard, tar, member)
                    elif ending.lower() in _MAYBE_LABELS:
                        others.setdefault(_key(name), member.name)
                    else:
                        left_out.add(name, False, IMAGE_EXTENSIONS)
                    found.stems.add(stem)
                else:
                    left_out.add(hidden, hidden != posixpath.basename(name), IMAGE_EXTENSIONS)
                if is_file:
                    files[name] = extent
            _check_end(shard, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"TarShards: {shard}: {error}; expected an uncompressed tar (a compressed one cannot be read by index)"
        ) from error
    keys = {_key(posixpath.normpath(name)) for name, _ in images} if others else set()
    found.others = [other for key, other in others.items() if key in keys][:1]
    found.images = [(name, extent or _link_target(shard, name, files, links)) for name, extent in images]
    return found


def _key(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the file name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _check_end(shard: str, offset: int) -> None:
    """ValueError unless the tar ends at `offset`, with zeros: `tarfile` takes a damaged header for the end."""
    with open(shard, "rb") as file:
        file.seek(offset)
        blocks = iter(lambda: file.read(1 << 20), b"")
        first = next(blocks, b"")
        if len(first) >= tarfile.BLOCKSIZE and not any(map(any, (first, *blocks))):
            return
    raise ValueError(
        f"TarShards: {shard}: expected the end of the tar (zeros) at byte {offset}; it is cut off or damaged there, or "
        "several tar files were joined, so images would be missing. Fetch or make it anew"
    )


def _text_of(shard: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The label in a `.cls` member."""
    content = tar.extractfile(member) if member.size <= _LONGEST_LABEL else None
    data = b"" if content is None else content.read()
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(text.splitlines()) > 1:
        raise ValueError(
            f"TarShards: {shard}: {member.name}: expected one label as text, a class index or a name, got "
            f"{member.size} bytes that begin with {data[:16]!r}"
        )
    return text


def _labels(shard: str, members: _Members) -> list[str | None]:
    """The text of every image's `.cls`, or None; ValueError if it is not certain which text belongs to which image."""
    labels: list[str | None] = []
    owners: dict[str, str] = {}  # stem of the `.cls`, or shortest stem of the key -> image
    used = set()
    for name, _ in members.images:
        stem = posixpath.splitext(posixpath.normpath(name))[0]
        cut = len(stem) - len(posixpath.basename(stem))
        parts = stem[cut:].split(".")
        stems = [stem[:cut] + ".".join(parts[:count]) for count in range(len(parts), 0, -1)]  # the longest first
        label = next((one for one in stems if one in members.texts), None)
        key = next(one for one in reversed(stems) if one in members.stems)
        for owned in {key, label or key}:
            other = owners.setdefault(owned, name)
            if other != name:
                raise ValueError(
                    f"TarShards: {shard}: {other} and {name} are two images of the key {owned!r}, and it is not "
                    "certain which of them is the sample; keep one image for each key"
                )
        labels.append(None if label is None else members.texts[label])
        used.add(label)
    lost = sorted(set(members.texts) - used)
    if lost:
        raise ValueError(
            f"TarShards: {shard}: {lost[0]}.cls has no image (read are {', '.join(IMAGE_EXTENSIONS)}); add the image, "
            "or remove the label"
        )
    return labels


def _link_target(shard: str, name: str, files: dict[str, tuple[int, int]], links: dict[str, str]) -> tuple[int, int]:
    """(offset, size) of the file that a link points to."""
    target, steps = posixpath.normpath(name), 0
    while target not in files:
        if target not in links or steps > len(links):
            raise ValueError(
                f"TarShards: {shard}: {name} is a link to {target}, which the tar does not contain; make the tar with "
                "--dereference, or leave the link out"
            )
        target, steps = links[target], steps + 1
    return files[target]
