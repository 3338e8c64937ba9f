"""Argument checks of the loaders, samplers and datasets; each error names operation, argument and value."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, Sampler

PART = "pass the dataset, or torch.utils.data.Subset(dataset, indices) for a part of it"


def as_bool(value: object, operation: str, name: str) -> bool:
    """`value` as a bool; TypeError for anything else (the string "False" would count as true)."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{operation}: {name} must be True or False, got {value!r} ({type(value).__name__})")
    return bool(value)


def device_of(operation: str, device: torch.device | str | None) -> torch.device:
    """`device` as a torch.device; None means the CPU, "cuda" the current GPU."""
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{operation}: device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{operation}: device: {str(found)!r} does not exist, torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; pass device='cpu', or see `dlb-fast doctor`"
        )
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


def length_of(operation: str, dataset: Any) -> int:
    """`len(dataset)`, the number of its samples; TypeError for anything else that has a length, or has none."""
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"{operation}: dataset must be read by index, {kind} is an IterableDataset, which has no order to repeat; "
            "put its items into a list, or pass a map-style dataset (`__len__` and `__getitem__`)"
        )
    if isinstance(dataset, (str, bytes, os.PathLike)):
        raise TypeError(
            f"{operation}: expected a dataset, got the {kind} {dataset!r}; open it first, such as ImageFolder(path) or "
            "open_dataset(...)"
        )
    own = any(hasattr(dataset, name) for name in ("__getitem__", "read", "images"))
    if isinstance(dataset, (Sampler, DataLoader, Set)) or (hasattr(dataset, "__iter__") and not own):
        raise TypeError(
            f"{operation}: expected a dataset, got a {kind}, whose length is not the number of samples; {PART}"
        )
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise TypeError(
            f"{operation}: dataset must have a length, {kind} has none ({error}); give it `__len__`, or put an "
            "iterable into a list first"
        ) from error
    if isinstance(dataset, Mapping) and set(dataset) != set(range(length)):
        raise TypeError(
            f"{operation}: expected a dataset, got a {kind} with the keys {', '.join(map(repr, list(dataset)[:5]))}; "
            "pass one of its values, such as the training split"
        )
    return length


def are_indices(source: Any, length: int) -> bool:
    """Whether `source` holds indices into a larger dataset: distinct whole numbers, one of them beyond its length."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        whole = source.dtype.kind in "iu" if isinstance(source, np.ndarray) else not source.dtype.is_floating_point
        if source.ndim != 1 or not whole:
            return False
        source = source.tolist()
    elif isinstance(source, (list, tuple)):
        if not all(type(value) is int or isinstance(value, np.integer) for value in source):
            return False
    elif not isinstance(source, range):
        return False
    return length > 0 and max(source) >= length and min(source) >= 0 and len(set(source)) == length


def check_callable(operation: str, **arguments: Any) -> None:
    """TypeError for an argument that is neither None nor callable."""
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{operation}: {name} must be callable or None, got {value!r} ({type(value).__name__})")


def class_indices(operation: str, values: Any) -> NDArray[np.int64]:
    """`values` (a list, array or tensor of integers) as int64; TypeError for floats and strings.

    Example:
        >>> class_indices("Example", [0, 2, True]).tolist()
        [0, 2, 1]
    """
    found = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if found.dtype.kind in "iub" or not found.size:
        return found.astype(np.int64)
    if found.dtype.kind == "O":
        whole = [class_index(operation, value) for value in found.ravel().tolist()]
        return np.array(whole, dtype=np.int64).reshape(found.shape)
    raise TypeError(
        f"{operation}: targets must be integer class labels, got {found.dtype}; a cast would round them, so make them "
        "integers first"
    )


def class_index(operation: str, value: Any) -> int:
    """One target as an int; TypeError for a float, a string or several numbers."""
    try:
        return operator.index(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:  # `item` of several numbers raises the latter two
        dtype = getattr(value, "dtype", None)
        got = repr(value) if dtype is None else f"{dtype} {tuple(value.shape)}"
        raise TypeError(
            f"{operation}: a target must be an integer class label, got {got}; a cast would round it, so make it an "
            "integer first"
        ) from error
