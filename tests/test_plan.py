"""OverlapPlan by brute force: coverage, sharding, boundaries, purity."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlb_fast.data import OverlapPlan
from dlb_fast.data import rng as _hash

EPOCHS = 4
FROZEN_0 = [0, 5, 6, 7, 9, 3, 11, 2, 1, 8, 4, 10]
FROZEN_1000 = [2, 3, 4, 0, 10, 7, 9, 8, 1, 5, 11, 6]


def configurations():
    for half, world, drop_last, shuffle in itertools.product((1, 2, 3), (1, 2, 3), (True, False), (True, False)):
        rows = half * world
        for length in range(rows, 5 * rows + 2):
            yield length, half, world, drop_last, shuffle


def global_half(plan, epoch, index):
    """The ids of one half over all ranks, without padding."""
    start = index * plan.global_rows
    kept = plan.steps_per_epoch * plan.global_rows if plan.drop_last else plan.length
    return plan.order(epoch)[start : min(start + plan.global_rows, kept)]


def make(length, half, world, drop_last, shuffle, seed=3):
    return OverlapPlan(length, half, shuffle=shuffle, seed=seed, world_size=world, drop_last=drop_last)


def expected_halves(length, rows, drop_last):
    return length // rows if drop_last else -(-length // rows)


def test_every_epoch_covers_what_it_must_with_equal_rows_on_all_ranks():
    for config in configurations():
        length, half, world, drop_last, _ = config
        plan = make(*config)
        rows = half * world
        assert plan.steps_per_epoch == expected_halves(length, rows, drop_last), config
        for epoch in range(EPOCHS):
            seen = Counter()
            for index in range(plan.steps_per_epoch):
                shares = [plan.half(epoch, index, rank) for rank in range(world)]
                sizes = {len(share) for share in shares}
                assert sizes == {plan.rows_of(index)}, config
                last = index == plan.steps_per_epoch - 1
                assert sizes == {half} or (last and not drop_last and 1 <= sizes.copy().pop() < half), config
                joined = np.concatenate(shares)
                whole = global_half(plan, epoch, index)
                assert joined[: len(whole)].tolist() == whole.tolist(), config  # rank order, wrapping only at the end
                assert all(len(set(share.tolist())) == len(share) for share in shares), config
                seen.update(joined.tolist())
            extra = seen.total() - len(seen)
            if drop_last:
                assert extra == 0 and len(seen) == length // rows * rows, config
            else:
                assert set(seen) == set(range(length)) and extra <= world - 1, config


def test_no_batch_holds_a_sample_twice_wherever_that_is_possible():
    """From two halves per epoch on, over all ranks, across every boundary."""
    for config in configurations():
        plan = make(*config)
        if plan.steps_per_epoch < 2:
            continue
        before = None
        for epoch, index in itertools.product(range(EPOCHS), range(plan.steps_per_epoch)):
            now = set(global_half(plan, epoch, index).tolist())
            assert before is None or not before & now, (config, epoch, index)
            before = now


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_boundaries_and_coverage_for_any_sizes(data):
    half, world = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    length = data.draw(st.integers(half * world, half * world * 6 + 5))
    plan = make(
        length,
        half,
        world,
        data.draw(st.booleans()),
        True,
        seed=data.draw(st.integers(0, 2**63 - 1)),
    )
    epoch = data.draw(st.integers(1, 10**6))
    order = plan.order(epoch)
    assert sorted(order.tolist()) == list(range(length))
    if plan.steps_per_epoch >= 2:
        last = global_half(plan, epoch - 1, plan.steps_per_epoch - 1)
        assert not np.intersect1d(last, global_half(plan, epoch, 0)).size


def test_half_is_pure_whatever_was_asked_before():
    for config in configurations():
        plan = make(*config)
        forward = [plan.half(e, i).tolist() for e in range(6) for i in range(plan.steps_per_epoch)]
        backward = [
            make(*config).half(e, i).tolist()
            for e in reversed(range(6))
            for i in reversed(range(plan.steps_per_epoch))
        ]
        assert forward == backward[::-1], config


def test_a_swap_really_happens_and_changes_nothing_else():
    """With three halves of a small set most boundaries collide; only traded places may differ from the raw order."""
    swapped = 0
    for seed in range(50):
        plan = OverlapPlan(13, 4, seed=seed)
        raw = _hash.permutation(_hash.key_of(seed, _hash.ORDER, 1), 13)
        final = plan.order(1)
        moved = np.flatnonzero(raw != final)
        last = global_half(plan, 0, 2)
        collisions = int(np.isin(raw[:4], last).sum())
        assert len(moved) == 2 * collisions
        assert not np.isin(moved, np.arange(8, 12)).any()  # the last half never takes part
        swapped += collisions > 0
    assert swapped > 25


def test_shuffling_is_uniform_enough_and_differs_by_epoch_and_seed():
    orders = {OverlapPlan(20, 2, seed=s).order(e).tobytes() for s in range(10) for e in range(10)}
    assert len(orders) == 100
    places = np.array([np.argsort(OverlapPlan(6, 1, seed=s).order(3)) for s in range(3000)])
    assert np.abs(places.mean(axis=0) - 2.5).max() < 0.15  # 6 standard errors of a uniform place is 0.19
    counts = np.array([(places[:, 0] == p).mean() for p in range(6)])
    assert np.abs(counts - 1 / 6).max() < 0.04


@pytest.mark.parametrize("length", [3, 8, 9, 23])
def test_without_overlap_every_epoch_is_a_permutation_of_its_own(length):
    plan = OverlapPlan(length, 4 if length > 4 else 3, seed=5, overlap=False)
    for epoch in range(EPOCHS):
        raw = _hash.permutation(_hash.key_of(5, _hash.ORDER, epoch), length)
        assert plan.order(epoch).tolist() == raw.tolist()
        for index in range(plan.steps_per_epoch):
            old, new = plan.batch(epoch, index)
            assert not len(old) and plan.num_old(epoch, index) == 0
            assert new.tolist() == plan.half(epoch, index).tolist()
    if length > 4:
        assert len({frozenset(plan.half(epoch, 0).tolist()) for epoch in range(8)}) > 4
    with pytest.raises(TypeError, match="overlap must be True or False, got 1"):
        OverlapPlan(8, 2, overlap=1)


def test_drop_last_leaves_out_other_samples_each_epoch():
    for length in (11, 15, 27):  # two halves (fixed split) and more
        plan = OverlapPlan(length, 5)
        dropped = [
            frozenset(range(length)) - {i for k in range(plan.steps_per_epoch) for i in plan.half(e, k).tolist()}
            for e in range(30)
        ]
        assert all(len(d) == length % 5 for d in dropped)
        if length % 5:
            assert len(set(dropped)) > 5
    plan = OverlapPlan(14, 5)  # two halves: both sides of the split share the loss
    assert len({i for e in range(60) for i in plan.order(e)[10:].tolist()}) == 14


def test_natural_order_without_shuffling():
    plan = OverlapPlan(7, 2, shuffle=False, drop_last=False)
    for epoch in (0, 5):
        assert [plan.half(epoch, i).tolist() for i in range(4)] == [[0, 1], [2, 3], [4, 5], [6]]


def test_padding_wraps_inside_the_short_half():
    plan = OverlapPlan(9, 2, shuffle=False, world_size=4, drop_last=False)
    assert [plan.half(0, 1, r).tolist() for r in range(4)] == [[8], [8], [8], [8]]
    plan = OverlapPlan(13, 2, shuffle=False, world_size=4, drop_last=False)
    assert [plan.half(0, 1, r).tolist() for r in range(4)] == [[8, 9], [10, 11], [12, 8], [9, 10]]


def test_orders_are_frozen_numbers():
    """The same on every platform and in every release: a saved state must find its stream again."""
    assert OverlapPlan(12, 2, seed=7).order(0).tolist() == FROZEN_0
    assert OverlapPlan(12, 2, seed=7).order(1000).tolist() == FROZEN_1000
    plan = OverlapPlan(4, 1)
    assert plan.order(0) is plan.order(0)  # cached
    with pytest.raises(ValueError, match="read-only"):
        plan.order(0)[0] = 1
    plan.half(0, 0)[0] = -1
    assert plan.half(0, 0)[0] >= 0


def test_layout_of_batches():
    plan = OverlapPlan(7, 2, drop_last=False)
    assert [plan.rows_of(i) for i in range(4)] == [2, 2, 2, 1]
    assert [plan.num_old(0, i) for i in range(4)] == [0, 2, 2, 2]
    assert plan.num_old(1, 0) == 1
    assert plan.before(0, 0) is None and plan.before(2, 0) == (1, 3) and plan.after(1, 3) == (2, 0)
    old, new = plan.batch(1, 0)
    assert old.tolist() == plan.half(0, 3).tolist() and new.tolist() == plan.half(1, 0).tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((7, 4, {"world_size": 2}), ValueError, r"4 \* 2 = 8 samples, got 7"),
        ((0, 4, {"world_size": 2, "drop_last": False}), ValueError, r"4 \* 2 = 8 samples, got 0"),
        ((0, 1, {}), ValueError, "got 0"),
        ((-1, 1, {}), ValueError, "length must be at least 0, got -1"),
        ((10, 0, {}), ValueError, "half must be at least 1, got 0"),
        ((10, 2.0, {}), TypeError, "half must be an integer, got 2.0"),
        ((10, True, {}), TypeError, "half must be an integer, got True"),
        ((10, 2, {"world_size": 0}), ValueError, "world_size must be at least 1"),
        ((10, 2, {"seed": -1}), ValueError, "seed must be at least 0, got -1"),
        ((10, 2, {"seed": None}), TypeError, "seed must be an integer, got None"),
        ((10, 2, {"drop_last": "False"}), TypeError, "drop_last must be True or False"),
    ],
)
def test_bad_arguments(arguments, error, match):
    length, half, options = arguments
    with pytest.raises(error, match=match):
        OverlapPlan(length, half, **options)


def test_bad_places():
    plan = OverlapPlan(8, 2, world_size=2)
    with pytest.raises(ValueError, match=r"index below steps_per_epoch = 2 .* got epoch 0, index 2, rank 0"):
        plan.half(0, 2)
    with pytest.raises(ValueError, match=r"rank below world_size = 2, got epoch 0, index 0, rank 2"):
        plan.half(0, 0, 2)
    with pytest.raises(ValueError, match=r"an epoch >= 0, .* got epoch -1"):
        plan.half(-1, 0)


def test_numpy_integers_are_integers():
    plan = OverlapPlan(np.int64(10), np.int32(2), seed=np.uint8(1), drop_last=np.bool_(False))
    assert plan.half(np.int64(1), np.int64(0)).dtype == np.int64
