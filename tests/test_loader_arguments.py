"""What the data side refuses, and how: the operation, the argument, what was expected, what came, what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_files import make_files

from dlb_fast.data import (
    ArrayDataset,
    EvalLoader,
    IndexedDataset,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    SampledLoader,
    SampleError,
    ViewPairSampler,
    collate_overlap,
    collate_rows,
)

IMAGES = torch.zeros(24, 3, 8, 8, dtype=torch.uint8)


class Memory:
    """Images in memory with any targets."""

    def __init__(self, targets: Any) -> None:
        self.images, self.targets = IMAGES, targets

    def __len__(self) -> int:
        return 24


def overlap(data: Any, **options: Any) -> OverlapLoader:
    return OverlapLoader(data, 8, num_threads=1, timeout=20, **options)


def first_of(loader: Any) -> Any:
    with loader:
        return next(iter(loader))


FLOATS: list[Any] = [[0.9] * 24, np.full(24, 0.9), torch.full((24,), 0.9), ["1"] * 24]
TAKERS: dict[str, Callable[[Any], Any]] = {
    "OverlapLoader": lambda targets: overlap(Memory(targets)),
    "ResidentLoader": lambda targets: ResidentLoader(Memory(targets), 8),
    "SampledLoader": lambda targets: SampledLoader(Memory(targets), ViewPairSampler(24, 8)),
    "EvalLoader": lambda targets: EvalLoader(Memory(targets), 8),
    "mine": lambda targets: ArrayDataset(IMAGES, targets, ["a", "b"], name="mine"),
}


@pytest.mark.parametrize("targets", FLOATS, ids=["list", "array", "tensor", "strings"])
@pytest.mark.parametrize("name", TAKERS)
def test_targets_that_a_cast_would_change_are_refused(name: str, targets: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: targets must be integer class labels, got .*; a cast would round"):
        TAKERS[name](targets)


KINDS: list[Any] = [list, np.array, torch.tensor, lambda t: np.array(t, np.uint8), lambda t: [*map(np.int8, t)]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in TAKERS if name != "mine"])
def test_integers_of_every_kind_are_targets(name: str, kind: Any) -> None:
    targets = [i % 2 for i in range(24)]
    batch = next(iter(TAKERS[name](kind(targets))))
    assert batch.targets.tolist() == [targets[i] for i in batch.ids.tolist()]
    assert TAKERS["mine"](kind(targets)).targets.tolist() == targets


def test_targets_of_single_items_are_not_rounded_either() -> None:
    data = [(image, 0.9) for image in IMAGES]
    with overlap(data, load=lambda d, i: d[i]) as loader, pytest.raises(SampleError, match="label, got 0.9; a cast"):
        next(iter(loader))
    with pytest.raises(SampleError, match="EvalLoader: a target must be an integer class label, got 0.9"):
        next(iter(EvalLoader(data, 8)))
    whole = [(image, np.int64(3)) for image in IMAGES[:12]] + [(image, torch.tensor(3)) for image in IMAGES[12:]]
    assert set(first_of(overlap(whole, load=lambda d, i: d[i])).targets.tolist()) == {3}
    for collate, sampler in ((collate_overlap, OverlapBatchSampler(24, 8)), (collate_rows, ViewPairSampler(24, 8))):
        for kind, targets in ((IndexedDataset(whole), [3] * 4), (IndexedDataset(data), None)):
            items = [kind[i] for i in next(iter(sampler))[:4]]
            if targets is None:
                with pytest.raises(TypeError, match=f"^{collate.__name__}: targets must be integer .* got float64"):
                    collate(items)
            else:
                assert collate(items).targets.tolist() == targets


def test_a_bad_file_is_met_with_options_that_the_loader_has(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    for path in files.paths:
        path.write_bytes(b"")

    def message(loader: Any) -> str:
        with pytest.raises(SampleError) as caught:
            next(iter(loader))
        assert str(pickle.loads(pickle.dumps(caught.value)))
        return str(caught.value)

    assert message(EvalLoader(files, 8)).endswith("Repair or remove the file (`dlb-fast verify-data` lists all of them).")
    assert "on_error" not in message(SampledLoader(files, ViewPairSampler(24, 8)))
    with overlap(files) as loader:
        assert message(loader).endswith('all of them) or pass on_error="replace".')
    with overlap(files, on_error="replace", max_failures=2) as loader:
        assert message(loader).endswith("all of them) or pass a larger max_failures.")


@pytest.mark.parametrize("collate", [collate_overlap, collate_rows])
@pytest.mark.parametrize(
    "items,got",
    [
        ([(IMAGES[0], 1)], r"\(Tensor, int\)"),
        ([(IMAGES[0], 1, 7)], r"\(Tensor, int, int\)"),
        ([IMAGES[0]], "Tensor"),
        ([{"image": 1}], "dict"),
        ([], "none"),
    ],
)
def test_items_without_an_index_are_refused(collate: Any, items: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"{collate.__name__}: expected items .*, got {got}; wrap the dataset in"):
        collate(items)
