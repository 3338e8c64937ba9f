"""`TarShards`: a dataset of images in uncompressed tar files."""

from __future__ import annotations

import os
import posixpath
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dlb_fast.data.datasets.folder import IMAGE_EXTENSIONS, FileDataset, numbered, some

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TarShards"]


class TarShards(FileDataset):
    """Images in uncompressed tar files, read by index: the constructor indexes the headers, `read` is one `pread`.

    The label of an image is the number in the `.cls` member of the same key (WebDataset's convention), else the name of
    its folder. Names that begin with a dot are ignored, as in `ImageFolder`. Links to members of the same tar are
    followed.

    Args:
        shards: a tar file, a folder of tar files, or a list of files; read in sorted order.

    Raises:
        FileNotFoundError: no shards.
        ValueError: a compressed or damaged tar, an image without a label, a link out of the tar, or numbers too large
            for class indices.
    """

    def __init__(self, shards: str | Path | Sequence[str | Path]) -> None:
        self.shards = _shard_files(shards)
        self._open: dict[int, int] = {}  # shard -> descriptor
        self._lock = threading.Lock()
        names: list[str] = []
        labels: list[str] = []
        extents: list[tuple[int, int, int]] = []
        named = False  # a folder name is a class name, even if it is a number
        for number, shard in enumerate(self.shards):
            images, classes = _walk(shard)
            for name, extent in images:
                key = name.split("/")[-1].split(".")[0]
                key = name[: len(name) - len(name.split("/")[-1])] + key
                folder = os.path.basename(os.path.dirname(name))
                if key in classes:
                    labels.append(classes[key])
                elif folder not in ("", "."):
                    labels.append(folder)
                    named = True
                else:
                    raise ValueError(f"TarShards: {shard}: {name} has neither a {key}.cls beside it nor a class folder")
                names.append(name)
                extents.append((number, *extent))
        if not names:
            raise ValueError(f"TarShards: no images in {some(self.shards)}")
        all_classes, targets = numbered(labels, f"TarShards: {some(self.shards)}", names=named)
        self._extents = np.array(extents, dtype=np.int64)  # (N, 3): shard, offset, size
        super().__init__(names, targets, all_classes, os.path.dirname(self.shards[0]), "tar")

    def path(self, index: int) -> str:
        return f"{self.shards[self._extents[index, 0]]}!{os.fsdecode(self._paths[index])}"

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self._extents[index])
        data = os.pread(self._descriptor(shard), size, offset)  # pread is safe to share between threads and forks
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
        chosen._extents = self._extents[indices]
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = {}, threading.Lock()


def _shard_files(shards: str | Path | Sequence[str | Path]) -> list[str]:
    if isinstance(shards, (str, Path)):
        path = Path(shards)
        files = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    else:
        files = sorted(Path(shard) for shard in shards)
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"TarShards: no tar files at {some(missing) if missing else shards}")
    return [str(file) for file in files]


def _walk(shard: str) -> tuple[list[tuple[str, tuple[int, int]]], dict[str, str]]:
    """(images with their (offset, size), key -> label) of one shard."""
    images: list[tuple[str, tuple[int, int] | None]] = []  # None: a link
    classes: dict[str, str] = {}
    files: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if member.isfile():
                    files[name] = (member.offset_data, member.size)
                elif member.islnk():
                    links[name] = posixpath.normpath(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                else:
                    continue
                if any(part.startswith(".") for part in name.split("/") if part != ".."):
                    continue
                if name.lower().endswith(IMAGE_EXTENSIONS):
                    images.append((member.name, files[name] if member.isfile() else None))
                elif member.isfile() and member.name.endswith(".cls"):
                    content = tar.extractfile(member)
                    classes[member.name[: -len(".cls")]] = content.read().decode().strip() if content else ""
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"TarShards: {shard}: {error}; expected an uncompressed tar (a compressed one cannot be read by index)"
        ) from error
    return [(name, extent or _link_target(shard, name, files, links)) for name, extent in images], classes


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
