"""Kernels broken on purpose, an instruction of their PTX at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from .machine import Fault, Kernel
from .program import Instruction, Program

BARRIERS = ("bar_sync", "bar_warp", "cluster_sync", "cluster_meet")
STORES = ("st_global", "st_shared", "st_cluster")
ACCESSES = ("ld_global", "ld_shared", *STORES)


def without_barriers(program: Program) -> Iterator[tuple[int, Instruction]]:
    """Every barrier, fence and release-acquire of an atomic in turn becomes nothing."""
    for index, one in enumerate(program.code):
        if one.operation in (*BARRIERS, "fence"):
            yield index, replace(one, operation="nop")
        elif one.operation == "atom_add_acq_rel":
            yield index, replace(one, operation="atom_add_relaxed")


def wrong_indices(program: Program) -> Iterator[tuple[int, Instruction]]:
    """Every access in turn goes to its neighbour."""
    for index, one in enumerate(program.code):
        if one.operation in ACCESSES:
            yield index, replace(one, imm=one.imm + one.size * one.count)


def lost_predicates(program: Program, of: tuple[str, ...] = STORES) -> Iterator[tuple[int, Instruction]]:
    """Every predicate of an access is dropped in turn, and of a branch that jumps over one: it is never taken.

    A load that should not be is a fault where it is outside of its array; inside, nobody uses what it finds.
    """
    for index, one in enumerate(program.code):
        if one.guard_kind and one.operation in of:
            yield index, replace(one, guard_kind=0)
        elif one.guard_kind and one.operation == "bra" and index < one.imm <= index + 12:
            skipped = program.code[index + 1 : one.imm]
            if any(i.operation in of for i in skipped) and not any(i.operation == "bra" for i in skipped):
                yield index, replace(one, operation="nop")


def some(of: Iterator[tuple[int, Instruction]], kernel: Kernel, count: int, seed: int) -> list[tuple[int, Instruction]]:
    """A few of those that the cases execute."""
    executed = [mutant for mutant in of if kernel.executed[mutant[0]]]
    return random.Random(seed).sample(executed, min(count, len(executed)))


def survivors(kernel: Kernel, mutants: list[tuple[int, Instruction]], cases: Callable[[Kernel], None]) -> list[int]:
    """Where a change was made that the cases did not notice: neither a fault, nor a wrong number."""
    alive = []
    for index, instruction in mutants:
        try:
            cases(kernel.changed(index, instruction))
        except (Fault, AssertionError):
            continue
        alive.append(index)
    return alive
