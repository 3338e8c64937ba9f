"""The Triton kernel of ``scale_grad_``: the upstream gradient, applied in place and only when it is not 1."""

from __future__ import annotations

import triton
import triton.language as tl

from .row_tiles import round_to


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["upstream_ptr", "parts_ptr"])
def scale_kernel(
    grad_ptr, upstream_ptr, parts_ptr, batch,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, PER_ROW: tl.constexpr, UPSTREAM_STRIDE: tl.constexpr,
):  # fmt: skip
    """``grad.flat[i] *= upstream[i // C] / grad_scale``; a tile whose factors are all 1 is neither read nor written."""
    # A division may err by 2 ulp, of equal numbers too.
    compute: tl.constexpr = parts_ptr.dtype.element_ty
    grad_scale = tl.load(parts_ptr + 4)
    span = tl.arange(0, BLOCK)
    size = tl.full([], batch, tl.int64) * CLASSES  # a product of C, so that the mask has its factors of two
    blocks = tl.cdiv(size, BLOCK)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        base = tl.full([], block, tl.int64) * BLOCK  # more than 2^31 logits
        place = base + span
        inside = place < size
        first = base // CLASSES
        if PER_ROW:
            row = first + (base - first * CLASSES + span) // CLASSES
            given = tl.load(upstream_ptr + row * UPSTREAM_STRIDE, mask=inside, other=1.0).to(compute)
            factor = tl.where(given == grad_scale, 1.0, given / grad_scale)
            changed = tl.max((inside & (factor != 1.0)).to(tl.int32), axis=0) != 0
        else:
            given = tl.load(upstream_ptr).to(compute)
            factor = tl.where(given == grad_scale, 1.0, given / grad_scale)
            changed = factor != 1.0
        if changed:
            grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(compute)
            tl.store(grad_ptr + place, round_to(grad * factor, grad_ptr.dtype.element_ty), mask=inside)
