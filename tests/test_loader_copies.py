"""Copies of plans, samplers and loaders, also through pickle: the same batches from the same place."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from loader_files import loader, make_files

from dlb_fast.data import (
    ClassBatchSampler,
    Compose,
    EvalLoader,
    Flip,
    OverlapBatchSampler,
    OverlapPlan,
    PadCrop,
    ResidentLoader,
    SampledLoader,
    ViewPairSampler,
    synthetic,
)

VIEWS = Compose([PadCrop(1), Flip()])
DATA = synthetic(length=24, num_classes=3, size=8)
WAYS: list[Any] = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
EACH_WAY = pytest.mark.parametrize("duplicate", WAYS, ids=["copy", "deepcopy", "pickle"])


@EACH_WAY
@pytest.mark.parametrize("overlap", [True, False])
def test_plans(duplicate: Any, overlap: bool) -> None:
    plan = OverlapPlan(23, 4, seed=3, overlap=overlap)
    plan.order(1)
    other = duplicate(plan)
    assert repr(other) == repr(plan)
    assert all(other.order(epoch).tolist() == plan.order(epoch).tolist() for epoch in range(4))
    assert b"_orders" not in pickle.dumps(plan)  # up to three permutations of the whole set


@EACH_WAY
@pytest.mark.parametrize(
    "make",
    [
        lambda: OverlapBatchSampler(24, 8, seed=2),
        lambda: ClassBatchSampler([0, 1] * 12, 8, seed=2),
        lambda: ViewPairSampler(24, 8, seed=2),
    ],
    ids=["overlap", "class", "pairs"],
)
def test_samplers(duplicate: Any, make: Any) -> None:
    sampler = make()
    whole = list(sampler) + list(sampler)
    sampler = make()
    steps = iter(sampler)
    for _ in range(3):
        next(steps)
    other = duplicate(sampler)
    assert other.state_dict() == sampler.state_dict() and other.state_dict()["step"] == 3
    other.load_state_dict(other.state_dict())  # it has no iteration, whatever goes on here
    assert list(other) == whole[3 : len(sampler)]
    assert next(steps) == whole[3]  # and this one goes on


@pytest.mark.parametrize("duplicate", WAYS[1:], ids=["deepcopy", "pickle"])
def test_loaders(duplicate: Any, tmp_path: Path) -> None:
    def images(batches: Any) -> list[Any]:
        return [batch.images.numpy().tobytes() for batch in batches]

    files = make_files(tmp_path)
    for made in (
        ResidentLoader(DATA, 8, transform=VIEWS, seed=1),
        SampledLoader(DATA, ViewPairSampler(24, 8), transform=VIEWS),
        SampledLoader(files, ViewPairSampler(24, 8), transform=VIEWS),
        EvalLoader(files, 5),
        EvalLoader(DATA, 5, transform=VIEWS),
        EvalLoader([(image, 0) for image in DATA.images], 5),
    ):
        if not isinstance(made, EvalLoader):
            made.set_epoch(2)
        other = duplicate(made)
        assert images(other) == images(made)


@EACH_WAY
def test_a_loader_with_threads_says_what_to_do(duplicate: Any, tmp_path: Path) -> None:
    message = r"OverlapLoader: a loader with threads and buffers cannot be pickled or copied.*load_state_dict"
    with loader(make_files(tmp_path)) as made, pytest.raises(TypeError, match=message):
        duplicate(made)
