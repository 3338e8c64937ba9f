"""What the means divide by, in Triton: it must be known before the first gradient is written."""

from __future__ import annotations

import triton
import triton.language as tl

UNKNOWN_ID = tl.constexpr(-(2**63))
HEADER = tl.constexpr(6)  # of the slots: latest, taught, mismatched, unknown, not_finite, untaught
COUNT_BLOCK = tl.constexpr(1024)
VALID_BLOCK = tl.constexpr(512)  # a row needs up to four numbers of 8 bytes
COUNT_PROGRAMS = tl.constexpr(256)
ID_BLOCK = tl.constexpr(128)


@triton.jit
def generation(which, capacity):
    """Where a generation starts in the slots: the count of its rows, then their ids, then which of them are finite."""
    return which * (1 + 2 * capacity) + HEADER


@triton.jit
def same_batch(ids_ptr, stored_ptr, count, batch, num_old):
    """1 where the last rows of a batch have the stored ids and its first rows have not (or are all it has), else 0.

    It is then the batch stored last. Reading ends with the first block of ids that differ from the stored ones.
    """
    span = tl.arange(0, ID_BLOCK)
    fits = (count > 0) & (batch >= count) & ((num_old < 0) | (batch - num_old == count))
    last_differ, first_differ = count * 0, (batch == count).to(tl.int32)
    base = count * 0
    while fits & (last_differ == 0) & (base < count):
        rows = base + span
        there = rows < count
        stored = tl.load(stored_ptr + rows, mask=there, other=0)
        last = tl.load(ids_ptr + (batch - count) + rows, mask=there, other=0)
        first = tl.load(ids_ptr + rows, mask=there, other=0)
        last_differ = tl.max((stored != last).to(tl.int32), axis=0)
        first_differ = tl.maximum(first_differ, tl.max((stored != first).to(tl.int32), axis=0))
        base += ID_BLOCK
    return (fits & (last_differ == 0) & (first_differ != 0)).to(tl.int32)


@triton.jit
def pair_layout(slots_ptr, ids_ptr, batch, capacity, num_old, again, HAS_IDS: tl.constexpr):
    """How a batch meets the buffer: rows stored, the first of them, how many rows may have a teacher, the generation
    that teaches, and whether the batch is the one stored last (``again`` < 0: the ids decide).

    Clamped, whatever the slots hold: no index leaves the batch or the buffer.
    """
    latest = (tl.load(slots_ptr) & 1).to(tl.int32)
    # Both counts at once: the one that is wanted would wait for `latest`.
    count_0, count_1 = tl.load(slots_ptr + HEADER), tl.load(slots_ptr + generation(1, capacity))
    count_0 = tl.minimum(tl.maximum(count_0, 0), capacity).to(tl.int32)
    count_1 = tl.minimum(tl.maximum(count_1, 0), capacity).to(tl.int32)
    count = tl.where(latest == 0, count_0, count_1)
    repeated = latest * 0 + again
    if HAS_IDS:  # noqa: SIM102
        if again < 0:
            repeated = same_batch(ids_ptr, slots_ptr + generation(latest, capacity) + 1, count, batch, num_old)
    same = repeated > 0
    old = tl.where(same, tl.maximum(batch - count, 0), count)
    old = tl.minimum(tl.where(num_old < 0, old, num_old), batch)
    stored = tl.minimum(batch - old, capacity)
    start = batch - stored
    teaching = tl.where(same, 1 - latest, latest)
    count = tl.where(teaching == 0, count_0, count_1)
    return stored, start, tl.minimum(tl.minimum(count, old), tl.minimum(start, capacity)), teaching, same


@triton.jit
def repeated_rows(
    rows, limit, slots_ptr, taught, capacity, ids_ptr, UPDATE: tl.constexpr, HAS_IDS: tl.constexpr
):  # fmt: skip
    """Which rows repeat a stored one, and which do not because that has no id, another id, or is not finite.

    ``taught``: where the generation that teaches starts in the slots.
    """
    repeats = rows < limit
    nobody = repeats & (rows < 0)
    unknown, other, infinite = nobody, nobody, nobody
    if UPDATE:
        finite = tl.load(slots_ptr + (taught + 1 + capacity + rows), mask=repeats, other=1)
        if HAS_IDS:
            stored_id = tl.load(slots_ptr + (taught + 1 + rows), mask=repeats, other=0)
            own_id = tl.load(ids_ptr + rows, mask=repeats, other=0)
            unknown = repeats & (stored_id == UNKNOWN_ID)
            other = repeats & (stored_id != UNKNOWN_ID) & (stored_id != own_id)
            repeats = repeats & (stored_id != UNKNOWN_ID) & (stored_id == own_id)
        infinite = repeats & (finite == 0)
        repeats = repeats & (finite != 0)
    return repeats, unknown, other, infinite


@triton.jit
def valid_rows(
    rows, limit, slots_ptr, taught, capacity, ids_ptr, mask_ptr, mask_rows, target_ptr, ignore_index,
    UPDATE: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Which rows have a valid teacher."""
    valid, _, _, _ = repeated_rows(rows, limit, slots_ptr, taught, capacity, ids_ptr, UPDATE, HAS_IDS)
    if HAS_MASK:
        valid = valid & (rows < mask_rows)
        valid = valid & (tl.load(mask_ptr + rows, mask=valid, other=0) != 0)
    if BY_LABEL:
        valid = valid & (tl.load(target_ptr + rows, mask=valid, other=0) != ignore_index)
    return valid


@triton.jit
def count_rows(
    first, last, limit, slots_ptr, taught, capacity, ids_ptr, mask_ptr, mask_rows, target_ptr, target_b_ptr,
    weight_ptr, ignore_index,
    COMPUTE: tl.constexpr, CLASSES: tl.constexpr, UPDATE: tl.constexpr, LABELS: tl.constexpr, PAIR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Over rows [first, last): the weights of the rows the CE counts, summed, and how many rows the KL counts."""
    counted = tl.zeros([COUNT_BLOCK], tl.int32)
    heavy = tl.zeros([COUNT_BLOCK], COMPUTE)
    if LABELS:
        for base in range(first, last, COUNT_BLOCK):
            rows = base + tl.arange(0, COUNT_BLOCK)
            ok = rows < last
            label = tl.load(target_ptr + rows, mask=ok, other=0)
            counts = ok & (label != ignore_index)
            if PAIR:
                counts = counts & (tl.load(target_b_ptr + rows, mask=ok, other=0) != ignore_index)
            elif HAS_WEIGHT:
                index = tl.minimum(tl.maximum(label, 0), CLASSES - 1)
                heavy += tl.load(weight_ptr + index, mask=counts, other=0.0)
            counted += counts.to(tl.int32)
    valid_count = tl.zeros([VALID_BLOCK], tl.int32)
    limit = tl.minimum(limit, last)
    for base in range(first, limit, VALID_BLOCK):
        valid = valid_rows(
            base + tl.arange(0, VALID_BLOCK), limit, slots_ptr, taught, capacity, ids_ptr, mask_ptr, mask_rows,
            target_ptr, ignore_index, UPDATE, HAS_IDS, HAS_MASK, BY_LABEL,
        )  # fmt: skip
        valid_count += valid.to(tl.int32)
    weight_sum = tl.sum(counted, axis=0).to(COMPUTE)
    if HAS_WEIGHT and not PAIR:
        weight_sum = tl.sum(heavy, axis=0)
    return weight_sum, tl.sum(valid_count, axis=0).to(COMPUTE)


@triton.jit(
    do_not_specialize=["batch", "given_rows", "capacity", "num_old", "again", "mask_rows", "ignore_index", "chunk"],
    do_not_specialize_on_alignment=["slots_ptr", "ids_ptr", "mask_ptr", "target_ptr", "target_b_ptr", "weight_ptr"],
)
def count_kernel(
    counts_ptr, slots_ptr, ids_ptr, mask_ptr, target_ptr, target_b_ptr, weight_ptr,
    batch, given_rows, capacity, num_old, again, mask_rows, ignore_index, chunk,
    COMPUTE: tl.constexpr, CLASSES: tl.constexpr, UPDATE: tl.constexpr, LABELS: tl.constexpr, PAIR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Large batches: program ``p`` counts rows [p chunk, (p + 1) chunk) into ``counts[:, p]`` (2, COUNT_PROGRAMS).

    Where the ids decide, the number after these is 1 for the batch stored last and 0 for a new one.
    """
    part = tl.program_id(0)
    limit, taught = given_rows, given_rows
    if UPDATE:
        _, _, limit, teaching, same = pair_layout(slots_ptr, ids_ptr, batch, capacity, num_old, again, HAS_IDS)
        taught = generation(teaching, capacity)
        if HAS_IDS:
            tl.store(counts_ptr + 2 * COUNT_PROGRAMS, same.to(COMPUTE), mask=part == 0)
    weights, valid_count = count_rows(
        part * chunk, tl.minimum(part * chunk + chunk, batch), limit, slots_ptr, taught, capacity, ids_ptr, mask_ptr,
        mask_rows, target_ptr, target_b_ptr, weight_ptr, ignore_index,
        COMPUTE, CLASSES, UPDATE, LABELS, PAIR, HAS_WEIGHT, HAS_IDS, HAS_MASK, BY_LABEL,
    )  # fmt: skip
    tl.store(counts_ptr + part, weights)
    tl.store(counts_ptr + COUNT_PROGRAMS + part, valid_count)


@triton.jit
def load_counts(counts_ptr, parts):
    """The totals of ``parts`` partial counts, in a fixed order."""
    span = tl.arange(0, COUNT_PROGRAMS)
    there = span < parts
    weights = tl.sum(tl.load(counts_ptr + span, mask=there, other=0.0), axis=0)
    return weights, tl.sum(tl.load(counts_ptr + COUNT_PROGRAMS + span, mask=there, other=0.0), axis=0)
