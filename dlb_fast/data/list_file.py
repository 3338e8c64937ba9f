"""A dataset of the files that a text file lists with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlb_fast.data.files import FileDataset, StringTable

__all__ = ["ListFile"]


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
