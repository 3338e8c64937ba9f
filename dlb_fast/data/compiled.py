"""The compiled op of this room: crops resized straight into batches, with the pixels of torch.

The op is declared in `csrc/resized_crops.cpp` with the schema below (a test compares the two). It is looked for once;
where the library was not built, torch makes the same pixels.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch

from dlb_fast import _backends

__all__ = ["SCHEMA", "resized_crops"]

_VIEW = "int row{0}, int top{0}, int left{0}, int height{0}, int width{0}, bool flip{0}"
SCHEMA = (
    f"resized_crops_(Tensor image, Tensor(a!) images, {_VIEW.format('')}, "
    f"Tensor(b!)? images_b, {_VIEW.format('_b')}) -> ()"
)


@functools.cache
def resized_crops() -> Any:
    """The op, or None where it is not built or not known to be faster than torch (which has vectors for ARM).

    `op(image, images, row, top, left, height, width, flip, images_b or None, row_b, ..., flip_b)` writes the crop
    `image[:, top:top+height, left:left+width]`, resized with antialiasing to the size of `images[row]` and then
    mirrored where `flip` says so, into `images[row]`; the same for the second view. It holds no interpreter lock.
    image: (c, h, w) uint8; images: (n, h', w', c) uint8; any strides.

    Raises:
        RuntimeError: from the op: a shape, dtype, row or crop that does not fit.

    Source: the arithmetic of torch's `_upsample_bilinear2d_aa` (after Pillow's resampling).

    Example:
        >>> op, rows = resized_crops(), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
        >>> if op is not None:
        ...     op(torch.full((3, 6, 8), 7, dtype=torch.uint8), rows, 1, 0, 0, 6, 8, False, None, 0, 0, 0, 0, 0, False)
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or _backends.load_library():
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dlb_fast::resized_crops_", "CPU"):
        return None  # a library of an earlier release
    op = torch.ops.dlb_fast.resized_crops_
    torch.library.register_fake("dlb_fast::resized_crops_", lambda *args: None)
    return op.default
