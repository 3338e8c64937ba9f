"""Datasets of image files: class folders, a list of files, and the TinyImageNet layout. Tar shards are in `tar.py`.

`read(i)` returns a file's bytes and `path(i)` its name; the loader decodes. `dataset[i]` decodes as well, so each is a
map-style dataset.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
import stat
import unicodedata
from collections import Counter
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
_OTHER_IMAGES = (".gif", ".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".svg", ".eps", ".npy")
_SYSTEM_FOLDERS = {
    "@eadir", "__macosx", "__pycache__", "lost+found", "$recycle.bin", "#recycle", "system volume information",
}  # fmt: skip
SMALL = {"thumbnail", "thumbnails", "thumb", "thumbs"}
_IMAGES = {"image", "images", "img", "imgs", "jpegimages"}
NO_CLASSES = _IMAGES | {
    "label", "labels", "annotation", "annotations", "masks", "segmentationclass", "segmentationobject",
    "segmentations", "groundtruth",
}  # fmt: skip
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def numbered(
    labels: Sequence[str], operation: str, where: Callable[[int], str], *, names: bool = False
) -> tuple[list[str], list[int]]:
    """(class names, class index of each label): numeric labels are indices, other labels are numbered in sorted order.

    Args:
        labels: one label per sample.
        operation: name for messages.
        where: where the label of a sample stands, for messages.
        names: True treats numeric labels as names too.

    Raises:
        ValueError: labels of which only some are numbers, numbers that are no class indices, a single class.
    """
    for label in dict.fromkeys(labels):
        if any(unicodedata.category(letter) == "Cc" for letter in label) or (
            not names and (label[0] in "[{(\"'" or label[-1] in ",;|" or _is_several(label))
        ):
            raise ValueError(
                f"{operation}: {where(labels.index(label))}: expected one class index or one name, got the label "
                f"{label!r}; several labels of an image, quotes, brackets and separators are not read"
            )
    whole = [not names and label.isascii() and label.isdigit() and len(label) < 19 for label in labels]
    if any(whole) and not all(whole):
        one, other = whole.index(True), whole.index(False)
        raise ValueError(
            f"{operation}: {where(other)} has the label {labels[other]!r}, {where(one)} the number {labels[one]!r}, so "
            "it is not certain whether labels are class indices or names; delete a header, and label all samples alike"
        )
    if len(set(labels)) == 1:
        raise ValueError(
            f"{operation}: all {len(labels)} samples have the label {labels[0]!r}, so every answer would be right; "
            "training needs two classes"
        )
    if not any(whole):
        odd = -1 if names else next((k for k, label in enumerate(labels) if _is_number(label)), -1)
        if odd >= 0:
            raise ValueError(
                f"{operation}: {where(odd)}: the label {labels[odd]!r} is a number but no class index; number the "
                "classes 0, 1, 2, ..., or put a letter in front of it to make it a name"
            )
        classes = sorted(set(labels))
        say_similar(operation, classes)
        index = {name: k for k, name in enumerate(classes)}
        return classes, [index[label] for label in labels]
    targets = [int(label) for label in labels]
    count, present = max(targets) + 1, set(targets)
    if count > 1000 and 10 * len(present) < count:
        raise ValueError(
            f"{operation}: {where(targets.index(count - 1))}: label {count - 1}: numbers are class indices, and of the "
            f"{count} classes from 0 on only {len(present)} occur; number the classes from 0, put a letter in front of "
            "each label to make it a name, or pass a ListFile the labels as classes=[...]"
        )
    if len(present) < count:
        missing = [str(label) for label in range(count) if label not in present]
        hint = " (do the labels count from 1?)" if missing == ["0"] else ""
        say(f"{operation}: {len(missing)} of the {count} classes have no image: {some(missing)}{hint}")
    return [str(label) for label in range(count)], targets


def _is_several(label: str) -> bool:
    """Whether a label is several numbers."""
    words = re.split(r"[\s,;|]+", label)
    return len(words) > 1 and all(map(_is_number, words))


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


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
        self._rows: NDArray[np.int64] | None = None
        self.root = str(root)
        self.name = name

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,) positions of the samples in the data set as it was before `select`."""
        return np.arange(len(self)) if self._rows is None else self._rows

    @property
    def files(self) -> NDArray[np.bytes_]:
        """(N,) paths relative to `root`, as the system encodes them."""
        return self._paths

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
        chosen._rows = self.rows[indices]
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

    Names that begin with a dot and the folders that systems make (`@eaDir`, `__MACOSX`, ...) are left out. Links are
    followed, and every folder is read once. What is left out is logged in one line.

    Args:
        root: folder with the class folders.
        classes: class names in the order of their indices; None means all folders, sorted as text. Pass the classes of
            the training set for its validation folder, so that the indices agree even if one folder lacks a class or
            writes its name in another form of Unicode (macOS: NFD).
            With classes the level of the class folders is certain, and their content is not questioned.
        extensions: file extensions, such as (".jpg", ".png"), in any case.
        allow_empty: keep classes without an image instead of raising.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no class folders, a class without images, a class folder that is not in `classes`, or one file in
            two classes. Without `classes` also: a single class, a class folder that holds only folders (the folder
            above or below `root` may be meant), or one that holds a folder named like another class.
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
        left_out = LeftOut()
        found = class_folders(root, endings, left_out)
        names = found if classes is None else list(classes)
        spelled = _spelled(found, names)  # a name -> its folder
        unknown = sorted(set(found) - set(spelled.values()))
        if unknown:
            raise ValueError(
                f"ImageFolder: {root} has class folders that the given classes lack: {some(unknown)}; the classes are "
                f"{some(names)}. Rename or remove these folders"
            )
        files = {name: image_files(root, spelled[name], endings, left_out) if name in spelled else [] for name in names}
        paths = [path for name in names for path, _ in files[name]]
        empty = [name for name in names if not files[name]]
        if not paths or (empty and classes is None and not allow_empty):
            raise ValueError(
                f"ImageFolder: no images in {some(empty)} of {root} (extensions {', '.join(endings)}); "
                "remove the empty folders, or pass allow_empty=True or other extensions"
            )
        targets = np.repeat(np.arange(len(names)), [len(files[name]) for name in names])
        if classes is None:
            check_levels(root, {name: [path for path, _ in found] for name, found in files.items()})
        check_twice(root, paths, [identity for name in names for _, identity in files[name]], targets)
        left_out.say(f"ImageFolder: {root}")
        say_similar(f"ImageFolder: {root}", names)
        say_masks(f"ImageFolder: {root}", paths)
        if classes is None and all(name.isascii() and name.isdigit() for name in names):
            fall = np.flatnonzero(np.diff([float(name) for name in names]) < 0)
            if len(fall):
                at = int(fall[0])
                say(f"ImageFolder: {root}: the classes are sorted as text, as in torchvision: {names[at]!r} is {at}")
        super().__init__(paths, targets, names, root, "imagefolder")


def _spelled(found: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The folder of each name: that of the same bytes, else the one that differs in the form of Unicode only."""
    same = {name: name for name in set(names).intersection(found)}
    folders = {unicodedata.normalize("NFC", folder): folder for folder in found if folder not in same}
    return {name: folders[form] for name in names if (form := unicodedata.normalize("NFC", name)) in folders} | same


class ListFile(FileDataset):
    """Images listed in a text file, one `path<TAB>label` per line; without a tab the last word is the label.

    Every line is used or is an error, so headers, quotes and commas between path and label are refused.

    Args:
        file: the list, in UTF-8. Empty lines and lines that begin with # are skipped.
        root: folder of the relative paths; None means the folder of the list.
        classes: class names in the order of their indices. None: numeric labels are class indices, other labels are
            numbered in sorted order.

    Raises:
        FileNotFoundError: the list does not exist, or none of its first images does.
        ValueError: a line without a label or with an unknown one, a path that is no image, one image with two labels
            (the message names file and line), labels that are partly numbers, numbers that are no class indices, or a
            single class.
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
        root = file.parent if root is None else Path(root)
        paths, labels, numbers = [], [], []
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # some editors write a byte order mark
        for number, line in enumerate(text.split("\n"), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            path, label = _fields(f"ListFile: {file} line {number}", line, root)
            paths.append(path)
            labels.append(label)
            numbers.append(number)
        if not paths:
            raise ValueError(f"ListFile: {file} lists no images")
        self._check_twice(file, root, paths, labels, numbers)
        if classes is None:
            classes, targets = numbered(labels, f"ListFile: {file}", lambda k: f"line {numbers[k]}")
        else:
            index = {name: k for k, name in enumerate(classes)}
            for label, number in zip(labels, numbers, strict=True):
                if label not in index:
                    raise ValueError(f"ListFile: {file} line {number}: label {label!r} is not one of the given classes")
            targets = [index[label] for label in labels]
        if not any(os.path.exists(os.path.join(root, path)) for path in paths[:20]):
            raise FileNotFoundError(
                f"ListFile: {file} line {numbers[0]}: no file {os.path.join(root, paths[0])}; relative paths begin at "
                f"{root}, pass root=... for another folder"
            )
        super().__init__(paths, targets, classes, root, "list")

    @staticmethod
    def _check_twice(file: Path, root: Path, paths: list[str], labels: list[str], numbers: list[int]) -> None:
        """ValueError for one path with two labels; a log line for equal lines."""
        known: dict[str, int] = {}
        again = 0
        for k, path in enumerate(paths):
            first = known.setdefault(os.path.normpath(os.path.join(root, path)), k)
            if labels[first] != labels[k]:
                raise ValueError(
                    f"ListFile: {file} line {numbers[k]}: {path} has the label {labels[k]!r}, but {labels[first]!r} in "
                    f"line {numbers[first]}; delete one of the lines"
                )
            again += first != k
        if again:
            say(f"ListFile: {file}: {again} lines repeat an image, which is trained on as often")


_IMAGE_IN_LINE = re.compile(rf"({'|'.join(map(re.escape, IMAGE_EXTENSIONS))})[\"']?\s*[\s,;|]", re.I)


def _fields(where: str, line: str, root: Path) -> tuple[str, str]:
    """(path, label) of one line of a list; ValueError if they are not certain."""
    fields = [field.strip() for field in (line.rsplit("\t", 1) if "\t" in line else line.rsplit(maxsplit=1))]
    if len(fields) == 2 and all(fields):
        path, label = fields
        quoted = any(len(field) > 1 and field[0] == field[-1] and field[0] in "\"'" for field in fields)
        if quoted:
            raise ValueError(f"{where}: quotes are part of a path or label here, got {line!r}; remove them")
        one = path.lower().endswith(IMAGE_EXTENSIONS) and "\t" not in path and not _IMAGE_IN_LINE.search(path)
        if one or os.path.isfile(os.path.join(root, path)):
            return path, label
        if label.lower().endswith(IMAGE_EXTENSIONS):
            raise ValueError(f"{where}: expected `path<TAB>label`, got {line!r}; the path comes first, then the label")
    if _IMAGE_IN_LINE.search(line):
        raise ValueError(
            f"{where}: expected `path<TAB>label`, got {line!r}; put a tab between path and label, and nothing else"
        )
    raise ValueError(
        f"{where}: expected `path<TAB>label`, got {line!r}, which names no image; if it is a header, delete it or put "
        "# in front"
    )


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
                paths += [path for path, _ in found]
                targets += [index[name]] * len(found)
        else:
            for number, line in enumerate(needed[1].read_text().splitlines(), start=1):
                fields = line.split("\t")
                if len(fields) < 2 or fields[1] not in index:
                    raise ValueError(f"TinyImageNet: {needed[1]} line {number}: expected `file<TAB>wnid`, got {line!r}")
                paths.append(os.path.join("val", "images", fields[0]))
                targets.append(index[fields[1]])
        super().__init__(paths, targets, classes, root, "tinyimagenet")


def class_folders(
    root: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS, left_out: LeftOut | None = None
) -> list[str]:
    """Names of the class folders in `root`, sorted."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"ImageFolder: {root} {what}; expected a folder with one subfolder per class")
    names = []
    for path, is_folder, _ in tree(str(root), "", unreadable, deep=False):
        if is_folder and not is_hidden(path):
            names.append(path)
        elif left_out is not None:
            left_out.add(path, is_folder, endings, beside=True)
    if not names:
        raise ValueError(f"ImageFolder: {root} has no class folders; expected {root}/CLASS/image.jpg")
    return names


Identity = tuple[int, int]  # device and inode


def image_files(
    root: Path, folder: str, endings: tuple[str, ...], left_out: LeftOut | None = None
) -> list[tuple[str, Identity]]:
    """(path relative to `root`, identity) of the image files below `root/folder`, sorted.

    Raises:
        OSError: a folder cannot be read; skipping it would silently drop its images.
    """
    images = []
    for path, is_folder, identity in tree(str(root), folder, unreadable):
        if not is_folder and is_image(path, endings):
            images.append((path, identity))
        elif left_out is not None:
            left_out.add(path, is_folder, endings)
    return sorted(images)


def is_image(path: str, endings: tuple[str, ...]) -> bool:
    """Whether a file name has an image extension and does not begin with a dot."""
    name = os.path.basename(path)
    return name.lower().endswith(endings) and not name.startswith(".")


def is_hidden(path: str) -> bool:
    """Whether a folder is not for images: its name begins with a dot, or a system makes it."""
    name = os.path.basename(path)
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def tree(
    root: str, folder: str, failed: Callable[[str, OSError], None], *, deep: bool = True
) -> Iterator[tuple[str, bool, Identity]]:
    """Yields (path relative to `root`, whether it is a folder, identity) of everything below `root/folder`.

    Sorted within each folder. Hidden folders are yielded but not entered. Links are followed, but every folder is
    entered once, however many links lead to it; a folder is entered by its own path if it is below `root/folder`.

    Args:
        root: base of the paths.
        folder: start, relative to `root`, or "".
        failed: called with a folder that cannot be read and the error; it raises, or returns to skip the folder.
        deep: False does not descend into subfolders.
    """
    waiting, links = [folder], list[str]()
    entered: dict[Identity, str] = {}
    above: set[Identity] | None = None  # of `root/folder`, asked for when there are links
    while waiting or links:
        followed = not waiting
        inside = links.pop() if followed else waiting.pop()
        current = os.path.join(root, inside) if inside else root
        try:
            here = _identity(current)
            if followed and above is None:
                start = Path(os.path.realpath(os.path.join(root, folder)))
                above = {_identity(str(parent)) for parent in (*start.parents, os.path.realpath(root))} - set(entered)
            if above and here in above:
                say(f"{current} links to one of its parent folders and is not followed")
                continue
            if here in entered:
                say(f"{current} links to {entered[here]}, which is read already, and is not followed")
                continue
            entered[here] = current
            with os.scandir(current) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            failed(current, error)
            continue
        for entry in found:
            path = os.path.join(inside, entry.name)
            try:
                is_folder, is_link = entry.is_dir(), entry.is_symlink()
                identity = _identity(entry.path) if is_link else (here[0], entry.inode())
            except PermissionError as error:  # a link to a folder without permission
                failed(entry.path, error)
                continue
            except OSError:  # a link to nothing or to itself; it counts as a file, and `read` raises
                is_folder, is_link, identity = False, True, (here[0], entry.inode())
            yield path, is_folder, identity
            if is_folder and deep and not is_hidden(entry.name):
                (links if is_link else waiting).append(path)


def _identity(path: str) -> Identity:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def unreadable(folder: str, error: OSError) -> NoReturn:
    raise type(error)(
        f"ImageFolder: cannot read the folder {folder} ({error.strerror}), so its images would be missing; allow it "
        "(chmod u+rx), or remove the folder from the dataset"
    ) from error


_SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "tests", "testing", "tst"), "test"),
}


def split_of(name: str) -> str:
    """ "train", "val" or "test" for the usual names of these splits, else ""."""
    word = re.sub(r"[^a-z]", "", name.lower())
    word = re.sub(r"(set|split|data|images|imgs|folder|dir)$", "", word)
    return _SPLITS.get(word, "")


class LeftOut:
    """What a folder of images contains and the dataset does not use; `say` logs it in one line."""

    def __init__(self) -> None:
        self._folders: set[str] = set()
        self._beside: list[str] = []
        self._formats: Counter[str] = Counter()
        self._unread: list[str] = []
        self._hidden = 0

    def add(self, path: str, is_folder: bool, endings: tuple[str, ...], *, beside: bool = False) -> None:
        """Note one entry that is no image of a class; `beside`: it lies beside the class folders."""
        name = os.path.basename(path)
        ending = os.path.splitext(name)[1].lower()
        if is_folder:
            if is_hidden(path):
                self._folders.add(name)
        elif name.startswith("."):
            self._hidden += ending in endings
        elif beside and ending in endings:
            self._beside.append(name)
        elif ending in _OTHER_IMAGES or ending in IMAGE_EXTENSIONS:
            self._formats[ending] += 1
        elif ending in _ARCHIVES or (beside and ending in _TABLES):
            self._unread.append(name)

    def say(self, where: str) -> None:
        """Log what was left out, if anything."""
        parts = []
        if self._folders:
            parts.append(f"the folders {some(sorted(self._folders))}")
        if self._beside:
            parts.append(f"images beside the class folders ({len(self._beside)}: {some(sorted(self._beside))})")
        if self._formats:
            kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(self._formats.items()))
            parts.append(f"files of other extensions ({kinds})")
        if self._unread:
            parts.append(f"archives and tables, which may hold images or labels ({some(sorted(self._unread))})")
        if self._hidden:
            parts.append(f"images whose names begin with a dot ({self._hidden})")
        if parts:
            say(f"{where}: not used: {'; '.join(parts)}")


def check_levels(root: Path, classes: dict[str, list[str]]) -> None:
    """ValueError if it is not certain that the folders in `root` are the classes, judged by the folders below them.

    Args:
        root: folder with the class folders.
        classes: class name -> its images, as paths relative to `root`.
    """
    check_names(f"ImageFolder: {root}", list(classes), f"pass classes={some_list(classes)}")
    for name, paths in classes.items():
        if not paths:
            continue
        folders = {path[len(name) + 1 :].rpartition(os.sep)[0] for path in paths}
        inner = sorted({folder.partition(os.sep)[0] for folder in folders} - {""})
        small = [one for one in {name}.union(*(f.split(os.sep) for f in folders)) if one.lower().strip("._") in SMALL]
        if small:
            raise ValueError(
                f"ImageFolder: {root}/{name}: the folder {small[0]!r} is named like a store of thumbnails; remove it, "
                "or, if it is a class, pass classes=[...]"
            )
        twins = [one for one in inner if one in classes and one != name]
        if twins:
            raise ValueError(
                f"ImageFolder: {root}/{name} holds folders named like classes beside it ({some(twins)}): is it another "
                f"split or a second copy? Move it out of {root}, or pass classes=[...] if {name!r} is a class"
            )
        deeper = "" if len(classes) > 1 else os.path.commonpath([os.path.dirname(path) for path in paths])
        if len(classes) == 1:
            nested = deeper not in {os.path.dirname(path) for path in paths}
        else:
            nested = "" not in folders and (len(folders) > 1 or os.sep in next(iter(folders)))
        if nested:
            way = f"Pass {root}/{deeper}" if deeper else "Make it CLASS/image.jpg"
            raise ValueError(
                f"ImageFolder: {root}: the class folder {name!r} holds no images but the folders {some(inner)}: is the "
                f"class {name!r}, or are the classes below it? {way}, or classes={some_list(classes)} to take these "
                "folders as classes (on the command line list the images: list:FILE)"
            )
        odd = [one for one in inner if split_of(one) or (_is_part(one) and not _is_part(one, _IMAGES))]
        if odd:
            raise ValueError(
                f"ImageFolder: {root}/{name}: the folders {some(odd)} are named like splits or like annotations, so it "
                "is not certain that all images below are of this class; move them out, or, if they are, pass "
                f"classes={some_list(classes)}"
            )
    if len(classes) == 1:
        (name,) = classes
        raise ValueError(
            f"ImageFolder: {root} has a single class folder, {name!r}, so every answer would be right; pass the folder "
            f"above the classes, or classes=[{name!r}] if one class is meant"
        )


def check_names(where: str, names: Sequence[str], certain: str, parts: set[str] = NO_CLASSES) -> None:
    """ValueError if folders have the names of splits or of parts of a dataset, not of classes.

    Args:
        where: beginning of the message.
        names: names of the folders.
        certain: what to do if they are the classes.
        parts: names in lower case that are not those of classes.
    """
    found = [name for name in names if _is_part(name, parts)]
    if found and len(names) > 1:
        raise ValueError(
            f"{where}: {some(found)}: named like a part of a dataset, not like a class; make it one folder per class, "
            f"list the images with their labels (list:FILE), or {certain} if these are the classes"
        )
    splits: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)
        rest = tuple(word.lower() for word in words if not split_of(word))
        for split in filter(None, map(split_of, words)):
            splits.setdefault(rest, {})[split] = name
    twins = next((list(found.values()) for found in splits.values() if "train" in found and len(found) > 1), None)
    if twins:
        raise ValueError(
            f"{where}: {some(twins)} are named like splits, not like classes; make it train/CLASS/image.jpg and "
            f"val/CLASS/image.jpg, or {certain} if these are the classes"
        )


def _is_part(name: str, parts: set[str] = NO_CLASSES) -> bool:
    return re.sub(r"[^a-z]", "", name.lower()) in parts


def say_masks(where: str, paths: Sequence[str]) -> None:
    """Log images that are named like the mask of an image beside them."""
    named = [path for path in paths if "mask" in path or "Mask" in path]
    stems = {os.path.splitext(path)[0] for path in paths} if named else set()
    masks = [path for path in named if re.sub(r"[_.\- ]?[mM]ask(_?\d+)?\.\w+$", "", path) in stems]
    if masks:
        say(f"{where}: {len(masks)} images are named like masks of others and are trained on: {some(masks)}")


def check_twice(root: Path, paths: list[str], identities: list[Identity], targets: NDArray[np.int64]) -> None:
    """ValueError for one file (or a link to it) in two classes; a log line for one that a class has twice."""
    keys = np.array(identities, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((targets, keys[:, 1], keys[:, 0]))
    same = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]).all(1))
    if not len(same):
        return
    for at in same[np.argsort(targets[order[same]] == targets[order[same + 1]], kind="stable")][:1]:
        one, other = int(order[at]), int(order[at + 1])
        first, second = os.path.join(root, paths[one]), os.path.join(root, paths[other])
        if not (os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)):
            return  # some file systems report no inodes in a listing
        if targets[one] != targets[other]:
            raise ValueError(
                f"ImageFolder: {first} and {second} are the same file in two classes; remove one of the links"
            )
        say(f"ImageFolder: {root}: {len(same)} images are there twice, by links, such as {first} and {second}")


def say(text: str) -> None:
    """Log a line once per process, at a level that is shown without any set-up."""
    if text not in _SAID:
        _SAID.add(text)
        _LOG.warning("%s", text)


_SAID: set[str] = set()


def say_similar(where: str, classes: Sequence[str]) -> None:
    """Log class names that differ in case, spaces, invisible characters or the form of Unicode only."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        seen = "".join(letter for letter in name if not letter.isspace() and unicodedata.category(letter) != "Cf")
        groups.setdefault(unicodedata.normalize("NFC", seen.casefold()), []).append(name)
    twins = [names for names in groups.values() if len(names) > 1]
    if twins:
        shown = some(twins[0]) if len(set(map(str.casefold, twins[0]))) == 1 else ", ".join(map(ascii, twins[0][:5]))
        say(f"{where}: {len(twins)} classes differ in case, spaces or the form of Unicode only, such as {shown}")


def some_list(names: Iterable[str]) -> str:
    """A Python list of the first few names, for messages."""
    shown = list(names)
    return "[" + ", ".join(map(repr, shown[:3])) + (", ...]" if len(shown) > 3 else "]")


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
