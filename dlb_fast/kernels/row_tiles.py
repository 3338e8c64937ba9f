"""Tile mathematics of one row in Triton: running statistics, gradient, rounding.

A tile is (ROWS, BLOCK), ROWS rows of the batch by BLOCK columns, where rows are held in registers; of a longer row it
is (LANES, VECTOR), reduced along AXIS 1, or (VECTOR, LANES), reduced along AXIS 0, one lane per thread: every lane has
sums of its own, so that the loop over the tiles never waits for other threads, and ``join_lanes`` makes one row of them
at the end. The first form reads 16 bytes per thread; the second serves rows that do not start on 16 bytes, where each
read is one element wide and neighbours must sit in neighbouring threads. Sums are kept as in an online softmax.
Everything is relative to the maximum ``m`` of the student, which serves both temperatures, and ``mt`` of the teacher:

    x = z - m,  u = x log2(e) / tau,  v = (t - mt) log2(e) / tau
    d1 = sum exp(x)    d2 = sum 2^u    dt = sum 2^v    a = sum 2^v (v - u)    =>  KL = ln 2 (a / dt + log2 d2 - log2 dt)

No term is a difference of two large numbers: log-sum-exps without the shift lose half the digits of a small KL.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NONE = tl.constexpr(0)
LOGITS = tl.constexpr(1)
PROBABILITIES = tl.constexpr(2)
VIRTUAL = tl.constexpr(3)


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """One rounding to nearest even; by hand for bfloat16 in the interpreter, whose cast truncates."""
    if DTYPE == tl.float64:  # noqa: SIM300
        return value.to(tl.float64)
    single = value.to(tl.float32)
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = single.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        quiet = ((bits >> 16) | 0x40).to(tl.uint16)  # a NaN stays one: the carry would turn it into infinity
        return tl.where(single == single, even, quiet).to(tl.bfloat16, bitcast=True)
    return single.to(DTYPE)


@triton.jit
def power_of_two_below(value):
    """The largest power of two <= value > 0 (float32), by its exponent bits; infinity for infinity and NaN."""
    return (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _larger2(a0, a1, b0, b1):
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def _plus4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def along(value, AXIS: tl.constexpr):
    """One value per row (AXIS 1) or column (AXIS 0) of a tile, spread over that tile."""
    if AXIS == 0:
        return value[None, :]
    else:  # Triton compiles what follows a return
        return value[:, None]


@triton.jit
def max2(a, b, AXIS: tl.constexpr):
    """Maxima of two tiles along an axis in one reduction: threads meet once instead of twice."""
    if INTERPRETED:  # which reduces by a function one element at a time
        return tl.max(a, axis=AXIS), tl.max(b, axis=AXIS)
    else:
        return tl.reduce((a, b), AXIS, _larger2)


@triton.jit
def sum4(a, b, c, d, AXIS: tl.constexpr):
    """Sums of four tiles along an axis in one reduction."""
    if INTERPRETED:
        return tl.sum(a, axis=AXIS), tl.sum(b, axis=AXIS), tl.sum(c, axis=AXIS), tl.sum(d, axis=AXIS)
    else:
        return tl.reduce((a, b, c, d), AXIS, _plus4)


@triton.jit
def shift_of(peak):
    """The row maximum as a shift: 0 where every value so far is -inf, for -inf - -inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def advance_peak(peak, top):
    """New maximum, new shift, and what the shift moved by; 0 on the first finite tile, when all sums are 0 or NaN."""
    highest = tl.maximum(peak, top)
    shift = shift_of(highest)
    return highest, shift, tl.where(peak == float("-inf"), 0.0, peak - shift)


@triton.jit
def given_teacher(cols, inside, teacher, label, share_here, share_rest, KIND: tl.constexpr):
    """Probabilities of a teacher that is not softened, and their base-2 logarithms."""
    if KIND == VIRTUAL:
        here = cols == label[:, None]
        prob = tl.where(inside, tl.where(here, share_here, share_rest), 0.0)
        return prob, tl.where(here, tl.log2(share_here), tl.log2(share_rest))
    else:
        return teacher, tl.log2(teacher)


@triton.jit
def spread_target(
    cols_ok, cols, dense, weight_ptr, keep_share, even_share, DENSE: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """The part of the target that covers all columns: dense rows and label smoothing, weighted by class."""
    spread = tl.where(cols_ok, even_share, 0.0)
    if DENSE:
        spread = spread + keep_share * dense
    if HAS_WEIGHT:
        spread = spread * tl.load(weight_ptr + cols, mask=cols_ok, other=0.0)
    return spread


@triton.jit
def first_of_largest(dense, cols, cols_ok, best, best_col, AXIS: tl.constexpr):
    """Running arg-max of dense target rows: the first column of the largest share."""
    values = tl.where(cols_ok, dense, float("-inf"))
    top = tl.max(values, axis=AXIS)
    where = tl.min(tl.where(values == along(top, AXIS), cols, 2147483647), axis=AXIS)
    better = top > best
    return tl.where(better, top, best), tl.where(better, where, best_col)


@triton.jit
def tile_sums(
    z, t, dense, cols, cols_ok, valid, label, weight_ptr, soft, keep_share, even_share, share_here, share_rest,
    peak, d1, qs, qx, best, best_col, d2, a, mt, dt,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, DENSE: tl.constexpr, HAS_WEIGHT: tl.constexpr, SPREAD: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Add one tile to the running sums: d1, qs = sum q and qx = sum q x of the spread target, d2, a, mt, dt.

    ``dt`` is the mass of the teacher: of ``2^v`` for logits, of the probabilities where they are given.
    """
    top_t = mt
    if KIND == LOGITS:
        top, top_t = max2(z, t, AXIS)
    else:
        top = tl.max(z, axis=AXIS)
    peak, shift, moved = advance_peak(peak, top)
    x = z - along(shift, AXIS)
    sum_1, sum_2, sum_t, sum_a = d1, d2, dt, a
    if KIND == NONE:
        sum_1 = tl.sum(tl.exp2(x * LOG2E), axis=AXIS)
    else:
        du, u = moved * soft, x * soft
        if KIND == LOGITS:
            mt, shift_t, moved_t = advance_peak(mt, top_t)
            dv, v = moved_t * soft, (t - along(shift_t, AXIS)) * soft
            prob, shrink = tl.exp2(v), tl.exp2(dv)
            a, dt = shrink * (a + dt * (dv - du)), dt * shrink
        else:
            prob, v = given_teacher(cols, valid[:, None] & cols_ok, t, label, share_here, share_rest, KIND)
            a = a - dt * du
        # A class without teacher mass costs nothing, even where the student gives it none: 0 * inf never appears.
        gap = tl.where(prob == 0.0, 0.0, prob * (v - u))
        if HAS_CE:
            sum_1, sum_2, sum_t, sum_a = sum4(tl.exp2(x * LOG2E), tl.exp2(u), prob + tl.zeros_like(z), gap, AXIS)
        else:
            sum_2, sum_t = tl.sum(tl.exp2(u), axis=AXIS), tl.sum(prob + tl.zeros_like(z), axis=AXIS)
            sum_a = tl.sum(gap, axis=AXIS)
        d2, dt, a = d2 * tl.exp2(du) + sum_2, dt + sum_t, a + sum_a
    if HAS_CE:
        d1 = d1 * tl.exp2(moved * LOG2E) + sum_1
    if SPREAD:
        spread = spread_target(cols_ok, cols, dense, weight_ptr, keep_share, even_share, DENSE, HAS_WEIGHT)
        qx = qx + qs * moved + tl.sum(tl.where(spread == 0.0, 0.0, spread * x), axis=AXIS)
        qs = qs + tl.sum(spread + tl.zeros_like(z), axis=AXIS)
    if DENSE:
        best, best_col = first_of_largest(dense, cols, cols_ok, best, best_col, AXIS)
    return peak, d1, qs, qx, best, best_col, d2, a, mt, dt


@triton.jit
def join_lanes(
    peak, d1, qs, qx, best, best_col, d2, a, mt, dt, soft,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, DENSE: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """The sums of one row from those of its lanes, as scalars, in a fixed order."""
    top = tl.max(peak, axis=0)
    moved = tl.where(peak == float("-inf"), 0.0, peak - shift_of(top))
    if HAS_CE:
        d1 = tl.sum(d1 * tl.exp2(moved * LOG2E), axis=0)
    if SPREAD:
        qx = tl.sum(qx + qs * moved, axis=0)
        qs = tl.sum(qs, axis=0)
    if DENSE:
        most = tl.max(best, axis=0)
        best_col = tl.min(tl.where(best == most, best_col, 2147483647), axis=0)
        best = most
    if KIND != NONE:
        du = moved * soft
        d2 = tl.sum(d2 * tl.exp2(du), axis=0)
        if KIND == LOGITS:
            top_t = tl.max(mt, axis=0)
            dv = tl.where(mt == float("-inf"), 0.0, mt - shift_of(top_t)) * soft
            a = tl.sum(tl.exp2(dv) * (a + dt * (dv - du)), axis=0)
            dt = tl.sum(dt * tl.exp2(dv), axis=0)
            mt = top_t
        else:
            a = tl.sum(a - dt * du, axis=0)
            dt = tl.sum(dt, axis=0)
    return top, d1, qs, qx, best, best_col, d2, a, mt, dt
