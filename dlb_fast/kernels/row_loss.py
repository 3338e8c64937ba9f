"""One side of a program's pairs in Triton: losses, gradient and buffer store of ROWS rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .row_tiles import (
    LN2,
    LOG2E,
    LOGITS,
    NONE,
    PROBABILITIES,
    given_teacher,
    join_lanes,
    round_to,
    shift_of,
    spread_target,
    tile_sums,
)


@triton.jit
def load_label(target_ptr, rows, row_ok, ignore_index, CLASSES: tl.constexpr):
    """Label clamped into [0, C), whether the row has one, and whether it is a class at all."""
    label = tl.load(target_ptr + rows, mask=row_ok, other=0)
    known = (label >= 0) & (label < CLASSES)
    return tl.where(known, label, 0).to(tl.int32), row_ok & (label != ignore_index), known


@triton.jit
def load_columns(row_ptr, cols, inside, OTHER: tl.constexpr, EVICT: tl.constexpr, COMPUTE: tl.constexpr):
    """A tile in the compute dtype; ``OTHER`` outside."""
    return tl.load(row_ptr + cols, mask=inside, other=OTHER, eviction_policy=EVICT).to(COMPUTE)


@triton.jit
def load_tile(
    z_row, t_row, dense_row, store_row, cols, cols_ok, active, valid,
    COMPUTE: tl.constexpr, KIND: tl.constexpr, DENSE: tl.constexpr, STORE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Student, teacher and dense target of one tile (the student again where there is none); stores the student."""
    inside = active[:, None] & cols_ok
    if STORE:
        raw = tl.load(z_row + cols, mask=inside, other=float("-inf"), eviction_policy=EVICT)
        kept = raw
        if raw.dtype != store_row.dtype.element_ty:
            kept = round_to(raw, store_row.dtype.element_ty)
        tl.store(store_row + cols, kept, mask=inside, eviction_policy="evict_first")
        z = raw.to(COMPUTE)
    else:
        z = load_columns(z_row, cols, inside, float("-inf"), EVICT, COMPUTE)
    t = z
    if KIND == LOGITS:
        t = load_columns(t_row, cols, valid[:, None] & cols_ok, float("-inf"), EVICT, COMPUTE)
    elif KIND == PROBABILITIES:
        t = load_columns(t_row, cols, valid[:, None] & cols_ok, 0.0, EVICT, COMPUTE)
    dense = z
    if DENSE:
        dense = load_columns(dense_row, cols, inside, 0.0, EVICT, COMPUTE)
    return z, t, dense


@triton.jit
def tile_grad(
    z, t, dense, cols, cols_ok, valid, label, label_b, weight_ptr, soft, keep_share, even_share, share_here,
    share_rest, shift, shift_t, from_ce, from_student, from_teacher, from_spread, at_a, at_b,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, DENSE: tl.constexpr, PAIR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile before rounding, the label columns corrected. Where the row is held the exponentials are
    the ones of ``tile_sums`` (the compiler sees the same expressions), otherwise they are computed again."""
    x = z - shift[:, None]
    g = tl.zeros_like(z)
    if KIND != NONE:
        if KIND == LOGITS:
            prob = tl.exp2((t - shift_t[:, None]) * soft)
        else:
            inside = valid[:, None] & cols_ok
            prob, _ = given_teacher(cols, inside, t, label, share_here, share_rest, KIND)
        # Student and teacher are close (one step apart): their difference first, in full precision.
        g = tl.exp2(x * soft) * from_student[:, None] - prob * from_teacher[:, None]
    if HAS_CE:
        ce = tl.exp2(x * LOG2E) * from_ce[:, None]
        if not DENSE:
            ce = ce - tl.where(cols == label[:, None], at_a[:, None], 0.0)
        if PAIR:
            ce = ce - tl.where(cols == label_b[:, None], at_b[:, None], 0.0)
        if SPREAD:
            spread = spread_target(cols_ok, cols, dense, weight_ptr, keep_share, even_share, DENSE, HAS_WEIGHT)
            ce = ce - spread * from_spread[:, None]
        g = g + ce
    return g


@triton.jit
def rows_loss(
    logits_ptr, grad_ptr, teacher_ptr, store_ptr, finite_ptr, target_ptr, target_b_ptr, lam_ptr, weight_ptr, loss_ptr,
    rows, row_ok, slots, finite_slots, valid,
    ce_factor, alpha, tau, keep_share, even_share, share_here, share_rest, ignore_index,
    ce_mult, kl_mult,
    COMPUTE: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    VECTOR: tl.constexpr, AXIS: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr, TEACHER_STRIDE: tl.constexpr, DENSE_STRIDE: tl.constexpr,
    KIND: tl.constexpr, STORE: tl.constexpr, HAS_CE: tl.constexpr, DENSE: tl.constexpr, PAIR: tl.constexpr,
    LAM_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, ROW_LOSS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
):  # fmt: skip
    """Rows ``rows`` (ROWS,), valid by ``slots`` where ``valid``; returns per row the CE, KL and hit.

    STORE: the rows go to ``slots``, and whether their log-sum-exp is finite to ``finite_slots``.
    """
    SPREAD: tl.constexpr = HAS_CE and (DENSE or SMOOTH)
    # The second pass of a long row has to find it in L2: keep what is read twice, let the rest go.
    FIRST: tl.constexpr = "evict_last" if TILES > 1 and NEED_GRAD else "evict_first"
    zero = tl.zeros([ROWS], COMPUTE)
    lowest = zero + float("-inf")
    soft = LOG2E / tau
    wide = rows.to(tl.int64)[:, None]
    z_row = logits_ptr + wide * LOGITS_STRIDE
    t_row, dense_row, store_row, grad_row = z_row, z_row, z_row, z_row
    if KIND == LOGITS or KIND == PROBABILITIES:  # noqa: SIM109
        t_row = teacher_ptr + slots.to(tl.int64)[:, None] * TEACHER_STRIDE
    if STORE:
        store_row = store_ptr + slots.to(tl.int64)[:, None] * CLASSES
    if DENSE:
        dense_row = target_ptr + wide * DENSE_STRIDE
    if NEED_GRAD:
        grad_row = grad_ptr + wide * CLASSES

    # Labels: shares q of the two label columns, which rows count, which labels are no class.
    label = tl.zeros([ROWS], tl.int32)
    label_b = label
    share_a, share_b, z_a, z_b = zero, zero, zero, zero
    nobody = row_ok & (rows < 0)
    counted, labelled, bad = nobody, nobody, nobody
    if HAS_CE:
        counted = row_ok
        if not DENSE:
            label, labelled, known = load_label(target_ptr, rows, row_ok, ignore_index, CLASSES)
            counted, bad = labelled, labelled & (known == 0)
            share_a = zero + keep_share
            if PAIR:
                label_b, labelled_b, known_b = load_label(target_b_ptr, rows, row_ok, ignore_index, CLASSES)
                counted = labelled & labelled_b
                bad = counted & ((known & known_b) == 0)
                if LAM_ROWS:
                    lam = tl.load(lam_ptr + rows, mask=row_ok, other=0.0)
                else:
                    lam = zero + tl.load(lam_ptr)
                share_a, share_b = keep_share * lam, keep_share * (1.0 - lam)
                z_b = tl.sum(tl.load(z_row + label_b[:, None], mask=counted[:, None], other=0.0).to(COMPUTE), axis=1)
                if HAS_WEIGHT:
                    share_b = share_b * tl.load(weight_ptr + label_b, mask=counted, other=0.0)
            z_a = tl.sum(tl.load(z_row + label[:, None], mask=labelled[:, None], other=0.0).to(COMPUTE), axis=1)
            if HAS_WEIGHT:
                share_a = share_a * tl.load(weight_ptr + label, mask=counted, other=0.0)
            share_a, share_b = tl.where(counted, share_a, 0.0), tl.where(counted, share_b, 0.0)
            labelled = labelled & known
    # A row that nothing counts is not read: what it holds, even NaN, cannot reach a sum.
    active = counted | valid | labelled
    if STORE:  # but every row is stored as it is
        active = row_ok

    if TILES == 1:
        peak, mt, best, best_col = lowest, lowest, lowest, label
        d1, d2, dt, a, qs, qx = zero, zero, zero, zero, zero, zero
        cols = tl.arange(0, BLOCK)[None, :]
        cols_ok = cols < CLASSES
        z, t, dense = load_tile(
            z_row, t_row, dense_row, store_row, cols, cols_ok, active, valid,
            COMPUTE, KIND, DENSE, STORE, "evict_first",
        )  # fmt: skip
        peak, d1, qs, qx, best, best_col, d2, a, mt, dt = tile_sums(
            z, t, dense, cols, cols_ok, valid, label, weight_ptr, soft, keep_share, even_share, share_here, share_rest,
            peak, d1, qs, qx, best, best_col, d2, a, mt, dt, KIND, HAS_CE or STORE, DENSE, HAS_WEIGHT, SPREAD, 1,
        )  # fmt: skip
    else:
        tl.static_assert(ROWS == 1)
        LANES: tl.constexpr = BLOCK // VECTOR
        if AXIS == 1:
            span = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        else:
            span = tl.arange(0, VECTOR)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        lane = tl.zeros([LANES], COMPUTE)
        peak, mt, best, best_col = lane + float("-inf"), lane + float("-inf"), lane + float("-inf"), lane.to(tl.int32)
        d1, d2, dt, a, qs, qx = lane, lane, lane, lane, lane, lane
        for k in range(TILES):
            cols = k * BLOCK + span
            cols_ok = cols < CLASSES
            z, t, dense = load_tile(
                z_row, t_row, dense_row, store_row, cols, cols_ok, active, valid,
                COMPUTE, KIND, DENSE, STORE, FIRST,
            )  # fmt: skip
            peak, d1, qs, qx, best, best_col, d2, a, mt, dt = tile_sums(
                z, t, dense, cols, cols_ok, valid, label, weight_ptr, soft, keep_share, even_share, share_here,
                share_rest, peak, d1, qs, qx, best, best_col, d2, a, mt, dt,
                KIND, HAS_CE or STORE, DENSE, HAS_WEIGHT, SPREAD, AXIS,
            )  # fmt: skip
        peak, d1, qs, qx, best, best_col, d2, a, mt, dt = join_lanes(
            peak, d1, qs, qx, best, best_col, d2, a, mt, dt, soft, KIND, HAS_CE or STORE, DENSE, SPREAD
        )
        if not SPREAD:
            qs, qx = 0.0, 0.0
        peak, d1, qs, qx = zero + peak, zero + d1, zero + qs, zero + qx
        if DENSE:
            best_col = label + best_col
        if KIND != NONE:
            d2, a, dt = zero + d2, zero + a, zero + dt
        mt = zero + mt if KIND == LOGITS else lowest

    if STORE:  # d1 is NaN where the row holds a NaN or +inf; rounding may make the largest value infinite
        top = round_to(peak, store_ptr.dtype.element_ty).to(COMPUTE)
        finite = (d1 == d1) & (tl.abs(top) < float("inf"))
        tl.store(finite_ptr + finite_slots, finite.to(tl.int64), mask=row_ok)

    shift, shift_t = shift_of(peak), shift_of(mt)
    row_ce, row_lb, hit = zero, zero, zero
    from_ce, from_student, from_teacher, from_spread = zero, zero, zero, zero
    if HAS_CE:
        log_d1 = tl.log(d1)
        total = share_a + share_b + qs
        ce = total * log_d1 - qx - tl.where(share_a == 0.0, 0.0, share_a * (z_a - shift))
        if PAIR:
            ce = ce - tl.where(share_b == 0.0, 0.0, share_b * (z_b - shift))
        row_ce = tl.where(bad, float("nan"), tl.where(counted, ce, 0.0))
        from_ce = tl.where(bad, float("nan"), tl.where(counted, ce_mult * total / d1, 0.0))
        from_spread = tl.where(counted, ce_mult + zero, 0.0)
        if DENSE:
            z_a = tl.sum(tl.load(z_row + best_col[:, None], mask=row_ok[:, None], other=0.0).to(COMPUTE), axis=1)
            labelled = row_ok
        # d1 is NaN where the row holds a NaN, which a maximum drops, or +inf, and 0 where it holds nothing but -inf.
        hit = tl.where(labelled & (z_a >= peak) & (d1 > 0.0), 1.0 + zero, 0.0)
    if KIND != NONE:
        if KIND == LOGITS:
            kl = LN2 * (a / dt + tl.log2(d2) - tl.log2(dt))
            from_student, from_teacher = kl_mult / d2, kl_mult / dt
        else:
            kl = LN2 * (a + dt * tl.log2(d2))
            from_student, from_teacher = kl_mult * dt / d2, kl_mult + zero
        row_lb = tl.where(valid, tau * tau * kl, 0.0)
        from_student = tl.where(valid, from_student, 0.0)
        from_teacher = tl.where(valid, from_teacher, 0.0)
    if ROW_LOSS:
        row_loss = ce_factor * row_ce + alpha * row_lb
        tl.store(loss_ptr + rows, row_loss, mask=row_ok)

    if NEED_GRAD:
        at_a, at_b = share_a * ce_mult, share_b * ce_mult
        if TILES == 1:
            g = tile_grad(
                z, t, dense, cols, cols_ok, valid, label, label_b, weight_ptr, soft, keep_share, even_share,
                share_here, share_rest, shift, shift_t, from_ce, from_student, from_teacher, from_spread, at_a, at_b,
                KIND, HAS_CE, DENSE, PAIR, HAS_WEIGHT, SPREAD,
            )  # fmt: skip
            if PAIR or STORE:  # a row may be read for its top-1 or to be stored, and not count
                g = tl.where((counted | valid)[:, None], g, 0.0)
            g = round_to(g, grad_ptr.dtype.element_ty)
            tl.store(grad_row + cols, g, mask=row_ok[:, None] & cols_ok)
        else:
            for k in range(TILES):
                cols = (TILES - 1 - k) * BLOCK + span
                cols_ok = cols < CLASSES
                z, t, dense = load_tile(
                    z_row, t_row, dense_row, store_row, cols, cols_ok, active, valid,
                    COMPUTE, KIND, DENSE, False, "evict_first",
                )  # fmt: skip
                g = tile_grad(
                    z, t, dense, cols, cols_ok, valid, label, label_b, weight_ptr, soft, keep_share, even_share,
                    share_here, share_rest, shift, shift_t, from_ce, from_student, from_teacher, from_spread,
                    at_a, at_b, KIND, HAS_CE, DENSE, PAIR, HAS_WEIGHT, SPREAD,
                )  # fmt: skip
                if PAIR or STORE:
                    g = tl.where((counted | valid)[:, None], g, 0.0)
                g = round_to(g, grad_ptr.dtype.element_ty)
                out = row_ok[:, None] & cols_ok
                tl.store(grad_row + cols, g, mask=out, eviction_policy="evict_first")
    return row_ce, row_lb, hit
