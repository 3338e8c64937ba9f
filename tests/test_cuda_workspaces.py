"""Which workspace the CUDA launcher takes: its bookkeeping (``csrc/cuda/workspaces.h``) without CUDA."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from ptx import harness

pytestmark = [
    pytest.mark.slow,  # the host code is compiled
    pytest.mark.skipif(bool(harness.no_host()), reason=harness.no_host()),
]

SLAB = 2 << 20
STREAMS = (0, 0x1000, 0x2000)


class Memory:
    """Slabs of made-up addresses, each device's in a range of its own."""

    def __init__(self) -> None:
        self.slabs: list[tuple[int, int, int]] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.full = False

    def __call__(self, device: int, size: int) -> int:
        self.meanwhile()
        if self.full:
            return 0
        self.slabs.append((device, (device << 40) + (len(self.slabs) + 1) * SLAB * 2, size))
        return self.slabs[-1][1]

    def holds(self, device: int, address: int) -> bool:
        return any(d == device and base <= address < base + size for d, base, size in self.slabs)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def spaces() -> Any:
    return harness.host().Workspaces(harness.host().workspace_bytes)


def test_a_stream_keeps_its_workspace_and_no_two_users_share_one(spaces: Any, memory: Memory) -> None:
    """Streams, devices, captures on one stream (torch captures all on one), and streams forked into one capture."""
    users = [(device, stream, capture) for device in (0, 1) for stream in STREAMS for capture in (0, 7, 8)]
    taken = {user: spaces.take(*user, memory) for user in users}
    assert all(fresh for _, fresh in taken.values())
    addresses = sorted(address for address, _ in taken.values())
    size = harness.host().workspace_bytes
    assert all(second - first >= size for first, second in itertools.pairwise(addresses))
    for user, (address, _) in taken.items():
        assert memory.holds(user[0], address) and memory.holds(user[0], address + size - 1)
        assert address % 128 == 0
        assert spaces.take(*user, memory) == (address, False)
    assert len(memory.slabs) == 2


def per_slab() -> int:
    return SLAB // harness.host().workspace_bytes


def test_a_slab_is_used_up_before_the_next_is_allocated(spaces: Any, memory: Memory) -> None:
    for stream in range(per_slab()):
        spaces.take(0, stream, 0, memory)
    assert [size <= SLAB for _, _, size in memory.slabs] == [True]
    spaces.take(0, per_slab(), 0, memory)
    assert len(memory.slabs) == 2


def test_captures_that_are_gone_give_their_workspaces_to_later_ones(spaces: Any, memory: Memory) -> None:
    eager, _ = spaces.take(0, STREAMS[1], 0, memory)
    alive: list[int] = []
    for capture in range(1, 10_000):
        address, fresh = spaces.take(0, STREAMS[1], capture, memory)
        assert fresh and address not in (eager, *alive)
        alive.append(address)
        if len(alive) == 20:
            for gone in alive[3:]:
                spaces.give_back(gone)
            del alive[3:]
    assert len(memory.slabs) == 1
    assert spaces.take(0, STREAMS[1], 4, memory)[1]  # it was given back
    assert spaces.take(0, STREAMS[1], 0, memory) == (eager, False)


def test_a_return_waits_for_no_lock(spaces: Any, memory: Memory) -> None:
    """CUDA returns workspaces from a thread of its own while the launcher waits for CUDA with the lock in its hand."""
    first, _ = spaces.take(0, 1, 5, memory)
    for stream in range(per_slab() - 1):
        spaces.take(0, stream, 0, memory)
    memory.meanwhile = lambda: spaces.give_back(first)
    spaces.take(0, per_slab() - 1, 0, memory)
    assert len(memory.slabs) == 2
    memory.meanwhile = lambda: None
    assert first in {spaces.take(0, 1, capture, memory)[0] for capture in range(6, 7 + per_slab())}


def test_what_cannot_be_allocated_is_asked_for_again(spaces: Any, memory: Memory) -> None:
    memory.full = True
    assert spaces.take(0, 0, 0, memory)[0] == 0
    memory.full = False
    address, fresh = spaces.take(0, 0, 0, memory)
    assert fresh and memory.holds(0, address)
