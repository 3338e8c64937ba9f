"""The compiled ops of this room: crops resized straight into batches, and batches of images that are kept in memory.

They are declared in `csrc/data_schemas.h` with the schemas below (a test compares them). Each is looked for once; where
the library was not built, torch and numpy make the same pixels.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch

from dlb_fast import _backends

__all__ = ["GATHERED", "GATHER_SCHEMA", "SCHEMA", "gathered_views", "resized_crops"]

_VIEW = "int row{0}, int top{0}, int left{0}, int height{0}, int width{0}, bool flip{0}"
SCHEMA = (
    f"resized_crops_(Tensor image, Tensor(a!) images, {_VIEW.format('')}, "
    f"Tensor(b!)? images_b, {_VIEW.format('_b')}) -> ()"
)
GATHERED = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes that the op writes
GATHER_SCHEMA = "gathered_views_(Tensor images, Tensor places, Tensor table, Tensor(a!) out) -> ()"


def _op(name: str) -> Any:
    if _backends.load_library():
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dlb_fast::{name}", "CPU"):
        return None  # a library of an earlier release
    torch.library.register_fake(f"dlb_fast::{name}", lambda *args: None)
    return getattr(torch.ops.dlb_fast, name).default


@functools.cache
def gathered_views() -> Any:
    """The op, or None where it is not built.

    `op(images, places, table, out)` writes `table[c, images[row, top + y, left + x, c]]` to `out[i, y, x, c]`, for view
    i at `row, top, left, flipped = places[:, i]`; columns run backwards where it is flipped. images: (N, H, W, c)
    uint8, contiguous; places: (4, n) int64; table: (c, 256), what each byte of a channel becomes; out: (n, h, w, c),
    any strides.

    Raises:
        RuntimeError: from the op: a shape, a dtype or a place that does not fit.

    Example:
        >>> op, out = gathered_views(), torch.zeros(1, 1, 2, 1)
        >>> images, places = torch.tensor([[[[3], [9]]]], dtype=torch.uint8), torch.tensor([[0], [0], [0], [1]])
        >>> if op is not None:
        ...     op(images, places, torch.arange(256.0)[None], out)
    """
    return _op("gathered_views_")


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
    return _op("resized_crops_") if platform.machine().lower() in ("x86_64", "amd64") else None
