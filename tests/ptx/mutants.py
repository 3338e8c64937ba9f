"""Kernels broken on purpose, an instruction of their PTX at a time, and what shows that one makes no difference."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from .machine import Fault, Kernel
from .program import COMPARISONS, TABLE, Instruction, Program

ACCESSES = ("ld_global", "ld_shared", "st_global", "st_shared", "st_cluster", "st_matrix", "ld_matrix")
BARRIERS = ("bar_sync", "bar_warp")
# A comparison that holds where this one does not, NaN included.
OPPOSITE = {"eq": "neu", "ne": "equ", "lt": "geu", "le": "gtu", "gt": "leu", "ge": "ltu", "num": "nan"}
OPPOSITE |= {there: here for here, there in OPPOSITE.items()}
INTEGERS = {f"{name}_b{bits}" for name in ("add", "sub", "mul", "mad", "shl") for bits in (32, 64)}
INTEGERS |= {f"{name}_{kind}{bits}" for name in ("setp", "min", "max") for kind in "su" for bits in (32, 64)}
OPERANDS = {operation: widths for operation, widths, _ in TABLE.values()}


@dataclass
class Mutant:
    kind: str
    changes: dict[int, Instruction]
    program: Program | None = None  # with a constant more

    @property
    def at(self) -> int:
        return min(self.changes)


def without_barriers(program: Program) -> Iterator[Mutant]:
    """Every barrier, fence, and release-acquire of an atomic or a cluster's barrier in turn becomes nothing."""
    arrive = -1
    for index, one in enumerate(program.code):
        if one.operation in BARRIERS:
            yield Mutant("barrier", {index: replace(one, operation="gone")})
        elif one.operation in ("fence", "launch_wait"):
            yield Mutant(one.operation, {index: replace(one, operation="nop")})
        elif one.operation == "atom_add_acq_rel":
            yield Mutant("fence", {index: replace(one, operation="atom_add_relaxed")})
        elif one.operation == "cluster_arrive":
            arrive = index
            if not one.imm:
                yield Mutant("release", {index: replace(one, imm=1)})
        elif one.operation == "cluster_wait" and arrive >= 0:
            nothing = replace(program.code[arrive], operation="nop")
            yield Mutant("barrier", {arrive: nothing, index: replace(one, operation="gone")})


def wrong_indices(program: Program) -> Iterator[Mutant]:
    """Every access in turn goes to its neighbour, and every constant of an integer's arithmetic is one more."""
    for index, one in enumerate(program.code):
        if one.operation in ACCESSES:
            yield Mutant("address", {index: replace(one, imm=one.imm + (one.size * one.count or 16))})
        elif one.operation in INTEGERS:
            values = {row: bits for bits, _, row in program.constants}
            for place, width in enumerate(OPERANDS[one.operation][1:], 1):
                if one.r[place] < 0:
                    made, row = program.with_constant(values[~one.r[place]] + 1, width)
                    r = [*one.r[:place], row, *one.r[place + 1 :]]
                    yield Mutant("constant", {index: replace(one, r=r)}, made)


def lost_predicates(program: Program) -> Iterator[Mutant]:
    """Every predicate in turn is dropped, and a jump's never holds; every comparison and selection is turned round."""
    for index, one in enumerate(program.code):
        if one.guard_kind:
            other = 3 if one.operation == "bra" else 3 - one.guard_kind
            yield Mutant("dropped", {index: replace(one, guard_kind=0)})
            yield Mutant("turned", {index: replace(one, guard_kind=other)})
        elif one.operation.startswith("setp"):
            opposite = COMPARISONS.index(OPPOSITE[COMPARISONS[one.imm]])
            yield Mutant("turned", {index: replace(one, imm=opposite)})
        elif one.operation.startswith("selp"):
            yield Mutant("turned", {index: replace(one, r=[one.r[0], one.r[2], one.r[1], *one.r[3:]])})


@dataclass
class Verdict:
    """What became of a mutant. ``why``: the rule that explains it, or an empty string."""

    mutant: Mutant
    text: str
    why: str
    differs: int = 0  # in how many launches the instruction did what the original would not
    instead: dict[str, int] = field(default_factory=dict)  # of a barrier: which order its pairs of accesses, how many

    def __str__(self) -> str:
        by = ", ".join(f"{count} pairs by {text}" for text, count in self.instead.items())
        what = f"{self.mutant.kind} {self.mutant.at} {self.text}: {self.why or 'unexplained'}"
        return f"{what}, differs in {self.differs} launches" if not by else f"{what}: {by}"


Case = Callable[[Kernel], None]
ENOUGH = 4  # launches with a difference in effect that leaves no trace, before a trace is taken to be impossible
TRAFFIC = ("loads16", "stores16", "loads", "stores", "bytes_loaded", "bytes_stored", "prefetched")


@dataclass
class Trace:
    """Of a mutant that no call has noticed: in how many launches it differed in effect, and what it left as it was."""

    differs: int = 0
    same: bool = True  # every byte of memory behind every launch
    traffic: bool = True  # what the launches moved


class Study:
    """A kernel and calls of it that are held against the reference.

    A mutant is *noticed* where one of them fails: by a wrong number, an access out of bounds, a race, a deadlock, a
    launch that does not end. What no call notices is explained by the first of these rules that holds in all launches:

    - idle: the instruction did what the original does, in every lane of every launch. (A predicate that always holds.)
    - unused: nor is anything noticed with noise in place of each of its results that differ.
    - traffic: memory is the same to the bit, and the launches loaded, stored or prefetched more or less: it costs time.
    - masked: its effect differed in at least ``ENOUGH`` launches, and memory is the same to the bit. (A shortcut around
      what would change nothing; a test that another one repeats; a store of the number that is there.)
    - rounded: bytes differ, by less than the arithmetic may err, after as many differences.

    ``more`` calls are made for what differed in fewer launches. What none of the rules explains is a call that is
    missing.

    A barrier, fence or release is *redundant* where no two conflicting accesses of any launch lack an order: the
    machine checks them all, by what orders them under every schedule, and says for each barrier which others do.
    """

    def __init__(self, kernel: Kernel, cases: list[Case], more: list[Case] | None = None) -> None:
        self.kernel, self.cases, self.more = kernel, [], more or []
        self.base: list[list[dict[str, int]]] = []
        self.steps = 0
        kernel.executed[:] = bytes(len(kernel.executed))
        self._extend(cases)

    def _extend(self, cases: list[Case]) -> None:
        """Make calls of the right kernel; some lead to another one and are left out.

        So are those in which the original errs by more than the reference allows: they would notice anything.
        """
        failed = 0
        for case in cases:
            self.kernel.launches = []
            try:
                case(self.kernel)
            except AssertionError:
                failed += 1
                assert failed <= len(cases) / 10, "the kernel itself is wrong"
                continue
            if self.kernel.launches:
                self.cases.append(case)
                self.base.append(self.kernel.launches)
                self.steps = max([self.steps, *(one["steps"] for one in self.kernel.launches)])
        self.kernel.launches = None

    def reached(self, mutants: Iterator[Mutant]) -> list[Mutant]:
        """Those whose instruction the calls execute."""
        return [mutant for mutant in mutants if all(self.kernel.executed[at] for at in mutant.changes)]

    def sampled(self, count: int) -> list[Mutant]:
        """As many wrong indices and as many lost predicates."""
        chosen: list[Mutant] = []
        for seed, change in enumerate((wrong_indices, lost_predicates)):
            reached = self.reached(change(self.kernel.program))
            chosen += random.Random(seed).sample(reached, min(count, len(reached)))
        return chosen

    def _survives(self, kernel: Kernel, trace: Trace, first: int = 0) -> bool:
        kernel.steps = 4 * self.steps + 100_000
        for case, base in zip(self.cases[first:], self.base[first:], strict=True):
            kernel.launches = []
            try:
                case(kernel)
            except (Fault, AssertionError, RuntimeError, ValueError):
                return False
            trace.differs += sum(one["infected"] > 0 for one in kernel.launches)
            trace.same &= [one["digest"] for one in kernel.launches] == [one["digest"] for one in base]
            trace.traffic &= all(
                a[key] == b[key] for a, b in zip(kernel.launches, base, strict=False) for key in TRAFFIC
            )
        return True

    def judge(self, mutant: Mutant) -> Verdict:
        code, at = self.kernel.program.code, mutant.at
        changed, trace = self.kernel.changed(mutant.changes, mutant.program), Trace()
        changed.orders = bytearray(4 * len(code) if mutant.kind == "barrier" else 0)
        survives = self._survives(changed, trace)
        if mutant.kind in ("barrier", "fence", "release", "launch_wait"):
            counts = memoryview(changed.orders).cast("I") if changed.orders else ()
            instead = {f"{i}: {code[i].text}": int(count) for i, count in enumerate(counts) if count}
            return Verdict(mutant, code[at].text, "redundant" if survives else "noticed", trace.differs, instead)
        while survives and 0 < trace.differs < ENOUGH and self.more:
            first, count = len(self.cases), len(self.cases)
            self._extend(self.more[:count])
            self.more = self.more[count:]
            survives = self._survives(changed, trace, first)
        if not survives:
            return Verdict(mutant, code[at].text, "noticed")
        why = ""
        if not trace.differs:
            why = "idle"
        elif self._unused(mutant):
            why = "unused"
        elif trace.same and not trace.traffic:
            why = "traffic"
        elif trace.differs >= ENOUGH:
            why = "masked" if trace.same else "rounded"
        return Verdict(mutant, code[at].text, why, trace.differs)

    def _unused(self, mutant: Mutant) -> bool:
        one = self.kernel.program.code[mutant.at]
        if one.width < 2 or one.operation.startswith(("st_", "atom", "bra")):
            return False
        changed = self.kernel.changed(mutant.changes, mutant.program)
        changed.noise = True
        return self._survives(changed, Trace())
