"""nvcc's PTX of the CUDA kernels with a logit buffer over many steps, against LogitBuffer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx import harness
from ptx.oracle import Stream, batch
from torch import Tensor

from dlb_fast.buffer import HEADER, UNKNOWN_ID
from dlb_fast.reference import top1_correct

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(harness.missing()), reason=f"PTX: {harness.missing()}"),
    pytest.mark.usefixtures("one_thread"),
]

CAPACITY = 4
# With a capacity of 4: rows, which ids, and what else the call says. "next" repeats the rows stored last and brings
# new ones, "same" are the ids of the batch before.
STEPS: list[tuple[int, str, dict[str, Any]]] = [
    (8, "next", {}),  # first step: no teacher, the second half is stored
    (8, "same", {}),  # the first batch once more still has none
    (8, "next", {}),  # steady state
    (8, "same", {}),  # the same teacher once more
    (8, "same", {}),
    (8, "next", {}),
    (8, "two differ", {"masked": True}),
    (8, "same", {"masked": True}),
    (7, "next", {}),  # a short batch stores 3
    (7, "same", {}),  # and has four repeated rows still
    (6, "next", {"again": 0}),
    (6, "none", {}),  # stored without ids
    (6, "none", {"again": 1}),  # as a recomputation says
    (6, "next", {}),  # rows of unknown id teach no row that has one
    (6, "same", {}),
    (7, "next", {"num_old": 3}),
    (7, "same", {"num_old": 3}),
    (7, "same", {"num_old": 4}),  # the number of repeated rows is another one: a new batch
    (8, "same", {"again": 0}),
    (8, "twice", {}),  # both halves are those stored last: a new batch
    (8, "all differ", {}),
    (8, "all differ", {"again": 0}),
    (4, "next", {"num_old": 4, "masked": True}),  # nothing new: the buffer empties
    (4, "same", {}),
    (4, "same", {"again": 1}),
    (5, "next", {"num_old": 1}),  # says 1, the buffer holds none
    (5, "same", {"num_old": 1}),
    (8, "all differ", {"num_old": 4}),
    (3, "next", {"num_old": 0}),  # a new stream: fewer rows than before, no teacher
    (2, "next", {}),  # fewer rows than are stored
    (0, "next", {}),
    (7, "next", {"num_old": 3, "masked": True}),
    (7, "same", {"num_old": 3, "again": 1}),
]


class Ids:
    """The sample ids of one batch after another."""

    def __init__(self) -> None:
        self.last = self.stored = torch.zeros(0, dtype=torch.int64)
        self.fresh = 0

    def of(self, rows: int, which: str, stored: Tensor) -> Tensor | None:
        """``stored``: the ids of the rows stored last."""
        if which == "none":
            return None
        if which == "same":
            ids = torch.arange(rows) + 10**6
            ids[: len(self.last)] = self.last[:rows]
        else:
            ids = torch.arange(rows) + self.fresh
            self.fresh += rows
            ids[: len(stored)] = stored[:rows]
        if which == "two differ":
            ids[1] = ids[3] = -7
        if which == "all differ":
            ids[: len(stored)] = -9
        if which == "twice":
            ids[rows - len(stored) :] = stored
        self.last = ids
        return ids


def roll_through(stream: Stream, classes: int, dtype: torch.dtype, steps: list, scale: int = 1) -> None:
    ids = Ids()
    for index, (rows, which, call) in enumerate(steps):
        call, rows = dict(call), rows * scale
        logits, target, _ = batch(rows, classes, dtype, seed=index)
        if index % 3 == 1:  # rows that count for nothing are stored too, and one of them cannot teach
            target[-2:] = -100
            logits[-1:, classes // 2] = torch.nan
        count = int(stream.buffer._generations[stream.buffer.slots[0]][0])
        stored = stream.buffer._generations[stream.buffer.slots[0]][1 : 1 + count]
        if "num_old" in call:
            call["num_old"] *= scale
        if call.pop("masked", False):
            call["kd_mask"] = torch.arange(rows // 2 + 1) % 3 != 1
        try:
            stream.step(logits, target, ids.of(rows, which, stored), temperature=2.0, **call)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"step {index}, {rows} rows, {which} ids: {error}") from error


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
    stream = Stream(harness.emulator(seed=classes), classes, CAPACITY, stored)
    roll_through(stream, classes, dtype, STEPS)
    assert all(int(value) > 0 for value in stream.slots[1:5]), "every counter has counted"


@pytest.mark.parametrize("clusters", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_many_steps_with_long_rows(clusters: int) -> None:
    stream = Stream(harness.emulator(largest_cluster=clusters), 17001, CAPACITY, torch.bfloat16)
    roll_through(stream, 17001, torch.bfloat16, [STEPS[i] for i in (0, 1, 2, 3, 8, 9)])


COUNTED_FIRST = [
    [STEPS[i] for i in (0, 2, 3, 6)],
    pytest.param(STEPS, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("steps", COUNTED_FIRST, ids=["some", "all"])
def test_many_steps_with_rows_counted_first(steps: list) -> None:
    """Above 4096 rows count_kernel compares the ids and counts, and leaves both in the workspace."""
    stream = Stream(harness.emulator(multiprocessors=8), 3, 2056)
    roll_through(stream, 3, torch.float32, steps, 514)
    assert int(stream.slots[1]) > 0 and int(stream.slots[2]) > 0


def spoiled(logits: Tensor, first: int, stored: torch.dtype) -> Tensor:
    """From row ``first`` on: NaN, +inf, nothing but -inf, what overflows the stored dtype; then rows that are fine."""
    classes = logits.shape[1]
    logits[first, classes - 1] = torch.nan
    logits[first + 1, classes // 2] = torch.inf
    logits[first + 2] = -torch.inf
    logits[first + 3] = torch.nan
    logits[first + 4, classes // 3] = torch.inf
    logits[first + 4, classes - 1] = torch.nan
    logits[first + 5, 1] = {torch.float16: 7e4, torch.bfloat16: 3.4e38}.get(stored, 1.0)
    logits[first + 6] = -7e4  # -inf in float16
    logits[first + 7, : classes - 1] = -torch.inf  # one class is possible: it can teach
    logits[first + 8, 0] = 6e4
    return logits


LONG = [pytest.param(17001, clusters, marks=pytest.mark.slow) for clusters in (0, 8)]


@pytest.mark.parametrize("labels", ["labels", "ignored", "some ignored", "none", "dense"])
@pytest.mark.parametrize(("classes", "clusters"), [(10, 8), (100, 8), (1001, 8), (1500, 8), *LONG])
def test_rows_that_are_not_finite_do_not_teach(classes: int, clusters: int, labels: str) -> None:
    """Whatever their labels say; each of them is counted, also when it is met again."""
    pairs = STORED if classes == 100 else STORED[1:2]
    for dtype, stored in pairs:
        stream = Stream(harness.emulator(largest_cluster=clusters), classes, 9, stored)
        for index, again in enumerate((0, 0, 1, 0)):
            logits, target, _ = batch(18, classes, dtype, seed=index)
            if labels == "dense":
                target = torch.softmax(torch.randn(18, classes), 1)
            elif labels != "labels":
                target[9 + (0 if labels == "ignored" else 1) :: 1 if labels == "ignored" else 2] = -100
            if index < 3:
                spoiled(logits, 9, stored)
                if target.dim() == 1 and labels == "labels":
                    target[10:12] = classes // 2  # where one row holds +inf and the next one nothing but -inf
            # A row of nothing but -inf has no loss that two implementations share.
            exact = labels in ("ignored", "none") or index == 3
            given = None if labels == "none" else target
            result = stream.step(logits, given, again=again, losses=exact)
            assert float(result.parts[3]) == float(top1_correct(logits, given))
        assert int(stream.slots[4]) == 3 * {torch.float32: 5, torch.bfloat16: 6, torch.float16: 7}[stored]


@pytest.mark.parametrize("count", [-5, 9, 2**40])
@pytest.mark.parametrize("classes", [10, 1500])
def test_a_corrupt_header_cannot_leave_the_arrays(classes: int, count: int) -> None:
    logits, target, _ = batch(6, classes)
    for num_old in (-1, 0, 6, 2**40):
        for again in (-1, 0, 1):
            stream = Stream(harness.emulator(), classes, CAPACITY)
            stream.slots[0] = count
            stream.slots[HEADER] = stream.slots[HEADER + 1 + 2 * CAPACITY] = count
            harness.emulator().last_batch(
                logits, target, rows=stream.rows, slots=stream.slots, ids=torch.arange(6), num_old=num_old, again=again
            )
            assert int(stream.slots[0]) in (0, 1)
            assert 0 <= int(stream.slots[HEADER + int(stream.slots[0]) * (1 + 2 * CAPACITY)]) <= CAPACITY


@pytest.mark.parametrize("classes", [1001, 1502])
def test_generations_that_begin_differently_on_packets(classes: int) -> None:
    """Which plan_launch notices: such rows take two passes."""
    stream = Stream(harness.emulator(), classes, 3)
    stream.buffer.rows, stream.rows = stream.buffer.rows[:, :3].clone(), stream.rows[:, :3].clone()
    for index in range(3):
        logits, target, _ = batch(6, classes, seed=index)
        assert stream.step(logits, target).plan["regime"].startswith("two_pass")


@pytest.mark.parametrize("by_ids", [True, False])
def test_replay_with_changing_schedules(by_ids: bool) -> None:
    """One set of addresses and arguments, as in a CUDA graph: only what is in the arrays changes."""
    stream = Stream(harness.emulator(), 100, 4)
    alpha, temperature = torch.tensor(1.0), torch.tensor(3.0)
    logits, target, ids = torch.empty(8, 100), torch.empty(8, dtype=torch.int64), torch.empty(8, dtype=torch.int64)
    for step, number in enumerate((0, 0, 1, 2, 2, 2, 3)):
        fresh, labels, _ = batch(8, 100, seed=step)
        logits.copy_(fresh)
        target.copy_(labels)
        ids.copy_(torch.arange(8) + 4 * number)
        alpha.fill_(step / 2)
        temperature.fill_(1.0 + step)
        stream.step(logits, target, ids if by_ids else None, alpha=alpha, temperature=temperature)
    assert int(stream.slots[1]) == (20 if by_ids else 24)


@pytest.mark.parametrize(("classes", "clusters"), [(10, 8), (100, 8), (1000, 8), (1500, 8), *LONG])
def test_the_same_batch_again_is_the_same_to_the_bit(classes: int, clusters: int) -> None:
    """By ids and by the argument: loss, gradient and buffer; and a third time."""
    for again, ids in ((-1, torch.arange(8)), (1, torch.arange(8)), (1, None)):
        stream = Stream(harness.emulator(largest_cluster=clusters), classes, 4)
        first, target, _ = batch(8, classes, seed=1)
        stream.step(first, target, None if ids is None else ids - 4)
        logits, target, _ = batch(8, classes, seed=2)
        results, buffers = [stream.step(logits, target, ids, again=0)], [stream.rows.clone()]
        for _ in range(2):
            results.append(stream.step(logits, target, ids, again=again))
            buffers.append(stream.rows.clone())
        for result, rows in zip(results[1:], buffers[1:], strict=True):
            assert torch.equal(result.loss, results[0].loss) and torch.equal(result.grad, results[0].grad)
            assert torch.equal(rows, buffers[0])
        assert stream.slots[1:6].tolist() == [12, 0, 0, 0, 0]


def test_rows_without_an_id_do_not_match_rows_with_the_id_of_none() -> None:
    """An id of -2**63 is no id: such a row is unknown, though the two are equal."""
    stream = Stream(harness.emulator(), 10, 4)
    for _ in range(2):
        logits, target, _ = batch(8, 10)
        stream.step(logits, target, torch.full((8,), UNKNOWN_ID), again=0)
    assert stream.slots[1:6].tolist() == [0, 0, 4, 0, 1]
