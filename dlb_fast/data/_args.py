"""Argument checks of the loaders, samplers and datasets; each error names operation, argument and value."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


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
    """`len(dataset)`; TypeError if it has no length."""
    try:
        return len(dataset)
    except TypeError as error:
        raise TypeError(
            f"{operation}: dataset must have a length, {type(dataset).__name__} has none ({error}); give it `__len__`, "
            "or put an iterable into a list first"
        ) from error


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
