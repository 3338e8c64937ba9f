"""Tile mathematics of one row in Triton: running statistics, gradient, rounding.

A tile is (ROWS, BLOCK): ROWS rows of the batch by BLOCK columns. Statistics are kept in the form of an online softmax,
so that the same code serves a row held in registers (one tile) and a row read twice (several tiles). Everything is
relative to the row maximum ``m`` of the student, which serves both temperatures, and ``mt`` of the teacher:

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
    if INTERPRETED and DTYPE == tl.bfloat16:
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
def shift_of(peak):
    """The row maximum as a shift: 0 where every value so far is -inf, for -inf - -inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def advance_peak(peak, tile):
    """New maximum, new shift, and what the shift moved by; 0 on the first finite tile, when all sums are 0 or NaN."""
    highest = tl.maximum(peak, tl.max(tile, axis=1))
    shift = shift_of(highest)
    moved = tl.where(peak == float("-inf"), 0.0, peak - shift)
    return highest, shift, moved


@triton.jit
def given_teacher(cols, inside, teacher, label, share_here, share_rest, KIND: tl.constexpr):
    """Probabilities of a teacher that is not softened, and their base-2 logarithms."""
    if KIND == VIRTUAL:
        here = cols[None, :] == label[:, None]
        prob = tl.where(inside, tl.where(here, share_here, share_rest), 0.0)
        return prob, tl.where(here, tl.log2(share_here), tl.log2(share_rest))
    return teacher, tl.log2(teacher)


@triton.jit
def kl_sums(
    z, t, cols, inside, shift, moved, label, soft, share_here, share_rest, d2, a, mt, dt, KIND: tl.constexpr
):  # fmt: skip
    """Add a tile to the sums of the KL term: returns d2, a, mt, dt (dt is the teacher's mass for given ones)."""
    du = moved * soft
    u = (z - shift[:, None]) * soft
    d2 = d2 * tl.exp2(du) + tl.sum(tl.exp2(u), axis=1)
    if KIND == LOGITS:
        mt, shift_t, moved_t = advance_peak(mt, t)
        dv = moved_t * soft
        shrink = tl.exp2(dv)
        v = (t - shift_t[:, None]) * soft
        mass = tl.exp2(v)
        # A class without teacher mass costs nothing, even where the student gives it none: 0 * inf never appears.
        a = shrink * (a + dt * (dv - du)) + tl.sum(tl.where(mass == 0.0, 0.0, mass * (v - u)), axis=1)
        dt = dt * shrink + tl.sum(mass, axis=1)
    else:
        prob, log2_prob = given_teacher(cols, inside, t, label, share_here, share_rest, KIND)
        a = a - dt * du + tl.sum(tl.where(prob == 0.0, 0.0, prob * (log2_prob - u)), axis=1)
        dt = dt + tl.sum(prob, axis=1)
    return d2, a, mt, dt


@triton.jit
def spread_target(
    cols_ok, cols, dense, weight_ptr, keep_share, even_share, DENSE: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """The part of the target that covers all columns, (ROWS or 1, BLOCK): dense rows and label smoothing, weighted."""
    spread = tl.where(cols_ok, even_share, 0.0)[None, :]
    if DENSE:
        spread = spread + keep_share * dense
    if HAS_WEIGHT:
        spread = spread * tl.load(weight_ptr + cols, mask=cols_ok, other=0.0)[None, :]
    return spread


@triton.jit
def ce_sums(z, spread, shift, moved, d1, qs, qx, SPREAD: tl.constexpr):
    """Add a tile to the sums of the cross entropy: d1 = sum e^x; qs = sum q, qx = sum q x of the spread target."""
    scaled = moved * LOG2E
    x = z - shift[:, None]
    d1 = d1 * tl.exp2(scaled) + tl.sum(tl.exp2(x * LOG2E), axis=1)
    if SPREAD:
        qx = qx + qs * moved + tl.sum(tl.where(spread == 0.0, 0.0, spread * x), axis=1)
        qs = qs + tl.sum(spread + tl.zeros_like(z), axis=1)
    return d1, qs, qx


@triton.jit
def first_of_largest(dense, cols, cols_ok, best, best_col):
    """Running arg-max of dense target rows: the first column of the largest share."""
    values = tl.where(cols_ok[None, :], dense, float("-inf"))
    top = tl.max(values, axis=1)
    where = tl.min(tl.where(values == top[:, None], cols[None, :], 2147483647), axis=1)
    better = top > best
    return tl.where(better, top, best), tl.where(better, where, best_col)
