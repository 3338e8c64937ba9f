"""The Triton kernel of ``last_batch`` and ``last_batch_update``: every row, the buffer and the scalars in one launch.

Program ``p`` takes tiles ``p, p + programs, ...`` of ROWS pairs. Pair ``j`` is row ``j``, whose teacher is slot ``j``
of the generation that teaches, and row ``start + j``, which is stored in slot ``j`` of the other. A launch only reads
the one and only writes the other, so no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .counting import (
    COUNT_PROGRAMS,
    HEADER,
    UNKNOWN_ID,
    count_rows,
    generation,
    load_counts,
    pair_layout,
    repeated_rows,
    valid_rows,
)
from .row_loss import rows_loss
from .row_tiles import NONE, VIRTUAL, power_of_two_below

MAX_PROGRAMS = tl.constexpr(8192)
PARTIALS = tl.constexpr(4)  # ce, lb, hits, valid
CONSTANT, COUNT_HERE, COUNTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def scalar(value, pointer, COMPUTE: tl.constexpr):
    """A number given by value or, for schedules, by address; a Python float in the interpreter."""
    if pointer is not None:
        return tl.load(pointer).to(COMPUTE)
    return tl.full([], value, COMPUTE)


@triton.jit
def half_scale(ce_size, kl_size, weight_ptr, COMPUTE: tl.constexpr, CLASSES: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """How much a float16 gradient is enlarged: the largest power of two <= 65536 that keeps its bound <= 16384."""
    heaviest = tl.full([], 1.0, COMPUTE)
    if HAS_WEIGHT:
        span = tl.arange(0, 1024)
        top = tl.zeros([1024], COMPUTE)
        for base in range(0, CLASSES, 1024):
            top = tl.maximum(top, tl.abs(tl.load(weight_ptr + base + span, mask=base + span < CLASSES, other=0.0)))
        heaviest = tl.max(top, axis=0)
    bound = tl.abs(ce_size) * heaviest + tl.abs(kl_size)
    room = power_of_two_below((16384.0 / bound).to(tl.float32))
    return tl.minimum(tl.maximum(room, 9.5367431640625e-07), 65536.0).to(COMPUTE)


@triton.jit
def total_of(partials_ptr, which, programs):
    """Sum of one partial over all programs, in a fixed order; ``.cg``: written by other multiprocessors."""
    span = tl.arange(0, 1024)
    kept = tl.zeros([1024], partials_ptr.dtype.element_ty)
    for base in range(0, programs, 1024):
        place = partials_ptr + which * MAX_PROGRAMS + base + span
        kept += tl.load(place, mask=base + span < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(kept, axis=0)


@triton.jit(
    do_not_specialize=[
        "batch", "given_rows", "capacity", "num_old", "again", "mask_rows", "ignore_index", "count_parts",
    ],
    do_not_specialize_on_alignment=["slots_ptr", "ids_ptr", "mask_ptr", "target_b_ptr", "lam_ptr", "loss_ptr"],
)  # fmt: skip
def last_batch_kernel(
    logits_ptr, teacher_ptr, slots_ptr, ids_ptr, target_ptr, target_b_ptr, lam_ptr, weight_ptr, mask_ptr,
    alpha_ptr, tau_ptr, loss_ptr, parts_ptr, grad_ptr, ticket_ptr, partials_ptr, counts_ptr,
    batch, given_rows, capacity, num_old, again, mask_rows, ignore_index, count_parts,
    alpha_value: tl.float64, tau_value: tl.float64, ce_weight: tl.float64, ce_alpha: tl.float64,
    smoothing: tl.float64, correct_share: tl.float64,  # the floats of options.h, in its order
    COMPUTE: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    VECTOR: tl.constexpr, AXIS: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr, TEACHER_STRIDE: tl.constexpr, DENSE_STRIDE: tl.constexpr,
    KIND: tl.constexpr, UPDATE: tl.constexpr, HAS_CE: tl.constexpr, DENSE: tl.constexpr, PAIR: tl.constexpr,
    LAM_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, BY_LABEL: tl.constexpr,
    MEAN: tl.constexpr, ROW_LOSS: tl.constexpr, NEED_GRAD: tl.constexpr,
    COUNTING: tl.constexpr,
):  # fmt: skip
    """See ``last_batch_triton``. Partial sums: (PARTIALS, MAX_PROGRAMS); counts: see ``count_kernel``."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    alpha = scalar(alpha_value, alpha_ptr, COMPUTE)
    tau = scalar(tau_value, tau_ptr, COMPUTE)
    ce_factor = scalar(ce_weight, None, COMPUTE) + scalar(ce_alpha, None, COMPUTE) * alpha
    eps = scalar(smoothing, None, COMPUTE)
    keep_share, even_share = 1.0 - eps, eps / CLASSES
    share_here = tl.full([], 1.0 / CLASSES, COMPUTE)
    share_rest = share_here
    if KIND == VIRTUAL and BY_LABEL:
        share_here = scalar(correct_share, None, COMPUTE)
        share_rest = (1.0 - share_here) / max(CLASSES - 1, 1)

    # Rows [0, start) come first, with a teacher up to `limit`; rows [start, batch) are stored.
    start, limit = given_rows, given_rows
    stored = batch - given_rows
    taught, written, taught_row, written_row = given_rows, given_rows, 0, 0
    if UPDATE:
        if HAS_IDS and COUNTING == COUNTED:
            again = tl.load(counts_ptr + 2 * COUNT_PROGRAMS).to(tl.int32)
        stored, start, limit, teaching, same = pair_layout(
            slots_ptr, ids_ptr, batch, capacity, num_old, again, HAS_IDS and COUNTING != COUNTED
        )
        # Numbers and no addresses: those would fill registers.
        taught, written = generation(teaching, capacity), generation(1 - teaching, capacity)
        size = tl.cdiv(capacity, 8) * 8
        taught_row, written_row = teaching * size, (1 - teaching) * size

    norm_ce = tl.full([], 1.0, COMPUTE)
    norm_lb = norm_ce
    if MEAN:
        if COUNTING == COUNT_HERE:
            norm_ce, norm_lb = count_rows(
                0, batch, limit, slots_ptr, taught, capacity, ids_ptr, mask_ptr, mask_rows, target_ptr, target_b_ptr,
                weight_ptr, ignore_index,
                COMPUTE, CLASSES, UPDATE, HAS_CE and not DENSE, PAIR, HAS_WEIGHT, HAS_IDS, HAS_MASK, BY_LABEL,
            )  # fmt: skip
        elif COUNTING == COUNTED:
            norm_ce, norm_lb = load_counts(counts_ptr, count_parts)
        else:
            norm_lb = limit.to(COMPUTE)
        if DENSE or not HAS_CE:
            norm_ce = batch.to(COMPUTE)
    # A term to which no row counts is 0, and so is its gradient.
    norm_ce = tl.where(norm_ce == 0.0, float("inf"), norm_ce)
    norm_lb = tl.where(norm_lb == 0.0, float("inf"), norm_lb)
    ce_mult, kl_mult = ce_factor / norm_ce, alpha * tau / norm_lb
    grad_scale = tl.full([], 1.0, COMPUTE)
    if NEED_GRAD and grad_ptr.dtype.element_ty == tl.float16:
        ce_size = ce_mult if HAS_CE else 0.0 * ce_mult
        if DENSE:
            ce_size *= 64.0  # a dense target need not sum to 1: up to 256 the gradient stays finite
        kl_size = kl_mult if KIND != NONE else 0.0 * kl_mult
        grad_scale = half_scale(ce_size, kl_size, weight_ptr, COMPUTE, CLASSES, HAS_WEIGHT and HAS_CE)
    ce_mult, kl_mult = ce_mult * grad_scale, kl_mult * grad_scale
    first = program == 0  # for the last program: in registers they would have to last through the loop
    tl.store(parts_ptr + 1, norm_ce, mask=first)
    tl.store(parts_ptr + 2, norm_lb, mask=first)
    tl.store(parts_ptr + 4, grad_scale, mask=first)

    tiles = tl.cdiv(tl.maximum(start, stored), ROWS)
    mine = partials_ptr + program
    valid_count = tl.zeros([ROWS], COMPUTE)
    if UPDATE:  # counters and ids before the losses, which fill the registers
        for tile in range(program, tiles, programs):
            slots = tile * ROWS + tl.arange(0, ROWS)
            valid = valid_rows(
                slots, limit, slots_ptr, taught, capacity, ids_ptr, mask_ptr, mask_rows, target_ptr, ignore_index,
                UPDATE, HAS_IDS, HAS_MASK, BY_LABEL,
            )  # fmt: skip
            valid_count += valid.to(COMPUTE)
            if UPDATE:
                repeats, unknown, other, infinite = repeated_rows(
                    slots, limit, slots_ptr, taught, capacity, ids_ptr, UPDATE, HAS_IDS
                )
                counter = slots_ptr + slots * 0
                tl.store(ticket_ptr + 1 + slots * 0, 1, mask=repeats)  # everybody stores the same
                tl.atomic_add(counter + 4, 1, mask=infinite, sem="relaxed")
                fresh = tl.full([ROWS], UNKNOWN_ID, tl.int64)
                if HAS_IDS:
                    tl.atomic_add(counter + 2, 1, mask=other, sem="relaxed")
                    tl.atomic_add(counter + 3, 1, mask=unknown, sem="relaxed")
                    fresh = tl.load(ids_ptr + start + slots, mask=slots < stored, other=0)
                tl.store(slots_ptr + (written + 1 + slots), fresh, mask=slots < stored)
    ce = tl.zeros([ROWS], COMPUTE)
    lb, hits = ce, ce
    for tile in range(program, tiles, programs):
        slots = tile * ROWS + tl.arange(0, ROWS)
        if KIND != NONE:
            row_ok = slots < start
            valid = valid_rows(
                slots, limit, slots_ptr, taught, capacity, ids_ptr, mask_ptr, mask_rows, target_ptr, ignore_index,
                UPDATE, HAS_IDS, HAS_MASK, BY_LABEL,
            )  # fmt: skip
            row_ce, row_lb, hit = rows_loss(
                logits_ptr, grad_ptr, teacher_ptr, teacher_ptr, slots_ptr, target_ptr, target_b_ptr, lam_ptr,
                weight_ptr, loss_ptr,
                slots, row_ok, taught_row + slots, slots, valid,
                ce_factor, alpha, tau, keep_share, even_share, share_here, share_rest, ignore_index,
                ce_mult, kl_mult,
                COMPUTE, CLASSES, ROWS, BLOCK, TILES, VECTOR, AXIS, LOGITS_STRIDE, TEACHER_STRIDE, DENSE_STRIDE,
                KIND, False, HAS_CE, DENSE, PAIR, LAM_ROWS, HAS_WEIGHT, SMOOTH, ROW_LOSS, NEED_GRAD,
            )  # fmt: skip
            ce, lb, hits = ce + row_ce, lb + row_lb, hits + hit
            if not UPDATE:
                valid_count += valid.to(COMPUTE)
        if KIND != VIRTUAL:
            row_ok = slots < stored
            rows = start + slots
            row_ce, row_lb, hit = rows_loss(
                logits_ptr, grad_ptr, teacher_ptr, teacher_ptr, slots_ptr, target_ptr, target_b_ptr, lam_ptr,
                weight_ptr, loss_ptr,
                rows, row_ok, written_row + slots, written + 1 + capacity + slots, row_ok & (rows < 0),
                ce_factor, alpha, tau, keep_share, even_share, share_here, share_rest, ignore_index,
                ce_mult, kl_mult,
                COMPUTE, CLASSES, ROWS, BLOCK, TILES, VECTOR, AXIS, LOGITS_STRIDE, TEACHER_STRIDE, DENSE_STRIDE,
                NONE, UPDATE, HAS_CE, DENSE, PAIR, LAM_ROWS, HAS_WEIGHT, SMOOTH, ROW_LOSS, NEED_GRAD,
            )  # fmt: skip
            ce, hits = ce + row_ce, hits + hit

    tl.store(mine, tl.sum(ce, axis=0))
    tl.store(mine + MAX_PROGRAMS, tl.sum(lb, axis=0))
    tl.store(mine + 2 * MAX_PROGRAMS, tl.sum(hits, axis=0))
    tl.store(mine + 3 * MAX_PROGRAMS, tl.sum(valid_count, axis=0))
    tl.debug_barrier()  # the ticket is drawn by one thread: it must not pass the stores of the others
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1:
        alpha = scalar(alpha_value, alpha_ptr, COMPUTE)
        ce_factor = scalar(ce_weight, None, COMPUTE) + scalar(ce_alpha, None, COMPUTE) * alpha
        norm_ce = tl.load(parts_ptr + 1, cache_modifier=".cg")
        norm_lb = tl.load(parts_ptr + 2, cache_modifier=".cg")
        mean_ce = total_of(partials_ptr, 0, programs) / norm_ce
        mean_lb = total_of(partials_ptr, 1, programs) / norm_lb
        loss = ce_factor * mean_ce + alpha * mean_lb
        if not HAS_CE:
            loss = alpha * mean_lb
        if KIND == NONE:
            loss = ce_factor * mean_ce
        if not ROW_LOSS:
            tl.store(loss_ptr, loss)
        tl.store(parts_ptr, loss)
        tl.store(parts_ptr + 1, mean_ce)
        tl.store(parts_ptr + 2, mean_lb)
        tl.store(parts_ptr + 3, total_of(partials_ptr, 2, programs))
        valid_rows_here = total_of(partials_ptr, 3, programs)
        tl.store(parts_ptr + 5, valid_rows_here)
        if UPDATE:
            # All programs have drawn their tickets, so all have read the header and the counts.
            tl.store(slots_ptr, (written != HEADER).to(tl.int64))
            tl.store(slots_ptr + written, stored.to(tl.int64))
            tl.store(slots_ptr + 1, tl.load(slots_ptr + 1) + valid_rows_here.to(tl.int64))
            # Batches in a row that found stored rows and repeated none of them.
            repeated = tl.load(ticket_ptr + 1, cache_modifier=".cg")
            untaught = tl.where(repeated != 0, 0, tl.load(slots_ptr + 5) + 1)
            tl.store(slots_ptr + 5, untaught, mask=limit > 0)
            tl.store(ticket_ptr + 1, 0)
        tl.store(ticket_ptr, 0)
