"""The Triton kernel behind `Normalise` with erasing: cast, normalisation, boxes and memory format in one launch.

Not yet run on a GPU; checked through Triton's interpreter against `erase_`, in the boxes bit for bit.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dlb_fast.data import _hash
from dlb_fast.data.erasing import BOX_COLUMNS, MODES, NOISE_START, NOISE_UNIT

if TYPE_CHECKING:
    from dlb_fast.data.normalise import Normalise

__all__ = ["erased", "finish_kernel", "finish_triton"]

_BLOCK = 512


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = tl.constexpr(_signed(_hash.GOLDEN))
_M1 = tl.constexpr(_signed(0xBF58476D1CE4E5B9))
_M2 = tl.constexpr(_signed(0x94D049BB133111EB))
_START = tl.constexpr(NOISE_START)
_UNIT = tl.constexpr(NOISE_UNIT)


@triton.jit
def _noise(key, place):
    """`erasing.noise`: SplitMix64 in int64 (shifts masked, because they carry the sign)."""
    z = key + (place + _START) * _GOLDEN
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _M1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _M2
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    total = (z & 0xFFFF) + ((z >> 16) & 0xFFFF) + ((z >> 32) & 0xFFFF) + ((z >> 48) & 0xFFFF)
    return (total - 131070).to(tl.float32) * _UNIT


@triton.jit
def erased(value, box, stride, fill, y, x, c, WIDTH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr):
    """`value`, or what the box has at (y, x, c). `box`: address of the first of its five numbers, `stride` apart."""
    top, left = tl.load(box), tl.load(box + stride)
    bottom, right = top + tl.load(box + 2 * stride), left + tl.load(box + 3 * stride)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    if MODE == 0:
        other = tl.load(fill + c)
    else:
        pixel = (y * 0 if MODE == 1 else y * WIDTH + x).to(tl.int64)
        other = _noise(tl.load(box + 4 * stride), pixel * C + c)
    return tl.where(inside, other, value)


@triton.jit
def finish_kernel(
    source, out, boxes, scale, bias, fill, stride_box, stride_n, stride_y, stride_x, stride_c,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`BLOCK` values of one view; `source` (n, h, w, c) contiguous uint8."""
    view = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = place < HEIGHT * WIDTH * C
    c, pixel = place % C, place // C
    y, x = pixel // WIDTH, pixel % WIDTH
    value = tl.load(source + view * (HEIGHT * WIDTH * C) + place, mask=valid, other=0).to(tl.float32)
    value = value * tl.load(scale + c) + tl.load(bias + c)
    value = erased(value, boxes + view, stride_box, fill, y, x, c, WIDTH, C, MODE)
    target = out + view * stride_n + y.to(tl.int64) * stride_y + x * stride_x + c * stride_c
    tl.store(target, value.to(out.dtype.element_ty), mask=valid)


def finish_triton(normalise: Normalise, out: torch.Tensor, x: torch.Tensor, boxes: torch.Tensor) -> None:
    """`out` (n, h, w, c) of uint8 `x` (n, h, w, c) with `boxes` (5, n) erased, all on one device."""
    assert normalise.erase is not None and boxes.shape == (BOX_COLUMNS, len(x))
    n, height, width, channels = x.shape
    scale, bias = normalise.per_channel(out.device, channels)
    assert x.is_contiguous() and boxes.stride(1) == 1
    finish_kernel[(n, triton.cdiv(height * width * channels, _BLOCK))](
        x, out, boxes, scale, bias, normalise.fill(out.device, channels), boxes.stride(0), *out.stride(),
        HEIGHT=height, WIDTH=width, C=channels, MODE=MODES.index(normalise.erase.mode), BLOCK=_BLOCK,
    )  # fmt: skip
