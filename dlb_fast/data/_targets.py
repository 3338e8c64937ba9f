"""Targets of this room are integer class labels: whatever a cast would change is refused, not rounded."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def class_indices(operation: str, values: Any) -> NDArray[np.int64]:
    """`values` (a list, array or tensor of integers) as int64; TypeError for floats, strings and the like.

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
    """One target as an int; TypeError for a float, a string, more than one number."""
    try:
        return operator.index(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:  # `item` of more than one number raises the latter two
        dtype = getattr(value, "dtype", None)
        got = repr(value) if dtype is None else f"{dtype} {tuple(value.shape)}"
        raise TypeError(
            f"{operation}: a target must be an integer class label, got {got}; a cast would round it, so make it an "
            "integer first"
        ) from error
