"""The slot ring on its own: what is handed out when, what counts as ready, when a slot is used again."""

from __future__ import annotations

import random
import threading
import time

import pytest
from builders import PATIENCE, wait_for

from dlb_fast.data.loaders.ring import Item, Slot, SlotRing
from dlb_fast.data.plan import OverlapPlan

PLAN = OverlapPlan(20, 4, seed=1)  # five halves per epoch


def drain(ring: SlotRing) -> list[Item]:
    """Items that are handed out without the consumer doing anything."""
    items = []
    while ring._may_take():
        items.append(ring.take())
    return items  # type: ignore[return-value]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_threads_run_ahead_by_the_depth_and_no_further(depth: int) -> None:
    ring = SlotRing(PLAN, 0, start=0, depth=depth)
    items = drain(ring)
    assert len(items) == 4 * (depth + 1)  # `depth` finished batches ahead of the one being awaited
    for item in items:
        ring.finish(item)
    ready = 0
    while (slot := ring.wait(0)) is not None:
        assert slot.step == ready and slot.missing == 0
        ready += 1
    assert ready == depth + 1 and not ring._may_take()


def test_a_batch_is_ready_when_its_last_row_is_and_not_before() -> None:
    ring = SlotRing(PLAN, 0, start=0, depth=1)
    items = drain(ring)
    later = items.pop(1)  # a row of half 0: missing in batch 0 and in batch 1
    for item in items:
        ring.finish(item)
    assert ring.wait(0) is None and "step 0: 3/4 rows" in ring.progress() and "step 1: 7/8 rows" in ring.progress()
    ring.finish(later)
    first, second = ring.wait(0), ring.wait(0)
    assert first is not None and second is not None and (first.step, second.step) == (0, 1)


def test_a_slot_is_used_again_only_after_its_release() -> None:
    ring = SlotRing(PLAN, 0, start=0, depth=1)
    for item in drain(ring):
        ring.finish(item)
    slot = ring.wait(0)
    assert slot is not None and drain(ring) == []  # delivered, but the consumer still reads it
    assert slot.step == 0
    ring.release(slot)
    opened = drain(ring)
    assert {s.step for i in opened for _, s, _ in i.views} == {2, 3} and slot.step == 3
    with pytest.raises(RuntimeError, match="expected step 1, got 3"):
        ring.release(slot)


def test_a_resumed_ring_carries_the_half_before_with_its_second_use_only() -> None:
    ring = SlotRing(PLAN, 0, start=7, depth=1)
    items = drain(ring)
    carried, new = items[:4], items[4:8]
    assert [i.sample for i in carried] == PLAN.half(1, 1).tolist()
    assert [(i.epoch, [(u, s.step, r) for u, s, r in i.views]) for i in carried] == [
        (1, [(1, 7, row)]) for row in range(4)
    ]
    assert [i.sample for i in new] == PLAN.half(1, 2).tolist()
    assert [[(u, s.step, r) for u, s, r in i.views] for i in new] == [
        [(0, 7, 4 + row), (1, 8, row)] for row in range(4)
    ]


def test_the_error_of_the_lowest_row_wins_and_the_batch_still_completes() -> None:
    ring = SlotRing(PLAN, 0, start=0, depth=1)
    items = drain(ring)
    for item in reversed(items):
        _, slot, row = item.views[0]
        ring.finish(item, ValueError(str(row)) if row in (1, 2) and slot.step == 0 else None)
    slot = ring.wait(0)
    assert slot is not None and str(slot.error) == "1"


def test_a_failing_copy_is_an_error_of_its_batch() -> None:
    def on_full(slot: Slot) -> None:
        if slot.step == 1:
            raise RuntimeError("copy failed")

    ring = SlotRing(PLAN, 0, start=0, depth=1, on_full=on_full)
    for item in drain(ring):
        ring.finish(item)
    first, second = ring.wait(0), ring.wait(0)
    assert first is not None and first.error is None
    assert second is not None and str(second.error) == "copy failed"


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_threads_fills_every_row_once(seed: int) -> None:
    """Items finish in random order from eight threads; delivered batches are complete and nobody writes into them."""
    rng, plan = random.Random(seed), OverlapPlan(23, 3, seed=seed, drop_last=False)
    written: dict[int, set[int]] = {}
    in_use: set[int] = set()
    violations: list[str] = []
    guard = threading.Lock()
    ring = SlotRing(plan, 0, start=rng.randrange(10), depth=rng.randrange(1, 4))

    def work() -> None:
        own = random.Random(rng.random())
        while (item := ring.take()) is not None:
            with guard:
                for _, slot, row in item.views:
                    if slot.step in in_use:
                        violations.append(f"row {row} written into delivered step {slot.step}")
                    rows = written.setdefault(slot.step, set())
                    if row in rows:
                        violations.append(f"row {row} of step {slot.step} written twice")
                    rows.add(row)
            time.sleep(own.random() * 0.002)
            ring.finish(item)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        slot = ring.wait(PATIENCE)
        assert slot is not None
        with guard:
            in_use.add(slot.step)
            assert written[slot.step] == set(range(slot.rows))
        assert slot.rows == slot.num_old + plan.rows_of(slot.step % plan.steps_per_epoch)
        with guard:
            in_use.discard(slot.step)
        ring.release(slot)
    ring.stop()
    for thread in threads:
        thread.join(PATIENCE)
    assert not violations and not any(t.is_alive() for t in threads)


def test_stop_may_come_from_inside_a_locked_region() -> None:
    """The garbage collector runs finalisers in any thread at any allocation, also where that thread holds the lock."""
    ring = SlotRing(PLAN, 0, start=0, depth=1)

    def stop_inside() -> None:
        with ring._lock:
            ring.stop()

    thread = threading.Thread(target=stop_inside, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive() and ring.take() is None


def test_threads_count_how_long_they_wait_for_room() -> None:
    ring = SlotRing(PLAN, 0, start=0, depth=1)
    for item in drain(ring):
        ring.finish(item)
    assert ring.idle_seconds() == 0.0
    taken: list[Item | None] = []
    pool = [threading.Thread(target=lambda: taken.append(ring.take())) for _ in range(2)]
    for thread in pool:
        thread.start()
    wait_for(lambda: ring.idle_seconds() > 0.1, "threads that wait for room")
    waiting = ring.idle_seconds()  # those who still wait count
    slot = ring.wait(0)
    assert slot is not None
    ring.release(slot)
    for thread in pool:
        thread.join()
    after = ring.idle_seconds()
    time.sleep(0.05)
    assert len(taken) == 2 and 0.1 < waiting <= after == ring.idle_seconds()
