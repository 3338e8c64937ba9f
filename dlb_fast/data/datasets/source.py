"""Load one sample of a dataset as an image, and handle samples that cannot be loaded."""

from __future__ import annotations

import copy
import functools
import logging
import math
import numbers
import operator
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from dlb_fast.data._args import class_index, class_indices, length_of
from dlb_fast.data.datasets.folder import read_file
from dlb_fast.data.decode.decode import is_pillow, loaded, plain_pixels
from dlb_fast.data.rng import SUBSTITUTE, key_of

__all__ = [
    "Again",
    "FailurePolicy",
    "SampleError",
    "SampleSource",
    "as_image",
    "as_pair",
    "is_torchvisions",
    "with_decoder",
    "without_transform",
]

_LOG = logging.getLogger("dlb_fast.data")
_LISTED = 100  # number of errors that are kept


class SampleError(RuntimeError):
    """One sample could not be read or decoded.

    Attributes:
        path: path of the file, or ``"sample 17"`` if the dataset has no paths.
        index: sample id in the dataset.
        epoch: epoch in which the sample was requested.
        reason: message of the reader or the decoder.
        remedy: an option of the loader that would help, or "".

    Example:
        >>> error = SampleError("a/b.jpg", 17, 3, "empty file (0 bytes)")
        >>> error.index, error.epoch
        (17, 3)
    """

    def __init__(self, path: str, index: int, epoch: int, reason: str, remedy: str = "") -> None:
        super().__init__(path, index, epoch, reason, remedy)
        self.path = path
        self.index = index
        self.epoch = epoch
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        # without a path there is no file to repair
        remedy = (
            "Check what the dataset or `load` returns for it"
            if self.path == f"sample {self.index}"
            else "Repair or remove the file (`dlb-fast verify-data` lists all of them)"
        )
        return (
            f"sample {self.index} of epoch {self.epoch} could not be loaded: {self.path}: "
            f"{self.reason}. {remedy}{self.remedy and ' or '}{self.remedy}."
        )


def as_image(value: Any) -> torch.Tensor:
    """Convert an image to a (channels, height, width) tensor; NumPy and PIL images are (height, width[, channels]).

    PIL images become grey or RGB; tensors and arrays keep their channels. The strides stay channels-last, for which
    torch's antialiased uint8 resize is fastest.

    Raises:
        TypeError: not an image, or integers other than uint8, whose range is unknown.

    Example:
        >>> as_image(np.zeros((4, 6, 3), np.uint8)).shape
        torch.Size([3, 4, 6])
    """
    if isinstance(value, torch.Tensor):
        tensor = value
    else:
        tensor = _as_tensor(plain_pixels(value) if is_pillow(value) else value)
        tensor = tensor[:, :, None] if tensor.ndim == 2 else tensor
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise TypeError(f"an image must be uint8 or floating, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if tensor.ndim != 3:
        raise TypeError(f"an image must have 3 dimensions, got shape {tuple(tensor.shape)}")
    return tensor


def _as_tensor(value: Any) -> torch.Tensor:
    """`value` as a tensor with the same axes; shares memory if possible."""
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "uifb":
        raise TypeError(
            f"an image must be a tensor (c, h, w), an array (h, w[, c]) or a PIL image, got {type(value).__name__} of "
            f"{array.dtype}"
        )
    if not array.flags.writeable or min(array.strides, default=0) < 0:  # torch supports neither
        array = array.copy()
    return torch.from_numpy(array)


def as_pair(item: Any) -> tuple[Any, Any]:
    """The (image, target) pair that `load` or `dataset[i]` returned.

    Raises:
        TypeError: anything else.

    Example:
        >>> as_pair(("image", 3))
        ('image', 3)
    """
    image, target = pair_of("", item)
    size = target.numel() if isinstance(target, torch.Tensor) else np.size(target)
    if size != 1:
        raise TypeError(
            f"{_PAIR}, got the target {type(target).__name__} of shape {tuple(np.shape(target))}; pass the class in "
            "place of soft targets (the loaders mix whole batches: docs/augmentation.md)"
        )
    return image, target


def pair_of(operation: str, item: Any) -> tuple[Any, Any]:
    """(image, target) of an item; TypeError for anything but a pair whose target is a number or an array of numbers."""
    where = f"{operation}{operation and ': '}{_PAIR}"
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"{where}, got {_described(item)}; pass load=lambda dataset, i: (image, target) that picks them, to "
            "OverlapLoader or to MapDataset(dataset, load)"
        )
    image, target = item
    if isinstance(target, str):
        raise TypeError(f"{where}, got the target {target!r}; number the class names")
    if not isinstance(target, (torch.Tensor, np.ndarray)) and not isinstance(target, (numbers.Real, np.number)):
        raise TypeError(
            f"{where}, got the target {_described(target)}; one class of the whole image is needed, no boxes, masks or "
            "captions: pass MapDataset(dataset, load), whose load(dataset, i) returns (image, class index)"
        )
    return image, target


_PAIR = "expected a pair (image, class index) from load or dataset[i]"


def _described(value: Any) -> str:
    """The type of a value, with its length or keys, for messages."""
    got = type(value).__name__
    if isinstance(value, (tuple, list)):
        got += f" of {len(value)}"
    elif isinstance(value, dict):
        got += f" with the keys {', '.join(map(repr, list(value)[:5]))}"
    return got


def is_torchvisions(value: Any) -> bool:
    """Whether the class of `value`, or one above it, is torchvision's; does not import torchvision."""
    return any(kind.__module__.partition(".")[0] == "torchvision" for kind in type(value).__mro__)


def without_transform(dataset: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """(a torchvision dataset without the transform of its images, that transform or None); any other as it is.

    Looks into `torch.utils.data.Subset` and `ConcatDataset`. So a loader reads an image once and transforms it for each
    of its views.

    Raises:
        ValueError: a ConcatDataset whose datasets have different transforms.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [without_transform(part) for part in dataset.datasets]
        transforms = [transform for _, transform in parts]
        if any(transform is not transforms[0] for transform in transforms):
            raise ValueError(
                "the datasets of the ConcatDataset have different transforms; give them none, and pass transform= to "
                "the loader"
            )
        return _changed(dataset, datasets=[part for part, _ in parts]), transforms[0]
    if isinstance(dataset, Subset):
        inner, transform = without_transform(dataset.dataset)
        return _changed(dataset, dataset=inner), transform
    transform = getattr(dataset, "transform", None)
    if transform is None or not is_torchvisions(dataset):
        return dataset, None
    both = getattr(dataset, "transforms", None)  # torchvision's pair of the transforms of image and target
    raw = _changed(dataset, transform=_unchanged)
    if both is not None:
        raw.transforms = _changed(both, transform=_unchanged)
    return raw, transform


def _unchanged(image: Any) -> Any:
    return image


def with_decoder(dataset: Any, decoder: Callable[[bytes], Any]) -> Any:
    """A torchvision folder whose files `decoder` reads, in place of torchvision's own loader; any other as it is.

    That one opens whatever Pillow knows, and some formats start a program.
    """
    if isinstance(dataset, ConcatDataset):
        return _changed(dataset, datasets=[with_decoder(part, decoder) for part in dataset.datasets])
    if isinstance(dataset, Subset):
        return _changed(dataset, dataset=with_decoder(dataset.dataset, decoder))
    loader = getattr(dataset, "loader", None)
    name = f"{getattr(loader, '__module__', '')}.{getattr(loader, '__name__', '')}"
    if name not in ("torchvision.datasets.folder.default_loader", "torchvision.datasets.folder.pil_loader"):
        return dataset
    return _changed(dataset, loader=functools.partial(_decoded, decoder))


def _decoded(decoder: Callable[[bytes], Any], path: str) -> Any:
    from PIL import Image

    return Image.fromarray(decoder(read_file(path)))


def _changed(value: Any, **attributes: Any) -> Any:
    changed = copy.copy(value)
    for name, attribute in attributes.items():
        setattr(changed, name, attribute)
    return changed


def _only_torchvisions(dataset: Any) -> bool:
    """Whether a dataset is torchvision's, or `Subset` and `ConcatDataset` of such."""
    if isinstance(dataset, ConcatDataset):
        return all(_only_torchvisions(part) for part in dataset.datasets)
    return _only_torchvisions(dataset.dataset) if isinstance(dataset, Subset) else is_torchvisions(dataset)


def _augments(dataset: Any) -> bool:
    """Whether the items of a dataset, or of one that it wraps, may differ from call to call, by a transform."""
    if isinstance(dataset, ConcatDataset):
        return any(_augments(part) for part in dataset.datasets)
    if hasattr(dataset, "dataset") and _augments(dataset.dataset):
        return True
    own, both = getattr(dataset, "transform", None), getattr(dataset, "transforms", None)
    if is_torchvisions(both):
        both = getattr(both, "transform", None)
    return any(transform not in (None, _unchanged) for transform in (own, both))


class Again:
    """The views of a dataset that transforms its items itself: each is an item of its own, so the second one is read
    again.

    Args:
        source: source of the items.
        transform: transform of the loader, applied after that of the dataset, or None.
    """

    def __init__(self, source: SampleSource, transform: Callable[..., Any] | None) -> None:
        self._source, self._transform = source, transform

    def __call__(self, image: Any, rng: Any) -> Any:
        if rng.view:
            image, _ = self._source.get(rng.sample)
        return image if self._transform is None else self._transform(image, rng)


class SampleSource:
    """Images and targets of a dataset of one of three kinds.

    Args:
        dataset: has a length, and either (a) ``targets`` and ``read(i)``, which returns the file's bytes or its path;
            or (b) ``targets`` and ``images`` (N, c, h, w); or (c) ``dataset[i]`` is (image, target).
        decoder: maps bytes to uint8 (h, w, 3).
        load: ``load(dataset, i)`` returns (image, target); the image is any that `as_image` accepts. None means
            ``dataset[i]`` for datasets of kind (c).
        operation: name of the loader, for messages.

    Attributes:
        items: whether the images are those of items, of any type, and not decoded or stored ones.
        own: transform of a torchvision dataset, which `dataset[i]` here leaves out, or None.
        augments: whether the dataset transforms its items itself, so that two items of one sample differ.
        unknown: whether it may do so under another name than `transform`.
        keep: True returns the images of items as they are, for transforms that take such images.

    Raises:
        TypeError: a dataset of another kind.
        ValueError: the dataset and its targets differ in length.
    """

    def __init__(
        self,
        dataset: Any,
        decoder: Callable[[bytes], Any],
        load: Callable[[Any, int], tuple[Any, Any]] | None = None,
        operation: str = "OverlapLoader",
    ) -> None:
        length = length_of(operation, dataset)
        self._operation = operation
        self._dataset = dataset
        self._decoder = decoder
        self._load = load
        self.reads = 0
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._targets: NDArray[np.int64] | None = None
        self.own: Callable[[Any], Any] | None = None
        self.augments = self.unknown = self.keep = False
        stored = (hasattr(dataset, "read") or hasattr(dataset, "images")) and hasattr(dataset, "targets")
        self.items = load is not None or not stored
        if load is None and not stored:
            if not hasattr(dataset, "__getitem__"):
                more = "; pass load=lambda dataset, i: (image, target)" if operation == "OverlapLoader" else ""
                raise TypeError(
                    f"{operation}: dataset: expected `dataset[i]` to be (image, target), or `targets` with `read(i)` "
                    f"or `images`, {type(dataset).__name__} has neither{more}"
                )
            raw, self.own = without_transform(dataset)
            self._dataset = with_decoder(raw, decoder)
            self._load = operator.getitem
        if self.items:
            self.augments = _augments(self._dataset)
            self.unknown = self.own is None and not _only_torchvisions(self._dataset)
            return
        self._targets = class_indices(operation, dataset.targets)
        if self._targets.shape != (length,):
            raise ValueError(f"{operation}: dataset.targets: expected shape ({length},), got {self._targets.shape}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._dataset)

    def path(self, sample: int) -> str:
        """The path of a sample if the dataset has paths, else `sample 17`."""
        dataset: Any = self._dataset
        index = sample
        try:
            while isinstance(dataset, Subset):
                dataset, index = dataset.dataset, dataset.indices[index]
            if callable(getattr(dataset, "path", None)):
                return str(dataset.path(index))
            if is_torchvisions(dataset) and hasattr(dataset, "samples"):
                return str(dataset.samples[index][0])
        except Exception:
            _LOG.debug("the path of sample %d is not known", sample, exc_info=True)
        return f"sample {sample}"

    def get(self, sample: int) -> tuple[Any, int]:
        """(uint8 or float image (c, h, w), target) of one sample; passes on errors of the reader and the decoder."""
        if self._load is not None:
            image, target = as_pair(self._load(self._dataset, sample))
            target, size = class_index(self._operation, target), 0
        else:
            assert self._targets is not None
            target, size = int(self._targets[sample]), 0
            if hasattr(self._dataset, "read"):
                data = self._dataset.read(sample)
                if isinstance(data, (str, os.PathLike)):
                    data = read_file(data)
                image, size = self._decoder(data), len(data)
            else:
                stored = self._dataset.images[sample]
                image = stored if is_pillow(stored) else _as_tensor(stored)  # an array is (c, h, w) already
        with self._lock:
            self.reads += 1
            self.bytes_read += size
        if self.keep:
            return loaded(image) if is_pillow(image) else image, target
        return as_image(image), target

    def load(self, sample: int, epoch: int) -> tuple[torch.Tensor, int]:
        """`get`, but every error except MemoryError becomes a `SampleError` that names path, index and epoch."""
        try:
            return self.get(sample)
        except MemoryError:
            raise  # not an error of this sample
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise SampleError(self.path(sample), sample, epoch, reason) from error


class FailurePolicy:
    """Raises for a sample that cannot be loaded, or replaces it by a fixed substitute.

    The substitute depends on (seed, epoch, sample, attempt) only, so it is the same for both views, any number of
    threads and a resumed run. More than `max_failures` distinct failed samples stop the run.

    Args:
        source: source of the samples.
        seed: seed of the run.
        on_error: "raise" or "replace".
        max_failures: an int, or a float fraction of the dataset.
        operation: the loader's name, for messages.
        targets: (N,) classes if a substitute must have the class of the failed sample.

    Raises:
        ValueError: another `on_error`, or a negative bound.
    """

    def __init__(
        self,
        source: SampleSource,
        seed: int,
        on_error: str,
        max_failures: int | float = 0.01,
        operation: str = "OverlapLoader",
        targets: NDArray[Any] | None = None,
    ) -> None:
        if on_error not in ("raise", "replace"):
            raise ValueError(f'{operation}: on_error: expected "raise" or "replace", got {on_error!r}.')
        self._targets = targets
        # The other loaders have no such argument.
        self._more_failures = "pass a larger max_failures" if operation == "OverlapLoader" else ""
        number = isinstance(max_failures, (int, float)) and not isinstance(max_failures, bool)
        if not (number and 0 <= max_failures < math.inf):
            raise ValueError(
                f"{operation}: max_failures: expected an int or a fraction, at least 0, got {max_failures!r}."
            )
        self._source, self._seed = source, seed
        self._replace = on_error == "replace"
        fraction = isinstance(max_failures, float)
        self.bound = max(1, int(max_failures * len(source))) if fraction and max_failures else int(max_failures)
        self._lock = threading.Lock()
        self._failed: set[int] = set()
        self.errors: dict[int, SampleError] = {}  # sample -> its error, for the first ones
        self.replaced = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def failed(self) -> int:
        """Number of distinct samples that failed."""
        return len(self._failed)

    def substitute(self, epoch: int, sample: int, attempt: int) -> int:
        """The sample that replaces a failed one."""
        key = key_of(self._seed, SUBSTITUTE, epoch, sample, attempt)
        if self._targets is None:
            return (key >> 32) * len(self._source) >> 32
        alike = np.flatnonzero(self._targets == self._targets[sample])
        return int(alike[(key >> 32) * len(alike) >> 32])

    def get(
        self, epoch: int, sample: int, doing: Callable[[str, int], None] = lambda what, sample: None
    ) -> tuple[int, torch.Tensor, int]:
        """(id of the sample or its substitute, image, target); SampleError if neither can be loaded."""
        wanted, attempts = sample, 100 + 20 * self.bound
        for attempt in range(attempts):
            doing("loading", sample)
            try:
                return sample, *self._source.load(sample, epoch)
            except SampleError as error:
                failure = error
                self.record(failure)
            sample = self.substitute(epoch, wanted, attempt)
        failure.reason += f" (and no substitute was readable in {attempts} attempts)"
        raise failure

    def record(self, failure: SampleError, done: str = "replaced") -> None:
        """Count and log a failure; raise it with on_error="raise", or where there are too many."""
        if not self._replace:
            failure.remedy = 'pass on_error="replace"'
            raise failure
        with self._lock:
            new = failure.index not in self._failed
            self._failed.add(failure.index)
            self.replaced += 1
            if new and len(self.errors) < _LISTED:
                self.errors[failure.index] = failure
            count = len(self._failed)
        if count > self.bound:
            failure.reason += f" (failure {count}, more than max_failures = {self.bound})"
            failure.remedy = self._more_failures
            raise failure
        if new:
            _LOG.warning(done + " sample %d: %s: %s", failure.index, failure.path, failure.reason)
