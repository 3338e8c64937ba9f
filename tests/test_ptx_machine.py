"""What the machine that executes PTX must find, each shown on a kernel of a few lines."""

from __future__ import annotations

import math
import shutil
import struct

import pytest
import torch
from ptx import mutants
from ptx import program as ptx
from ptx.harness import extent
from ptx.machine import Fault, Kernel

pytestmark = [
    pytest.mark.slow,  # g++ compiles the machine
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

REGISTERS = (
    ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<20>; .reg .f32 %f<8>; .reg .b64 %d<8>;"
    ".shared .align 16 .b8 room[256];"
    "ld.param.u64 %d0, [a]; ld.param.u64 %d1, [b]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;"
    "mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;"
    "mov.u32 %r2, room; mad.lo.s32 %r3, %r0, 4, %r2;"
)


def made(body: str) -> Kernel:
    text = f".visible .entry k(.param .u64 a, .param .u64 b)\n{{ {REGISTERS} {body} ret; }}"
    return Kernel(ptx.decode(text, "k", ptx.entries(text)["k"]))


def run(
    body: str | Kernel, a: torch.Tensor, b: torch.Tensor, *, blocks: int = 1, threads: int = 32, cluster: int = 1,
    seed: int = 0, before: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """``a`` may be written, ``b`` may not; %d3 and %d4: this thread's words of them, %r3: its word of shared memory."""
    kernel = made(body) if isinstance(body, str) else body
    ranges = [(*extent(a), True, "a"), (*extent(b), False, "b")]
    arguments = struct.pack("<QQ", a.data_ptr(), b.data_ptr())
    kernel.run(arguments, ranges, blocks=blocks, threads=threads, cluster=cluster, seed=seed, before=before)


FIRST = "setp.eq.s32 %p1, %r0, 0;"
TICKET = "@%p1 atom.global.add.u32 %r6, [%d0+0], 1;"
FAULTS = {
    "out of bounds read at byte 128 of b": "ld.global.u32 %r4, [%d4+4];",
    "out of bounds write at byte -4 of a": "st.global.u32 [%d3+-4], %r0;",
    "misaligned read": "ld.global.u32 %r4, [%d4+2];",
    "write into the input b": "st.global.u32 [%d4], %r0;",
    "read-only path": "ld.global.nc.u32 %r4, [%d3];",
    "outside the block's shared memory": "st.shared.u32 [%r3+192], %r0;",
    "nobody has written": "ld.shared.u32 %r4, [%r3];",
    "outside the kernel's parameters": "ld.param.u64 %d5, [a+16];",
    # Lane 0 goes another way and meets another exchange.
    "different collectives": FIRST + "@%p1 bra $L; mov.u32 %r4, 0; redux.sync.add.s32 %r5, %r0, -1; bra $E;"
    "$L: redux.sync.add.s32 %r5, %r0, -1; $E: mov.u32 %r6, 0;",
    "does not name all lanes": "redux.sync.add.s32 %r5, %r0, 15;",
    # All write a word, and all read their neighbour's.
    "read of shared memory": "st.shared.u32 [%r3], %r0; xor.b32 %r4, %r3, 4; ld.shared.u32 %r5, [%r4];"
    "st.global.u32 [%d3], %r5;",
    "write of a": "st.global.u32 [%d0], %r0;",
    "trap": FIRST + "@%p1 trap;",
    "bulk prefetch": "add.s64 %d5, %d1, 8; mov.u32 %r4, 16; cp.async.bulk.prefetch.L2.global [%d5], %r4;",
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_is_named(words: str) -> None:
    with pytest.raises(Fault, match=words):
        run(FAULTS[words], torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32))


def exchange(between: str, **shape: int) -> list[int]:
    """All write a word of shared memory and read the one across the block, with ``between`` in between."""
    a, threads = torch.zeros(64, dtype=torch.int32), 64
    body = f"st.shared.u32 [%r3], %r0; {between} mov.u32 %r5, {4 * (threads - 1)}; sub.s32 %r5, %r5, %r3;"
    body += "add.s32 %r5, %r5, %r2; add.s32 %r5, %r5, %r2; ld.shared.u32 %r6, [%r5]; st.global.u32 [%d3], %r6;"
    run(body, a, torch.zeros(1), threads=threads, **shape)
    return a.tolist()


def test_a_barrier_orders_a_block_and_a_warp_barrier_does_not() -> None:
    for seed in range(5):
        assert exchange("bar.sync 0;", seed=seed) == list(range(63, -1, -1))
        for between in ("", "bar.warp.sync -1;"):
            with pytest.raises(Fault, match=r"race: |nobody has written"):
                exchange(between, seed=seed)


def test_a_barrier_that_some_never_reach_is_a_deadlock() -> None:
    with pytest.raises(Fault, match="deadlock"):
        exchange("setp.lt.u32 %p2, %r0, 32; @%p2 exit; bar.sync 0;")


def partials(fence: str, after: str, seed: int) -> int:
    """Every block leaves a number and takes a ticket; the last one adds them up. ``a``: ticket, sum, numbers."""
    a = torch.zeros(8, dtype=torch.int32)
    body = FIRST + "mul.wide.u32 %d5, %r1, 4; add.s64 %d5, %d0, %d5; add.s32 %r4, %r1, 1;"
    body += f"@%p1 st.global.u32 [%d5+8], %r4; {fence} {TICKET} {after}"
    body += "setp.ne.s32 %p2, %r6, 3; @%p2 exit; setp.ne.s32 %p3, %r0, 0; @%p3 exit;"
    for place in range(4):
        body += f"ld.global.u32 %r8, [%d0+{8 + 4 * place}]; add.s32 %r7, %r7, %r8;"
    body = "mov.u32 %r7, 0; mov.u32 %r6, 0;" + body + "st.global.u32 [%d0+4], %r7;"
    run(body, a, torch.zeros(1), blocks=4, seed=seed)
    return int(a[1])


def test_fences_around_a_ticket_order_blocks() -> None:
    """Release before the ticket and acquire behind it: either one alone is a race, whoever comes last."""
    for seed in range(5):
        assert partials("membar.gl;", "membar.gl;", seed) == 10
        for fence, after in (("", "membar.gl;"), ("membar.gl;", ""), ("", "")):
            with pytest.raises(Fault, match="race: read of a"):
                partials(fence, after, seed)


REMOTE = (
    "mov.u32 %r4, %cluster_ctarank; xor.b32 %r4, %r4, 1; mapa.shared::cluster.u32 %r5, %r3, %r4;"
    "{} st.shared::cluster.u32 [%r5], %r0; {}"
)
WHOLE = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
BEGUN = "barrier.cluster.arrive.relaxed; mov.u32 %r6, 0; barrier.cluster.wait.acquire;"  # orders nothing
RELAXED = "barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (WHOLE, WHOLE, ""),
        (BEGUN, WHOLE, ""),
        ("", WHOLE, "may not have begun"),
        (WHOLE, BEGUN, "read of shared|nobody has"),
        (WHOLE, "", "read of shared|nobody has|leaving"),
        (RELAXED, WHOLE, ""),  # that the others run is enough to write to them
        (WHOLE, RELAXED, "race: read of shared|nobody has|leaving"),  # to read what they wrote it is not
        # A later release covers what an earlier arrival left out.
        (WHOLE, RELAXED + WHOLE, ""),
        (WHOLE + WHOLE.split()[0], WHOLE.split()[1], "race: read of|nobody has|leaving"),
        (WHOLE + "barrier.cluster.arrive.relaxed;", WHOLE, "arrives twice"),
        (WHOLE, WHOLE + "barrier.cluster.wait.acquire;", "without having arrived"),
    ],
)
def test_shared_memory_of_another_block_needs_the_cluster(before: str, after: str, words: str) -> None:
    a = torch.zeros(32, dtype=torch.int32)
    body = REMOTE.format(before, after) + "ld.shared.u32 %r6, [%r3]; st.global.u32 [%d3], %r6;"
    if words:
        with pytest.raises(Fault, match=words):
            run(body, a, torch.zeros(1), blocks=2, cluster=2)
    else:
        run(body, a, torch.zeros(1), blocks=2, cluster=2)
        assert a.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("shfl.sync.idx.b32 %r4, %r0, 5, 31, -1;", 5),
        ("mov.u32 %r5, 0x3f80c000; mov.u32 %r6, 0xbf804000; max.bf16x2 %r4, %r5, %r6;", 0x3F804000),
        ("mov.u32 %r5, 0x3c00c000; mov.u32 %r6, 0xfe004000; max.f16x2 %r4, %r5, %r6;", 0x3C004000),  # a NaN loses
        ("mov.u32 %r4, 1; griddepcontrol.wait; prefetch.global.L2 [%d4];", 1),
    ],
)
def test_exchanges_by_lane_and_comparisons_of_halves(body: str, value: int) -> None:
    a = torch.zeros(32, dtype=torch.int32)
    run(f"{body} st.global.u32 [%d3], %r4;", a, torch.zeros(32, dtype=torch.int32))
    assert a.tolist() == [value] * 32


@pytest.mark.parametrize(
    ("instruction", "exact", "ulps"),
    [
        ("ex2.approx.ftz.f32 %f1, %f0;", lambda x: 2.0**x, 2.0),
        ("rcp.approx.ftz.f32 %f1, %f0;", lambda x: 1.0 / x, 1.0),
        ("lg2.approx.ftz.f32 %f1, %f0;", lambda x: math.log2(x) if x > 0 else math.nan, None),
        ("mov.f32 %f2, 0f40490FDB; div.full.f32 %f1, %f0, %f2;", lambda x: x / 3.1415927410125732, 2.0),
    ],
    ids=["ex2", "rcp", "lg2", "div"],
)
def test_approximations_err_as_much_as_they_may_and_no_more(instruction: str, exact, ulps: float | None) -> None:
    """A function of the operand and the card: the same input gives the same output."""
    x = torch.empty(4096).uniform_(0.01, 20.0, generator=torch.Generator().manual_seed(0))
    body = "mad.lo.s32 %r4, %r1, 128, 0; cvt.u64.u32 %d5, %r4; add.s64 %d3, %d3, %d5; add.s64 %d4, %d4, %d5;"
    results = []
    for seed in (1, 1, 2):
        a = torch.zeros_like(x)
        run(f"{body} ld.global.f32 %f0, [%d4]; {instruction} st.global.f32 [%d3], %f1;", a, x, blocks=128, seed=seed)
        results.append(a)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    worst = 0.0
    for given, got in zip(x.tolist(), results[0].tolist(), strict=True):
        true = exact(given)
        unit = 2.0 ** (math.floor(math.log2(abs(true))) - 23) if ulps else 2.0**-22 * max(1.0, abs(true))
        worst = max(worst, abs(got - true) / unit)
    assert 0.7 * (ulps or 1.0) < worst <= (ulps or 1.0)


SECOND_WARP = "setp.eq.s32 %p2, %r0, 32;"


def test_a_write_of_the_bytes_that_are_there_is_ordered_after_what_met_others() -> None:
    """All may write one number. Where it was another one before, all of them come after that, whoever is first."""
    for seed in range(8):
        a = torch.zeros(64, dtype=torch.int32)
        run("st.global.u32 [%d0], 7;", a, torch.zeros(1), threads=64, seed=seed)
        one = "mov.u32 %r4, 9; st.shared.u32 [%r2], %r4;"
        run(one, a, torch.zeros(1), threads=64, seed=seed)
        with pytest.raises(Fault, match="race: write of shared"):  # the same by chance
            run(one + "st.shared.u32 [%r2], %r4;", a, torch.zeros(1), threads=64, seed=seed)
        assert a[0] == 7
        first = FIRST + SECOND_WARP + "@%p1 st.global.u32 [%d0], 1; {} @%p1 st.global.u32 [%d0], 2;"
        run(first.format("") + "bar.sync 0; @%p2 st.global.u32 [%d0], 2;", a, torch.zeros(1), threads=64, seed=seed)
        with pytest.raises(Fault, match="race: write of a"):
            run(first.format("") + "@%p2 st.global.u32 [%d0], 2;", a, torch.zeros(1), threads=64, seed=seed)


def test_an_atomic_orders_those_before_it_and_no_read_beside_it() -> None:
    for seed in range(4):
        a = torch.zeros(8, dtype=torch.int32)
        # The last of four sees that it is, and may put the counter back.
        last = FIRST + "mov.u32 %r6, 0;" + TICKET + "setp.eq.s32 %p2, %r6, 3; @%p2 st.global.u32 [%d0], 0;"
        run(last.replace("%d0+0", "%d0"), a, torch.zeros(1), blocks=4, seed=seed)
        assert a[0] == 0
        with pytest.raises(Fault, match="race"):
            run(FIRST + TICKET + "@%p1 ld.global.u32 %r7, [%d0];", a, torch.zeros(1), blocks=4, seed=seed)


def test_a_ticket_taken_by_another_thread_is_acquired_by_a_sequential_fence_alone() -> None:
    """One thread takes it, the block meets, another one reads: fences of all blocks in one order, or none."""
    for fence, right in (("membar.gl;", True), ("fence.acq_rel.gpu;", False)):
        body = FIRST + "mul.wide.u32 %d5, %r1, 4; add.s64 %d5, %d0, %d5; mov.u32 %r6, 0;"
        body += f"@%p1 st.global.u32 [%d5+8], 5; {fence} {TICKET} @%p1 st.shared.u32 [room], %r6; bar.sync 0; {fence}"
        body += "ld.shared.u32 %r6, [room]; setp.ne.s32 %p2, %r6, 3; @%p2 exit; setp.ne.s32 %p3, %r0, 1; @%p3 exit;"
        body += "ld.global.u32 %r8, [%d0+8]; ld.global.u32 %r7, [%d0+12]; add.s32 %r7, %r7, %r8;"
        a = torch.zeros(8, dtype=torch.int32)
        if right:
            run(body + "st.global.u32 [%d0+4], %r7;", a, torch.zeros(1), blocks=4)
            assert a[1] == 10
        else:
            with pytest.raises(Fault, match="race: read of a"):
                run(body + "st.global.u32 [%d0+4], %r7;", a, torch.zeros(1), blocks=4)


@pytest.mark.parametrize(
    ("body", "before", "words"),
    [
        ("ld.global.u32 %r4, [%d4];", (0, 2), "b, which the launch before may still write"),
        ("ld.global.u32 %r4, [%d4];", (2, 1), ""),
        ("st.global.u32 [%d3], %r0;", (1, 0), "a, which the launch before may still read"),
        ("griddepcontrol.wait; ld.global.u32 %r4, [%d4]; st.global.u32 [%d3], %r0;", (3, 2), ""),
    ],
)
def test_a_dependent_launch_waits_for_what_the_one_before_touches(
    body: str, before: tuple[int, int], words: str
) -> None:
    a, b = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    if words:
        with pytest.raises(Fault, match=words):
            run(body, a, b, before=before)
    else:
        run(body, a, b, before=before)


def test_of_two_barriers_each_is_redundant_and_says_which_one_does_its_work() -> None:
    meet = "bar.sync 0;"
    body = f"st.shared.u32 [%r3], %r0; {meet} {{}} xor.b32 %r4, %r3, 128; ld.shared.u32 %r5, [%r4];"
    body += "st.global.u32 [%d3], %r5;"

    def call(kernel: Kernel) -> None:
        a = torch.zeros(64, dtype=torch.int32)
        run(kernel, a, torch.zeros(1), threads=64)
        assert a.tolist() == [*range(32, 64), *range(32)]

    for bodies, rule in ((body.format(meet), "redundant"), (body.format(""), "noticed")):
        study = mutants.Study(made(bodies.replace("room[256]", "room[1024]")), [call])
        barriers = study.reached(mutants.without_barriers(study.kernel.program))
        verdicts = [study.judge(one) for one in barriers]
        assert [one.why for one in verdicts] == [rule] * len(barriers) and barriers
        if rule == "redundant":
            other = [[f"{two.at}: bar.sync 0" for two in barriers if two is not one] for one in barriers]
            assert [list(one.instead) for one in verdicts] == other


def test_mutants_are_explained_by_what_they_change() -> None:
    """A predicate that always holds, a result that nobody uses, a shortcut; and what a call notices."""
    body = "mov.u32 %r4, 5; setp.lt.s32 %p1, %r0, 32; add.s32 %r5, %r0, 1; mov.u32 %r7, 3;"
    body += "@%p1 add.s32 %r6, %r0, 4; setp.lt.s32 %p2, %r0, 9; @%p2 bra $L; mul.lo.s32 %r6, %r6, 1;"
    body += "$L: st.global.u32 [%d3], %r6;"

    def call(kernel: Kernel) -> None:
        a = torch.zeros(32, dtype=torch.int32)
        run(kernel, a, torch.zeros(1))
        assert a.tolist() == list(range(4, 36))

    study = mutants.Study(made(body), [call] * mutants.ENOUGH)
    changes = [*mutants.wrong_indices(study.kernel.program), *mutants.lost_predicates(study.kernel.program)]
    found = {(one.kind, study.kernel.program.code[one.at].text): study.judge(one).why for one in changes}
    for text, why in {
        ("dropped", "@%p1 add.s32 %r6, %r0, 4"): "idle", ("turned", "@%p1 add.s32 %r6, %r0, 4"): "noticed",
        ("constant", "add.s32 %r5, %r0, 1"): "unused", ("constant", "@%p1 add.s32 %r6, %r0, 4"): "noticed",
        ("turned", "@%p2 bra $L"): "masked", ("dropped", "@%p2 bra $L"): "masked",
        ("constant", "setp.lt.s32 %p2, %r0, 9"): "masked", ("constant", "setp.lt.s32 %p1, %r0, 32"): "idle",
        ("address", "st.global.u32 [%d3], %r6"): "noticed",
    }.items():  # fmt: skip
        assert found[text] == why, (text, found)


def test_an_unknown_instruction_is_named() -> None:
    for instruction, words in {
        "sin.approx.f32 %f1, %f2": r"sin\.approx\.f32 %f1, %f2: no such instruction",
        "@%p1 bar.sync 0": "a collective under a predicate",
        "add.f32 %f1, %r1, %d1": "%d1 has 8 bytes, expected 4",
        "ld.global.v8.b32 %r1, [%d1]": "no such instruction",
        "bar.sync 1, 64": "no such instruction",
    }.items():
        with pytest.raises(ptx.UnknownPtx, match=words):
            run(f"{instruction};", torch.zeros(1), torch.zeros(1))
