"""The Triton kernel behind `augment_on="device"`: one launch from decoded images to a normalised batch.

Not yet run on a GPU; checked through Triton's interpreter against `cut_torch`, to one grey level.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from dlb_fast.data.device_augment import BOX_START, COLUMNS, ViewParameters
from dlb_fast.data.erasing import MODES
from dlb_fast.data.finish_kernel import erased
from dlb_fast.data.normalise import Normalise

__all__ = ["cut_kernel", "cut_triton"]

_BLOCK = 256


@triton.jit
def _field(table, view, k: tl.constexpr, FIELDS: tl.constexpr):
    return tl.load(table + view * FIELDS + k)


@triton.jit
def cut_kernel(
    before, own, table, out, scale, bias, fill, stride_n, stride_y, stride_x, stride_c,
    blank, SIZE: tl.constexpr, HOLE: tl.constexpr, C: tl.constexpr, FIELDS: tl.constexpr, INTEGER: tl.constexpr,
    ERASE: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`BLOCK` pixels of a view: Pillow's antialiased bilinear (both passes rounded to integers), scale, bias, box."""
    view = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    y, x = pixel // SIZE, pixel % SIZE
    mine, offset = _field(table, view, 0, FIELDS), _field(table, view, 1, FIELDS)
    width, top, left = _field(table, view, 3, FIELDS), _field(table, view, 4, FIELDS), _field(table, view, 5, FIELDS)
    crop_h, crop_w = _field(table, view, 6, FIELDS).to(tl.int32), _field(table, view, 7, FIELDS).to(tl.int32)
    flip = _field(table, view, 8, FIELDS)
    hole_top, hole_left = _field(table, view, 9, FIELDS), _field(table, view, 10, FIELDS)
    source = tl.where(flip != 0, SIZE - 1 - x, x)
    step_y, step_x = crop_h.to(tl.float32) / SIZE, crop_w.to(tl.float32) / SIZE
    reach_y, reach_x = tl.maximum(step_y, 1.0), tl.maximum(step_x, 1.0)  # half the width of the triangle
    centre_y, centre_x = (y + 0.5) * step_y, (source + 0.5) * step_x
    first_y = tl.maximum((centre_y - reach_y + 0.5).to(tl.int32), 0)
    first_x = tl.maximum((centre_x - reach_x + 0.5).to(tl.int32), 0)
    last_y = tl.minimum((centre_y + reach_y + 0.5).to(tl.int32), crop_h)
    last_x = tl.minimum((centre_x + reach_x + 0.5).to(tl.int32), crop_w)
    taps_y, taps_x = (2 * reach_y).to(tl.int32) + 2, (2 * reach_x).to(tl.int32) + 2
    in_hole = (y >= hole_top) & (y < hole_top + HOLE) & (x >= hole_left) & (x < hole_left + HOLE)
    for c in tl.static_range(C):
        total = tl.zeros([BLOCK], tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        for ky in range(taps_y):
            at_y = first_y + ky
            used_y = inside & (at_y < last_y)
            weight_y = tl.maximum(1.0 - tl.abs((at_y + 0.5 - centre_y) / reach_y), 0.0)
            weight_y = tl.where(used_y, weight_y, 0.0)
            line = tl.zeros([BLOCK], tl.float32)
            norm = tl.zeros([BLOCK], tl.float32)
            for kx in range(taps_x):
                at_x = first_x + kx
                used = used_y & (at_x < last_x)
                weight_x = tl.maximum(1.0 - tl.abs((at_x + 0.5 - centre_x) / reach_x), 0.0)
                weight_x = tl.where(used, weight_x, 0.0)
                place = offset + ((top + at_y) * width + left + at_x) * C + c
                value = tl.load(own + place, mask=used & (mine != 0), other=0).to(tl.float32)
                value += tl.load(before + place, mask=used & (mine == 0), other=0).to(tl.float32)
                line += weight_x * value
                norm += weight_x
            line = tl.floor(line / tl.where(norm > 0, norm, 1.0) + 0.5)
            total += weight_y * line
            weights += weight_y
        grey = tl.floor(total / tl.where(weights > 0, weights, 1.0) + 0.5)
        if HOLE > 0:
            grey = tl.where(in_hole, tl.load(fill + c), grey)
        if not INTEGER:
            grey = grey * tl.load(scale + c) + tl.load(bias + c)
        if ERASE >= 0:
            grey = erased(grey, table + view * FIELDS + BOX, 1, blank, y, x, c, SIZE, C, ERASE)
        target = out + view * stride_n + y.to(tl.int64) * stride_y + x * stride_x + c * stride_c
        tl.store(target, grey.to(out.dtype.element_ty), mask=inside)


def cut_triton(
    before: torch.Tensor,
    own: torch.Tensor,
    table: torch.Tensor,
    parameters: ViewParameters,
    normalise: Normalise,
    out: torch.Tensor,
) -> None:
    """Launch `cut_kernel`: `table` (n, 18) int64, flat uint8 buffers, `out` (n, size, size, c), all on the device."""
    n, size, _, channels = out.shape
    scale, bias = normalise.per_channel(out.device, channels)
    fill = torch.tensor(parameters.fill, dtype=torch.float32).expand(channels).contiguous().to(out.device)
    cut_kernel[(n, triton.cdiv(size * size, _BLOCK))](
        before, own, table, out, scale, bias, fill, *out.stride(),
        normalise.fill(out.device, channels), SIZE=size, HOLE=parameters.hole, C=channels, FIELDS=len(COLUMNS),
        INTEGER=out.dtype == torch.uint8, BOX=BOX_START, BLOCK=_BLOCK,
        ERASE=-1 if normalise.erase is None else MODES.index(normalise.erase.mode),
    )  # fmt: skip
