"""The emulator is worth what it catches: kernels broken on purpose must not pass."""

from __future__ import annotations

import pytest
import torch
from emulation import harness
from emulation.oracle import Stream, batch

pytestmark = [
    pytest.mark.slow,  # every mutant is compiled
    pytest.mark.skipif(bool(harness.missing()), reason=f"emulator: {harness.missing()}"),
]


# Sample ids of the batches, and `again`: the next batch, the same once more, a short one, the same, its new rows twice,
# a batch that repeats nothing.
STEPS = [
    ([0, 1, 2, 3, 4, 5], 0),
    ([3, 4, 5, 6, 7, 8], -1),
    ([3, 4, 5, 6, 7, 8], -1),
    ([6, 7, 8, 9, 10], -1),
    ([6, 7, 8, 9, 10], -1),
    ([9, 10, 9, 10], -1),
    ([20, 21, 22, 23], -1),
]


def outcome(
    mutation: tuple[str, str, str], classes: int, *, clusters: int = 8, stored: torch.dtype = torch.float32,
    many: int = 1,
) -> str:  # fmt: skip
    """What is wrong with a mutant: the emulator's fault, or which comparison failed; "" when it passes.

    Pairs of six rows: with an odd number of classes row 3 + j and slot j lie differently on packets, and threads meet.
    """
    module = harness.load(harness.build(mutation, float32_only=True, flags=("-O0",)))
    for seed in range(3 if many == 1 else 1):
        emulator = harness.Emulator(module, largest_cluster=clusters, seed=seed)
        stream = Stream(emulator, classes, 3 * many, stored)
        try:
            for index, (numbers, again) in enumerate(STEPS):
                ids = torch.tensor([number * many + i for number in numbers for i in range(many)])
                logits, target, _ = batch(len(ids), classes, seed=seed + index)
                target[-2:] = -100  # rows that are stored and count for nothing
                logits[-1, classes // 2] = (0.0, torch.nan, torch.nan, 7e4, torch.inf, 0.0, 0.0)[index]
                if index == 4:  # neither of its two new rows can teach
                    logits[-2] = -torch.inf
                stream.step(logits, target, ids, again=again)
        except (RuntimeError, AssertionError) as error:
            return str(error) or "wrong"
    return ""


@pytest.mark.parametrize(("classes", "clusters"), [(100, 8), (1001, 8), (1501, 8), (17001, 8), (17001, 0)])
def test_the_kernels_as_they_are_pass(classes: int, clusters: int) -> None:
    assert outcome(("plan.h", "#pragma once", "#pragma once"), classes, clusters=clusters) == ""


def test_the_kernels_as_they_are_pass_with_other_rows() -> None:
    assert outcome(("plan.h", "#pragma once", "#pragma once"), 100, stored=torch.float16) == ""
    assert outcome(("plan.h", "#pragma once", "#pragma once"), 3, many=700) == ""


@pytest.mark.parametrize(
    ("barrier", "classes"),
    [("    sync_block();\n    const int other", 1501), ("    sync_cluster();\n    const int warps", 17001)],
    ids=["block reduction", "cluster reduction"],
)
def test_a_removed_barrier_is_caught(barrier: str, classes: int) -> None:
    without = barrier.replace("sync_block();", "").replace("sync_cluster();", "")
    assert outcome(("groups.cuh", barrier, without), classes)


@pytest.mark.parametrize(("classes", "clusters"), [(100, 8), (1501, 8), (17001, 0)])
def test_a_write_into_the_generation_that_teaches_is_caught(classes: int, clusters: int) -> None:
    swapped = ("batch.cuh", "s.written = 1 - s.taught;", "s.written = s.taught;")
    assert "generation that teaches" in outcome(swapped, classes, clusters=clusters)


def test_a_read_only_load_of_what_the_launch_writes_is_caught() -> None:
    load = "rows_of<const float>(a, s.taught)"
    swapped = ("resident_kernel.cuh", load, load.replace("taught", "written"))
    assert "read-only path" in outcome(swapped, 100)


MUTATIONS = {
    "the header is written before everybody has read it": (
        "batch.cuh",
        "  if (a.precounted) {\n    lay_out",
        "  store(a.slots + slots_latest, int64_t(1 - header.latest()));\n  if (a.precounted) {\n    lay_out",
    ),
    "a row that counts for nothing has no flag": ("resident_kernel.cuh", "any(read)", "any(exists && role.active())"),
    "NaN is finite": ("row.cuh", "n.d1 > 0.0f && top", "top"),
    "new rows are not compared": ("batch.cuh", "id != last ? 2.0f", "id != last && false ? 2.0f"),
    "repeated rows are not compared": ("batch.cuh", "|| id != old ?", "|| id != old || true ?"),
    "the same batch has as many repeated rows as are stored": ("batch.cuh", "again ? a.batch - count : count", "count"),
    "the other generation has as many rows": ("batch.cuh", "header.count(a, s.taught)", "count"),
    "a batch without a repeated row is forgotten": ("finish.cuh", "+ n.not_finite <", "<"),
    "flags are those of the other generation": ("batch.cuh", "load(ids + a", "load(slots_of(a, s.written) + 1 + a"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_the_buffer_gets_wrong_is_caught(name: str) -> None:
    assert outcome(MUTATIONS[name], 1501)


def test_an_overflow_of_the_stored_dtype_is_caught() -> None:
    mutation = ("row.cuh", "} else if (a.teacher_dtype == DType::f16) {\n    F16", "} else if (false) {\n    F16")
    assert outcome(mutation, 100, stored=torch.float16)


def test_a_decision_that_is_not_handed_on_is_caught() -> None:
    """With so many rows that count_kernel takes it."""
    assert outcome(("count_kernel.cuh", "store(&w.again, again ? 1 : 0);", ""), 3, many=700)


def test_a_wrong_pair_index_is_caught() -> None:
    mutation = ("resident_kernel.cuh", "half == 0 ? pair : s.start + pair", "half == 0 ? pair : a.batch - 1 - pair")
    assert outcome(mutation, 100)


def test_a_write_out_of_bounds_is_caught() -> None:
    packed = "    if (c >= 0 && c < classes) {\n      if constexpr"
    assert "out of bounds write" in outcome(("columns.cuh", packed, packed.replace("c <", "c <=")), 1001)
    whole = "first >= 0 && first + V <= classes)\n    store"
    assert "out of bounds write" in outcome(("columns.cuh", whole, "first >= 0)\n    store"), 17001, clusters=0)
