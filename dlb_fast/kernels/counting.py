"""What the means divide by, in Triton: it must be known before the first gradient is written."""

from __future__ import annotations

import triton
import triton.language as tl

UNKNOWN_ID = tl.constexpr(-(2**63))
HEADER = tl.constexpr(2)
COUNT_BLOCK = tl.constexpr(1024)
COUNT_PROGRAMS = tl.constexpr(256)


@triton.jit
def pair_layout(slots_ptr, batch, capacity, num_old):
    """How a batch meets the buffer: rows stored, the first of them, and how many rows may have a teacher.

    Clamped, whatever the slots hold: no index leaves the batch or the buffer.
    """
    count = tl.minimum(tl.maximum(tl.load(slots_ptr), 0), capacity).to(tl.int32)
    old = tl.minimum(tl.where(num_old < 0, count, num_old), batch)
    stored = tl.minimum(batch - old, capacity)
    start = batch - stored
    return stored, start, tl.minimum(tl.minimum(count, old), tl.minimum(start, capacity))


@triton.jit
def valid_rows(
    rows, limit, slots_ptr, ids_ptr, mask_ptr, mask_rows, target_ptr, ignore_index,
    HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Which rows have a valid teacher, and which met the slot of another sample."""
    valid = rows < limit
    other = valid & (rows < 0)
    if HAS_IDS:
        slot_id = tl.load(slots_ptr + HEADER + rows, mask=valid, other=UNKNOWN_ID)
        own_id = tl.load(ids_ptr + rows, mask=valid, other=0)
        other = valid & (slot_id != UNKNOWN_ID) & (slot_id != own_id)
        valid = valid & (other == 0)
    if HAS_MASK:
        valid = valid & (rows < mask_rows)
        valid = valid & (tl.load(mask_ptr + rows, mask=valid, other=0) != 0)
    if BY_LABEL:
        valid = valid & (tl.load(target_ptr + rows, mask=valid, other=0) != ignore_index)
    return valid, other


@triton.jit
def count_rows(
    first, last, limit, slots_ptr, ids_ptr, mask_ptr, mask_rows, target_ptr, target_b_ptr, weight_ptr, ignore_index,
    COMPUTE: tl.constexpr, CLASSES: tl.constexpr, LABELS: tl.constexpr, PAIR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Over rows [first, last): the weights of the rows the CE counts, summed, and how many rows the KL counts."""
    span = tl.arange(0, COUNT_BLOCK)
    counted = tl.zeros([COUNT_BLOCK], tl.int32)
    valid_count = tl.zeros([COUNT_BLOCK], tl.int32)
    heavy = tl.zeros([COUNT_BLOCK], COMPUTE)
    for base in range(first, last, COUNT_BLOCK):
        rows = base + span
        ok = rows < last
        if LABELS:
            label = tl.load(target_ptr + rows, mask=ok, other=0)
            counts = ok & (label != ignore_index)
            if PAIR:
                counts = counts & (tl.load(target_b_ptr + rows, mask=ok, other=0) != ignore_index)
            elif HAS_WEIGHT:
                index = tl.minimum(tl.maximum(label, 0), CLASSES - 1)
                heavy += tl.load(weight_ptr + index, mask=counts, other=0.0)
            counted += counts.to(tl.int32)
        valid, _ = valid_rows(
            rows, tl.minimum(limit, last), slots_ptr, ids_ptr, mask_ptr, mask_rows, target_ptr, ignore_index,
            HAS_IDS, HAS_MASK, BY_LABEL,
        )  # fmt: skip
        valid_count += valid.to(tl.int32)
    weight_sum = tl.sum(counted, axis=0).to(COMPUTE)
    if HAS_WEIGHT and not PAIR:
        weight_sum = tl.sum(heavy, axis=0)
    return weight_sum, tl.sum(valid_count, axis=0).to(COMPUTE)


@triton.jit(
    do_not_specialize=["batch", "given_rows", "capacity", "num_old", "mask_rows", "ignore_index", "chunk"],
    do_not_specialize_on_alignment=["slots_ptr", "ids_ptr", "mask_ptr", "target_ptr", "target_b_ptr", "weight_ptr"],
)
def count_kernel(
    counts_ptr, slots_ptr, ids_ptr, mask_ptr, target_ptr, target_b_ptr, weight_ptr,
    batch, given_rows, capacity, num_old, mask_rows, ignore_index, chunk,
    COMPUTE: tl.constexpr, CLASSES: tl.constexpr, UPDATE: tl.constexpr, LABELS: tl.constexpr, PAIR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Large batches: program ``p`` counts rows [p chunk, (p + 1) chunk) into ``counts[:, p]`` (2, COUNT_PROGRAMS)."""
    part = tl.program_id(0)
    limit = given_rows
    if UPDATE:
        _, _, limit = pair_layout(slots_ptr, batch, capacity, num_old)
    weights, valid_count = count_rows(
        part * chunk, tl.minimum(part * chunk + chunk, batch), limit, slots_ptr, ids_ptr, mask_ptr, mask_rows,
        target_ptr, target_b_ptr, weight_ptr, ignore_index,
        COMPUTE, CLASSES, LABELS, PAIR, HAS_WEIGHT, HAS_IDS, HAS_MASK, BY_LABEL,
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
