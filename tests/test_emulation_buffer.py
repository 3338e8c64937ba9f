"""The emulated CUDA kernels with a logit buffer: what teaches, what is stored, over many steps, against LogitBuffer."""

from __future__ import annotations

import pytest
import torch
from emulation import harness
from emulation.oracle import batch, compare

from dlb_fast.buffer import LogitBuffer

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=f"emulator: {harness.missing()}")

CAPACITY = 4
# (rows, num_old, which ids, masked): with a capacity of 4
STEPS = [
    (8, -1, "same", False),  # first step: no teacher, the second half is stored
    (8, -1, "same", False),  # steady state
    (8, -1, "two differ", True),
    (7, -1, "same", False),  # a short last batch stores 3
    (6, -1, "none", False),  # 3 repeated rows; stored without ids
    (7, 3, "same", False),  # unknown ids match any
    (4, 4, "same", True),  # nothing new: the buffer empties
    (5, 1, "same", False),  # num_old says 1, the buffer holds none
    (8, 4, "all differ", False),
    (3, 0, "same", False),  # a new stream: fewer rows than before, no teacher
    (7, 3, "same", True),
]


def roll_through(
    emulator: harness.Emulator,
    classes: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    capacity: int,
    steps: list,
    scale: int,
) -> None:
    oracle = LogitBuffer(classes, capacity, stored)
    logits_at, slots = oracle.logits.clone(), oracle.slots.clone()
    last_ids = torch.zeros(0, dtype=torch.int64)
    for index, (rows, old, which, masked) in enumerate(steps):
        rows, num_old = rows * scale, old * scale if old >= 0 else old
        logits, target, _ = batch(rows, classes, dtype, seed=index)
        ids = None
        if which != "none":
            ids = torch.arange(rows) + 1000 * index
            kept = min(len(last_ids), rows)
            ids[:kept] = last_ids[:kept]
            if which == "two differ":
                ids[1] = ids[3] = -7
            if which == "all differ":
                ids[:capacity] = -9
        mask = torch.arange(rows // 2 + 1) % 3 != 1 if masked else None
        teacher, valid = oracle.teacher(logits, ids, None if num_old < 0 else num_old)
        teacher = teacher.clone()
        if mask is not None:
            padded = torch.zeros(len(valid), dtype=torch.bool)
            padded[: len(mask)] = mask[: len(valid)]
            valid = valid & padded
        result = emulator.last_batch(
            logits, target, buffer=logits_at, slots=slots, ids=ids, num_old=num_old, kd_mask=mask, temperature=2.0
        )
        compare(result, logits, target, teacher, kd_mask=valid, temperature=2.0)
        assert int(result.parts[5]) == int(valid.sum())
        oracle.update(logits, ids, None if num_old < 0 else num_old)
        assert torch.equal(slots, oracle.slots), f"step {index}: count, mismatches or ids"
        assert torch.equal(logits_at, oracle.logits), f"step {index}: stored rows"
        last_ids = torch.zeros(0, dtype=torch.int64) if ids is None else ids[rows - oracle.count :]


STORED = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
# Every pair of dtypes in each regime of short rows, and other numbers of classes with one of them.
CASES = [(classes, *pair) for classes in (100, 1001, 1500) for pair in STORED]
CASES += [(classes, *pair) for classes, pair in zip((3, 10, 1000), (STORED[0], STORED[2], STORED[4]), strict=True)]


@pytest.mark.parametrize(("classes", "dtype", "stored"), CASES)
def test_many_steps(classes: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    emulator = harness.emulator(seed=classes)
    roll_through(emulator, classes, dtype, stored, CAPACITY, STEPS, 1)


@pytest.mark.parametrize("clusters", [0, 8])
def test_many_steps_with_long_rows(clusters: int) -> None:
    roll_through(
        harness.emulator(largest_cluster=clusters), 17001, torch.bfloat16, torch.bfloat16, CAPACITY, STEPS[:6], 1
    )


def test_many_steps_with_rows_counted_first() -> None:
    """Above 4096 rows the pairs' owners write the ids, and count_kernel has compared them before."""
    roll_through(
        harness.emulator(multiprocessors=8),
        3,
        torch.float32,
        torch.float32,
        2056,
        [STEPS[i] for i in (0, 1, 2, 3)],
        514,
    )


@pytest.mark.parametrize("count", [-5, 9, 2**40])
@pytest.mark.parametrize("classes", [10, 1500])
def test_a_corrupt_count_cannot_leave_the_arrays(classes: int, count: int) -> None:
    buffer = LogitBuffer(classes, CAPACITY)
    buffer.slots[0] = count
    logits, target, _ = batch(6, classes)
    for num_old in (-1, 0, 6, 2**40):
        slots, stored = buffer.slots.clone(), buffer.logits.clone()
        harness.emulator().last_batch(logits, target, buffer=stored, slots=slots, num_old=num_old)
        assert 0 <= int(slots[0]) <= CAPACITY


def test_replay_with_changing_schedules() -> None:
    """One set of addresses, as in a CUDA graph: only what is in them changes."""
    emulator = harness.emulator()
    oracle = LogitBuffer(100, 4)
    stored, slots = oracle.logits.clone(), oracle.slots.clone()
    alpha, temperature = torch.tensor(1.0), torch.tensor(3.0)
    logits, target = torch.empty(8, 100), torch.empty(8, dtype=torch.int64)
    for step in range(4):
        fresh, labels, _ = batch(8, 100, seed=step)
        logits.copy_(fresh)
        target.copy_(labels)
        alpha.fill_(step / 2)
        temperature.fill_(1.0 + step)
        teacher, valid = oracle.teacher(logits, None)
        teacher = teacher.clone()
        result = emulator.last_batch(logits, target, buffer=stored, slots=slots, alpha=alpha, temperature=temperature)
        compare(result, logits, target, teacher, kd_mask=valid, alpha=alpha, temperature=temperature)
        oracle.update(logits)
    assert torch.equal(stored, oracle.logits) and torch.equal(slots, oracle.slots)
