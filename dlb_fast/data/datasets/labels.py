"""The labels of a training set in a file: NumPy's arrays in the data's order, or CSV by path or index."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dlb_fast._args import did_you_mean
from dlb_fast.data.datasets.folder import some
from dlb_fast.data.datasets.noise import relabelled

__all__ = ["LabelFile", "label_rows", "read_labels", "table", "with_labels"]

_COUNTED = 100  # labels from which on their agreement with the data's own is no accident


class LabelFile(NamedTuple):
    """The parts of `PATH.csv`, `PATH.npy` or `PATH.npz[:KEY[:CLEAN]]`.

    Example:
        >>> LabelFile.of("labels/n.npz:worse:clean")
        LabelFile(path='labels/n.npz', key='worse', clean='clean')
    """

    path: str
    key: str | None
    clean: str | None

    @classmethod
    def of(cls, source: str) -> LabelFile:
        """ValueError for another ending, or a key of a file that has none."""
        parts = re.fullmatch(r"(.+?\.(?:npy|npz|csv))(?::([^:]+))?(?::([^:]+))?", source, re.IGNORECASE)
        if parts is None:
            raise ValueError(
                f"labels: expected FILE.csv, FILE.npy or FILE.npz:KEY, got {source!r}; convert another format once, "
                "such as a list of integers by numpy.save"
            )
        if parts[2] and not parts[1].lower().endswith(".npz"):
            raise ValueError(f"labels: {source}: a key belongs to a .npz file, leave {parts[2]!r} out")
        return cls(parts[1], parts[2], parts[3])


def read_labels(source: str, dataset: Any, rest: Any = None) -> NDArray[np.int64]:
    """(N,) labels for the whole data set, in its own order; -1 where a CSV has none.

    Args:
        source: `PATH.npy`: integers, one per sample. `PATH.npz:KEY`: the same; the key may be left out where there is
            one only. `PATH.npz:KEY:CLEAN`: the file has another order, in which its array CLEAN has the true labels;
            the k-th sample of a class is the k-th of that class in the file. `PATH.csv`: a header with `label` and
            `path` (below the data set's folder) or `index` (position in the data set), and other columns, which are not
            used. Labels are class names; numbers are class indices where no class has a number for its name.
        dataset: the training set, before any subset.
        rest: the part of the data set that is held out of it, if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or has another number of labels, labels that are no classes, a sample twice or
            an unknown one, or an order in which the labels agree with the true ones by chance only.
    """
    file = LabelFile.of(source)
    if not os.path.isfile(file.path):
        raise FileNotFoundError(f"labels: no file {file.path}")
    parts = [dataset] if rest is None else [dataset, rest]
    own = np.empty(sum(map(len, parts)), dtype=np.int64)
    for part in parts:
        own[part.rows] = np.asarray(part.targets)
    if file.path.lower().endswith(".csv"):
        return _of_csv(file.path, parts, len(own))
    found = _array(file.path, file.key)
    known = None if file.clean is None else _array(file.path, file.clean)
    for name, values in ((source, found), (f"{file.path}:{file.clean}", known)):
        if values is not None:
            _check(f"labels: {name}", values, len(own), dataset.num_classes, rest is not None)
    found = found.astype(np.int64)
    if known is not None:
        return _in_order_of(f"labels: {file.path}:{file.clean}", own, known.astype(np.int64), found, dataset.classes)
    _check_order(source, own, found, dataset.num_classes)
    return found


def with_labels(dataset: Any, labels: NDArray[np.int64], source: str) -> Any:
    """The dataset, possibly a subset, with its labels among those of `read_labels`; `clean_targets` keeps its own.

    Raises:
        ValueError: a sample has no label.
    """
    chosen = labels[dataset.rows]
    if lacking := np.flatnonzero(chosen < 0).tolist():
        names = [_name(dataset, k) for k in lacking[:6]]
        raise ValueError(
            f"labels: {source} has no label for {len(lacking)} of {len(dataset)} training images, such as "
            f"{some(names[:3])}; add a line for each"
        )
    return relabelled(dataset, chosen)


def table(dataset: Any, **columns: Sequence[Any]) -> bytes:
    """CSV of the samples of a dataset: `index`, for files `path`, and further columns.

    Example:
        >>> from dlb_fast.data import open_dataset
        >>> table(open_dataset("synthetic:8,2,4"), label=[0, 1] * 4).split()[:3]
        [b'index,label', b'0,0', b'1,1']
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    files = {} if not hasattr(dataset, "files") else {"path": [_slashed(os.fsdecode(name)) for name in dataset.files]}
    every: Mapping[str, Sequence[Any]] = {"index": dataset.rows.tolist(), **files, **columns}
    writer.writerow(every)
    writer.writerows(zip(*every.values(), strict=True))
    return out.getvalue().encode("utf-8", "surrogateescape")


def label_rows(dataset: Any) -> bytes:
    """The CSV of the labels of a dataset by class name, with its true ones; `read_labels` reads it."""
    names = np.asarray(dataset.classes, dtype=object)
    labels, clean = (names[np.asarray(values)].tolist() for values in (dataset.targets, dataset.clean_targets))
    return table(dataset, label=labels, clean=clean)


def _name(dataset: Any, index: int) -> str:
    files = getattr(dataset, "files", None)
    return f"index {dataset.rows[index]}" if files is None else os.fsdecode(files[index])


def _slashed(path: str) -> str:
    return path if os.sep == "/" else path.replace(os.sep, "/")


def _array(path: str, key: str | None) -> NDArray[Any]:
    """The array of a file, of any dtype without Python objects."""
    try:
        with open(path, "rb") as file:  # which numpy.load leaves open where it fails
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            if key is None and len(found.files) == 1:
                key = found.files[0]
            if key in found.files:
                return found[key]
            keys = found.files
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"labels: {path} cannot be read as an array of integers: {error}") from error
    if key is None:
        raise ValueError(f"labels: {path} has the arrays {some(keys)}; name one, as in file:{path}:KEY")
    raise ValueError(f"labels: {path} has no array {key!r}{did_you_mean(key, keys) or f'; it has {some(keys)}'}")


def _check(where: str, values: NDArray[Any], length: int, classes: int, is_part: bool) -> None:
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"{where} holds {values.dtype}; expected class indices as integers, because a cast would round others and "
            "give NaN a class"
        )
    if values.shape != (length,):
        whole = ", of the training part and the held-out part together" if is_part else ""
        raise ValueError(
            f"{where} has the shape {values.shape}, expected ({length},): a label per image of the data set in its own "
            f"order{whole}"
        )
    wrong = np.flatnonzero((values < 0) | (values >= classes))
    if len(wrong):
        raise ValueError(f"{where}: label {values[wrong[0]]} at index {wrong[0]}; expected a class in [0, {classes})")


def _check_order(source: str, own: NDArray[np.int64], found: NDArray[np.int64], classes: int) -> None:
    """ValueError for labels that agree with the data's own as often as shuffled ones."""
    count = len(own)
    shares = [np.bincount(values, minlength=classes) / count for values in (own, found)]
    chance = float((shares[0] * shares[1]).sum())
    agreed = float((own == found).mean())
    if count >= _COUNTED and agreed <= chance + 2 * (chance * (1 - chance) / count) ** 0.5:
        raise ValueError(
            f"labels: {source} agrees with the data's own labels in {100 * agreed:.1f} % of the images, no more than "
            f"by chance ({100 * chance:.1f} %): is it in another order? Name the file's array of true labels as in "
            "file:PATH.npz:KEY:CLEAN, or use a CSV with path or index, which is taken as it is"
        )


def _in_order_of(
    where: str, own: NDArray[np.int64], known: NDArray[np.int64], found: NDArray[np.int64], classes: Sequence[str]
) -> NDArray[np.int64]:
    """The labels for the k-th sample of each class from the k-th of that class in the file."""
    here, there = (np.bincount(values, minlength=len(classes)) for values in (own, known))
    differ = np.flatnonzero(here != there)
    if len(differ):
        k = int(differ[0])
        raise ValueError(
            f"{where} has {there[k]} images of class {classes[k]!r}, the data set {here[k]}; it is of another data "
            "set, or its classes are in another order"
        )
    ordered = np.empty_like(own)
    ordered[np.argsort(own, kind="stable")] = found[np.argsort(known, kind="stable")]
    return ordered


def _of_csv(path: str, parts: Sequence[Any], length: int) -> NDArray[np.int64]:
    rows, numbers, labels = _lines(path, parts, length)
    given = _classes_of(path, parts[0].classes, labels, numbers)
    whole = np.full(length, -1, dtype=np.int64)
    lines: dict[int, int] = {}  # row -> line
    for places, label, number in zip(rows, given, numbers, strict=True):
        for row in places:
            if row in lines:
                raise ValueError(
                    f"labels: {path} lines {lines[row]} and {number} are of the same image; delete one of them"
                )
            lines[row] = number
            whole[row] = label
    return whole


def _lines(path: str, parts: Sequence[Any], length: int) -> tuple[list[list[int]], list[int], list[str]]:
    """(rows of the data set, line, label) of each line."""
    rows, numbers, labels = [], [], []
    places = _Places(parts)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            by_path = places.files and "path" in header
            if "label" not in header or not (by_path or "index" in header) or len(set(header)) < len(header):
                raise ValueError(
                    f"labels: {path}: expected a first line with the columns label and {'path or ' * places.files}"
                    f"index, each once, got {', '.join(header) or 'nothing'}"
                )
            for line in reader:
                where = f"labels: {path} line {reader.line_num}"
                if None in line or None in line.values():
                    raise ValueError(f"{where}: expected {len(header)} fields as in the first line")
                rows.append(places.of(where, line, by_path, length))
                numbers.append(reader.line_num)
                labels.append(line["label"])
    except csv.Error as error:
        raise ValueError(f"labels: {path} is not a CSV: {error}") from error
    return rows, numbers, labels


class _Places:
    """Where the samples of a data set are, by path or by index."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.files = hasattr(parts[0], "files")
        self.root, self.same = "", True
        self._rows: dict[str, list[int]] = {}
        if not self.files:
            return
        self.root = os.path.abspath(parts[0].root)
        self.same = parts[0].name != "tar"  # two shards may have images of one name
        for part in parts:
            for name, row in zip(part.files.tolist(), part.rows.tolist(), strict=True):
                self._rows.setdefault(_normal(os.fsdecode(name)), []).append(row)

    def of(self, where: str, line: Mapping[str, str], by_path: bool, length: int) -> list[int]:
        """The rows that a line speaks of."""
        text = line.get("index", "").strip()
        if by_path:
            found = self._named(line["path"])
            if not found:
                raise ValueError(f"{where}: {line['path']!r} is no image of the data set in {self.root}")
            if len(found) == 1 or (self.same and not text):
                return found
            if not text:
                raise ValueError(
                    f"{where}: {len(found)} images of the data set are called {line['path']!r}; add a column index"
                )
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) < length):
            raise ValueError(f"{where}: index {text!r}; expected a whole number in [0, {length})")
        return [int(text)]

    def _named(self, path: str) -> list[int]:
        """By the path below the folder of the training images, below the folder above that one, or a whole path."""
        split, _, below = path.partition("/")
        tries = [path, below if split == os.path.basename(self.root) else path]
        if os.path.isabs(path):
            tries.append(os.path.relpath(path, self.root))
        return next((self._rows[name] for name in map(_normal, tries) if name in self._rows), [])


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", _slashed(os.path.normpath(path)))


def _classes_of(path: str, classes: Sequence[str], labels: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """Class indices of labels that are all names, or all indices where no class is named by a number."""
    names = {unicodedata.normalize("NFC", str(name)): k for k, name in enumerate(classes)}
    labels = [label if unicodedata.normalize("NFC", label) in names else label.strip() for label in labels]
    if labels and all(map(_is_index, labels)) and not any(map(_is_index, names)):
        names = {str(k): k for k in range(len(classes))}
        labels = [str(int(label)) for label in labels]
    found = [names.get(unicodedata.normalize("NFC", label), -1) for label in labels]
    if -1 in found:
        at = found.index(-1)
        hint = did_you_mean(labels[at], names) or f"; the classes are {some(list(names))}"
        raise ValueError(
            f"labels: {path} line {numbers[at]}: the label {labels[at]!r} is no class of the data{hint}. All labels "
            "are class names, or all are class indices"
        )
    return found


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19
