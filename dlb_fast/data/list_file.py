"""A dataset of the files that a text file lists with their labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dlb_fast.data.files import IMAGE_EXTENSIONS, FileDataset, StringTable, numbered

__all__ = ["ListFile"]


# A comma or a space may belong to the path or to the label: the path ends where its extension does.
_WAYS = [
    re.compile(r"(.*(?:{}))([, ]+)(.+)".format("|".join(map(re.escape, IMAGE_EXTENSIONS))), re.IGNORECASE),
    re.compile(r"(.*\.\w{1,5})([, ]+)([^/]+)"),
    re.compile(r"(.*[^, ])([, ]+)([^, ]+)"),
]


class ListFile(FileDataset):
    """A text file with one `path label` per line, separated by a tab, a comma or spaces.

    The label follows the last tab; in a line without one it follows the image's extension (only a comma lets it have
    several words), or is the last word where there is no extension. Each line counts by itself.

    Args:
        file: the list, in UTF-8. Empty lines and lines that begin with # are skipped.
        root: folder of relative paths; None is the list's own.
        classes: names in the order of their indices. None: numbers are class indices themselves, and other labels are
            numbered in sorted order.

    Raises:
        FileNotFoundError: no such list. ValueError: a line without a label or with an unknown one, naming file and
            line; numbers that are no class indices.
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
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # some editors write a mark in front
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            path, label = _split(line)
            if not path or not label:
                raise ValueError(f"ListFile: {file} line {number}: expected `path label`, got {line!r}")
            paths.append(path)
            labels.append(label)
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
        super().__init__(StringTable(paths), targets, classes, file.parent if root is None else root, "list")


def _split(line: str) -> tuple[str, str]:
    """(path, label); empty ones where the line cannot be split."""
    if "\t" in line:
        path, _, label = line.rpartition("\t")
        return path.strip(), label.strip()
    found = next(filter(None, (way.fullmatch(line) for way in _WAYS)), None)
    if found is None:
        return "", ""
    path, separator, label = found.groups()
    if "," in label or (" " in label and "," not in separator):  # more columns than two, or no telling which are
        return "", ""
    return path, label
