"""What the machine that executes PTX must find, each shown on a kernel of a few lines."""

from __future__ import annotations

import math
import shutil
import struct

import pytest
import torch
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


def run(
    body: str, a: torch.Tensor, b: torch.Tensor, *, blocks: int = 1, threads: int = 32, cluster: int = 1, seed: int = 0
) -> None:
    """``a`` may be written, ``b`` may not; %d3 and %d4: this thread's words of them, %r3: its word of shared memory."""
    text = f".visible .entry k(.param .u64 a, .param .u64 b)\n{{ {REGISTERS} {body} ret; }}"
    kernel = Kernel(ptx.decode(text, "k", ptx.entries(text)["k"]))
    ranges = [(*extent(a), True, "a"), (*extent(b), False, "b")]
    arguments = struct.pack("<QQ", a.data_ptr(), b.data_ptr())
    kernel.run(arguments, ranges, blocks=blocks, threads=threads, cluster=cluster, seed=seed)


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


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (WHOLE, WHOLE, ""),
        (BEGUN, WHOLE, ""),
        ("", WHOLE, "may not have begun"),
        (WHOLE, BEGUN, "read of shared|nobody has"),
        (WHOLE, "", "read of shared|nobody has|leaving"),
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
