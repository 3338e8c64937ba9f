"""The emulator is worth what it catches: kernels broken on purpose must not pass."""

from __future__ import annotations

import pytest
import torch
from emulation import harness
from emulation.oracle import batch, compare

pytestmark = [
    pytest.mark.slow,  # every mutant is compiled
    pytest.mark.skipif(bool(harness.missing()), reason=f"emulator: {harness.missing()}"),
]


def outcome(
    mutation: tuple[str, str, str], classes: int, *, clusters: int = 8, rows: int = 6
) -> str:
    """What is wrong with a mutant: the emulator's fault, or which comparison failed; "" when it passes.

    Six rows: with an odd number of classes row 3 + j and slot j lie differently on packets, and threads meet.
    """
    module = harness.load(harness.build(mutation, float32_only=True, flags=("-O0",)))
    for seed in range(3):
        emulator = harness.Emulator(module, largest_cluster=clusters, seed=seed)
        logits, target, teacher = batch(rows, classes, seed=seed)
        stored, slots = teacher.clone(), torch.full((2 + len(teacher),), -(2**63))
        slots[0], slots[1] = len(teacher), 0
        given = logits.clone()
        target[-1] = -100  # a row that is stored and counts for nothing
        try:
            result = emulator.last_batch(given, target, buffer=stored, slots=slots)
            compare(result, logits, target, teacher)
            assert torch.equal(stored, logits[rows - len(teacher) :]), "stored rows"
        except (RuntimeError, AssertionError) as error:
            return str(error) or "wrong"
    return ""


@pytest.mark.parametrize(("classes", "clusters"), [(100, 8), (1001, 8), (1501, 8), (17001, 8), (17001, 0)])
def test_the_kernels_as_they_are_pass(classes: int, clusters: int) -> None:
    assert outcome(("plan.h", "#pragma once", "#pragma once"), classes, clusters=clusters) == ""


@pytest.mark.parametrize(
    ("file", "barrier", "classes", "clusters"),
    [
        ("groups.cuh", "    sync_block();\n    const int other", 1501, 8),
        ("groups.cuh", "    sync_cluster();\n    const int warps", 17001, 8),
        ("two_pass_kernel.cuh", "        Group::sync();", 17001, 0),
    ],
    ids=["block reduction", "cluster reduction", "teacher read before it is overwritten"],
)
def test_a_removed_barrier_is_caught(file: str, barrier: str, classes: int, clusters: int) -> None:
    without = barrier.replace("sync_block();", "").replace("sync_cluster();", "").replace("Group::sync();", "")
    assert outcome((file, barrier, without), classes, clusters=clusters)


def test_a_read_only_load_of_what_the_launch_writes_is_caught() -> None:
    load = "raw[p] = load_packet_if(columns.whole(p), row + columns.column(p), false"
    assert "read-only path" in outcome(("resident_kernel.cuh", load, load.replace("false", "true")), 100)


def test_a_wrong_pair_index_is_caught() -> None:
    mutation = ("resident_kernel.cuh", "half == 0 ? pair : s.start + pair", "half == 0 ? pair : a.batch - 1 - pair")
    assert outcome(mutation, 100)


def test_a_write_out_of_bounds_is_caught() -> None:
    packed = "    if (c >= 0 && c < classes) {\n      if constexpr"
    assert "out of bounds write" in outcome(("columns.cuh", packed, packed.replace("c <", "c <=")), 1001)
    whole = "first >= 0 && first + V <= classes)\n    store"
    assert "out of bounds write" in outcome(("columns.cuh", whole, "first >= 0)\n    store"), 17001, clusters=0)
