"""The classes of image files, by the network of a run."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from dlb_fast.data import Batch, ImageDecoder
from dlb_fast.data.datasets.folder import IMAGE_EXTENSIONS, LeftOut, is_image, read_file, tree, unreadable

from .checkpoint import write_atomically
from .config import FILE_KINDS
from .data import eval_loader, evaluation_config
from .run import RunFolder, load_model, resolve_device

__all__ = [
    "ENDINGS", "find_images", "predict", "one_field", "printable", "stored_images_note", "with_logits",
    "write_predictions",
]  # fmt: skip

LISTS = (".txt", ".tsv", ".lst")  # endings of files that list images
ENDINGS = (".csv", ".json")  # of what `write_predictions` writes


class ImageFiles:
    """Image files as a dataset whose targets are their positions; what cannot be read is noted, and is black.

    Attributes:
        failed: position -> why the file cannot be read or is not for this network.
    """

    def __init__(self, paths: Sequence[str], decoder: ImageDecoder, channels: int) -> None:
        self.paths, self.failed = paths, dict[int, str]()
        self._decoder, self._channels = decoder, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            pixels = self._decoder(read_file(self.paths[index]))
            if self._channels == 1:
                if (pixels != pixels[..., :1]).any():
                    raise ValueError("an image in colour, the network was trained on grey ones")
                pixels = pixels[..., :1]
        except MemoryError:
            raise  # not an error of this file
        except Exception as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.failed[index] = text or type(error).__name__
            pixels = np.zeros((1, 1, self._channels), dtype=np.uint8)
        return pixels, index

    def path(self, index: int) -> str:
        """Path of a file."""
        return self.paths[index]


def find_images(sources: Sequence[str | Path]) -> list[str]:
    """The image files of paths: files, folders (with all folders below them) and lists, each file once.

    A list is `list:FILE`, or a file that ends in .txt, .tsv or .lst: one path per line, relative to the list's folder,
    as for the training; a label behind it is not used. Only a listed or named file may lack an image's ending.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder or list without images.
    """
    found: list[str] = []
    for given in sources:
        source = os.fspath(given)
        listed = source.startswith("list:") and not os.path.exists(source)
        path = source.removeprefix("list:") if listed else source
        if os.path.isdir(path):
            images = _below(path)
        elif not os.path.exists(path):
            raise FileNotFoundError(f"predict: no file or folder {path}")
        elif listed or path.lower().endswith(LISTS):
            if not os.path.isfile(path):  # reading a pipe may never return
                raise ValueError(f"predict: {path} is a pipe, socket or device; expected a file that lists images")
            images = list(_listed(Path(path)))
        else:
            images = [path]
        if not images:
            raise ValueError(f"predict: {path} has no images (in a folder: {', '.join(IMAGE_EXTENSIONS)})")
        found += images
    return list(dict.fromkeys(found))


def _below(folder: str) -> list[str]:
    images, left_out = [], LeftOut()
    for path, is_folder, _ in tree(folder, "", unreadable):
        if not is_folder and is_image(path, IMAGE_EXTENSIONS):
            images.append(os.path.join(folder, path))
        else:
            left_out.add(path, is_folder, IMAGE_EXTENSIONS)
    left_out.say(f"predict: {folder}")
    return sorted(images)


def _listed(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"):
        line = line.strip()
        if line and not line.startswith("#"):
            path = os.path.join(file.parent, line.rpartition("\t")[0].strip() or line)
            if not os.path.exists(path) and os.path.isfile(short := path.rpartition(" ")[0].rstrip()):
                path = short  # followed by a label
            yield path


def predict(
    run: Path | str, paths: Sequence[str], *, weights: str = "best", top: int = 1, device: str = "auto"
) -> Iterator[tuple[str, list[tuple[str, float]] | str]]:
    """Yields `(path, [(class, probability), ...])` for every file in order, the most probable class first.

    The images pass the transform of the run's evaluation, in batches of its size, in float32. A file that cannot be
    read gives `(path, why)`.

    Args:
        run: run folder.
        paths: image files.
        weights: `best` or `last`.
        top: number of classes; at most all.
        device: name of the device, or `auto`.

    Raises:
        ValueError: there is no run.
        CheckpointError: the weights are missing or damaged.

    Example: `for path, found in predict("runs/first", ["a.jpg"]): print(path, found)`
    """
    where = resolve_device(device)
    model, about = load_model(run, weights=weights)
    model, config = model.to(where), RunFolder(run).read_config().data
    files = ImageFiles(paths, ImageDecoder(max_pixels=config.max_pixels), about["channels"])
    loader = eval_loader(files, evaluation_config(config, about), about["mean"], about["std"], where)
    count = min(top, len(about["classes"]))
    for batch, logits in with_logits(model, loader):
        values, classes = softmax(logits, dim=1).topk(count, dim=1)
        for index, row, names in zip(batch.targets.tolist(), values.tolist(), classes.tolist(), strict=True):
            if index in files.failed:
                yield paths[index], files.failed[index]
            else:
                yield paths[index], [(about["classes"][k], value) for k, value in zip(names, row, strict=True)]


@torch.no_grad()
def with_logits(model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """(batch, its logits in float64) of every batch, without a gradient."""
    for batch in loader:
        yield batch, model(batch.images).double()


def stored_images_note(run: Path, weights: str) -> str:
    """How a network that was trained on stored images sees files; "" for one that was trained on files."""
    config = RunFolder(run).read_config().data
    if config.kind in FILE_KINDS:
        return ""
    about = load_model(run, weights=weights)[1]
    height, width = about["size"]
    kind = "grey" if about["channels"] == 1 else "RGB"
    return (
        f"the run was trained on the stored images of {config.kind}: files are read as {kind}, their shorter side is "
        f"resized to {height} and the middle {height} x {width} pixels are taken; they should look like those images"
    )


def printable(text: str) -> str:
    """Names that are no UTF-8 have surrogates, which cannot be printed."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_field(text: str) -> str:
    """A name as one field of one printed line: names may have tabs and line ends."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: ascii(found[0])[1:-1], text)


def write_predictions(file: Path, rows: Sequence[tuple[str, list[tuple[str, float]]]]) -> None:
    """Write a row per file and class (CSV), or a list of `{"file", "classes": [{"class", "probability"}]}` (JSON)."""
    out = io.StringIO(newline="")
    if file.suffix.lower() == ".csv":
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("file", "class", "probability"))
        writer.writerows((name, label, repr(value)) for name, found in rows for label, value in found)
    else:
        listed = [
            {"file": name, "classes": [{"class": label, "probability": value} for label, value in found]}
            for name, found in rows
        ]
        json.dump(listed, out, indent=1, ensure_ascii=False)
        out.write("\n")
    text = out.getvalue().encode()
    write_atomically(file, lambda stream: stream.write(text), "then repeat the command")
